// What the model predicts with a patch, without it, and in the run that it comes from; the patch as code.

import { h } from "./dom.js";
import { labelEl } from "./tokens.js";
import { percent } from "./words.js";

/** @returns {string} what a run is, over its list of tokens */
export function runName({ role, name }, roles) {
  const run = name === "prompt" ? "" : `${name}, `;
  if (role === "source") return `${run}the source`;
  if (role === "base") return roles.includes("source") ? `${run}as it is` : "as it is";
  return roles.includes("source") ? `${run}patched` : "with the patch";
}

/** @returns {Set<number>} the tokens of a run's list that the unpatched run does not list */
export function newTokens(runs, at) {
  const base = runs.find(({ role }) => role === "base");
  return runs[at].role === "patched" ? new Set(runs[at].ids.filter((id) => !base.ids.includes(id))) : new Set();
}

/**
 * Return the pane of predictions and code.
 * @param {object} given
 * @param {number} given.count how many prompts there are
 * @param {(channel: string, what: string, more?: object) => Promise<object | null>} given.ask
 */
export function makeOutcomes({ count, ask, say, signal }) {
  let outlook = null; // what can be asked
  let [index, which, shown] = [null, 0, ""];
  const kept = new Map();
  const heading = h("p.ol-caption", {}, "What comes next");
  const lists = h("div.ol-answers");
  const note = h("p.ol-facts", { role: "status" });
  const pick = count < 2 ? null : h("label.ol-field", {}, "for prompt ", h("select", {
    onchange: (event) => { which = event.target.selectedIndex; refresh(); },
  }, Array.from({ length: count }, (_, i) => h("option", {}, String(i)))));
  const button = h("button.ol-button", { type: "button", "aria-expanded": "false", onclick: () => toggle(), title: "this patch as Python code (c)" }, "Code");
  const code = h("div");
  const el = h("div.ol-outcomes", {}, h("div.ol-outcomes-head", {}, heading, pick, button), lists, note, code);

  /** Ask once, and keep what was answered; null if a newer question has taken its place. */
  async function get(what) {
    const key = `${what} ${which} ${index}`;
    if (!kept.has(key)) {
      const found = await ask(what, what, { index, which });
      if (found === null) return null;
      kept.set(key, found);
    }
    return kept.get(key);
  }

  async function refresh() {
    if (!outlook || !index) return;
    const key = `${which} ${index}`;
    if (key === shown) return;
    shown = key;
    if (button.getAttribute("aria-expanded") === "true") drawCode();
    if (outlook.predictions) {
      note.textContent = outlook.predictions;
      return;
    }
    el.setAttribute("aria-busy", "true");
    try {
      const found = await get("predictions");
      if (found === null || signal.aborted || shown !== key) return;
      draw(found);
      note.textContent = "";
    } catch (error) {
      if (shown !== key) return;
      lists.replaceChildren();
      note.textContent = error.gone ? "What is predicted under a patch needs a running kernel: run the cell again." : error.message;
      shown = ""; // to choose the patch again asks again
    }
    el.setAttribute("aria-busy", "false");
  }

  function draw({ runs, after, at }) {
    const roles = runs.map(({ role }) => role);
    heading.replaceChildren("What comes next, after ", labelEl(after, { most: 18 }), ` (position ${at})`);
    lists.replaceChildren(...runs.map((run, i) => {
      const fresh = newTokens(runs, i);
      const name = runName(run, roles);
      return h("div", {}, h("p.ol-caption", {}, run.role === "patched" ? h("b", {}, name) : name),
        h("ol.ol-guesses", { "aria-label": `Likeliest tokens: ${name}` }, run.ids.map((id, k) =>
          h(fresh.has(id) ? "li.ol-guess.ol-only" : "li.ol-guess", { style: { "--ol-part": `${100 * run.probs[k]}%` } },
            h("span", {}, labelEl(run.labels[k], { most: 18 }), fresh.has(id) ? h("span.ol-hidden", {}, ", not in the list without the patch") : null),
            h("span", {}, percent(run.probs[k]))))));
    }), runs.some((_, i) => newTokens(runs, i).size) ? h("p.ol-caption.ol-across", {}, h("span.ol-change-key"), "not in the list without the patch") : "");
  }

  async function drawCode() {
    if (outlook?.code) {
      code.replaceChildren(h("p.ol-facts", {}, outlook.code));
      return;
    }
    const key = shown;
    try {
      const found = await get("code");
      if (found === null || signal.aborted || shown !== key || button.getAttribute("aria-expanded") !== "true") return;
      const text = h("pre.ol-patch-code", { tabindex: 0, role: "region", "aria-label": "Python code" }, found.code);
      const copy = async () => {
        try {
          await navigator.clipboard.writeText(found.code);
          say("Copied the code.");
        } catch { // a page that was not loaded safely may not write there, but may mark text
          getSelection().selectAllChildren(text);
          say("The code is marked; copy it with the keyboard.");
        }
      };
      code.replaceChildren(h("div.ol-panel", {},
        h("div.ol-panel-bar", {}, h("span", {}, "This patch by itself; `model` is your model"), h("button.ol-button", { type: "button", onclick: copy }, "Copy")),
        text));
    } catch (error) {
      code.replaceChildren(h("p.ol-facts", {}, error.gone ? "The code is made by Python: run the cell again." : error.message));
    }
  }

  function toggle() {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    if (open) drawCode();
    else code.replaceChildren();
  }

  return {
    el,
    toggle,
    /** Say what can be asked, as Python or the page does; null if nobody is there. */
    open(found) {
      outlook = found ?? { predictions: "What is predicted under a patch needs a running kernel: run the cell again.", code: "The code is made by Python: run the cell again." };
      refresh();
    },
    at(next) {
      index = [...next];
      refresh();
    },
  };
}
