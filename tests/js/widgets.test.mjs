// The parts of the views that compute and need no document.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [arcs, arrays, attribution, colour, grid, keys, lens, lines, map, partmap, patterns, peers, residual, selections, standin, steps, words] =
  await Promise.all(["arcs", "arrays", "attribution", "colour", "headgrid", "keys", "lens", "lines", "headmap", "partmap", "patterns", "peer",
    "residual", "selection", "standin", "steps", "words"].map(from));

const THEME = { ink: "#1b1f24", paper: "#ffffff" };
const RAMP = ["#ffffff", "#3b80bb", "#122b5c"];

test("levels hold a weight to 0.4 %, and what cannot be seen apart", () => {
  for (let i = 0; i <= 1000; i += 1) {
    const weight = i / 1000;
    assert.ok(Math.abs(colour.weightOf(colour.levelOf(weight)) - weight) < 0.004);
  }
  assert.equal(colour.levelOf(NaN), 255);
  assert.ok(Number.isNaN(colour.weightOf(255)));
  assert.equal(colour.levelOf(1.2), 254);
});

test("a table of pixels runs from one end of the ramp to the other", () => {
  const table = colour.levelTable(RAMP, "#e9e7e0");
  assert.equal(table[0], 0xffffffff);
  assert.equal(table[254], colour.pixel([0x12, 0x2b, 0x5c]));
  assert.equal(table[255], colour.pixel([0xe9, 0xe7, 0xe0]));
  assert.equal(colour.pixel([1, 2, 3]), 0xff030201);
});

test("ink on a ground is what can be read there", () => {
  assert.equal(colour.inkOn([255, 255, 255], THEME), THEME.ink);
  assert.equal(colour.inkOn([18, 43, 92], THEME), THEME.paper);
  assert.ok(Math.abs(colour.contrast([0, 0, 0], [255, 255, 255]) - 21) < 1e-9);
});

test("numbers are written for people", () => {
  assert.deepEqual([0.931, 0.0001, 0.9999, 0, 1, NaN].map(words.percent),
    ["93.1 %", "< 0.1 %", "> 99.9 %", "0.0 %", "100.0 %", "–"]);
  assert.deepEqual([0, 1.234, 12.34, 1234.5, 1e6, -0.00001].map(words.number),
    ["0", "1.23", "12.3", "1235", "1.0e+6", "-1.0e-5"]);
  assert.equal(words.short("incomprehensibilities", 9), "inco…ties");
  assert.equal(words.short("🙂🙂🙂🙂", 4), "🙂🙂🙂🙂");
  assert.equal(words.spoken("·Mary"), "space Mary");
});

test("a table becomes CSV in which no token is a formula", () => {
  assert.equal(words.csvOf([["a", '"b"'], ["=1+1", -2.5], ["x,y", "l\nm"]]),
    'a,"""b"""\n\'=1+1,-2.5\n"x,y","l\nm"\n');
});

test("arrays are found in state, messages and pages, at any offset", () => {
  const bytes = new Uint8Array([9, 9, 9, ...new Uint8Array(new Float32Array([1.5, -2]).buffer)]);
  const view = new DataView(bytes.buffer, 3, 8);
  const spec = (data) => ({ x: [{ dtype: "f4", shape: [2], data }] });
  const text = Buffer.from(bytes.slice(3)).toString("base64");
  for (const found of [arrays.unpacked(spec(view)), arrays.unpacked(spec(0), [view]), arrays.unpacked(spec(text))]) {
    assert.deepEqual(found.x[0], { shape: [2], data: new Float32Array([1.5, -2]) });
  }
  const cube = { shape: [2, 3, 2], data: Uint8Array.from({ length: 12 }, (_, i) => i) };
  assert.deepEqual(arrays.slice(cube, 1, 2), { shape: [2], data: Uint8Array.of(10, 11) });
});

test("pooling keeps the hottest cell, and masks a block only if all of it is masked", () => {
  const data = Uint8Array.from([7, 255, 255, 1, 2, 255, 3, 0, 9]);
  const small = arrays.poolLevels(data, 3, 3, 2);
  assert.deepEqual([small.rows, small.columns, small.step], [2, 2, 2]);
  assert.deepEqual([...small.data], [7, 255, 3, 9]);
  assert.equal(arrays.poolLevels(data, 3, 3, 3).data, data);
});

test("keys move inside a table and stop at its edges", () => {
  assert.deepEqual(keys.moved([0, 0], "ArrowDown", [2, 3]), [1, 0]);
  assert.deepEqual(keys.moved([1, 2], "ArrowRight", [2, 3]), [1, 2]);
  assert.deepEqual(keys.moved([5, 1], "PageUp", [9, 3]), [0, 1]);
  assert.deepEqual(keys.moved([1, 1], "End", [2, 3]), [1, 2]);
  assert.equal(keys.moved([0, 0], "x", [2, 3]), null);
});

