// A few lines over the layers, told apart by colour and by marker, with their names at the right.

import { h } from "./dom.js";

const MARKERS = ["●", "■", "◆", "▼", "▲", "✚"];
const [WIDTH, HEIGHT] = [340, 170];
const BOX = { left: 42, right: 12, top: 12, bottom: 26 };

/** @returns {string} the marker of the line of a number */
export function markerOf(index) {
  return MARKERS[index % MARKERS.length];
}

/** @returns {string} an SVG path over values; NaN interrupts it */
export function pathOf(values, x, y) {
  let pen = "M";
  return values.map((value, i) => {
    if (Number.isNaN(value)) {
      pen = "M";
      return "";
    }
    const step = `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
    return step;
  }).join("");
}

/** @returns {number} the end of an axis: the smallest of 1, 2, 5, 10, ... that holds a value */
export function roundTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * power).find((top) => top >= value * 0.9999);
}

/**
 * Return a chart as an element.
 * @param {object} given
 * @param {string} given.label what it shows, for screen readers
 * @param {string[]} given.rows names along the level axis
 * @param {{ name: string, values: number[] }[]} given.series at most six lines
 * @param {number} given.top where the upright axis ends
 * @param {(value: number) => string} given.format writes its numbers
 * @param {number | null} given.at row that is selected
 * @param {object} given.theme colours
 * @param {(row: number) => void} given.choose called when a row is clicked
 */
export function lineChart({ label, rows, series, top, format, at, theme, choose }) {
  const inner = [WIDTH - BOX.left - BOX.right, HEIGHT - BOX.top - BOX.bottom];
  const x = (row) => BOX.left + (rows.length > 1 ? (row * inner[0]) / (rows.length - 1) : inner[0] / 2);
  const y = (value) => BOX.top + inner[1] * (1 - Math.min(value / top, 1));
  const every = Math.ceil(rows.length / 12);
  const grid = [0, 0.5, 1].map((share) => [
    h("svg:line.ol-rule", { x1: BOX.left, x2: WIDTH - BOX.right, y1: y(share * top), y2: y(share * top) }),
    h("svg:text.ol-tick", { x: BOX.left - 6, y: y(share * top) + 3.5, "text-anchor": "end" }, format(share * top)),
  ]);
  const names = rows.map((name, row) => row % every || (row > rows.length - every && row < rows.length - 1) ? null :
    h("svg:text.ol-tick", { x: x(row), y: HEIGHT - 8, "text-anchor": "middle" }, name));
  const drawn = series.map(({ values }, i) => {
    const color = theme.series[i % theme.series.length];
    const marks = values.map((value, row) => Number.isNaN(value) ? null :
      h("svg:text.ol-mark", { x: x(row), y: y(value) + 3, fill: color, "text-anchor": "middle" }, markerOf(i)));
    return [h("svg:path", { d: pathOf(values, x, y), fill: "none", stroke: color, "stroke-width": 1.8 }), marks];
  });
  const half = rows.length > 1 ? inner[0] / (rows.length - 1) / 2 : inner[0] / 2;
  const hits = rows.map((_, row) => h("svg:rect.ol-hit", {
    x: x(row) - half, y: 0, width: 2 * half, height: HEIGHT, onclick: () => choose(row),
  }));
  const line = at === null ? null :
    h("svg:line.ol-at", { x1: x(at), x2: x(at), y1: BOX.top - 6, y2: BOX.top + inner[1] });
  return h("svg:svg.ol-chart", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    line, grid, names, drawn, hits);
}
