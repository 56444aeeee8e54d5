// What a click asks to change, as plain descriptions: which part, where, what to do. Pure functions.

import { number, short } from "./words.js";

/** The parts that can be changed at a selected place. */
export const TARGETS = ["head", "attention", "mlp", "stream"];

/**
 * Return a description of a change.
 * @param {string} part one of TARGETS
 * @param {{ layer: number | "embed", head: number }} place
 * @param {number | null} pos the only position that is changed, or all
 * @param {{ do: string, factor?: number, other?: string }} what
 */
export function clickOf(part, { layer, head }, pos, what) {
  return { ...what, part, layer, head: part === "head" ? head : null, pos };
}

/** Whether there is such a part: before the first layer there is nothing but the stream. */
export const exists = (part, { layer }) => part === "stream" || layer !== "embed";

const FIELDS = ["do", "part", "layer", "head", "pos", "factor", "other"];

/** @returns {boolean} whether two descriptions ask for the same */
export function sameClick(a, b) {
  return FIELDS.every((name) => (a[name] ?? null) === (b[name] ?? null));
}

/**
 * Return a list with a change at its end; an ablation that is in it is taken out instead.
 * @param {object[]} entries what is in force, descriptions or what Python made of them
 * @param {object} click
 */
export function toggled(entries, click) {
  const at = click.do === "ablate" ? entries.findIndex((entry) => sameClick(entry, click)) : -1;
  return at < 0 ? [...entries, click] : entries.filter((_, i) => i !== at);
}

/** @returns {object[]} what to ask of Python: a number for what it knows, else the description */
export function wantedOf(entries) {
  return entries.map((entry) => (entry.number === undefined ? entry : { number: entry.number }));
}

/** @returns {string} a part of a layer in words: "head 3.2", "MLP 3" */
export function partName(part, { layer, head }) {
  if (part === "head") return `head ${layer}.${head}`;
  if (part === "attention") return `attention ${layer}`;
  if (part === "mlp") return `MLP ${layer}`;
  return layer === "embed" ? "embedding" : `stream after ${layer}`;
}

/** @returns {string | null} what is in force in words; null for what no click can ask for */
export function entryWords(entry, tokens) {
  if (!entry.do) return null;
  const label = tokens[entry.pos] ?? "";
  const where = entry.pos === null ? "" : ` at ${entry.pos}${label && ` “${label}”`}`;
  const what = {
    ablate: "ablated", mean: "at its mean", scale: `× ${entry.factor}`,
    patch: `from “${short(entry.other ?? "", 60)}”`,
  }[entry.do];
  return `${partName(entry.part, entry)}${where}: ${what}`;
}

/** @returns {string} a change of a probability in points, with its sign */
export function points(before, after) {
  const change = 100 * (after - before);
  if (!Number.isFinite(change)) return "";
  if (Math.abs(change) < 0.05) return "±0";
  return `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(1)}`;
}

/**
 * Return the next tokens at a position before and after.
 * @param {{ ids: object, before: object, after: object, kl: object } | null} prediction as Python gives it
 * @param {number} column which of the recorded positions
 */
export function rowsAt({ ids, before, after }, column) {
  const k = ids.shape[1];
  return [...Array(k).keys()].map((i) => ({
    id: ids.data[column * k + i], before: before.data[column * k + i], after: after.data[column * k + i],
  }));
}

/**
 * Return the next tokens before and after the ablation of a head, from what a page holds.
 * @param {{ id: number, after: number }[]} rows the next tokens as they are on the page
 * @param {{ ids: object, probs: object, chosen: number, kept: object }} ablations
 * @param {number} place layer times heads plus head
 */
export function ablatedRows(rows, { ids, probs, chosen, kept }, place) {
  const k = ids.shape[2];
  const was = new Map(rows.map(({ id, after }) => [id, after]));
  const now = new Map([...Array(k).keys()].map((i) => [ids.data[place * k + i], probs.data[place * k + i]]));
  now.set(chosen, kept.data[place]);
  const all = [...new Set([...now.keys(), ...was.keys()])];
  const found = all.map((id) => ({ id, before: was.get(id) ?? NaN, after: now.get(id) ?? NaN }));
  const size = ({ before, after }) => Math.max(Number.isNaN(after) ? -1 : after, 0) + (before || 0) * 1e-6;
  return found.sort((a, b) => size(b) - size(a)).slice(0, 8);
}

/** @returns {string} an amount of nats in words */
export const nats = (value) => `${number(value)} nats`;