test("heads are ranked by score; without a score they come last", () => {
  assert.deepEqual(grid.ranked([0.2, NaN, 0.9, 0.2], false), [2, 0, 3, 1]);
  assert.deepEqual(grid.ranked([0.2, NaN, 0.9, 0.2], true), [0, 3, 2, 1]);
});

test("labels leave room for each other and for the chosen one", () => {
  assert.deepEqual(map.ticksFor(4, 400, null), [0, 1, 2, 3]);
  assert.deepEqual(map.ticksFor(9, 39, 4, 13), [0, 4]);
  const ticks = map.ticksFor(100, 130, 47);
  assert.ok(ticks.includes(47) && !ticks.includes(50) && !ticks.includes(40) && ticks.includes(60));
});

test("arcs go to the strongest keys alone", () => {
  assert.deepEqual(arcs.arcsOf([0.5, 0.009, NaN, 0.2, 0.291]), [0, 4, 3]);
  assert.equal(arcs.arcsOf(Array(100).fill(0.01)).length, 24);
  assert.match(arcs.arcPath(10, 90, 100, 90), /^M10 100C10 [\d.]+,90 [\d.]+,90 100$/);
});

test("lines are interrupted where nothing is known", () => {
  assert.equal(lines.pathOf([1, NaN, 2, 3], (i) => i, (v) => v), "M0.0 1.0M2.0 2.0L3.0 3.0");
  assert.deepEqual([0.3, 1, 7, 340].map(lines.roundTop), [0.5, 1, 10, 500]);
});

test("a store of patterns forgets what was not used for longest", () => {
  const kept = new patterns.Kept(10);
  kept.set("a", 1, 4);
  kept.set("b", 2, 4);
  kept.get("a");
  kept.set("c", 3, 4);
  assert.deepEqual(["a", "b", "c"].map((key) => kept.get(key)), [1, undefined, 3]);
  kept.set("huge", 4, 99); // one that fits nowhere is kept as long as it is the newest
  assert.equal(kept.get("huge"), 4);
});

test("a query's weights are read exactly, or from shrunk levels", () => {
  const exact = { exact: Float32Array.from([1, NaN, 0.25, 0.75]) };
  assert.deepEqual([...patterns.rowOf(exact, 1, 2)], [0.25, 0.75]);
  const shrunk = { data: Uint8Array.from([254, 127, 0, 255]), columns: 2, step: 2 };
  const row = patterns.rowOf(shrunk, 1, 4);
  assert.deepEqual([...row], [1, 1, 0.25, 0.25]);
});

test("the lens ranks the final answer, and finds the row of a layer", () => {
  assert.equal(lens.rankOf(Int32Array.from([5, 3, 9]), 9), 2);
  assert.equal(lens.rankOf(Int32Array.from([5, 3, 9]), 4), 3);
  assert.equal(lens.rowOfLayer(["embed", 0, 0, 1, 1], 0, 9), 2);
  assert.equal(lens.rowOfLayer(["embed", 0], null, 1), 1);
});

test("lengths get a logarithmic scale where they differ much", () => {
  const even = residual.lengthScale([1, 2, 4, NaN]);
  assert.deepEqual([even.log, even.share(2)], [false, 0.5]);
  const wide = residual.lengthScale([1, 1000, 0]);
  assert.equal(wide.log, true);
  assert.ok(wide.share(1) > 0 && wide.share(1000) === 1 && wide.share(0) === 0);
  assert.equal(residual.lengthScale([NaN]).share(1), 0);
});

test("terms are bars that begin where the one before ended, whatever is put together", () => {
  const values = Float32Array.from([1, -3, 0.5, 0.25, 2]);
  const few = steps.largestTerms(values, 2);
  assert.deepEqual(few, [
    { members: [1], value: -3, rest: false }, { members: [4], value: 2, rest: false },
    { members: [0, 2, 3], value: 1.75, rest: true },
  ]);
  const bars = steps.stacked(few);
  assert.deepEqual(bars.map(({ start, end }) => [start, end]), [[0, -3], [-3, -1], [-1, 0.75]]);
  assert.equal(steps.stacked(steps.largestTerms(values, 4)).at(-1).end, 0.75); // one other is shown as itself
  assert.equal(steps.largestTerms(values, 4).length, 5);
  assert.deepEqual(steps.spanOf(bars), [-3, 0.75]);
  assert.deepEqual(steps.spanOf([]), [0, 1]);
});

test("signs are written out, but not before a zero", () => {
  assert.deepEqual([1.234, -1.235, -0.001, 0].map((value) => steps.signed(value)), ["+1.23", "−1.24", "0.00", "0.00"]);
  assert.deepEqual([0.004, -0.12, 0.996, -7.27, 9.96, -123].map(partmap.brief), ["0", "−.12", "1.0", "−7.3", "10", "−123"]);
});

