// What every head, MLP and bias of each layer adds, as a table of colours with its numbers.

import { cssOf, inkOn, mixed } from "./colour.js";
import { h, setStyle } from "./dom.js";
import { handled, moved } from "./keys.js";
import { signed } from "./steps.js";

/** @returns {string} a term as short as a small cell needs: ".12", "−1.3", "7" */
export function brief(value) {
  const size = Math.abs(value);
  if (size < 0.005) return "0";
  const text = size >= 9.95 ? size.toFixed(0) : size >= 0.995 ? size.toFixed(1) : size.toFixed(2).slice(1);
  return value < 0 ? `−${text}` : text;
}

/**
 * @param {object} given
 * @param {number} given.layers how many layers
 * @param {{ name: string, title: string, wide: boolean }[]} given.columns the parts of a layer
 * @param {(layer: number, column: number) => string} given.say a part in words
 * @param {(layer: number, column: number) => void} given.choose called with a chosen part
 */
export function partMap({ layers, columns, say, choose, tip, signal }) {
  const shape = [layers, columns.length];
  const el = h("div.ol-parts", {
    role: "grid", "aria-label": "What each part adds: rows are layers", "aria-rowcount": layers + 1,
    style: { "--ol-count": String(columns.length + 1) },
  });
  const gap = (column) => (columns[column].wide && !columns[column - 1]?.wide ? ".ol-apart" : "");
  const cells = [...Array(layers).keys()].map((layer) => columns.map((_, column) => h(`div.ol-part${gap(column)}`, {
    role: "gridcell", tabindex: -1, "aria-selected": "false", "data-row": layer, "data-column": column,
  })));
  const totals = cells.map(() => h("div.ol-part-total.ol-apart", { role: "gridcell" }));
  el.append(
    h("div.ol-parts-line", { role: "row" }, h("div.ol-part-name", { role: "columnheader" }, "layer"),
      columns.map(({ name, title }, column) => h(`div.ol-part-name${gap(column)}`, { role: "columnheader", "aria-label": title, title }, name)),
      h("div.ol-part-name.ol-apart", { role: "columnheader" }, "all")),
    ...cells.map((line, layer) => h("div.ol-parts-line", { role: "row" },
      h("div.ol-part-name", { role: "rowheader" }, String(layer)), line, totals[layer])));
  let selected = [layers - 1, 0];
  let shown = null;

  const placeOf = (target) => {
    const cell = target.closest?.(".ol-part");
    return cell && [Number(cell.dataset.row), Number(cell.dataset.column)];
  };
  const point = (place) => {
    if (!place || !shown) return tip.hide();
    const [layer, column] = place;
    return tip.show([h("p", {}, say(layer, column)),
      h("div.ol-fact", {}, h("span", {}, "adds"), h("span", {}, `${signed(shown.value(layer, column), 4)} logits`))], cells[layer][column]);
  };
  el.addEventListener("click", (event) => {
    const place = placeOf(event.target);
    if (place) choose(...place);
  }, { signal });
  el.addEventListener("keydown", (event) => {
    const from = placeOf(event.target);
    const place = from && moved(from, event.key, shape);
    if (!place) return;
    handled(event);
    choose(...place);
    cells[place[0]][place[1]].focus();
    point(place);
  }, { signal });
  el.addEventListener("mouseover", (event) => point(placeOf(event.target)), { signal });
  el.addEventListener("mouseleave", () => point(null), { signal });
  el.addEventListener("focusout", () => point(null), { signal });

  return {
    el,
    /**
     * @param {(layer: number, column: number) => number} value a part's term
     * @param {(layer: number) => number} total what a layer adds in all
     * @param {number} limit the term that has the deepest colour
     */
    show({ value, total, limit }, theme) {
      shown = { value };
      cells.forEach((line, layer) => {
        line.forEach((cell, column) => {
          const term = value(layer, column);
          // One MLP is often ten times any head: on a linear scale, that alone had a colour.
          const ground = mixed(theme.diverging, (Math.sign(term) * Math.sqrt(Math.abs(term) / limit) + 1) / 2);
          setStyle(cell, { background: cssOf(ground), color: inkOn(ground, theme) });
          cell.replaceChildren(h("span.ol-part-number", {}, brief(term)));
          cell.setAttribute("aria-label", `${say(layer, column)}: ${signed(term)}`);
        });
        totals[layer].textContent = signed(total(layer), 1);
        totals[layer].setAttribute("aria-label", `layer ${layer} in all: ${signed(total(layer))}`);
      });
    },
    /** Mark a part; null when what is chosen is not of a layer. */
    select(place) {
      const mark = ([layer, column], on) => {
        cells[layer][column].setAttribute("aria-selected", String(on));
        cells[layer][column].tabIndex = on ? 0 : -1;
      };
      mark(selected, false);
      if (place) {
        selected = place;
        mark(selected, true);
      } else cells[selected[0]][selected[1]].tabIndex = 0;
    },
  };
}
