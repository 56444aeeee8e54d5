// What the views of comparisons and generations compute without a document.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [compare, steps] = await Promise.all(["compare", "scrubber"].map(from));

const table = (shape, data) => ({ shape, data });

test("differences share one ramp, and those of rounding stay pale", () => {
  assert.equal(compare.shareOfDifference(4, 16), 0.5);
  assert.equal(compare.shareOfDifference(NaN, 16), 0);
  assert.ok(compare.shareOfDifference(1e-8, 1e-8) < 0.02);
  assert.equal(compare.largestOf(Float32Array.of(NaN, 2, 1)), 2);
  assert.deepEqual([0, 0.0002, 0.5, 12.34].map(compare.written), ["0.000", "< 0.001", "0.500", "12.3"]);
});

test("the next change is found in reading order, around the end", () => {
  const changed = Uint8Array.from([0, 1, 0, 0, 0, 1]);
  assert.deepEqual(compare.nextChange(changed, [0, 0], 3), [0, 1]);
  assert.deepEqual(compare.nextChange(changed, [0, 1], 3), [1, 2]);
  assert.deepEqual(compare.nextChange(changed, [1, 2], 3), [0, 1]);
  assert.equal(compare.nextChange(new Uint8Array(6), [1, 2], 3), null);
});

const BRANCH = {
  ids: [2, 7, 9], own: table([2, 3], Float32Array.of(0.5, 0.25, 0.25, NaN, NaN, NaN)),
  after: table([2, 3], Float32Array.of(1, 0, 0, 0.5, 0.5, NaN)), tokens: table([2, 3], Int32Array.of(7, 8, 4, 8, 9, -1)),
};

test("candidates know which was taken and which was cut off", () => {
  const first = steps.candidatesAt(BRANCH, 1, 0);
  assert.deepEqual(first.map(({ id, chosen, cut }) => [id, chosen, cut]), [[7, true, false], [8, false, true], [4, false, true]]);
  assert.deepEqual(steps.candidatesAt(BRANCH, 1, 1).map(({ id, chosen }) => [id, chosen]), [[8, false], [9, true]]);
});

test("surprise is of the model's own probability where that was kept", () => {
  assert.ok(Math.abs(steps.surpriseAt(BRANCH, 1, 0) - Math.log(2)) < 1e-6);
  assert.ok(Math.abs(steps.surpriseAt(BRANCH, 1, 1) - Math.log(2)) < 1e-6);
});

test("a form's fields become options, and what is no number is named", () => {
  assert.deepEqual(steps.optionsOf({ temperature: "0.7", top_k: "", seed: " 12 " }), { temperature: 0.7, top_k: null, seed: 12 });
  assert.throws(() => steps.optionsOf({ top_k: "1.5" }), /top-k: “1.5” is no whole number/);
  assert.throws(() => steps.optionsOf({ temperature: "warm" }), /temperature: “warm” is no number/);
  assert.throws(() => steps.optionsOf({ seed: "99999999999999999999" }), /seed/);
});

test("how a branch was chosen is told in words", () => {
  assert.equal(steps.manner({ sampling: null, seed: null }), "greedy");
  assert.equal(steps.manner({ sampling: { temperature: 0.7, top_k: null, top_p: 0.9 }, seed: "3" }), "temperature 0.7, top-p 0.9, seed 3");
  assert.equal(steps.manner({ sampling: { temperature: null, top_k: null, top_p: null }, seed: "3" }), "sampled, seed 3");
});
