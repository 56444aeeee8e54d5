// Where a value lies between those of two runs, on one line, with its interval.

import { h } from "./dom.js";
import { number } from "./words.js";

const GAUGE = { wide: 340, high: 62, edge: 26, y: 30 };

/** @returns {(value: number) => number} a scale that has room for all given numbers */
export function gaugeScale(given) {
  const known = given.filter((value) => Number.isFinite(value));
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const room = GAUGE.wide - 2 * GAUGE.edge;
  return (value) => GAUGE.edge + (high > low ? ((value - low) / (high - low)) * room : room / 2);
}

/** Return the line as an element. */
export function gauge({ value, ends, clean, corrupt, metric }) {
  const runs = [["clean", clean], ["corrupt", corrupt]].filter(([, end]) => end !== null);
  const x = gaugeScale([value, ...ends, ...runs.map(([, end]) => end)]);
  const { y, wide, high, edge } = GAUGE;
  const near = runs.length === 2 && Math.abs(x(clean) - x(corrupt)) < 60;
  const said = runs.map(([name, end]) => `${name} ${number(end)}`).join(", ");
  const unpatched = runs.length === 1 ? { clean: "unpatched" } : {};
  return h("svg:svg.ol-chart", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `${metric}: ${number(value)}; ${said}` },
    h("svg:line.ol-rule", { x1: edge, x2: wide - edge, y1: y, y2: y }),
    runs.map(([name, end], i) => [
      h("svg:line.ol-end", { x1: x(end), x2: x(end), y1: y - 8, y2: y + 8 }),
      h("svg:text.ol-tick", { x: x(end), y: near && i ? y - 14 : y + 24, "text-anchor": x(end) > wide - 60 ? "end" : x(end) < 60 ? "start" : "middle" },
        `${unpatched[name] ?? name} ${number(end)}`)]),
    Number.isNaN(ends[0]) || Number.isNaN(value) ? null : h("svg:line.ol-interval", { x1: x(ends[0]), x2: x(ends[1]), y1: y, y2: y }),
    Number.isNaN(value) ? null : h("svg:circle.ol-dot", { cx: x(value), cy: y, r: 5.5 }));
}
