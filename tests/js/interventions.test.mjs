// What the interventions view works out without a document: clicks, questions, what a page holds.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [clicks, requests, pages] = await Promise.all(["clicks", "requests", "pageruns"].map(from));

const PLACE = { layer: 3, head: 2, query: 7 };
const HEAD = clicks.clickOf("head", PLACE, null, { do: "ablate" });

test("a click says which part, where and what", () => {
  assert.deepEqual(HEAD, { do: "ablate", part: "head", layer: 3, head: 2, pos: null });
  assert.deepEqual(clicks.clickOf("mlp", PLACE, 7, { do: "scale", factor: 2 }), { do: "scale", factor: 2, part: "mlp", layer: 3, head: null, pos: 7 });
  assert.deepEqual(["head", "stream"].map((part) => clicks.exists(part, { layer: "embed" })), [false, true]);
});

test("an ablation comes and goes, everything else is stacked", () => {
  const scale = clicks.clickOf("mlp", PLACE, null, { do: "scale", factor: 0.5 });
  const once = clicks.toggled([], HEAD);
  assert.deepEqual(once, [HEAD]);
  assert.deepEqual(clicks.toggled([{ ...HEAD, number: 4, call: "Ablate(...)" }, scale], { ...HEAD }), [scale]);
  assert.equal(clicks.toggled(once, { ...HEAD, pos: 3 }).length, 2);
  assert.equal(clicks.toggled([scale], scale).length, 2);
  assert.deepEqual(clicks.wantedOf([{ ...HEAD, number: 0 }, scale]), [{ number: 0 }, scale]);
});

test("what is in force is said in words", () => {
  const tokens = ["</s>", "·Mary"];
  assert.equal(clicks.entryWords(HEAD, tokens), "head 3.2: ablated");
  assert.equal(clicks.entryWords({ ...HEAD, do: "scale", factor: 0.5, part: "stream", layer: "embed", pos: 1 }, tokens), "embedding at 1 “·Mary”: × 0.5");
  assert.equal(clicks.entryWords({ ...HEAD, do: "patch", part: "mlp", other: "The cat" }, tokens), "MLP 3: from “The cat”");
  assert.equal(clicks.entryWords({ do: null }, tokens), null);
  assert.deepEqual([[0.5, 0.25], [0.1, 0.1001], [0, 1], [NaN, 1]].map((pair) => clicks.points(...pair)), ["−25.0", "±0", "+100.0", ""]);
});

const table = (data, ...shape) => ({ shape, data });

test("the next tokens of a page after an ablation: what it holds, the rest unknown", () => {
  const prediction = { ids: table([1, 2, 3, 4], 2, 2), before: table([0.5, 0.25, 0.75, 0.125], 2, 2), after: table([0.5, 0.25, 0.75, 0.125], 2, 2) };
  const rows = clicks.rowsAt(prediction, 1);
  assert.deepEqual(rows, [{ id: 3, before: 0.75, after: 0.75 }, { id: 4, before: 0.125, after: 0.125 }]);
  const ablations = { ids: table([0, 0, 9, 8], 1, 2, 2), probs: table([0, 0, 0.5, 0.25], 1, 2, 2), chosen: 3, kept: table([0, 0.0625], 1, 2) };
  assert.deepEqual(clicks.ablatedRows(rows, ablations, 1), [
    { id: 9, before: NaN, after: 0.5 }, { id: 8, before: NaN, after: 0.25 },
    { id: 3, before: 0.75, after: 0.0625 }, { id: 4, before: 0.125, after: NaN },
  ]);
});

