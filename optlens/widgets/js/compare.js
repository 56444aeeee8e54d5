// The compare view: two runs in one table, how far they are apart in each cell, both sides' tokens.

import { slice } from "./arrays.js";
import { cellGrid } from "./cellgrid.js";
import { cssOf, inkOn, mixed } from "./colour.js";
import { h } from "./dom.js";
import { rowOfLayer } from "./lens.js";
import { lineChart, roundTop } from "./lines.js";
import { choice } from "./panel.js";
import { cellPicture } from "./picture.js";
import { labelEl } from "./tokens.js";
import { number, percent, spoken } from "./words.js";

const COMPARE_WIDTH = 84;
const LEAST_TOP = 1e-4; // differences of rounding alone stay pale
const NAMES = ["A", "B"];

/** @returns {number} the share of the ramp for a difference; small ones can be told apart too */
export function shareOfDifference(value, top) {
  return Number.isNaN(value) ? 0 : Math.sqrt(Math.max(value, 0) / Math.max(top, LEAST_TOP));
}

/**
 * Return the next cell in reading order, after a place, at which something changed; null if nowhere.
 * @param {Uint8Array} changed row after row
 */
export function nextChange(changed, [row, column], columns) {
  const start = row * columns + column;
  for (let step = 1; step <= changed.length; step += 1) {
    const at = (start + step) % changed.length;
    if (changed[at]) return [Math.floor(at / columns), at % columns];
  }
  return null;
}

/** @returns {string} a difference as people read it */
export function written(value) {
  if (value > 0 && value < 0.001) return "< 0.001";
  return Math.abs(value) < 1 ? value.toFixed(3) : number(value);
}

/** @returns {number} the largest of some numbers that are numbers */
export function largestOf(values) {
  return values.reduce((top, value) => (value > top ? value : top), 0);
}

