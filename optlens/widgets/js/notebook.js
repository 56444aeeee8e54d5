// The page of a notebook: its views, each in its place, linked as they were.

import { pageModel, plainModel } from "./standin.js";

/** Return the models of a notebook's views; those that share a selection share its model. */
export function notebookModels({ views, selections }) {
  const shared = selections.map((value) => plainModel({ value }));
  return views.map((state) => {
    const at = Number(state.selection.replace("IPY_MODEL_", ""));
    return pageModel({ state, answers: [] }, shared[at]);
  });
}

/**
 * Draw a notebook's views where they stand. What a place holds already, a picture and a table, gives
 * way when its view has been drawn, and stays, with a note, if it cannot be.
 */
export async function startNotebook(page, render) {
  const models = notebookModels(JSON.parse(page.getElementById("contents").textContent));
  for (const place of page.querySelectorAll(".nb-view[data-view]")) {
    const el = page.createElement("div");
    place.append(el); // colours are those of the document that an element is in
    try {
      await render({ model: models[Number(place.dataset.view)], el });
      place.replaceChildren(el);
    } catch (error) {
      el.remove();
      const note = page.createElement("p");
      note.className = "nb-note";
      note.textContent = "Not interactive in this page. Its saved state does not suit this version of optlens; "
        + `run the notebook again. (${error.message})`;
      place.prepend(note);
    }
    await new Promise((done) => { setTimeout(done); }); // lets the page be scrolled meanwhile
  }
}
