// The residual view: how long the stream is at each layer and position, and how each layer turns it.

import { slice } from "./arrays.js";
import { cellGrid } from "./cellgrid.js";
import { cssOf, inkOn, mixed, pixel } from "./colour.js";
import { h } from "./dom.js";
import { rowOfLayer } from "./lens.js";
import { lineChart, roundTop } from "./lines.js";
import { handled, moved } from "./keys.js";
import { choice } from "./panel.js";
import { cellPicture } from "./picture.js";
import { promptToken } from "./tokens.js";
import { number, spoken } from "./words.js";

const RESIDUAL_WIDTH = 56;

/** @returns {{ log: boolean, share: (value: number) => number, low: number, high: number }} a scale for lengths */
export function lengthScale(values) {
  const known = [...values].filter((value) => value > 0 && Number.isFinite(value));
  const low = known.reduce((a, b) => Math.min(a, b), Infinity);
  const high = known.reduce((a, b) => Math.max(a, b), 0);
  if (!known.length) return { log: false, share: () => 0, low: 0, high: 1 };
  // The first token of a trained OPT is often many times longer than all others.
  const log = high > 10 * low;
  const floor = low / 1.5; // keeps the smallest apart from the paper
  const share = log
    ? (value) => (value > 0 ? Math.log(value / floor) / Math.log(high / floor) : 0)
    : (value) => value / high;
  return { log, share, low: log ? low : 0, high };
}

