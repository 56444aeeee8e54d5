// The bar on which one says what to change at the selected place: which part, where, and how.

import { clickOf, exists, partName, sameClick, TARGETS } from "./clicks.js";
import { h } from "./dom.js";
import { choice } from "./panel.js";
import { promptToken } from "./tokens.js";

/**
 * @param {object} given
 * @param {(click: object) => void} given.act called with what a button asks for
 * @param {(problem: string) => void} given.refuse called with why nothing can be asked for
 * @param {() => void} given.aimed called when another part is chosen
 */
export function changeBar({ act, refuse, aimed }) {
  let target = "head";
  const scopes = { head: "all", attention: "all", mlp: "all", stream: "one" };
  let place = null; // { layer, head, query }
  const targets = choice("What to change", TARGETS.map((name) => [name, name]), target, (name) => bar.aim(name));
  const scope = choice("Where", [["all", "all positions"], ["one", "one"]], "all", (name) => {
    scopes[target] = name;
    aimed();
  });
  const button = (name, text, title) => h("button.ol-button", { type: "button", title, onclick: () => press(name), "data-do": name }, text);
  const factor = h("input.ol-input.ol-iv-factor", { type: "number", step: "any", value: "0.5", "aria-label": "Factor" });
  const other = h("input.ol-input.ol-iv-other", { type: "text", "aria-label": "Other prompt, to patch or to take the mean from", placeholder: "other prompt", spellcheck: "false" });
  const ablate = button("ablate", "Ablate", "write zeros; once more takes that back (a)");
  const el = h("div.ol-iv-bar", { role: "group", "aria-label": "Change the run" },
    h("div.ol-iv-aim", {}, targets.el, scope.el),
    h("div.ol-iv-do", {}, ablate,
      button("mean", "Mean", "write the mean over all positions of the other prompt, or of this one"),
      h("span.ol-iv-with", {}, button("scale", "Scale by", "multiply by a factor"), factor),
      h("span.ol-iv-with.ol-iv-wide", {}, button("patch", "Patch from", "write what another prompt of as many tokens has here"), other)));

  const clickFor = (name, more = {}) => clickOf(target, place, scopes[target] === "one" ? place.query : null, { do: name, ...more });

  function press(name) {
    const number = factor.valueAsNumber;
    if (name === "scale" && Number.isNaN(number)) return refuse("Type the factor to scale by: a number, such as 0.5.");
    if (name === "patch" && !other.value) return refuse("Type the prompt to patch from beside “Patch from”.");
    const more = name === "scale" ? { factor: number } : name === "ablate" ? {} : { other: other.value || null };
    return act(clickFor(name, more));
  }

  const bar = {
    el,
    press,
    target: () => target,
    /** Change another part of what is selected. */
    aim(name) {
      target = name;
      aimed();
    },
    /** What is changed is what is selected in the section at hand: a head, or a place in the stream. */
    aimFrom(kind) {
      if (kind === "attention") target = "head";
      if (kind === "lens" || kind === "residual") target = "stream";
    },
    /**
     * @param {object} shown
     * @param {{ layer: number | "embed", head: number, query: number }} shown.place what is selected
     * @param {object[]} shown.inForce
     * @param {(name: string, target: string) => boolean} shown.can what can be asked for
     * @param {boolean} shown.able whether the fields can be typed into
     */
    draw({ place: next, prompt, inForce, can, able }) {
      place = next;
      if (!exists(target, place)) target = "stream";
      targets.set(target);
      for (const option of targets.el.children) {
        const name = option.getAttribute("data-value");
        option.textContent = exists(name, place) ? partName(name, place) : name;
        option.disabled = !exists(name, place);
      }
      scope.set(scopes[target]);
      scope.el.children[1].replaceChildren("only ", promptToken(prompt, place.query, 12), ` ${place.query}`);
      for (const one of el.querySelectorAll("[data-do]")) one.disabled = !can(one.getAttribute("data-do"), target);
      ablate.textContent = inForce.some((entry) => sameClick(entry, clickFor("ablate"))) ? "Restore" : "Ablate";
      for (const input of [factor, other]) input.disabled = !able;
    },
  };
  return bar;
}
