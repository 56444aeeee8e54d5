// The lens view: what each layer would predict at each position, and the ways of followed tokens.

import { slice } from "./arrays.js";
import { cellGrid } from "./cellgrid.js";
import { cssOf, inkOn, mixed } from "./colour.js";
import { h, setStyle } from "./dom.js";
import { lineChart, markerOf, roundTop } from "./lines.js";
import { choice } from "./panel.js";
import { cellPicture } from "./picture.js";
import { labelEl, promptToken } from "./tokens.js";
import { percent, spoken } from "./words.js";

const MOST_FOLLOWED = 6;
const LENS_WIDTH = 78;

/**
 * Return the rank of a position's final answer in one row: 0 is the top, k stands for "not in the top k".
 * @param {Int32Array} ids of the row's best tokens
 * @param {number} final id of the last row's best token
 */
export function rankOf(ids, final) {
  const found = ids.indexOf(final);
  return found < 0 ? ids.length : found;
}

/** @returns {number | string} the layer that a click on a row selects */
export function rowOfLayer(layers, layer, otherwise) {
  const found = layers.lastIndexOf(layer); // of "3 mid" and "3 post", what the layer leaves behind
  return found < 0 ? otherwise : found;
}

/** Draw the lens part. */
export function lensView({ state, prompt, main, tools, theme, selection, ask, say, tip, kept, signal }) {
  const { rows, layers, positions, ids, probs, entropy, kl, words } = state;
  const [nRows, nColumns, k] = ids.shape;
  const last = nRows - 1;
  const cellOf = (row, column) => ({
    ids: slice(ids, row, column).data,
    probs: slice(probs, row, column).data,
    entropy: entropy.data[row * nColumns + column],
    kl: kl.data[row * nColumns + column],
  });
  const largest = (values) => values.data.reduce((top, value) => Math.max(top, value), 1e-9);
  const tops = { entropy: largest(entropy), kl: largest(kl) };
  const followed = []; // { token, label, rank, prob }
  let mode = "probability";
  let place = [last, nColumns - 1];

  const modes = {
    probability: { text: "probability", share: (cell) => cell.probs[0], show: (cell) => percent(cell.probs[0]), legend: ["0", "1"] },
    entropy: {
      text: "entropy", share: (cell) => cell.entropy / tops.entropy, show: (cell) => cell.entropy.toFixed(2),
      legend: ["0", `${tops.entropy.toFixed(1)} nats: how undecided`],
    },
    kl: {
      text: "KL to the end", share: (cell) => cell.kl / tops.kl, show: (cell) => cell.kl.toFixed(2),
      legend: ["0", `${tops.kl.toFixed(1)} nats: how far from the final prediction`],
    },
    rank: {
      text: "rank of the final answer", share: (cell, row, column) => 1 - rankOf(cell.ids, finalOf(column)) / k,
      show: (cell, row, column) => rankText(rankOf(cell.ids, finalOf(column))),
      legend: [`not in the top ${k}`, "first"],
    },
  };
  const finalOf = (column) => slice(ids, last, column).data[0];
  const rankText = (rank) => (rank < k ? `#${rank + 1}` : `> ${k}`);
  const shareOf = (row, column) => {
    const one = followed.find(({ token }) => mode === `token ${token}`);
    return one ? one.prob.data[row * nColumns + column] : modes[mode].share(cellOf(row, column), row, column);
  };
  const textOf = (row, column) => {
    const one = followed.find(({ token }) => mode === `token ${token}`);
    return one ? percent(one.prob.data[row * nColumns + column]) : modes[mode].show(cellOf(row, column), row, column);
  };
  const colours = (share) => {
    const ground = mixed(theme().ramp, Number.isNaN(share) ? 0 : share);
    return [cssOf(ground), inkOn(ground, theme())];
  };

  const grid = cellGrid({
    label: "Logit lens: rows are layers, columns positions", rows, prompt, positions, width: LENS_WIDTH, signal,
    cell(row, column) {
      const found = cellOf(row, column);
      const [ground, ink] = theme() ? colours(shareOf(row, column)) : [];
      const label = words[found.ids[0]];
      const next = prompt.ids[positions[column] + 1];
      return {
        children: [labelEl(label, { most: 9 }), h("small", {}, textOf(row, column))],
        ground, ink, mark: found.ids[0] === next ? "ol-true" : null,
        label: `after layer ${rows[row]}, position ${positions[column]}: ${spoken(label)}, ${percent(found.probs[0])}, entropy ${found.entropy.toFixed(2)}`,
      };
    },
    choose: (row, column) => selection.set({ layer: layers[row], query: positions[column], token: cellOf(row, column).ids[0] }),
    point(at, el) {
      if (!at || !el) tip.hide();
      else tip.show(guesses(...at, 5), el);
    },
  });

  const detail = h("div");
  const chart = h("div");
  const chips = h("div.ol-chips");
  const field = h("input.ol-input", { type: "text", size: 14, placeholder: "·token", "aria-label": "Token to follow; a dot stands for its leading space" });
  const form = h("form.ol-follow", {
    onsubmit(event) {
      event.preventDefault();
      if (field.value) follow({ text: field.value.replace(/^·/, " ") });
    },
  }, h("label.ol-field", {}, "Follow ", field), h("button.ol-button", { type: "submit" }, "Add"), chips);
  const legend = h("div.ol-legend");
  main.append(
    h("div.ol-pane", {}, grid.el, legend),
    h("div.ol-pane.ol-details", {}, detail, h("div", {}, chart, form)));
  const picker = choice("Colour by", Object.entries(modes).map(([value, { text }]) => [value, text]), mode, (value) => colourBy(value));
  tools.append(h("span.ol-field.ol-with", {}, "Colour by", picker.el));

  function colourBy(next) {
    mode = next;
    picker.set(next);
    grid.refresh();
    drawLegend();
    drawChips();
    say(`Colour: ${modes[next]?.text ?? "probability of the followed token"}.`);
  }

  function drawLegend() {
    const [low, high] = modes[mode]?.legend ?? ["0", "1: probability of the followed token"];
    legend.replaceChildren(h("span", {}, low, h("span.ol-ramp"), high),
      h("span", {}, h("span.ol-true-key", {}, "word"), " stands there next in the prompt"));
  }

  /** The guesses of a cell with bars, as children of a card. */
  function guesses(row, column, most) {
    const found = cellOf(row, column);
    const lines = [...found.ids].slice(0, most).map((id, i) => h("div.ol-guess", { style: { "--ol-part": `${100 * found.probs[i]}%` } },
      labelEl(words[id], { most: 20 }), h("span", {}, percent(found.probs[i]))));
    return [h("p", {}, `after layer ${rows[row]}, position ${positions[column]}: entropy ${found.entropy.toFixed(2)}, KL ${found.kl.toFixed(2)} nats`), ...lines];
  }

  function drawDetail() {
    const [row, column] = place;
    const found = cellOf(row, column);
    const where = rows[row] === "embed" ? "Before the first layer" : `After layer ${rows[row]}`;
    const lines = [...found.ids].map((id, i) => {
      const on = followed.some(({ token }) => token === id);
      return h("button.ol-guess", {
        type: "button", style: { "--ol-part": `${100 * found.probs[i]}%` }, "aria-pressed": String(on),
        "aria-label": `${spoken(words[id])}, ${percent(found.probs[i])}; ${on ? "stop following" : "follow"}`,
        title: on ? "stop following" : "follow through the layers", onclick: () => follow({ token: id }),
      }, labelEl(words[id], { most: 22 }), h("span", {}, percent(found.probs[i])));
    });
    detail.replaceChildren(
      h("h4.ol-name", {}, `${where}, at `, promptToken(prompt, positions[column], 18), h("small", {}, ` ${positions[column]}`)),
      h("p.ol-facts", {},
        h("span", {}, "entropy ", h("b", {}, found.entropy.toFixed(2)), " nats"),
        h("span", {}, "KL to the end ", h("b", {}, found.kl.toFixed(2)), " nats"),
        h("span", {}, "final answer: rank ", h("b", {}, rankText(rankOf(found.ids, finalOf(column)))))),
      h("div.ol-guesses", {}, lines));
  }

  function drawChart() {
    if (!theme()) return;
    const column = place[1];
    const series = followed.length
      ? followed.map(({ label, prob }) => ({ name: label, values: rows.map((_, row) => prob.data[row * nColumns + column]) }))
      : [{ name: words[finalOf(column)], values: rows.map((_, row) => shareOfFinal(row, column)) }];
    const names = series.map(({ name }) => spoken(name)).join(", ");
    chart.replaceChildren(
      h("p.ol-caption", {}, followed.length ? "Probability of the followed tokens here" : ["Probability of the final answer here, ", labelEl(series[0].name), `; 0 where it is not in the top ${k}`]),
      lineChart({
        label: `Probability along the layers of ${names}`, rows, series, at: place[0], theme: theme(),
        top: roundTop(Math.max(0.01, ...series.flatMap(({ values }) => [...values]))), format: (share) => `${+(100 * share).toPrecision(2)} %`,
        choose: (row) => selection.set({ layer: layers[row] }),
      }));
  }
  const shareOfFinal = (row, column) => {
    const found = cellOf(row, column);
    const at = found.ids.indexOf(finalOf(column));
    return at < 0 ? 0 : found.probs[at];
  };

  function drawChips() {
    chips.replaceChildren(...followed.map(({ token, label }, i) => {
      const marker = h("span", { "aria-hidden": "true" }, markerOf(i));
      if (theme()) setStyle(marker, { color: theme().series[i] });
      return h("span.ol-chip", {}, marker, labelEl(label),
        h("button", {
          type: "button", title: "colour the table by this token", "aria-pressed": String(mode === `token ${token}`),
          onclick: () => colourBy(mode === `token ${token}` ? "probability" : `token ${token}`),
        }, "colour"),
        h("button", { type: "button", "aria-label": `Stop following ${spoken(label)}`, onclick: () => follow({ token }) }, "×"));
    }));
  }

  /** Follow a token through all cells, or stop following it. */
  async function follow(wanted) {
    const at = followed.findIndex(({ token }) => token === wanted.token);
    if (at >= 0) {
      followed.splice(at, 1);
      if (mode === `token ${wanted.token}`) colourBy("probability");
    } else if (followed.length === MOST_FOLLOWED) {
      return note(`At most ${MOST_FOLLOWED} tokens are followed: remove one first.`);
    } else {
      const answer = await ask("follow", "follow", wanted).catch((error) => { note(error.message); return null; });
      if (!answer || followed.some(({ token }) => token === answer.token)) return null;
      followed.push(answer);
      field.value = "";
    }
    note("");
    drawDetail();
    drawChart();
    drawChips();
    return null;
  }

  const trouble = h("p.ol-trouble", { role: "status" });
  form.append(trouble);
  function note(text) {
    trouble.textContent = text;
  }

  /** Take over what another run was looked at with. */
  async function restore() {
    for (const { token } of kept.followed) await follow({ token });
    if (kept.mode in modes || followed.some(({ token }) => kept.mode === `token ${token}`)) colourBy(kept.mode);
  }

  drawLegend();
  if (kept.mode && (kept.mode !== mode || kept.followed.length)) restore();
  return {
    kept: () => ({ mode, followed: followed.map(({ token }) => ({ token })) }),
    update({ layer, query }) {
      const column = positions.indexOf(query);
      place = [rowOfLayer(layers, layer, place[0]), column < 0 ? place[1] : column];
      grid.move(...place);
      drawDetail();
      drawChart();
    },
    paint() {
      grid.refresh();
      drawChart();
      drawChips();
    },
    keys: [["← → ↑ ↓", "among cells"]],
    commands: {
      m: ["the next way to colour", () => colourBy(Object.keys(modes)[(Object.keys(modes).indexOf(mode) + 1) % 4])],
      f: ["follow the likeliest token of the cell, or stop", () => follow({ token: cellOf(...place).ids[0] })],
    },
    table() {
      const column = place[1];
      return {
        caption: `The lens after ${prompt.tokens[positions[column]]} (${positions[column]})`,
        head: ["after layer", "rank", "token", "id", "probability", "entropy", "KL to the end"],
        rows: rows.flatMap((name, row) => {
          const found = cellOf(row, column);
          return [...found.ids].map((id, i) => [name, i + 1, words[id], id, found.probs[i].toPrecision(4), found.entropy.toFixed(4), found.kl.toFixed(4)]);
        }),
      };
    },
    picture: () => cellPicture({
      title: `Logit lens: the likeliest next token (colour: ${modes[mode]?.text ?? "followed token"})`, theme: theme(),
      rows, columns: positions.map((position) => prompt.tokens[position]), width: LENS_WIDTH,
      cell(row, column) {
        const [ground, ink] = colours(shareOf(row, column));
        return { ground, ink, text: words[cellOf(row, column).ids[0]] };
      },
    }),
  };
}