/** Draw the residual part. */
export function residualView({ state, prompt, main, tools, theme, selection, ask, say, tip, kept, signal }) {
  const { rows, layers, positions } = state;
  const nColumns = positions.length;
  const scale = lengthScale(state.norms.data);
  const at = (values, row, column) => values.data[row * nColumns + column];
  const modes = {
    norms: {
      text: "length", values: state.norms, title: "length (L2 norm)",
      colour: (value) => mixed(theme().ramp, scale.share(value)),
      legend: [number(scale.low), `${number(scale.high)}, ${scale.log ? "logarithmic" : "linear"}`],
    },
    before: {
      text: "cosine to the layer before", values: state.before, title: "cosine with the stream one layer before",
      colour: (value) => mixed(theme().diverging, (value + 1) / 2), legend: ["−1", "1: the direction stays"],
    },
    last: {
      text: "cosine to the end", values: state.last, title: "cosine with the stream after the last layer",
      colour: (value) => mixed(theme().diverging, (value + 1) / 2), legend: ["−1", "1: the final direction"],
    },
  };
  const cosines = new Map();
  let mode = kept.mode ?? "norms";
  let place = [rows.length - 1, nColumns - 1];
  let other = kept.other ?? null; // the row with which the matrix compares

  const colours = (value) => {
    if (Number.isNaN(value)) return [theme().masked, theme().muted];
    const ground = modes[mode].colour(value);
    return [cssOf(ground), inkOn(ground, theme())];
  };
  const grid = cellGrid({
    label: "Residual stream: rows are layers, columns positions", rows, prompt, positions, width: RESIDUAL_WIDTH, signal,
    cell(row, column) {
      const value = at(modes[mode].values, row, column);
      const [ground, ink] = theme() ? colours(value) : [];
      return {
        children: [number(value)], ground, ink,
        label: `after layer ${rows[row]}, position ${positions[column]}: ${modes[mode].text} ${number(value)}`,
      };
    },
    choose: (row, column) => selection.set({ layer: layers[row], query: positions[column] }),
    point(cell, el) {
      if (!cell || !el) return tip.hide();
      const [row, column] = cell;
      const line = (text, values) => h("div.ol-fact", {}, h("span", {}, text), h("span", {}, number(at(values, row, column))));
      return tip.show([h("p", {}, `after layer ${rows[row]}, position ${positions[column]}`),
        ...Object.values(modes).map(({ text, values }) => line(text, values))], el);
    },
  });

  const name = h("h4.ol-name");
  const chart = h("div");
  const canvas = h("canvas", { width: rows.length, height: rows.length });
  const cursor = h("div.ol-over.ol-over-cell", { hidden: true });
  const square = h("div.ol-square.ol-small-square", { role: "application", tabindex: 0, "aria-roledescription": "table of cosines" }, canvas, cursor);
  const said = h("p.ol-readout");
  const legend = h("div.ol-legend");
  main.classList.add("ol-residual");
  main.append(
    h("div.ol-pane", {}, grid.el, legend),
    h("div.ol-pane.ol-details", {},
      h("div", {}, name, chart),
      h("div", {}, h("p.ol-caption", {}, "Cosine between all layers here; both axes run from the embedding to the last layer"), square,
        h("div.ol-legend", {}, h("span", {}, "−1", h("span.ol-ramp.ol-both"), "1")), said)));
  const picker = choice("Show", Object.entries(modes).map(([value, { text }]) => [value, text]), mode, (value) => show(value));
  tools.append(picker.el);

  function show(next) {
    mode = next;
    picker.set(next);
    grid.refresh();
    drawLegend();
    say(`Shown: ${modes[next].title}.`);
  }

  function drawLegend() {
    const [low, high] = modes[mode].legend;
    legend.replaceChildren(h("span", {}, low, h(mode === "norms" ? "span.ol-ramp" : "span.ol-ramp.ol-both"), `${high} · ${modes[mode].title}`));
  }

  function drawChart() {
    if (!theme()) return;
    const column = place[1];
    const values = rows.map((_, row) => at(state.norms, row, column));
    name.replaceChildren("At ", promptToken(prompt, positions[column], 18), h("small", {}, ` ${positions[column]}`));
    chart.replaceChildren(h("p.ol-caption", {}, "Length after each layer"), lineChart({
      label: `Length of the residual stream at ${spoken(prompt.tokens[positions[column]])}, layer by layer`,
      rows, series: [{ name: "length", values }], at: place[0], theme: theme(),
      top: roundTop(Math.max(...values.filter((value) => !Number.isNaN(value)), 1e-9)), format: (value) => String(+value.toPrecision(3)),
      choose: (row) => selection.set({ layer: layers[row] }),
    }));
  }

  async function drawMatrix() {
    if (!theme()) return;
    const column = place[1];
    if (!cosines.has(column)) {
      const found = state.cosines ? slice(state.cosines, column)
        : await ask("cosines", "cosines", { column }).then((answer) => answer?.cosines, (error) => { said.textContent = error.message; return null; });
      if (!found) return;
      cosines.set(column, found);
    }
    if (column !== place[1]) return;
    const { data } = cosines.get(column);
    const context = canvas.getContext("2d");
    const image = context.createImageData(rows.length, rows.length);
    const pixels = new Uint32Array(image.data.buffer);
    const masked = mixed([theme().masked, theme().masked], 0);
    data.forEach((value, i) => { pixels[i] = pixel(Number.isNaN(value) ? masked : mixed(theme().diverging, (value + 1) / 2)); });
    context.putImageData(image, 0, 0);
    readOut([place[0], other ?? Math.max(0, place[0] - 1)]);
  }

  function readOut([one, two]) {
    const found = cosines.get(place[1]);
    if (!found) return;
    const value = found.data[one * rows.length + two];
    cursor.hidden = false;
    Object.assign(cursor.style, {
      top: `${(100 * one) / rows.length}%`, left: `${(100 * two) / rows.length}%`,
      width: `${100 / rows.length}%`, height: `${100 / rows.length}%`,
    });
    said.replaceChildren(`after layer ${rows[one]} and after layer ${rows[two]}: cosine `, h("b", {}, Number.isNaN(value) ? "none, a vector has length 0" : value.toFixed(3)));
    square.setAttribute("aria-label", `Cosines between layers. ${said.textContent}`);
  }

  const cellAt = (event) => {
    const box = square.getBoundingClientRect();
    const share = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
    return share.map((value) => Math.min(rows.length - 1, Math.max(0, Math.floor(value * rows.length))));
  };
  square.addEventListener("pointermove", (event) => readOut(cellAt(event)), { signal });
  square.addEventListener("pointerleave", () => readOut([place[0], other ?? Math.max(0, place[0] - 1)]), { signal });
  square.addEventListener("click", (event) => {
    const [row, column] = cellAt(event);
    other = column;
    selection.set({ layer: layers[row] });
    readOut([row, column]);
  }, { signal });
  square.addEventListener("keydown", (event) => {
    const next = moved([place[0], other ?? Math.max(0, place[0] - 1)], event.key, [rows.length, rows.length]);
    if (!next) return;
    handled(event);
    [, other] = next;
    selection.set({ layer: layers[next[0]] });
    readOut(next);
  }, { signal });

  drawLegend();
  return {
    kept: () => ({ mode, other }),
    update({ layer, query }) {
      const column = positions.indexOf(query);
      place = [rowOfLayer(layers, layer, place[0]), column < 0 ? place[1] : column];
      grid.move(...place);
      drawChart();
      drawMatrix();
    },
    paint() {
      grid.refresh();
      drawChart();
      drawMatrix();
    },
    keys: [["← → ↑ ↓", "among cells; among layers in the square"]],
    commands: {
      m: ["the next thing to show", () => show(Object.keys(modes)[(Object.keys(modes).indexOf(mode) + 1) % 3])],
    },
    table() {
      const column = place[1];
      return {
        caption: `Residual stream at ${prompt.tokens[positions[column]]} (${positions[column]})`,
        head: ["after layer", "length", "cosine to the layer before", "cosine to the end"],
        rows: rows.map((label, row) => [label, ...Object.values(modes).map(({ values }) => {
          const value = at(values, row, column);
          return Number.isNaN(value) ? "" : value.toPrecision(5);
        })]),
      };
    },
    picture: () => cellPicture({
      title: `Residual stream: ${modes[mode].title}`, theme: theme(), rows, width: RESIDUAL_WIDTH,
      columns: positions.map((position) => prompt.tokens[position]),
      cell(row, column) {
        const value = at(modes[mode].values, row, column);
        const [ground, ink] = colours(value);
        return { ground, ink, text: number(value) };
      },
    }),
  };
}
