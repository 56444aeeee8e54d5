// The attention view: all heads as small pictures, one of them large, and what one token reads from.

import { arcStrip } from "./arcs.js";
import { cssOf, inkOn, mixed } from "./colour.js";
import { h } from "./dom.js";
import { headGrid } from "./headgrid.js";
import { headMap } from "./headmap.js";
import { choice } from "./panel.js";
import { patternStore, rowOf } from "./patterns.js";
import { mapPicture } from "./picture.js";
import { scorePanel } from "./scoreparts.js";
import { promptToken } from "./tokens.js";
import { number, percent, spoken } from "./words.js";

/** Draw the attention part; see `makeSection` for what comes in and what goes out. */
export function attentionView({ state, prompt, main, tools, theme, selection, ask, say, kept, signal }) {
  const store = patternStore(state, ask);
  const { layers, heads, positions } = state;
  const count = prompt.tokens.length;
  let weighted = Boolean(kept.weighted && state.weighable);
  let order = "none";
  let place = { i: layers.length - 1, j: 0, row: positions.length - 1, key: null };
  let exact = null; // the chosen query's weights once they have come from Python
  const scores = Object.fromEntries(state.scores.map((score) => [score.key, { ...score, values: score.values?.data ?? null }]));

  const pooled = h("span");
  const grid = headGrid({
    layers, heads, signal, resident: Boolean(state.thumbs),
    picture: (i, j) => store.thumb(i, j, weighted, () => grid.paint(theme())),
    choose: (i, j) => selection.set({ layer: layers[i], head: heads[j] }),
  });
  const map = headMap({
    prompt, positions, signal,
    choose: (row, key) => selection.set({ query: positions[row], key }),
    point: (at) => readOut(at),
    drawn(step) {
      pooled.textContent = step > 1 ? `large: each pixel is the largest of ${step} × ${step} weights` : "";
    },
  });
  const strip = arcStrip({
    prompt, positions, signal,
    chooseQuery: (query) => selection.set({ query, key: null }),
    chooseKey: (key) => selection.set({ key }),
  });
  const score = scorePanel({ state, prompt, ask, theme, say, kept: kept.score ?? {} });
  const name = h("h4.ol-name");
  const facts = h("p.ol-facts");
  const readout = h("p.ol-readout");
  const naming = h("span", { hidden: true }, "below a picture: layer.head");
  const touching = h("span", { hidden: true }, h("span.ol-touched-key"), "an intervention acts on it");
  const legend = h("div.ol-legend", {},
    h("span", {}, "0", h("span.ol-ramp"), "1, square-root scale"),
    h("span", {}, h("span.ol-swatch"), "the future, which no token can see"), pooled,
    state.step > 1 ? h("span", {}, `small: the largest of ${state.step} × ${state.step}`) : null, naming, touching);
  main.classList.add("ol-attention");
  if (heads.length > 20) main.classList.add("ol-stacked");
  main.append(
    h("div.ol-pane", {}, h("div.ol-scroll.ol-heads-scroll", {}, grid.el), legend),
    h("div.ol-pane", {}, name, facts, readout, map.el, score.button),
    score.panel,
    h("div.ol-pane.ol-across", {}, strip.el, strip.said));

  const orders = h("select", { onchange: (event) => sortBy(event.target.value) },
    h("option", { value: "none" }, "layer and head"),
    state.scores.map(({ key, label, ascending }) =>
      h("option", { value: key }, `${label}, ${ascending ? "smallest" : "largest"} first`)));
  tools.append(h("label.ol-field", {}, "Order ", orders));
  const weights = choice("Weights", [["false", "weight", "the attention weight alone"],
    ["true", "weight × |value|", "weight times the length of what the head writes for that token, as a share of the row"]],
  String(weighted), (value) => weigh(value === "true"));
  if (state.weighable) tools.append(weights.el);

  async function sortBy(key) {
    order = key;
    orders.value = key;
    const score = scores[key];
    if (score && !score.values) {
      say(`Computing ${score.label} of every head.`);
      const answer = await ask("scores", "scores", { score: key }).catch((error) => { say(error.message); return null; });
      if (!answer) return;
      score.values = answer.values.data;
    }
    if (order !== key) return;
    grid.arrange(score ?? null);
    naming.hidden = !score;
    describe();
    say(score ? `Heads in the order of ${score.label}.` : "Heads by layer.");
  }

  function weigh(on) {
    if (!state.weighable || on === weighted) return;
    weighted = on;
    weights.set(String(on));
    grid.renew();
    showHead();
    say(on ? "Weights times value lengths." : "Attention weights.");
  }

  // ---- what is chosen

  function update(selected) {
    const before = place;
    const at = (list, value, otherwise) => (list.includes(value) ? list.indexOf(value) : otherwise);
    place = {
      i: at(layers, selected.layer, place.i),
      j: at(heads, selected.head, place.j),
      row: at(positions, selected.query, place.row),
      key: selected.key !== null && selected.key < count ? selected.key : null,
    };
    grid.select(place.i, place.j);
    if (before.i !== place.i || before.j !== place.j || !started) showHead();
    else if (before.row !== place.row) showRow();
    else showRow(exact);
    score.show(place);
    started = true;
  }
  let started = false;

  async function showHead() {
    const { i, j } = place;
    describe();
    const known = store.head(i, j, weighted);
    map.show(known, theme());
    showRow();
    if (known) return;
    const on = weighted;
    const found = await store.fetch(i, j, on).catch((error) => { fail(error); return null; });
    if (!found || place.i !== i || place.j !== j || weighted !== on) return;
    map.show(found, theme());
    showRow();
    prefetch(i, j, on);
  }

  /** Fetch the heads beside the chosen one while nothing else is wanted. */
  function prefetch(i, j, on) {
    for (const next of [j + 1, j - 1]) {
      if (heads[next] === undefined || store.head(i, next, on)) continue;
      store.fetch(i, next, on, `beside ${next > j}`).catch(() => null); // only a convenience
    }
  }

  function showRow(known = null) {
    exact = known;
    const pattern = store.head(place.i, place.j, weighted);
    const weightsNow = exact ?? (pattern ? rowOf(pattern, place.row, count) : null);
    const query = positions[place.row];
    map.select(place.row, place.key, `Pattern of layer ${layers[place.i]}, head ${heads[place.j]}. ${sentence(weightsNow)} Arrows move query and key.`);
    strip.show(query, place.key, weightsNow, (weight) => {
      const ground = mixed(theme().ramp, Math.sqrt(weight));
      return [cssOf(ground), inkOn(ground, theme())];
    });
    readOut(null);
    if (known || !pattern || pattern.exact) return;
    const { i, j, row } = place;
    ask("row", "row", { layer: layers[i], head: heads[j], query: row, weighted }).then((answer) => {
      if (answer && place.i === i && place.j === j && place.row === row) showRow(answer.weights.data);
    }, () => null); // a page has levels alone, and marks its numbers as rounded
  }

  function weightAt(row, key) {
    const pattern = store.head(place.i, place.j, weighted);
    if (row === place.row && exact) return [exact[key], true];
    return pattern ? [rowOf(pattern, row, count)[key], Boolean(pattern.exact)] : [NaN, true];
  }

  function readOut(at) {
    const [row, key] = at ?? [place.row, place.key];
    const from = promptToken(prompt, positions[row], 20);
    const small = (position) => h("small", {}, ` ${position} `);
    if (key === null) {
      const [best, weight, sure] = strongest();
      const parts = best === null ? ["…"] : ["mostly reads ", promptToken(prompt, best, 20), small(best), h("b", {}, about(weight, sure))];
      readout.replaceChildren(from, small(positions[row]), ...parts);
      return;
    }
    const [weight, isExact] = weightAt(row, key);
    const what = key > positions[row] ? "cannot see " : "reads ";
    readout.replaceChildren(from, small(positions[row]), what, promptToken(prompt, key, 20), small(key),
      key > positions[row] ? "" : h("b", {}, about(weight, isExact)));
  }
  const about = (weight, isExact) => `${isExact ? "" : "≈ "}${percent(weight)}`;

  function strongest() {
    const pattern = store.head(place.i, place.j, weighted);
    const values = exact ?? (pattern ? rowOf(pattern, place.row, count) : []);
    const best = [...values].reduce((top, value, key) => (value > (values[top] ?? -1) ? key : top), null);
    return [best, values[best], Boolean(exact || pattern?.exact)];
  }

  function sentence(weightsNow) {
    const query = positions[place.row];
    const word = (position) => `${spoken(prompt.tokens[position])} at ${position}`;
    if (place.key === null || !weightsNow) return `Query ${word(query)}.`;
    return `Query ${word(query)} reads ${word(place.key)}: ${percent(weightsNow[place.key])}.`;
  }

  function describe() {
    const at = place.i * heads.length + place.j;
    name.textContent = `Layer ${layers[place.i]}, head ${heads[place.j]}`;
    facts.replaceChildren(...Object.values(scores).filter(({ values }) => values).map(({ key, label, meaning, share, values }) =>
      h("span", { title: meaning, "data-order": key === order }, `${label} `, h("b", {}, !share ? number(values[at]) : percent(values[at])))));
  }

  function fail(error) {
    map.show(null, theme());
    readout.replaceChildren(error.message);
    say(error.message);
  }

  const step = (by) => {
    const keys = ["none", ...state.scores.map(({ key }) => key)];
    sortBy(keys[(keys.indexOf(order) + by) % keys.length]);
  };
  grid.arrange(null);
  if (kept.order && kept.order !== "none") sortBy(kept.order);

  return {
    update,
    touch(touched) {
      grid.touch(touched);
      touching.hidden = !touched.length;
    },
    kept: () => ({ order, weighted, score: score.kept() }),
    paint() {
      grid.paint(theme());
      map.show(store.head(place.i, place.j, weighted), theme());
      showRow(exact);
      score.paint();
    },
    keys: [["← → ↑ ↓", "among heads; in the large pattern, among keys and queries"]],
    commands: {
      o: ["the next order of heads", () => step(1)],
      q: ["the score by dimensions of query and key", () => score.toggle()],
      ...(state.weighable && { v: ["weights times value lengths, or alone", () => weigh(!weighted)] }),
    },
    table() {
      const rows = [...Array(count).keys()].filter((key) => key <= positions[place.row]);
      return {
        caption: `Layer ${layers[place.i]}, head ${heads[place.j]}: what ${prompt.tokens[positions[place.row]]} (${positions[place.row]}) reads`,
        head: ["position", "token", weighted ? "weight × |value|, share" : "weight"],
        rows: rows.map((key) => [key, prompt.tokens[key], weightAt(place.row, key)[0].toPrecision(4)]),
      };
    },
    picture: () => mapPicture({
      title: name.textContent, canvas: map.canvas, theme: theme(),
      rows: positions.map((position) => prompt.tokens[position]), columns: prompt.tokens,
    }),
  };
}
