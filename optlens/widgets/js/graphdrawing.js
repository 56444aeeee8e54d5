// A contribution graph as lines: where nodes and edges stand, as SVG in the view and on a canvas to keep.

import { h } from "./dom.js";
import { MONO, sheet } from "./picture.js";
import { columnPlaces } from "./graphroutes.js";
import { short } from "./words.js";

const EDGE_NAMES = { carry: "carried along", head: "head", mlp: "MLP" };
const EDGE_CLASS = { carry: "ol-graph-carry", head: "ol-graph-head", mlp: "ol-graph-mlp" };
const GRAPH_MARGIN = 16;
const DOT_SIZE = 5;

/** @returns {string} the class of what stands for an edge of a kind */
export function edgeClass(kind) {
  return EDGE_CLASS[kind];
}

/** @returns {object} the theme's colour of each kind of edge */
export function edgeColours(theme) {
  return { carry: theme.muted, head: theme.series[0], mlp: theme.series[2] };
}

/** @returns {number} the width of an edge in pixels */
export function edgeWidth(weight) {
  return 0.8 + 7 * weight;
}

/**
 * Place nodes and edges.
 * @param {number[]} columns tokens that are shown
 * @param {object[]} edges edges between them
 * @param {number} nRows rows of the graph
 * @param {number} room pixels there are
 * @returns {{ x: Map<number, number>, y: number[], gaps: number[], wide: number, tall: number, pitch: number, paths: object[] }}
 */
export function graphLayout(columns, edges, nRows, room) {
  const [gap, margin] = [26, 18];
  const breaks = columns.filter((column, i) => i && column !== columns[i - 1] + 1).length;
  const pitch = Math.min(92, Math.max(46, (room - 2 * margin - breaks * gap) / columns.length));
  const { x, gaps, wide } = columnPlaces(columns, pitch, gap, margin);
  const unit = Math.min(70, Math.max(34, 600 / ((nRows - 1) / 2)));
  const y = Array.from({ length: nRows }, (_, row) =>
    GRAPH_MARGIN + unit * Math.floor(row / 2) + (row % 2 ? unit * 0.62 : 0)); // attention has more to cross
  const twins = new Map(); // heads between the same two nodes lie side by side
  const paths = edges.map((edge) => {
    const [[row, from], [to, at]] = [edge.source, edge.target];
    const [x1, y1, x2, y2] = [x.get(from), y[row], x.get(at), y[to]];
    if (edge.kind === "carry") return { edge, d: `M${x1} ${y1}V${y2}`, mark: null };
    if (edge.kind === "mlp") {
      const bow = Math.min(20, 0.36 * pitch);
      const side = x1 + bow;
      return { edge, d: `M${x1} ${y1}C${side} ${y1 + 4} ${side} ${y2 - 4} ${x2} ${y2}`, mark: [x1 + 0.75 * bow, (y1 + y2) / 2] };
    }
    const key = `${row} ${from} ${at}`;
    const twin = twins.get(key) ?? 0;
    twins.set(key, twin + 1);
    const tall = y2 - y1;
    if (from === at) {
      const side = x1 - Math.min(18, 0.32 * pitch) - 7 * twin;
      return { edge, d: `M${x1} ${y1}C${side} ${y1 + 0.2 * tall} ${side} ${y2 - 0.2 * tall} ${x2} ${y2}`, mark: null };
    }
    const drop = 7 * (twin % 2 ? (twin + 1) / 2 : -twin / 2);
    return { edge, d: `M${x1} ${y1}C${x1} ${y1 + 0.6 * tall + drop} ${x2} ${y2 - 0.6 * tall + drop} ${x2} ${y2}`, mark: null };
  });
  return { x, y, gaps, wide, tall: y.at(-1) + GRAPH_MARGIN, pitch, paths };
}

const diamondPath = ([x, y], size) => `M${x} ${y - size}L${x + size} ${y}L${x} ${y + size}L${x - size} ${y}Z`;

