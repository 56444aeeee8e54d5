// The weights that the attention view has: from its state, from answers, within a bound of memory.

import { slice } from "./arrays.js";
import { levelOf, weightOf } from "./colour.js";

const BYTES_KEPT = 64_000_000;

/** A store that forgets what was not used for longest once it holds too many bytes. */
export class Kept {
  constructor(most = BYTES_KEPT) {
    this.most = most;
    this.bytes = 0;
    this.entries = new Map();
  }

  get(key) {
    const entry = this.entries.get(key);
    if (!entry) return undefined;
    this.entries.delete(key);
    this.entries.set(key, entry); // the newest stands last
    return entry.value;
  }

  set(key, value, bytes) {
    if (this.entries.has(key)) this.bytes -= this.entries.get(key).bytes;
    this.entries.delete(key);
    this.entries.set(key, { value, bytes });
    this.bytes += bytes;
    for (const [old, entry] of this.entries) {
      if (this.bytes <= this.most || old === key) break;
      this.entries.delete(old);
      this.bytes -= entry.bytes;
    }
  }
}

/**
 * @param {object} state of the attention part
 * @param {(channel: string, what: string, wanted: object) => Promise<any>} ask
 */
export function patternStore(state, ask) {
  const heads = new Kept();
  const thumbs = new Map(); // "layer weighted" -> array, or "asked"
  const inState = (weighted) => !weighted && state.exact;

  const fromState = (i, j) => {
    const { data, shape } = slice(state.exact, i, j);
    return { data: Uint8Array.from(data, levelOf), exact: data, rows: shape[0], columns: shape[1], step: 1 };
  };

  return {
    /** A head's pattern if it is here: levels, and exact weights where these came along. */
    head(i, j, weighted) {
      const key = `${i} ${j} ${weighted}`;
      const known = heads.get(key);
      if (known || !inState(weighted)) return known ?? null;
      const made = fromState(i, j);
      heads.set(key, made, made.data.length);
      return made;
    },
    /** Ask for a head's pattern; null if a newer question has taken its place. */
    async fetch(i, j, weighted, channel = "head") {
      const wanted = { layer: state.layers[i], head: state.heads[j], weighted };
      const answer = await ask(channel, "head", wanted);
      if (!answer) return null;
      const { shape, data } = answer.levels;
      const made = { data, rows: shape[0], columns: shape[1], step: answer.step };
      heads.set(`${i} ${j} ${weighted}`, made, data.length);
      return made;
    },
    /** A head's small picture if it is here; otherwise its layer is asked for, once. */
    thumb(i, j, weighted, arrived) {
      const key = `${i} ${weighted}`;
      let layer = !weighted && state.thumbs ? slice(state.thumbs, i) : thumbs.get(key);
      if (!layer) {
        thumbs.set(key, "asked");
        ask(`thumbs ${key}`, "thumbs", { layer: state.layers[i], weighted }).then((answer) => {
          if (!answer) return;
          thumbs.set(key, answer.levels);
          arrived();
        }, () => thumbs.delete(key));
      }
      if (!layer || layer === "asked") return null;
      const { shape, data } = slice(layer, j);
      return { data, rows: shape[0], columns: shape[1] };
    },
  };
}

/** @returns {Float32Array} a query's weights as a pattern has them, exact or to a level */
export function rowOf(pattern, query, count) {
  if (pattern.exact) return pattern.exact.subarray(query * count, (query + 1) * count);
  const row = Math.floor(query / pattern.step);
  return Float32Array.from({ length: count }, (_, key) =>
    weightOf(pattern.data[row * pattern.columns + Math.floor(key / pattern.step)]));
}
