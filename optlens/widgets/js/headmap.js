// One head large: a row for each query, a column for each key, its tokens beside it.

import { poolLevels } from "./arrays.js";
import { h, setStyle } from "./dom.js";
import { paintLevels } from "./headgrid.js";
import { handled, moved } from "./keys.js";
import { promptToken } from "./tokens.js";

const TICK = 13; // pixels between labels, at least

/** @returns {number[]} which of `count` labels have room in `size` pixels; the chosen one always */
export function ticksFor(count, size, chosen, gap = TICK) {
  const step = Math.max(1, Math.ceil((count * gap) / Math.max(size, 1)));
  const near = (i) => chosen !== null && Math.abs(i - chosen) < step && i !== chosen;
  return [...Array(count).keys()].filter((i) => i === chosen || (i % step === 0 && !near(i)));
}

/**
 * @param {object} given
 * @param {object} given.prompt the prompt
 * @param {number[]} given.positions positions of the queries
 * @param {(row: number, column: number) => void} given.choose called with a chosen query row and key
 * @param {(place: number[] | null) => void} given.point called as the mouse moves
 * @param {(step: number) => void} given.drawn told how many weights a side one pixel stands for
 */
export function headMap({ prompt, positions, choose, point, drawn, signal }) {
  const shape = [positions.length, prompt.tokens.length];
  const canvas = h("canvas", { width: 1, height: 1 });
  const overlays = ["row", "column", "here-row", "here-column"].map((name) =>
    h(`div.ol-over.ol-over-${name}`, { hidden: true }));
  const [row, column, hereRow, hereColumn] = overlays;
  const square = h("div.ol-square", {
    role: "application", tabindex: 0, "aria-roledescription": "attention pattern",
    style: { aspectRatio: `${shape[1]} / ${shape[0]}` },
  }, canvas, overlays);
  const ys = h("div.ol-ys", { "aria-hidden": "true" });
  const xs = h("div.ol-xs", { "aria-hidden": "true" });
  const el = h("div.ol-map", {}, ys, square, h("div"), xs);
  let [pattern, theme, selected] = [null, null, [shape[0] - 1, null]];
  let [width, height] = [0, 0]; // as last seen: a notebook takes far cells out of the document

  const draw = () => {
    if (!pattern || !theme || !width) return;
    // No more pixels than the screen has: a browser that shrinks an image drops rows and columns.
    const most = Math.max(32, Math.floor(width * (window.devicePixelRatio || 1)));
    const small = poolLevels(pattern.data, pattern.rows, pattern.columns, most);
    paintLevels(canvas, small, theme.levels);
    drawn(small.step * pattern.step);
  };

  const label = () => {
    const tick = (i, size, position, chosen) => {
      const edge = i === chosen ? "ol-tick-label.ol-chosen" : "ol-tick-label";
      return h(`span.${edge}`, { style: { "--ol-share": String((i + 0.5) / size) } }, promptToken(prompt, position, 10));
    };
    ys.replaceChildren(...ticksFor(shape[0], height, selected[0])
      .map((i) => tick(i, shape[0], positions[i], selected[0])));
    xs.replaceChildren(...ticksFor(shape[1], width, selected[1])
      .map((i) => tick(i, shape[1], i, selected[1])));
  };

  const bar = (over, axis, at) => {
    over.hidden = at === null || at === undefined;
    if (over.hidden) return;
    const [start, size] = axis ? ["left", "width"] : ["top", "height"];
    setStyle(over, { [start]: `${(100 * at) / shape[axis]}%`, [size]: `${100 / shape[axis]}%` });
  };

  const placeAt = (event) => {
    const box = square.getBoundingClientRect();
    const at = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
    return [at((event.clientY - box.top) / box.height, shape[0]), at((event.clientX - box.left) / box.width, shape[1])];
  };
  const visible = ([query, key]) => key <= positions[query];

  square.addEventListener("pointermove", (event) => {
    const place = placeAt(event);
    bar(hereRow, 0, place[0]);
    bar(hereColumn, 1, place[1]);
    point(place);
  }, { signal });
  square.addEventListener("pointerleave", () => {
    bar(hereRow, 0, null);
    bar(hereColumn, 1, null);
    point(null);
  }, { signal });
  square.addEventListener("click", (event) => {
    const place = placeAt(event);
    choose(place[0], visible(place) ? place[1] : null);
  }, { signal });
  square.addEventListener("keydown", (event) => {
    const from = [selected[0], selected[1] ?? positions[selected[0]]];
    const place = moved(from, event.key, shape);
    if (!place) return;
    handled(event);
    choose(place[0], Math.min(place[1], positions[place[0]]));
  }, { signal });
  const observer = new ResizeObserver(() => {
    if (!square.clientWidth) return;
    [width, height] = [square.clientWidth, square.clientHeight];
    draw();
    label();
  });
  observer.observe(square);
  signal.addEventListener("abort", () => observer.disconnect());

  return {
    el,
    canvas,
    show(next, colours) {
      [pattern, theme] = [next, colours];
      square.classList.toggle("ol-waiting", !next);
      draw();
    },
    select(query, key, words) {
      selected = [query, key];
      square.setAttribute("aria-label", words);
      bar(row, 0, query);
      bar(column, 1, key);
      label();
    },
  };
}
