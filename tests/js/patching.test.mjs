// What the patching view of a running sweep computes without a document, and how messages get lost.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [filling, outcomes, patching, peers] = await Promise.all(["filling", "outcomes", "patching", "peer"].map(from));

test("the time left goes by the pace since it was started or went on", () => {
  assert.equal(filling.timeLeft(10, 0, 0.25), 30);
  assert.equal(filling.timeLeft(10, 0.5, 0.75), 10);
  assert.ok([[0.1, 0, 0.5], [10, 0.5, 0.5]].every((given) => Number.isNaN(filling.timeLeft(...given))));
  assert.deepEqual([0.2, 12.4, 89, 200, 7000].map(filling.durationWords),
    ["about 1 s", "about 12 s", "about 89 s", "about 3 min", "about 2 h"]);
});

test("every state says what is done and what can be done", () => {
  const words = (state, left = NaN) => filling.fillWords({ state, done: 3, all: 9, trouble: "No memory." }, left);
  assert.deepEqual(words("running", 4), { words: "3 of 9 patches, about 4 s left", action: "Cancel", busy: true });
  assert.deepEqual(words("paused"), { words: "Cancelled: 3 of 9 patches are done.", action: "Go on", busy: false });
  assert.deepEqual(words("failed"), { words: "No memory. 3 of 9 patches are done and kept.", action: "Try again", busy: false });
  assert.match(words("gone").words, /^Partial: 3 of 9 .* Run the cell again/);
  assert.deepEqual(["python", "gone", "done"].map((state) => words(state).action), ["", "", ""]);
});

test("the strongest cells come first, of equals the first one, weak and unknown ones not at all", () => {
  assert.deepEqual(patching.strongestOf([0.5, -2, NaN, 2, 0.001, 1], 0), [1, 3, 5, 0]);
  assert.deepEqual(patching.strongestOf([1, 0.25, 1], 1, 2), [1]);
  assert.deepEqual(patching.strongestOf([1, 2, 3, 4], 0, 2), [3, 2]);
  assert.deepEqual(patching.strongestOf([NaN, 0], 0), []);
  for (const at of [0, 7, 23]) assert.equal(patching.flatIndex(patching.indexOfFlat(at, [2, 3, 4]), [2, 3, 4]), at);
});

test("runs have names, and tokens that a patch brings in are marked", () => {
  const runs = [{ role: "source", name: "clean", ids: [1, 2] }, { role: "base", name: "corrupt", ids: [3, 4] }, { role: "patched", name: "corrupt", ids: [3, 1] }];
  const roles = runs.map(({ role }) => role);
  assert.deepEqual(runs.map((run) => outcomes.runName(run, roles)), ["clean, the source", "corrupt, as it is", "corrupt, patched"]);
  assert.deepEqual(runs.slice(1).map(({ role }) => outcomes.runName({ role, name: "prompt" }, ["base", "patched"])), ["as it is", "with the patch"]);
  assert.deepEqual(runs.map((_, i) => [...outcomes.newTokens(runs, i)]), [[], [], [1]]);
});

function line() {
  const heard = [];
  const model = { sent: [], send: (message) => model.sent.push(message), on: (_, run) => heard.push(run), off() {} };
  const said = [];
  const state = { live: true };
  const peer = peers.makePeer(model, { live: () => state.live, report: (text) => said.push(text) });
  return { model, said, state, peer, tell: (message) => heard.forEach((run) => run(message, [])) };
}

test("what Python sends unasked goes to the part that it is about", () => {
  const { peer, tell } = line();
  const got = [];
  peer.listen(1, (content) => got.push(content));
  tell({ kind: "news", part: 0, content: "not mine" });
  tell({ kind: "news", part: 1, content: { done: 3 } });
  tell({ kind: "answer", part: 1, content: "no news" });
  assert.deepEqual(got, [{ done: 3 }]);
});

test("when the kernel goes, every open question is told so, those that wait too", async () => {
  const { peer, said, state } = line();
  const asked = [peer.ask("a", {}), peer.ask("a", {}), peer.ask("b", {})];
  state.live = false;
  peer.lost();
  for (const one of asked) await assert.rejects(one, (error) => error.gone);
  assert.equal(said.at(-1), "gone");
  peer.close();
});