test("heads of a layer and their bias are one sub-layer, and all parts are named", () => {
  const part = (label, kind, layer = null, head = null) => ({ label, kind, layer, head });
  const parts = [part("embed", "token embedding"), part("L0H0", "head", 0, 0), part("L0H1", "head", 0, 1),
    part("b_O0", "attention bias", 0), part("mlp0", "mlp", 0), part("b_U", "unembedding bias")];
  const groups = attribution.subLayers(parts, [1, 2, 3, 4, 5, 6]);
  assert.deepEqual(groups.map(({ name, members, value }) => [name, members, value]),
    [["token", [0], 1], ["attention 0", [1, 2, 3], 9], ["MLP 0", [4], 5], ["b_U", [5], 6]]);
  assert.deepEqual(parts.map(attribution.partName), ["token embedding", "layer 0, head 0", "layer 0, head 1",
    "output bias of attention in layer 0", "MLP of layer 0", "unembedding bias"]);
  assert.deepEqual(parts.map(attribution.partShort), ["token", "head 0.0", "head 0.1", "bias 0", "MLP 0", "b_U"]);
});

// ---- questions to Python

function fakeModel() {
  const model = standin.plainModel({});
  model.sent = [];
  model.send = (message) => model.sent.push(message);
  model.answer = (at, content) => model.tell("msg:custom", { kind: "answer", id: model.sent[at].id, content }, []);
  return model;
}

function peerOf(model, live = true) {
  const said = [];
  return [peers.makePeer(model, { live: () => live, report: (state) => said.push(state) }), said];
}

test("of questions that wait only the newest is sent", async () => {
  const model = fakeModel();
  const [peer] = peerOf(model);
  const answers = [1, 2, 3].map((n) => peer.ask("head", { n }));
  assert.deepEqual(model.sent.map(({ question }) => question.n), [1]);
  model.answer(0, "first");
  assert.equal(await answers[0], "first");
  assert.equal(await answers[1], null);
  assert.deepEqual(model.sent.map(({ question }) => question.n), [1, 3]);
  model.answer(1, "third");
  assert.equal(await answers[2], "third");
});

test("channels do not wait for each other, and a late answer changes nothing", async () => {
  const model = fakeModel();
  const [peer] = peerOf(model);
  const [one, two] = [peer.ask("a", {}), peer.ask("b", {})];
  model.answer(1, "b");
  model.answer(0, "a");
  model.answer(0, "again");
  assert.deepEqual(await Promise.all([one, two]), ["a", "b"]);
});

test("an error of Python is the error of the question", async () => {
  const model = fakeModel();
  const [peer, said] = peerOf(model);
  const asked = peer.ask("a", {});
  model.tell("msg:custom", { kind: "error", id: model.sent[0].id, message: "no such head" });
  await assert.rejects(asked, { message: "no such head", gone: false });
  assert.deepEqual(said, ["asking", ""]);
});

test("without a kernel a question is refused at once", async () => {
  const model = fakeModel();
  const [peer, said] = peerOf(model, false);
  await assert.rejects(peer.ask("a", {}), { gone: true });
  assert.equal(said.at(-1), "gone");
  assert.deepEqual(model.sent, []);
});

test("a busy kernel is named, a lost question asked again, silence admitted, a late answer welcome", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const model = fakeModel();
  const [peer, said] = peerOf(model);
  const asked = peer.ask("a", {});
  t.mock.timers.tick(1500);
  assert.equal(said.at(-1), "busy");
  t.mock.timers.tick(6500);
  assert.deepEqual(model.sent.map(({ id }) => id), [1, 1]);
  t.mock.timers.tick(22000);
  assert.equal(said.at(-1), "silent");
  peer.again();
  assert.equal(model.sent.length, 3);
  model.answer(2, "at last");
  assert.equal(await asked, "at last");
  assert.equal(said.at(-1), "");
});

test("a selection is shared, sent once, and survives a kernel that is gone", () => {
  const shared = standin.plainModel({ value: { prompt: 0, layer: 1, head: 2, query: null, key: null, token: null } });
  let saved = 0;
  shared.save_changes = () => { saved += 1; };
  const heard = [[], []];
  const life = new AbortController();
  const [one] = heard.map((list) => selections.makeSelection(shared, (value) => list.push(value.layer), life.signal));
  one.set({ layer: 3 });
  one.set({ layer: 3 });
  assert.deepEqual([heard, saved], [[[3], [3]], 1]);
  shared.save_changes = () => { throw new Error("comm is closed"); };
  one.set({ layer: 4 });
  assert.deepEqual(heard, [[3, 4], [3, 4]]);
  life.abort();
  one.set({ layer: 5 });
  assert.deepEqual(heard[0], [3, 4]);
  shared.comm_live = false;
  assert.equal(one.live(), false);
});

test("a page answers what it holds, whatever the order of the question, and says so of the rest", async () => {
  const model = standin.pageModel({ state: {}, selected: {}, answers: [[{ part: 0, what: "head", layer: 1 }, "found"]] });
  const [peer] = peerOf(model);
  assert.equal(await peer.ask("a", { layer: 1, what: "head", part: 0 }), "found");
  await assert.rejects(peer.ask("a", { layer: 2, what: "head", part: 0 }), /does not hold/);
});