/** A Python that answers when told to, on one channel as `makePeer` does. */
function slowPython(state) {
  const asked = [];
  let waiting = null;
  const send = (one) => { asked.push(one); };
  const free = () => {
    if (waiting) [waiting, asked.now] = [null, waiting];
    else asked.now = null;
    if (asked.now) send(asked.now);
  };
  return {
    asked, state,
    ask: (channel, what, more) => new Promise((resolve, reject) => {
      const one = { what, ...more, resolve, reject };
      if (!asked.now) send(asked.now = one);
      else {
        waiting?.resolve(null);
        waiting = one;
      }
    }),
    async answer(next) {
      const { now } = asked;
      free();
      now.resolve({ state: next });
      await new Promise(setImmediate);
    },
    async refuse(message) {
      const { now } = asked;
      free();
      now.reject(new Error(message));
      await new Promise(setImmediate);
    },
  };
}

function start(state = { inForce: [], at: 0, count: 1 }) {
  const python = slowPython(state);
  const told = [];
  const made = requests.runRequests({
    ask: python.ask, state: () => python.state, signal: { aborted: false },
    settled: (next) => { python.state = next; }, failed: (error) => told.push(error.message), busy: (running) => told.push(running),
  });
  return { python, told, made };
}
const click = (head) => ({ ...HEAD, head });

test("of quick clicks the newest question says what all of them want", async () => {
  const { python, told, made } = start();
  for (const head of [1, 2, 3]) made.change((entries) => clicks.toggled(entries, click(head)));
  await new Promise(setImmediate);
  assert.deepEqual(python.asked.map(({ wanted }) => wanted.length), [1]);
  await python.answer({ inForce: [{ ...click(1), number: 0 }], at: 1, count: 2 });
  assert.deepEqual(python.asked.at(-1).wanted, [click(1), click(2), click(3)]);
  await python.answer({ inForce: [1, 2, 3].map((head) => ({ ...click(head), number: head })), at: 2, count: 3 });
  assert.equal(told.at(-1), false);
  made.change((entries) => clicks.toggled(entries, click(2)));
  assert.deepEqual(python.asked.at(-1).wanted, [{ number: 1 }, { number: 3 }]);
});

test("steps back are counted from where the last one leads, and a click waits for them", async () => {
  const { python, made } = start({ inForce: [{ ...click(1), number: 0 }], at: 3, count: 4 });
  for (const by of [-1, -1, -1, -1]) made.go(by);
  await new Promise(setImmediate);
  made.change((entries) => clicks.toggled(entries, click(5)));
  await python.answer({ inForce: [], at: 2, count: 4 });
  assert.deepEqual(python.asked.map(({ what, at }) => [what, at]), [["go", 2], ["go", 0]]);
  await python.answer({ inForce: [], at: 0, count: 4 });
  assert.deepEqual(python.asked.at(-1).wanted, [click(5)]);
});

test("a refusal is told and leaves what is in force, and the typed text goes with the next click", async () => {
  const { python, told, made } = start({ inForce: [{ ...click(1), number: 0 }], at: 1, count: 2 });
  made.change((entries) => [...entries, click(9)]);
  await python.refuse("There is no head 9.");
  assert.deepEqual(told, [true, "There is no head 9.", false]);
  made.change((entries) => entries, "The cat");
  made.change((entries) => [...entries, click(2)]);
  await python.answer(python.state);
  assert.deepEqual([python.asked.at(-1).wanted, python.asked.at(-1).text], [[{ number: 0 }, click(2)], "The cat"]);
});

test("a page has one ablation at a time, with a way back", () => {
  const page = pages.pageRuns({ code: "Ablate('z', layer=9871, head=9872)" });
  assert.match(page.ablate({ ...HEAD, pos: 3 }), /all positions/);
  page.ablate(HEAD);
  page.ablate(click(7));
  assert.deepEqual([page.entries(), page.code("plain")], [[click(7)], "Ablate('z', layer=3, head=7)"]);
  page.go(-1);
  assert.deepEqual([page.clicked(), page.canGo(1), page.canGo(-2)], [HEAD, true, false]);
  page.ablate(HEAD);
  assert.deepEqual([page.entries(), page.canGo(1), page.code("plain")], [[], false, "plain"]);
  page.reset();
  assert.equal(page.canGo(-3), false);
});
