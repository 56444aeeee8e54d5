// Tokens of the prompt as elements: in their own direction, special ones as pills, addressed by position.

import { h } from "./dom.js";
import { short } from "./words.js";

const BYTES = /^⟨[0-9A-F]{2}( [0-9A-F]{2})*⟩$/;

/** Return a token's label as an element that holds nothing but text. */
export function labelEl(label, { special = false, most = 14 } = {}) {
  const kind = special ? "bdi.ol-token.ol-special" : BYTES.test(label) ? "bdi.ol-token.ol-bytes" : "bdi.ol-token";
  return h(kind, { title: [...label].length > most ? label : null }, short(label, most));
}

/** Return the prompt's token at a position as an element. */
export function promptToken(prompt, position, most) {
  return labelEl(prompt.tokens[position], { special: prompt.special.includes(position), most });
}
