// The form that forks a text in Python, and the list of branches.

import { h } from "./dom.js";
import { manner, optionsOf } from "./scrubber.js";
import { labelEl } from "./tokens.js";

const SHOWN = 14; // tokens of a branch in the list
const FIELDS = [
  ["temperature", "Temperature", "off", "0.05"], ["top_k", "Top-k", "off", "1"], ["top_p", "Top-p", "off", "0.05"],
  ["seed", "Seed", "any", "1"], ["max_new_tokens", "New tokens", "as before", "1"],
];

/**
 * Return the form. It is hidden until `allow(true)`.
 * @param {object} given
 * @param {(wanted: object) => Promise<void>} given.fork carries it out; what it throws is shown
 */
export function forkForm({ fork }) {
  const inputs = Object.fromEntries(FIELDS.map(([name, , empty, step]) =>
    [name, h("input.ol-input.ol-figure", { type: "number", min: name === "seed" ? null : 0, step, placeholder: empty })]));
  const text = h("input.ol-input", { type: "text", size: 12, placeholder: "the model's choice", "aria-label": "Token to put there; a dot stands for its leading space" });
  const button = h("button.ol-button.ol-go", { type: "submit" }, "Fork here");
  const trouble = h("p.ol-trouble", { role: "status" });
  const where = h("span");
  let token = null; // { id, label } chosen from the list
  let busy = false;
  const form = h("form.ol-fork", {
    hidden: true,
    async onsubmit(event) {
      event.preventDefault();
      if (busy) return;
      await attempt();
    },
  }, h("p.ol-caption", {}, "Go on another way from ", where),
    h("div.ol-fork-fields", {}, h("label.ol-field", {}, "With token ", text),
      FIELDS.map(([name, label]) => h("label.ol-field", {}, `${label} `, inputs[name]))),
    h("div.ol-fork-do", {}, button, h("small", {}, "With temperature, top-k, top-p and seed empty, the likeliest token is taken.")), trouble);
  const none = h("p.ol-facts.ol-fork-none", {}, "Forking runs the model: it needs Python, in a notebook.");

  async function attempt() {
    try {
      const options = optionsOf(Object.fromEntries(Object.entries(inputs).map(([name, input]) => {
        if (input.validity.badInput) throw new Error(`${name.replace("_", "-")}: not a number.`);
        return [name, input.value];
      })));
      const written = text.value.replace(/^·/, " ");
      const put = token && text.value === token.label ? { token: token.id } : written ? { text: written } : {};
      set(true);
      await fork({ ...put, options });
    } catch (error) {
      trouble.textContent = error.message;
      set(false);
      return;
    }
    trouble.textContent = "";
    set(false);
  }

  function set(on) {
    busy = on;
    button.disabled = on;
    form.setAttribute("aria-busy", String(on));
    button.textContent = on ? "Writing…" : "Fork here";
    if (on) trouble.textContent = "";
  }

  return {
    el: h("div", {}, form, none),
    allow(on) {
      form.hidden = !on;
      none.hidden = on;
    },
    at(words) {
      where.replaceChildren(words);
    },
    /** Put a token of the list into the field; the same one again takes it out. */
    put(id, label) {
      const same = token?.id === id && text.value === label;
      token = same ? null : { id, label };
      text.value = same ? "" : label;
      return !same;
    },
    chosen: () => (token && text.value === token.label ? token.id : null),
    clear() {
      token = null;
      text.value = "";
    },
  };
}

/** Return the list of branches: where each parts from its parent, and what it wrote from there. */
export function branchList({ branches, start, words, current, choose }) {
  return h("ol.ol-branches", { "aria-label": "Branches" }, branches.map((branch, number) => {
    const from = start + branch.step;
    const shown = branch.ids.slice(from, from + SHOWN);
    const more = branch.ids.length - from - shown.length;
    const origin = branch.parent === null ? "as generated" : `from branch ${branch.parent + 1}, step ${branch.step}`;
    return h("li", {}, h("button.ol-branch", {
      type: "button", "aria-pressed": String(number === current), onclick: () => choose(number),
    }, h("b.ol-side", {}, String(number + 1)),
    h("span", {}, h("small", {}, `${origin} · ${manner(branch)} · ended: ${branch.reason}`),
      h("span.ol-branch-text", {}, branch.step ? "… " : "", shown.map((id, i) => h(branch.forced && i === 0 ? "span.ol-forced" : "span", {},
        labelEl(words[id], { special: branch.special.includes(from + i), most: 16 }))), more > 0 ? ` … ${more} more` : ""))));
  }));
}
