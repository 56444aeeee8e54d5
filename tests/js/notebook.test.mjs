// Tests of a notebook's page without a browser: models, links, what cannot be drawn.

import assert from "node:assert/strict";
import { test } from "node:test";

import { notebookModels, startNotebook } from "../../optlens/widgets/js/notebook.js";

const contents = {
  views: [0, 1, 0].map((number) => ({ selection: `IPY_MODEL_${number}`, parts: [], prompts: [] })),
  selections: [{ layer: 1 }, { layer: 2 }],
};

test("views share the model of their selection and no other", async () => {
  const models = notebookModels(contents);
  const shared = await Promise.all(models.map((model) => model.widget_manager.get_model("0")));
  assert.equal(shared[0], shared[2]);
  assert.notEqual(shared[0], shared[1]);
  const heard = [];
  shared[2].on("change:value", () => heard.push(shared[2].get("value")));
  shared[0].set("value", { layer: 3 });
  assert.deepEqual(heard, [{ layer: 3 }]);
  assert.deepEqual(shared[1].get("value"), { layer: 2 });
});

test("a question has the answer that this page has none", async () => {
  const [model] = notebookModels(contents);
  const said = new Promise((done) => { model.on("msg:custom", done); });
  model.send({ id: 4, question: { part: 0 } });
  assert.deepEqual(await said, { kind: "error", id: 4, message: "This page does not hold that; the notebook does." });
});

/** A page with a place for each view, as far as `startNotebook` needs one. */
function fakePage() {
  const element = () => ({
    children: ["still"],
    remove() { this.parent.children.splice(this.parent.children.indexOf(this), 1); },
    append(el) { this.children.push(el); el.parent = this; },
    prepend(el) { this.children.unshift(el); },
    replaceChildren(...all) { this.children = all; },
  });
  const places = ["0", "1", "2"].map((view) => ({ ...element(), dataset: { view } }));
  return {
    places,
    getElementById: () => ({ textContent: JSON.stringify(contents) }),
    querySelectorAll: () => places,
    createElement: element,
  };
}

test("a view that cannot be drawn leaves what stood there, and the others are drawn", async () => {
  const page = fakePage();
  const drawn = [];
  await startNotebook(page, async ({ model, el }) => {
    if (model.get("selection") === "IPY_MODEL_1") throw new Error("no state");
    drawn.push(el);
  });
  assert.deepEqual(page.places.map(({ children }) => children.length), [1, 2, 1]);
  assert.deepEqual([page.places[0].children[0], page.places[2].children[0]], drawn);
  const [note, still] = page.places[1].children;
  assert.match(note.textContent, /run the notebook again\. \(no state\)$/);
  assert.equal(still, "still");
});
