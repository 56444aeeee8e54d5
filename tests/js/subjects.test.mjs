// What the views of neurons and of sweeps compute without a document.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [neurons, pictures, patching, gauges] = await Promise.all(["neurons", "neuronpicture", "patching", "gauge"].map(from));

test("neurons are ranked by strength, of equals the first one first", () => {
  assert.deepEqual(neurons.strongestFirst(Float32Array.of(1, 3, 0, 3)), [1, 3, 0, 2]);
});

test("a token is as dark as its share of the largest activation", () => {
  assert.deepEqual([[2, 4], [-1, 4], [9, 4], [1, 0]].map((pair) => neurons.shadeOf(...pair)), [0.5, 0, 1, 0]);
  assert.deepEqual([1.234, -0.5].map(neurons.signed), ["+1.23", "−0.50"]);
});

test("an example is broken where its line ends, and never before its first token", () => {
  const lines = pictures.brokenLines(["aaaa", "bbbb", "cccc"], 80);
  assert.deepEqual(lines.map((line) => line.map(({ column }) => column)), [[0, 1], [2]]);
  assert.equal(lines[1][0].x, 0);
  assert.deepEqual(pictures.brokenLines(["long".repeat(9)], 10).map((line) => line.length), [1]);
});

const AXES = [
  { name: "layer", bare: false, place: "layer", entries: [3, 5], headings: ["3", "5"], numbers: ["", ""] },
  { name: "site", bare: true, place: null, entries: [null, null], headings: ["z", "q"], numbers: ["", ""] },
  { name: "position", bare: false, place: "query", entries: [0, 4], headings: ["</s>", "·he"], numbers: ["0", "4"] },
];

test("a cell and the selection name each other, as far as they have the same places", () => {
  assert.deepEqual(patching.selectionOfCell(AXES, [1, 1, 0]), { layer: 5, query: 0 });
  assert.deepEqual(patching.cellOfSelection(AXES, { layer: 5, query: 4 }, [0, 1, 0]), [1, 1, 1]);
  assert.deepEqual(patching.cellOfSelection(AXES, { layer: 4, query: null }, [1, 0, 1]), [1, 0, 1]);
  assert.deepEqual(AXES.map((axis) => patching.entryName(axis, 1)), ["layer 5", "q", "position 4 ·he"]);
  assert.equal(patching.flatIndex([1, 0, 2], [2, 2, 3]), 8);
});

test("the numbers of a table have as many decimals as its largest needs", () => {
  assert.deepEqual([[0.126, 1], [-0.001, 1], [52.13, 80], [0.0123, 0.05], [NaN, 1], [2e-5, 1e-3], [250.4, 900]].map((pair) => patching.fixedFor(...pair)),
    ["0.13", "0.00", "52.1", "0.012", "–", "2.0e-5", "250"]);
});

test("a line has room for the value, its interval and both runs", () => {
  const x = gauges.gaugeScale([1, NaN, -3, 5]);
  assert.ok(x(-3) === 26 && x(5) === 314 && x(1) === 170);
  assert.equal(gauges.gaugeScale([2, 2])(2), 170);
});
