// Interventions in a page, which holds what the ablation of each single head does. Knows no document.

import { sameClick } from "./clicks.js";

/** Return the clicks of a page with their history; `ablations` is null where the page holds none. */
export function pageRuns(ablations) {
  const history = [[]];
  let at = 0;
  const put = (entries) => {
    history.splice(at + 1, Infinity, entries);
    at += 1;
  };
  return {
    ablations,
    entries: () => history[at],
    /** The head that is ablated, or nothing. */
    clicked: () => history[at][0],
    canGo: (by) => at + by >= 0 && at + by < history.length,
    /** Ablate a head in place of the one before, or take that back; returns why not, if not. */
    ablate(click) {
      if (click.pos !== null) return "The page holds ablations at all positions; choose “all positions”.";
      put(history[at].some((entry) => sameClick(entry, click)) ? [] : [click]);
      return "";
    },
    go(by) {
      at += by;
    },
    reset() {
      if (history[at].length) put([]);
    },
    /** The code of the page's run, for the head that is ablated. */
    code(otherwise) {
      const [head] = history[at];
      return head ? ablations.code.replace("layer=9871", `layer=${head.layer}`).replace("head=9872", `head=${head.head}`) : otherwise;
    },
  };
}
