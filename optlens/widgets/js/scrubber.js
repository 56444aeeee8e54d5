// What a generation's steps hold, as numbers; and their chart. Steps count from the end of the first prompt.

import { slice } from "./arrays.js";
import { h } from "./dom.js";
import { pathOf } from "./lines.js";

const [WIDE, HIGH] = [1000, 100];

/**
 * Return what could have been chosen at a step, the likeliest first.
 * @param {object} branch as Python describes it
 * @returns {{ id: number, own: number, after: number, chosen: boolean, cut: boolean }[]} NaN where not kept
 */
export function candidatesAt(branch, start, step) {
  const [own, after] = [slice(branch.own, step).data, slice(branch.after, step).data];
  return [...slice(branch.tokens, step).data]
    .map((id, i) => ({ id, own: own[i], after: after[i], chosen: id === branch.ids[start + step], cut: after[i] === 0 }))
    .filter(({ id }) => id >= 0);
}

/** @returns {number} -ln of the probability with which a step's token came, in nats: the model's own if kept */
export function surpriseAt(branch, start, step) {
  const { own, after } = candidatesAt(branch, start, step).find(({ chosen }) => chosen);
  return -Math.log(Number.isNaN(own) ? after : own);
}

/** @returns {string} how a branch's tokens were chosen, in a few words */
export function manner({ sampling, seed }) {
  if (!sampling) return "greedy";
  const names = { temperature: "temperature", top_k: "top-k", top_p: "top-p" };
  const set = Object.entries(sampling).filter(([, value]) => value !== null).map(([name, value]) => `${names[name]} ${value}`);
  return [...(set.length ? set : ["sampled"]), `seed ${seed}`].join(", ");
}

/**
 * Read the fields of the form: numbers, null where a field is empty.
 * @param {Record<string, string>} texts by option
 * @returns {Record<string, number | null>}
 * @throws {Error} naming what is no number
 */
export function optionsOf(texts) {
  return Object.fromEntries(Object.entries(texts).map(([name, text]) => {
    const value = text.trim() === "" ? null : Number(text);
    const whole = !["temperature", "top_p"].includes(name);
    if (value !== null && (Number.isNaN(value) || (whole && !Number.isSafeInteger(value)))) {
      throw new Error(`${name.replace("_", "-")}: “${text}” is no ${whole ? "whole " : ""}number.`);
    }
    return [name, value];
  }));
}

/**
 * Return the entropy over the steps as an element; it has no text, its scale stands beside it.
 * @param {object} given
 * @param {{ values: number[], color: string }[]} given.series
 * @param {number} given.top the largest value
 */
export function stepChart({ label, series, top, at, choose }) {
  const count = series[0].values.length;
  const x = (step) => (WIDE * (step + 0.5)) / count;
  const y = (value) => HIGH * (1 - (0.94 * value) / Math.max(top, 1e-9)) - 2;
  const lines = series.map(({ values, color }) => h("svg:path", {
    d: pathOf(values, x, y), fill: "none", stroke: color, "stroke-width": 2, "vector-effect": "non-scaling-stroke",
  }));
  const hits = series[0].values.map((_, step) => h("svg:rect.ol-hit", {
    x: (WIDE * step) / count, y: 0, width: WIDE / count, height: HIGH, onclick: () => choose(step),
  }));
  const line = h("svg:line.ol-at", { x1: x(at), x2: x(at), y1: 0, y2: HIGH, "vector-effect": "non-scaling-stroke" });
  return h("svg:svg.ol-steps-chart", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, line, lines, hits);
}
