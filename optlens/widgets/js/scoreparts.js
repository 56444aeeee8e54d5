// What an attention score is made of: query and key in every dimension of the head, and their products.

import { h, keepingFocus, setStyle } from "./dom.js";
import { choice } from "./panel.js";
import { Kept } from "./patterns.js";
import { promptToken } from "./tokens.js";
import { percent } from "./words.js";

const DETAIL_BYTES = 16_000_000; // of queries with their keys, kept for coming back

/** @returns {Float64Array} what each dimension adds to a score */
export function productsOf(q, k, scale) {
  return Float64Array.from(q, (value, dimension) => value * k[dimension] * scale);
}

/** @returns {number[]} dimensions by the size of their product, the largest first, or as they are */
export function termOrder(products, by) {
  const places = [...products.keys()];
  return by === "size" ? places.sort((a, b) => Math.abs(products[b]) - Math.abs(products[a]) || a - b) : places;
}

/** @returns {(value: number) => number} per cent of a track on which all products and 0 have room */
export function termScale(products) {
  const [low, high] = [Math.min(0, ...products), Math.max(0, ...products)];
  return (value) => (100 * (value - low)) / (high - low || 1);
}

/** @returns {number} how many of a query's scores are larger than that of a key */
export function scoreRank(scores, key) {
  return scores.reduce((count, score) => count + (score > scores[key] ? 1 : 0), 0);
}

/** @returns {string} a number with its sign, all with the same digits so that they can be added by eye */
export function withSign(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}

/**
 * Return a button with the panel that it opens.
 * @param {object} given
 * @param {object} given.state of the attention part
 * @param {object} given.prompt the prompt
 * @param {(channel: string, what: string, wanted: object) => Promise<any>} given.ask
 * @param {() => object} given.theme the colours in force
 * @param {(text: string) => void} given.say tells a screen reader
 * @param {{ open?: boolean, by?: string }} given.kept how it stood in a section before this one
 */
