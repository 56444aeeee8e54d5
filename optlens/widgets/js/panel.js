// The panels below a section that open on a button: its numbers as a table, its keys.

import { h } from "./dom.js";
import { csvOf } from "./words.js";

const MOST_ROWS = 400;

/**
 * Return a table of a section's numbers with a button that copies all of them.
 * @param {{ caption: string, head: string[], rows: any[][] }} table
 * @param {(text: string) => void} say
 */
export function tablePanel({ caption, head, rows }, say) {
  const copy = async () => {
    await navigator.clipboard.writeText(csvOf([head, ...rows]));
    say(`Copied ${rows.length} rows.`);
  };
  const shown = rows.slice(0, MOST_ROWS);
  const more = rows.length > shown.length ? ` The first ${shown.length} of ${rows.length} rows.` : "";
  return h("div.ol-panel", {},
    h("div.ol-panel-bar", {},
      h("span", {}, `${caption}.${more}`),
      h("button.ol-button", { type: "button", onclick: copy }, "Copy as CSV")),
    h("div.ol-scroll", { tabindex: 0, role: "region", "aria-label": caption },
      h("table.ol-table", {},
        h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, shown.map((row) => h("tr", {},
          row.map((value, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, h("bdi", {}, String(value))))))))));
}

/** Return the list of keys. */
export function keysPanel(keys) {
  return h("div.ol-panel", {},
    h("dl.ol-keys", {}, keys.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])));
}

/** Return a group of buttons of which one is pressed. */
export function choice(label, options, current, choose) {
  const group = h("div.ol-choice", { role: "radiogroup", "aria-label": label });
  const buttons = options.map(([value, text, title]) =>
    h("button", {
      type: "button", role: "radio", title, "aria-checked": String(value === current),
      tabindex: value === current ? 0 : -1, onclick: () => choose(value), "data-value": value,
    }, text));
  group.append(...buttons);
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const next = buttons[(buttons.indexOf(event.target) + step + buttons.length) % buttons.length];
    next.focus();
    next.click();
  });
  return {
    el: group,
    set(value) {
      for (const button of buttons) {
        const on = button.getAttribute("data-value") === String(value);
        button.setAttribute("aria-checked", String(on));
        button.tabIndex = on ? 0 : -1;
      }
    },
  };
}
