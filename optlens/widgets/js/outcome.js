// The next token before and after a change, and who wrote a token, as lists to click on.

import { partName, points } from "./clicks.js";
import { h, setStyle } from "./dom.js";
import { cellPicture } from "./picture.js";
import { labelEl } from "./tokens.js";
import { signed } from "./steps.js";
import { percent, spoken } from "./words.js";

/**
 * Return the lines of next tokens.
 * @param {object} given
 * @param {{ id: number, before: number, after: number }[]} given.rows
 * @param {boolean} given.changed whether there is a run to compare with
 * @param {number | null} given.chosen the token that is selected
 * @param {(id: number) => void} given.choose
 */
export function outcomeList({ rows, words, changed, chosen, choose }) {
  const head = h("div.ol-guess-head.ol-iv-columns", { "aria-hidden": "true" }, h("span", {}, "next token"),
    changed ? ["before (line)", "now (bar)", "points"].map((text) => h("span", {}, text)) : h("span", {}, "probability"));
  return [head, ...rows.map(({ id, before, after }) => {
    const shown = Number.isNaN(after) ? 0 : after;
    const said = changed ? `before ${percent(before)}, now ${percent(after)}` : percent(after);
    return h("button.ol-guess.ol-candidate.ol-iv-columns", {
      type: "button", "aria-pressed": String(id === chosen), "aria-label": `${spoken(words[id])}, ${said}`,
      title: "who wrote it?", onclick: () => choose(id),
      style: { "--ol-part": `${100 * shown}%`, "--ol-own": `${changed && before ? 100 * before : 0}%` },
    }, h("span.ol-candidate-name", {}, labelEl(words[id], { most: 20 })),
    changed ? [h("span", {}, percent(before)), h("span", {}, percent(after)), h("span.ol-iv-points", {}, points(before, after))]
      : h("span", {}, percent(after)));
  })];
}

/**
 * Return the list of parts that wrote a token.
 * @param {object} given
 * @param {{ parts: object[], rest: number, total: number }} given.found
 * @param {(part: object) => boolean} given.isChosen
 * @param {(part: object) => void} given.choose
 */
export function writerList({ found, theme, isChosen, choose }) {
  const values = [...found.parts.map(({ value }) => value), found.rest];
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const share = (value) => (100 * (value - low)) / (high - low || 1);
  const track = (value) => {
    const [left, right] = [Math.min(0, value), Math.max(0, value)].map(share);
    return h("span.ol-track", { "aria-hidden": "true", style: { "--ol-zero": `${share(0)}%` } },
      h(`span.ol-step-bar.${value < 0 ? "ol-down" : "ol-up"}`, { style: { left: `${left}%`, width: `max(1px, ${right - left}%)` } }));
  };
  const name = (part) => partName(part.part, part);
  const list = h("div.ol-iv-writers", {},
    found.parts.map((part) => h("button.ol-iv-writer", {
      type: "button", "aria-pressed": String(isChosen(part)), onclick: () => choose(part),
      "aria-label": `${name(part)}: ${signed(part.value)} logits; select it`,
    }, h("span", {}, name(part)), track(part.value), h("span.ol-iv-points", {}, signed(part.value)))),
    h("div.ol-iv-writer.ol-iv-rest", {}, h("span", {}, "all else"), track(found.rest), h("span.ol-iv-points", {}, signed(found.rest))));
  setStyle(list, { "--ol-rises": theme.diverging.at(-2), "--ol-falls": theme.diverging[1] });
  return list;
}

/** Return the next tokens as a picture to keep. */
export function outcomePicture({ title, rows, words, changed, theme }) {
  const columns = changed ? ["before", "now"] : ["probability"];
  return cellPicture({
    title, theme, rows: rows.map((_, i) => `#${i + 1}`), columns: ["token", ...columns], width: 110,
    cell: (row, column) => ({
      ground: theme.paper, ink: theme.ink,
      text: column === 0 ? words[rows[row].id] : percent(changed && column === 1 ? rows[row].before : rows[row].after),
    }),
  });
}