/** Draw the compare part. */
export function compareView({ state, main, tools, theme, selection, say, tip, prompt, signal }) {
  const { rows, layers, sides, words, changed } = state;
  const nColumns = prompt.tokens.length;
  const positions = [...Array(nColumns).keys()];
  const at = (values, row, column) => values.data[row * nColumns + column];
  const alone = (column) => sides.findIndex(({ places }) => places[column] === null);
  const didChange = (row, column) => Boolean(at(changed, row, column));
  const guessesOf = (side, row, column) => {
    const ids = [...slice(sides[side].ids, row, column).data];
    const probs = slice(sides[side].probs, row, column).data;
    return ids.map((id, i) => ({ id, label: words[id], prob: probs[i] })).filter(({ id }) => id >= 0);
  };
  const difference = state.cosine && { shape: state.cosine.shape, data: state.cosine.data.map((value) => 1 - value) };
  const modes = {
    kl: { text: "KL", title: "KL(A ‖ B) of the two predictions, nats", values: state.kl, shown: state.kl },
    js: { text: "Jensen–Shannon", title: "Jensen–Shannon divergence, nats (at most 0.69)", values: state.js, shown: state.js },
  };
  if (state.cosine) modes.cosine = { text: "cosine", title: "cosine of the two residual streams", values: difference, shown: state.cosine };
  for (const each of Object.values(modes)) each.top = largestOf(each.values.data);
  const names = Object.keys(modes);
  let mode = "kl";
  let place = [rows.length - 1, nColumns - 1];

  const colours = (row, column) => {
    const ground = mixed(theme().ramp, shareOfDifference(at(modes[mode].values, row, column), modes[mode].top));
    return [cssOf(ground), inkOn(ground, theme())];
  };
  const value = (row, column) => (mode === "cosine" ? at(state.cosine, row, column).toFixed(3) : written(at(modes[mode].shown, row, column)));
  const where = (side, column) => `${NAMES[side]} ${sides[side].places[column] ?? "has no token"}`;

  function headOf(column) {
    const token = (side) => sides[side].tokens[column] === null
      ? h("span.ol-gap", { title: `${NAMES[side]} has no token here` }, "—")
      : labelEl(sides[side].tokens[column], { most: 10 });
    const [one, other] = sides.map(({ places }) => places[column]);
    const numbers = one === other ? String(one) : `${one ?? "–"} | ${other ?? "–"}`;
    return state.same_prompt ? [token(0), h("small", {}, numbers)] : [token(0), token(1), h("small", {}, numbers)];
  }

  function cellOf(row, column) {
    const lone = alone(column);
    if (lone >= 0) {
      const [best] = guessesOf(1 - lone, row, column);
      return {
        children: [labelEl(best.label, { most: 9 }), h("small", {}, `only ${NAMES[1 - lone]}`)], mark: "ol-alone",
        label: `after layer ${rows[row]}, ${where(1 - lone, column)}: only ${NAMES[1 - lone]} has a token here; ${spoken(best.label)}, ${percent(best.prob)}`,
      };
    }
    const [[one], [other]] = [guessesOf(0, row, column), guessesOf(1, row, column)];
    const [ground, ink] = theme() ? colours(row, column) : [];
    const said = didChange(row, column) ? `changed from ${spoken(one.label)} to ${spoken(other.label)}` : `both ${spoken(one.label)}`;
    return {
      children: didChange(row, column) ? [labelEl(one.label, { most: 9 }), labelEl(other.label, { most: 9 })]
        : [labelEl(one.label, { most: 9 }), h("small", {}, value(row, column))],
      ground, ink, mark: didChange(row, column) ? "ol-changed" : null,
      label: `after layer ${rows[row]}, ${where(0, column)}, ${where(1, column)}: ${said}, ${modes[mode].text} ${value(row, column)}`,
    };
  }

  const grid = cellGrid({
    label: "Two runs compared: rows are layers, columns aligned tokens", rows, prompt, positions, width: COMPARE_WIDTH, signal,
    heading: headOf, cell: cellOf,
    choose: (row, column) => selection.set({ layer: layers[row], query: column }),
    point(cell, el) {
      if (!cell || !el) tip.hide();
      else tip.show(card(...cell), el);
    },
  });

  function card(row, column) {
    const line = (text, values, digits) => h("div.ol-fact", {}, h("span", {}, text), h("span", {}, digits ? values.toFixed(3) : written(values)));
    const best = NAMES.map((name, side) => guessesOf(side, row, column)[0]).map((guess, side) => guess &&
      h("div.ol-fact", {}, h("span", {}, `${NAMES[side]} `, labelEl(guess.label, { most: 16 })), h("span", {}, percent(guess.prob))));
    return [h("p", {}, `after layer ${rows[row]} · ${where(0, column)}, ${where(1, column)}`), ...best.filter(Boolean),
      ...(alone(column) >= 0 ? [] : names.map((name) => line(modes[name].text, at(modes[name].shown, row, column), name === "cosine")))];
  }

  const legend = h("div.ol-legend");
  const name = h("h4.ol-name");
  const facts = h("p.ol-facts");
  const pair = h("div.ol-answers");
  const chart = h("div");
  main.classList.add("ol-compare");
  if (state.same_prompt) main.classList.add("ol-one-prompt");
  const sideEl = ({ text }, i) => h("li", {}, h("b.ol-side", {}, NAMES[i]), h("bdi", {}, text),
    state.same_model ? null : h("small", {}, i ? "the second model" : "the first model"));
  main.append(
    h("ul.ol-sides", { "aria-label": "What is compared" }, sides.map(sideEl)),
    h("div.ol-pane", {}, grid.el, legend),
    h("div.ol-pane.ol-details", {}, h("div", {}, name, facts, pair), chart));
  const picker = choice("Colour by", names.map((key) => [key, modes[key].text, modes[key].title]), mode, (next) => colourBy(next));
  const seek = h("button.ol-button", { type: "button", title: "the next cell in which the likeliest token differs (n)", onclick: () => next() }, "Next change");
  tools.append(h("span.ol-field.ol-with", {}, "Colour by", picker.el), seek);

  function colourBy(next) {
    mode = next;
    picker.set(next);
    grid.refresh();
    drawLegend();
    say(`Colour: ${modes[next].title}.`);
  }

  function next() {
    const found = nextChange(changed.data, place, nColumns);
    if (!found) {
      say("The likeliest token is the same everywhere.");
      return;
    }
    selection.set({ layer: layers[found[0]], query: found[1] });
    say(cellOf(...found).label);
  }

  function drawLegend() {
    const count = largestOf([changed.data.reduce((sum, one) => sum + one, 0)]);
    const ends = mode === "cosine" ? ["1", number(1 - modes.cosine.top)] : ["0", number(modes[mode].top)];
    legend.replaceChildren(
      h("span", {}, ends[0], h("span.ol-ramp"), `${ends[1]} · ${modes[mode].title}, square-root scale`),
      h("span", {}, h("span.ol-change-key"), `A above, B below: the likeliest token differs (${count} of ${changed.data.length} cells)`),
      sides.some(({ places }) => places.includes(null)) ? h("span", {}, h("span.ol-swatch.ol-alone"), "only one prompt has a token here") : "");
    seek.disabled = !count;
  }

  function drawDetail() {
    const [row, column] = place;
    const start = rows[row] === "embed" ? "Before the first layer" : `After layer ${rows[row]}`;
    const tokens = sides.map(({ tokens: all }) => all[column]);
    const both = tokens[0] === tokens[1] ? [labelEl(tokens[0], { most: 18 })]
      : [tokens[0] === null ? "—" : labelEl(tokens[0], { most: 14 }), h("small", {}, "|"), tokens[1] === null ? "—" : labelEl(tokens[1], { most: 14 })];
    name.replaceChildren(`${start}, at `, ...both, h("small", {}, `${where(0, column)} · ${where(1, column)}`));
    const fact = (text, shown) => h("span", {}, `${text} `, h("b", {}, shown));
    facts.replaceChildren(...(alone(column) >= 0 ? [h("span", {}, "Nothing to compare with: one prompt has no token here.")]
      : [fact("KL", written(at(state.kl, row, column))), fact("JS", written(at(state.js, row, column))),
        state.cosine ? fact("cosine", at(state.cosine, row, column).toFixed(4)) : "the streams differ in width",
        h("span", {}, "at the end: KL(A ‖ B) ", h("b", {}, written(state.end.kl.data[column])), ", KL(B ‖ A) ", h("b", {}, written(state.end.kl_reverse.data[column])))]));
    const lists = NAMES.map((side, i) => guessesOf(i, row, column));
    pair.replaceChildren(...lists.map((list, i) => listOf(list, lists[1 - i], i)),
      lists.every((list) => list.length) ? h("p.ol-caption.ol-across", {}, h("span.ol-change-key"), "not in the other's list") : "");
  }

  /** One side's likeliest tokens; those that the other side does not list are marked. */
  function listOf(list, other, side) {
    if (!list.length) return h("div", {}, h("p.ol-caption", {}, h("b.ol-side", {}, NAMES[side])), h("p.ol-facts", {}, "no token here"));
    return h("div", {}, h("p.ol-caption", {}, h("b.ol-side", {}, NAMES[side]), "predicts"),
      h("ol.ol-guesses", { "aria-label": `${NAMES[side]} predicts` }, list.map(({ id, label, prob }) => {
        const only = other.length > 0 && !other.some((one) => one.id === id);
        return h(only ? "li.ol-guess.ol-only" : "li.ol-guess", { style: { "--ol-part": `${100 * prob}%` } },
          h("span", {}, labelEl(label, { most: 18 }), only ? h("span.ol-hidden", {}, `, not in ${NAMES[1 - side]}'s list`) : null), h("span", {}, percent(prob)));
      })));
  }

  function drawChart() {
    if (!theme()) return;
    const column = place[1];
    if (alone(column) >= 0) {
      chart.replaceChildren();
      return;
    }
    const series = ["kl", "js"].map((key) => ({ name: modes[key].text, values: rows.map((_, row) => at(state[key], row, column)) }));
    const key = series.map((one, i) => [h("span", { style: { color: theme().series[i] }, "aria-hidden": "true" }, i ? "■ " : "● "), `${one.name}${i ? "" : " and "}`]);
    chart.replaceChildren(h("p.ol-caption", {}, "How far apart after each layer: ", key, ", nats"), lineChart({
      label: "KL and Jensen–Shannon divergence after each layer", rows, series, at: place[0], theme: theme(),
      top: roundTop(Math.max(1e-6, ...series.flatMap(({ values }) => values))), format: (one) => String(+one.toPrecision(2)),
      choose: (row) => selection.set({ layer: layers[row] }),
    }));
  }

  drawLegend();
  return {
    update({ layer, query }) {
      place = [rowOfLayer(layers, layer, place[0]), query !== null && query < nColumns ? query : place[1]];
      grid.select(...place);
      drawDetail();
      drawChart();
    },
    paint() {
      grid.refresh();
      drawChart();
    },
    keys: [["← → ↑ ↓", "among cells"]],
    commands: {
      m: ["the next way to colour", () => colourBy(names[(names.indexOf(mode) + 1) % names.length])],
      n: ["the next changed prediction", () => next()],
    },
    table() {
      const column = place[1];
      const shown = (values, row) => (Number.isNaN(at(values, row, column)) ? "" : at(values, row, column).toPrecision(5));
      return {
        caption: `Two runs compared at ${prompt.tokens[column]} (column ${column})`,
        head: ["after layer", "rank", "A predicts", "probability in A", "B predicts", "probability in B", "KL(A || B)", "JS", "cosine"],
        rows: rows.flatMap((label, row) => {
          const [one, other] = [guessesOf(0, row, column), guessesOf(1, row, column)];
          const cells = (list, i) => (list[i] ? [list[i].label, list[i].prob.toPrecision(4)] : ["", ""]);
          return (one.length ? one : other).map((_, i) => [label, i + 1, ...cells(one, i), ...cells(other, i),
            shown(state.kl, row), shown(state.js, row), state.cosine ? shown(state.cosine, row) : ""]);
        }),
      };
    },
    picture: () => cellPicture({
      title: `Two runs compared: ${modes[mode].title}`, theme: theme(), rows, columns: prompt.tokens, width: COMPARE_WIDTH + 24,
      cell(row, column) {
        const lone = alone(column);
        if (lone >= 0) return { ground: theme().masked, ink: theme().muted, text: `only ${NAMES[1 - lone]}` };
        const [ground, ink] = colours(row, column);
        const [one, other] = [guessesOf(0, row, column)[0].label, guessesOf(1, row, column)[0].label];
        return { ground, ink, text: didChange(row, column) ? `${one.slice(0, 6)}→${other.slice(0, 6)}` : one };
      },
    }),
  };
}