/** Return an edge as elements: the line, a diamond if an MLP made it, and a wider line to point at. */
export function edgeElement({ edge, d, mark }, colour, index) {
  const width = edgeWidth(edge.weight);
  return h(`svg:g.ol-graph-edge.${edgeClass(edge.kind)}`, { "data-edge": index, style: { color: colour } },
    h("svg:path.ol-graph-line", { d, "stroke-width": width.toFixed(2) }),
    mark && h("svg:path.ol-graph-mark", { d: diamondPath(mark, 3.5 + width / 3) }),
    h("svg:path.ol-graph-hit", { d, "stroke-width": Math.max(9, width) }));
}

/** Return a node as an element, whose ring shows when it is selected. */
export function nodeElement(place, layout, { label, selected, focus, end }) {
  const [row, column] = place;
  return h("svg:circle.ol-graph-node", {
    cx: layout.x.get(column), cy: layout.y[row], r: end ? DOT_SIZE + 2.5 : DOT_SIZE, role: "button", "aria-label": label,
    "aria-pressed": String(selected), tabindex: focus ? 0 : -1, "data-row": row, "data-column": column,
    "data-end": end,
  });
}

/** Return what the colours and forms of edges mean, and how wide which weight is. */
export function edgeLegend(theme) {
  const colours = edgeColours(theme);
  const sample = (kind) => h("svg:svg.ol-graph-sample", { viewBox: "0 0 44 16", "aria-hidden": "true" }, edgeElement({
    edge: { kind, weight: 0.3 }, mark: kind === "mlp" ? [22, 10] : null,
    d: kind === "carry" ? "M2 8H42" : kind === "mlp" ? "M2 4C12 12 32 12 42 4" : "M2 3C24 3 20 13 42 13",
  }, colours[kind], -1));
  const widths = [0.05, 0.2, 0.8].map((weight) => [
    h("svg:svg.ol-graph-sample.ol-graph-short", { viewBox: "0 0 20 16", "aria-hidden": "true" },
      h("svg:path.ol-graph-line", { d: "M1 8H19", "stroke-width": edgeWidth(weight) })), `${100 * weight} % `]);
  return [...Object.entries(EDGE_NAMES).map(([kind, name]) => h("span", {}, sample(kind), name)), h("span", {}, widths)];
}

/** Return the graph as a picture to keep. */
export function graphPicture({ title, theme, layout, nodes, end, rows, tokens, note }) {
  const [left, top] = [76, 92];
  const [made, pen] = sheet(Math.max(420, left + layout.wide + 20), top + layout.tall + 34, theme, title);
  const colours = edgeColours(theme);
  pen.font = `11px ${MONO}`;
  pen.textBaseline = "middle";
  pen.fillStyle = theme.muted;
  pen.fillText(note, 16, top + layout.tall + 18);
  pen.textAlign = "center";
  const most = Math.floor(layout.pitch / 7);
  for (const [column, x] of layout.x) {
    pen.fillStyle = theme.ink;
    pen.fillText(short(tokens[column], most), left + x, top - 32);
    pen.fillStyle = theme.muted;
    pen.fillText(String(column), left + x, top - 16);
  }
  for (const x of layout.gaps) pen.fillText("⋯", left + x, top - 32);
  pen.textAlign = "right";
  rows.forEach((name, row) => pen.fillText(name, left - 10, top + layout.y[row]));
  pen.translate(left, top);
  for (const { edge, d, mark } of [...layout.paths].sort((a, b) => a.edge.weight - b.edge.weight)) {
    pen.globalAlpha = edge.kind === "carry" ? 0.45 : 0.75;
    pen.strokeStyle = colours[edge.kind];
    pen.lineWidth = edgeWidth(edge.weight);
    pen.stroke(new Path2D(d));
    pen.fillStyle = colours[edge.kind];
    if (mark) pen.fill(new Path2D(diamondPath(mark, 3.5 + pen.lineWidth / 3)));
  }
  pen.globalAlpha = 1;
  pen.lineWidth = 1.5;
  pen.strokeStyle = theme.ink;
  pen.fillStyle = theme.paper;
  for (const [row, column] of nodes) {
    const last = row === rows.length - 1 && column === end;
    pen.beginPath();
    pen.arc(layout.x.get(column), layout.y[row], last ? DOT_SIZE + 2.5 : DOT_SIZE, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
  }
  return made;
}
