// All heads as small pictures, in rows of layers or in the order of a score.

import { h } from "./dom.js";
import { handled, moved } from "./keys.js";
import { number } from "./words.js";

/**
 * Return the places of heads in the order of a score.
 * @param {number[]} values a score for each head, layer by layer
 * @param {boolean} ascending whether the smallest come first; NaN comes last
 * @returns {number[]} indices into `values`
 */
export function ranked(values, ascending) {
  const sign = ascending ? 1 : -1;
  const worth = (i) => (Number.isNaN(values[i]) ? Infinity : sign * values[i]);
  return [...values.keys()].sort((a, b) => worth(a) - worth(b) || a - b);
}

/**
 * @param {object} given
 * @param {number[]} given.layers numbers of the layers
 * @param {number[]} given.heads numbers of the heads
 * @param {boolean} given.resident whether all small pictures are here: else only those in sight are painted
 * @param {(layer: number, head: number) => { data: Uint8Array, rows: number, columns: number } | null}
 *   given.picture a head's small picture by indices; null while it is not here, and then asked for
 * @param {(layer: number, head: number) => void} given.choose called with the indices of a chosen head
 */
export function headGrid({ layers, heads, resident, picture, choose, signal }) {
  const shape = [layers.length, heads.length];
  const el = h("div.ol-heads", {
    role: "grid", "aria-label": "All heads", style: { "--ol-count": String(heads.length) },
  });
  const cells = layers.map((layer, i) => heads.map((head, j) => makeHead(layer, head, i, j)));
  let order = cells.flat(); // as they stand, row by row
  let selected = cells[0][0];
  let theme = null;

  function makeHead(layer, head, i, j) {
    const canvas = h("canvas", { width: 1, height: 1, "aria-hidden": "true" });
    const name = h("span.ol-head-name");
    const cell = h("div.ol-head", { role: "gridcell", tabindex: -1, "aria-selected": "false" }, canvas, name);
    return { layer, head, i, j, el: cell, canvas, name, seen: resident, painted: null };
  }

  const paint = (one) => {
    const drawn = theme && one.seen && picture(one.i, one.j);
    if (!drawn || one.painted === drawn.data) return;
    one.painted = drawn.data;
    paintLevels(one.canvas, drawn, theme.levels);
  };

  const arrange = (score) => {
    const numbers = score && ranked(score.values, score.ascending);
    order = numbers ? numbers.map((at) => cells.flat()[at]) : cells.flat();
    const lines = layers.map((layer, i) => {
      const line = order.slice(i * heads.length, (i + 1) * heads.length);
      const first = score ? `${i * heads.length + 1}.` : layer;
      return h("div.ol-heads-line", { role: "row" },
        h("div.ol-heads-name", { role: "rowheader" }, String(first)), line.map((one) => one.el));
    });
    const names = h("div.ol-heads-line", { role: "row" }, h("div.ol-heads-name", { role: "columnheader" }, score ? "" : "layer"),
      heads.map((head) => h("div.ol-heads-top", { role: "columnheader", "aria-label": `head ${head}` }, score ? "" : String(head))));
    el.classList.toggle("ol-sorted", Boolean(score));
    for (const one of order) {
      const value = score && score.values[one.i * heads.length + one.j];
      one.name.textContent = score ? `${one.layer}.${one.head}` : "";
      one.el.setAttribute("aria-label", `layer ${one.layer}, head ${one.head}${score ? `, ${score.label} ${number(value)}` : ""}`);
      one.el.title = score ? `layer ${one.layer}, head ${one.head}: ${score.label} ${number(value)}` : `layer ${one.layer}, head ${one.head}`;
    }
    el.replaceChildren(names, ...lines);
    if (el.parentElement) reveal(selected);
  };

  /** Scroll the grid's own box so that a head is in sight; the notebook around it does not move. */
  const reveal = (one) => {
    const [box, frame] = [one.el.getBoundingClientRect(), el.parentElement.getBoundingClientRect()];
    const top = frame.top + 24; // below the numbers of the heads
    if (box.top < top) el.parentElement.scrollTop -= top - box.top;
    else if (box.bottom > frame.bottom) el.parentElement.scrollTop += box.bottom - frame.bottom + 4;
  };

  const byElement = new Map(cells.flat().map((one) => [one.el, one]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const one = byElement.get(entry.target);
      one.seen = resident || entry.isIntersecting;
      paint(one);
    }
  }, { rootMargin: "100px" });
  for (const one of order) observer.observe(one.el);
  signal.addEventListener("abort", () => observer.disconnect());

  el.addEventListener("click", (event) => {
    const one = byElement.get(event.target.closest(".ol-head"));
    if (one) choose(one.i, one.j);
  }, { signal });
  el.addEventListener("keydown", (event) => {
    const at = order.indexOf(byElement.get(event.target));
    const place = at >= 0 && moved([Math.floor(at / shape[1]), at % shape[1]], event.key, shape);
    if (!place) return;
    handled(event);
    const next = order[place[0] * shape[1] + place[1]];
    choose(next.i, next.j);
    next.el.focus();
  }, { signal });

  return {
    el,
    arrange,
    /** Paint what is in sight and has arrived, in the colours of a theme. */
    paint(colours) {
      if (colours !== theme) for (const one of order) one.painted = null;
      theme = colours;
      for (const one of order) paint(one);
    },
    /** Forget what is painted: other numbers are to be shown. */
    renew() {
      for (const one of order) one.painted = null;
      for (const one of order) paint(one);
    },
    /** Mark the heads on which something acts, given by layer and head. */
    touch(touched) {
      const names = new Set(touched.map(String));
      for (const one of order) one.el.classList.toggle("ol-touched", names.has(`${one.layer},${one.head}`));
    },
    select(i, j) {
      const next = cells[i]?.[j];
      for (const [one, on] of [[selected, false], [next, true]]) {
        if (!one) continue;
        one.el.setAttribute("aria-selected", String(on));
        one.el.tabIndex = on ? 0 : -1;
      }
      if (!next) return;
      selected = next;
      reveal(next);
    },
  };
}

/** Paint levels one to one into a canvas. */
export function paintLevels(canvas, { data, rows, columns }, table) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i += 1) pixels[i] = table[data[i]];
  context.putImageData(image, 0, 0);
}
