// The prompt in one line with arcs from the chosen token to those that it reads from.

import { h, setStyle, whenSeen } from "./dom.js";
import { percent } from "./words.js";
import { promptToken } from "./tokens.js";

const MOST_ARCS = 24;
const LEAST = 0.01; // weights below are not drawn
const TALL = 92; // pixels above the tokens

/**
 * Return the keys that get an arc, largest weight first.
 * @param {ArrayLike<number>} weights of one query; NaN cannot be seen
 */
export function arcsOf(weights) {
  return [...Array(weights.length).keys()]
    .filter((key) => weights[key] >= LEAST)
    .sort((a, b) => weights[b] - weights[a] || a - b)
    .slice(0, MOST_ARCS);
}

/** @returns {string} which keys of a query have an arc, and which have none */
export function arcWords(weights) {
  const visible = [...weights].filter((weight) => !Number.isNaN(weight));
  const many = visible.filter((weight) => weight >= LEAST).length;
  const drawn = Math.min(many, MOST_ARCS);
  const rule = many > drawn ? `the largest of ${many} with at least ${percent(LEAST)}` : `those with at least ${percent(LEAST)}`;
  return drawn === visible.length ? `Arcs: all ${drawn} keys` : `Arcs: ${drawn} of ${visible.length} keys, ${rule}`;
}

/** @returns {string} the path of an arc between two places on a line */
export function arcPath(from, to, base, room) {
  if (from === to) return `M${from - 5} ${base}C${from - 16} ${base - 34},${from + 16} ${base - 34},${from + 5} ${base}`;
  const height = Math.min(room, 16 + Math.abs(from - to) * 0.32);
  const top = base - height * 1.3;
  return `M${from} ${base}C${from} ${top},${to} ${top},${to} ${base}`;
}

/**
 * @param {object} given
 * @param {object} given.prompt the prompt
 * @param {number[]} given.positions positions that can be chosen as query
 * @param {(position: number) => void} given.chooseQuery called with a position
 * @param {(position: number) => void} given.chooseKey called with a position
 */
export function arcStrip({ prompt, positions, chooseQuery, chooseKey, signal }) {
  const tokens = prompt.tokens.map((_, position) => h("li", { "data-at": position, role: "presentation" },
    promptToken(prompt, position, 16), h("small", {}, String(position))));
  const list = h("ol.ol-strip", { "aria-hidden": "true" }, tokens);
  const svg = h("svg:svg.ol-arcs", { "aria-hidden": "true" });
  const frame = h("div.ol-strip-frame", {}, svg, list);
  const el = h("div.ol-scroll.ol-strip-scroll", { tabindex: -1 }, frame);
  const said = h("p.ol-caption");
  let centers = null;
  let last = null;

  const measure = () => {
    centers = tokens.map((token) => token.offsetLeft + token.offsetWidth / 2);
    setStyle(svg, { width: `${list.scrollWidth}px`, height: `${TALL}px` });
  };

  list.addEventListener("click", (event) => {
    const token = event.target.closest("li");
    if (!token) return;
    const position = Number(token.dataset.at);
    if (event.shiftKey || !positions.includes(position)) chooseKey(position);
    else chooseQuery(position);
  }, { signal });

  const renew = () => {
    centers = null;
    if (last) show(...last);
  };
  whenSeen(el, renew, signal);
  const observer = new ResizeObserver(renew);
  observer.observe(list);
  signal.addEventListener("abort", () => observer.disconnect());

  /** Show a query's weights; `ramp` gives the ground and ink of a token by its weight. */
  function show(query, key, weights, ramp) {
    const fresh = !last || last[0] !== query;
    last = [query, key, weights, ramp];
    if (!centers) measure();
    tokens.forEach((token, position) => {
      const weight = weights ? weights[position] : NaN;
      const [ground, ink] = Number.isNaN(weight) ? ["", ""] : ramp(weight);
      setStyle(token.firstChild, { background: ground, color: ink });
      token.toggleAttribute("data-query", position === query);
      token.toggleAttribute("data-key", position === key);
      token.toggleAttribute("data-future", Number.isNaN(weight));
    });
    const keys = weights ? arcsOf(weights) : [];
    said.textContent = weights ? arcWords(weights) : "";
    svg.replaceChildren(...keys.reverse().map((at) => h("svg:path", {
      d: arcPath(centers[query], centers[at], TALL, TALL / 1.05), "stroke-width": 0.75 + 5 * weights[at],
      class: at === key ? "ol-arc ol-arc-key" : "ol-arc", opacity: Math.min(1, 0.25 + weights[at]),
    }, h("svg:title", {}, percent(weights[at])))));
    if (!fresh) return;
    const left = centers[query] - el.clientWidth / 2;
    if (centers[query] < el.scrollLeft || centers[query] > el.scrollLeft + el.clientWidth) el.scrollLeft = left;
  }

  return { el, said, show };
}
