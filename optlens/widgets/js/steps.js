// Terms of a sum as bars, each beginning where the one above it ended, so that they add up to see.

import { h, setStyle } from "./dom.js";
import { handled, movedInList } from "./keys.js";

/** @returns {string} a number with its sign, the minus as long as the plus, nothing before a zero */
export function signed(value, digits = 2) {
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}

/**
 * Put terms one after the other.
 * @param {{ value: number }[]} terms in their order
 * @returns {{ start: number, end: number }[]} the same with where each begins and ends
 */
export function stacked(terms) {
  let sum = 0;
  return terms.map((term) => {
    const start = sum;
    sum += term.value;
    return { ...term, start, end: sum };
  });
}

/**
 * Return the largest terms of either sign in their order, and all others as one at the end.
 * @param {ArrayLike<number>} values the terms
 * @param {number} most how many have a bar of their own
 * @returns {{ members: number[], value: number, rest: boolean }[]}
 */
export function largestTerms(values, most) {
  const all = [...values].map((value, i) => ({ members: [i], value, rest: false }));
  if (all.length <= most + 1) return all;
  const kept = new Set([...all.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b).slice(0, most));
  const others = [...all.keys()].filter((i) => !kept.has(i));
  const value = others.reduce((sum, i) => sum + values[i], 0);
  return [...all.filter((_, i) => kept.has(i)), { members: others, value, rest: true }];
}

/** @returns {[number, number]} where an axis that shows all steps and zero begins and ends */
export function spanOf(steps) {
  const ends = steps.flatMap(({ start, end }) => [start, end]);
  const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  return high > low ? [low, high] : [low, low + 1];
}

/**
 * @param {object} given
 * @param {string} given.label name of the list for screen readers
 * @param {(index: number) => void} given.choose called with the number of a chosen step
 */
export function stepList({ label, choose, signal }) {
  const list = h("div.ol-steps", { role: "listbox", "aria-label": label });
  const foot = h("div.ol-steps-sum");
  const head = h("div.ol-steps-head", { "aria-hidden": "true" }, h("span"), h("span"),
    h("span.ol-step-value", {}, "adds"), h("span.ol-step-run", {}, "so far"));
  const el = h("div", {}, head, list, foot);
  let at = 0;

  const bar = ([low, high], start, end, kind) => {
    const share = (value) => (100 * (value - low)) / (high - low);
    const [left, right] = [Math.min(start, end), Math.max(start, end)].map(share);
    return h("span.ol-track", { "aria-hidden": "true", style: { "--ol-zero": `${share(0)}%` } },
      h(`span.ol-step-bar.${kind}`, { style: { left: `${left}%`, width: `max(1px, ${right - left}%)` } }),
      h("span.ol-step-end", { style: { left: `${share(end)}%` } }));
  };
  const focusable = (next) => {
    list.children[at]?.setAttribute("tabindex", "-1");
    at = next;
    list.children[at]?.setAttribute("tabindex", "0");
  };

  list.addEventListener("click", (event) => {
    const row = event.target.closest(".ol-step");
    if (!row) return;
    focusable([...list.children].indexOf(row));
    choose(at);
  }, { signal });
  list.addEventListener("keydown", (event) => {
    const next = movedInList(at, event.key, list.children.length, 1);
    if (next === null) return;
    handled(event);
    focusable(next);
    list.children[next].focus();
    choose(next);
  }, { signal });

  return {
    el,
    /**
     * @param {{ name: Node | string, spoken: string, value: number, start: number, end: number }[]} steps
     * @param {number[]} chosen which of them are selected
     * @param {{ sum: number, own: number }} sums what they add up to
     */
    show(steps, chosen, { sum, own }) {
      const focused = list.contains(document.activeElement);
      const span = spanOf([...steps, { start: 0, end: sum }]);
      list.replaceChildren(...steps.map(({ name, spoken, value, start, end }, i) => h("div.ol-step", {
        role: "option", tabindex: -1, "aria-selected": String(chosen.includes(i)),
        "aria-label": `${spoken}: ${signed(value)}, from ${signed(start)} to ${signed(end)}`,
      }, h("span.ol-step-name", {}, name), bar(span, start, end, value < 0 ? "ol-down" : "ol-up"),
      h("span.ol-step-value", {}, signed(value)), h("span.ol-step-run", {}, end.toFixed(2).replace("-", "−")))));
      foot.replaceChildren(h("span.ol-step-name", {}, "sum"), bar(span, 0, sum, "ol-whole"),
        h("span.ol-step-value", {}, sum.toFixed(2).replace("-", "−")),
        h("span.ol-step-run", { title: "the model's own" }, "= ", own.toFixed(2).replace("-", "−")));
      focusable(Math.min(chosen.length ? chosen[0] : at, steps.length - 1));
      if (focused) list.children[at]?.focus({ preventScroll: true });
    },
    /** Take the colours of a theme. */
    paint(theme) {
      setStyle(el, { "--ol-rises": theme.diverging.at(-2), "--ol-falls": theme.diverging[1] });
    },
  };
}