export function scorePanel({ state, prompt, ask, theme, say, kept }) {
  const { layers, heads, positions } = state;
  const known = new Kept(DETAIL_BYTES);
  let [open, by] = [Boolean(kept.open), kept.by ?? "size"];
  let place = null;
  let drawn = null; // what stands there: the detail and the key

  const button = h("button.ol-button", { type: "button", title: "query and key of the score, by dimension (q)", onclick: () => toggle() }, "Score: q · k");
  const order = choice("Dimensions", [["size", "by size", "the largest products first"], ["dimension", "by dimension", "in the order of the head's dimensions"]],
    by, (value) => { by = value; order.set(value); draw(); });
  const name = h("p.ol-terms-name");
  const facts = h("p.ol-facts");
  const trouble = h("p.ol-trouble", { role: "status", hidden: true });
  const table = h("div.ol-scroll.ol-terms-scroll", { tabindex: 0, role: "region", "aria-label": "Products of query and key" });
  const said = h("p.ol-caption");
  const content = h("div.ol-terms-content", {}, h("div", {}, name, facts, order.el, said), table);
  const panel = h("div.ol-panel.ol-terms-panel.ol-across", { role: "group", "aria-label": "The score by dimension" }, trouble, content);

  function toggle() {
    open = !open;
    settle();
    say(open ? "The score by dimension." : "Closed.");
    if (open && place) show(place);
  }

  function settle() {
    button.setAttribute("aria-expanded", String(open));
    panel.hidden = !open;
  }

  function fail(text) {
    trouble.textContent = text;
    trouble.hidden = !text;
    content.hidden = Boolean(text);
    panel.removeAttribute("aria-busy");
  }

  /** Show the score at a place of the view: `{ i, j, row, key }`; without a key, that of the key read most. */
  async function show(next) {
    place = next;
    if (!open) return;
    const { i, j, row } = next;
    const at = `${i} ${j} ${row}`;
    if (!known.get(at)) {
      if (state.obstacle) return fail(state.obstacle);
      panel.setAttribute("aria-busy", "true");
      const wanted = { layer: layers[i], head: heads[j], query: row };
      let problem = "";
      const answer = await ask("detail", "detail", wanted).catch((error) => { problem = error.message; });
      if (answer) known.set(at, answer, 4 * answer.k.data.length);
      if (place.i !== i || place.j !== j || place.row !== row) return; // a newer place is asked for
      if (!answer) return problem && fail(problem);
    }
    fail("");
    const detail = known.get(at);
    const { data } = detail.weights;
    drawn = { detail, key: place.key ?? data.indexOf(Math.max(...data)) };
    draw();
  }

  function draw() {
    if (!open || !drawn || !theme()) return;
    const { detail: { q, k, scores, weights, scale, agrees }, key } = drawn;
    const query = positions[place.row];
    const small = (position) => h("small", {}, ` ${position} `);
    name.replaceChildren("q of ", promptToken(prompt, query, 20), small(query), "· k of ", promptToken(prompt, key, 20), small(key));
    const count = scores.data.length;
    if (key >= count) {
      facts.replaceChildren("a key in the query's future, which it cannot see");
      table.replaceChildren();
      said.replaceChildren();
      return;
    }
    const width = q.data.length;
    const vector = k.data.subarray(key * width, (key + 1) * width);
    const products = productsOf(q.data, vector, scale);
    facts.replaceChildren(
      h("span", {}, "score ", h("b", {}, withSign(scores.data[key], 3))),
      h("span", {}, "rank ", h("b", {}, String(scoreRank(scores.data, key) + 1)), ` of ${count} keys`),
      h("span", {}, "weight ", h("b", {}, percent(weights.data[key]))));
    keepingFocus(table, () => table.replaceChildren(termTable({ q: q.data, k: vector, products, by, score: scores.data[key], theme: theme() })));
    said.textContent = `Product: q · k / √${width}; q and k include their biases. The products of all ${width} dimensions add up to the score, and the softmax over the ${count === 1 ? "only key" : `${count} keys`} that the query may see makes it a weight.${place.key === null ? " Shown for the key that it reads most." : ""}${agrees ? "" : " An intervention or hook acts behind this: the recorded weight is another one."}`;
  }

  settle();
  return { button, panel, show, toggle, paint: draw, kept: () => ({ open, by }) };
}

/** Return the table of dimensions, with a bar for each product and their sum below. */
function termTable({ q, k, products, by, score, theme }) {
  const x = termScale(products);
  const bar = (value) => h(value < 0 ? "span.ol-step-bar.ol-down" : "span.ol-step-bar.ol-up",
    { style: { left: `${Math.min(x(value), x(0))}%`, width: `${Math.abs(x(value) - x(0))}%` } });
  const rows = termOrder(products, by).map((dimension) => h("tr", { "data-dimension": dimension },
    h("th", { scope: "row" }, String(dimension)),
    h("td", {}, withSign(q[dimension], 2)), h("td", {}, withSign(k[dimension], 2)),
    h("td.ol-terms-bar", {}, h("div.ol-track", {}, bar(products[dimension]))),
    h("td", {}, withSign(products[dimension], 3))));
  const made = h("table.ol-table.ol-terms", {},
    h("thead", {}, h("tr", {}, ["dim", "q", "k"].map((text) => h("th", { scope: "col" }, text)),
      h("td.ol-terms-bar"), h("th", { scope: "col" }, "product"))),
    h("tbody", {}, rows),
    h("tfoot", {}, h("tr", {}, h("th", { scope: "row", colspan: 4 }, "sum = score"), h("td", {}, withSign(score, 3)))));
  setStyle(made, { "--ol-rises": theme.diverging.at(-2), "--ol-falls": theme.diverging[1], "--ol-zero": `${x(0)}%` });
  return made;
}
