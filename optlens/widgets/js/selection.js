// What is selected, shared by all views that refer to the same model: in this picture, in other cells.

export const PLACES = ["prompt", "layer", "head", "query", "key", "token", "neuron"];

/** Return the model of the shared selection, which a view names by its id. */
export function sharedSelection(model) {
  const id = String(model.get("selection")).replace(/^(IPY_MODEL_|anywidget:)/, "");
  return model.widget_manager.get_model(id);
}

/**
 * Wrap that model.
 * @returns {{ get: () => object, set: (patch: object) => void, live: () => boolean }}
 */
export function makeSelection(shared, changed, signal) {
  const get = () => shared.get("value");
  const hear = () => changed(get());
  shared.on("change:value", hear);
  signal.addEventListener("abort", () => shared.off("change:value", hear));
  return {
    get,
    set(patch) {
      const before = get();
      const after = { ...before, ...patch };
      if (PLACES.every((name) => before[name] === after[name])) return;
      shared.set("value", after);
      try {
        shared.save_changes();
      } catch {
        // Python is gone; the views in this document are linked all the same.
      }
    },
    // A restored notebook has models without a kernel behind them.
    live: () => shared.comm_live !== false,
  };
}
