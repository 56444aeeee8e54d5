// What the architecture view says of one stage: tensor, numbers, formula, code, weights.

import { counted, histogramPath, sizesOf } from "./archplan.js";
import { h } from "./dom.js";
import { number, percent } from "./words.js";

/** @returns {string} a number with a minus as long as a plus */
export function plainNumber(value) {
  return number(value).replaceAll("-", "−");
}

/** @returns {string} a mean with as many digits as the spread around it gives it: "0.00 ± 1.00" */
export function spreadText(mean, std) {
  return `${Math.abs(mean) < 0.005 * std ? "0" : plainNumber(mean)} ± ${plainNumber(std)}`;
}

/** @returns {string} the hook's name of a stage in a block, or what else one reads it from */
export function hookName(stage, layer) {
  if (!stage.hook) return `output of ${stage.key}`;
  return stage.in_block ? `blocks.${layer}.${stage.key}` : stage.key;
}

/** Return a histogram as an element, with its ends if they are given. */
export function histogramEl(counts, ends) {
  const drawn = h("svg:svg.ol-arch-bars", { viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" },
    h("svg:path", { d: histogramPath(counts) }));
  if (!ends) return drawn;
  return h("div.ol-arch-histogram", {}, drawn, h("div.ol-arch-ends", {}, ends.map((end) => h("small", {}, plainNumber(end)))));
}

/** Return the lines of code of one function, the one that names the tensor marked. */
export function codeEl({ file, function: name, lines }) {
  const shown = [];
  lines.forEach(([place, text, named], i) => {
    if (i && place !== lines[i - 1][0] + 1) shown.push(h("div.ol-arch-cut", { "aria-hidden": "true" }, "⋯"));
    shown.push(h(named ? "div.ol-arch-code-line.ol-arch-named" : "div.ol-arch-code-line", {}, h("small", {}, String(place)), h("code", { dir: "ltr" }, text)));
  });
  return h("figure.ol-arch-code", {},
    h("figcaption", {}, file, " · ", h("b", {}, name)),
    h("div.ol-scroll", { tabindex: 0, role: "region", "aria-label": `Lines of ${file}, ${name}` }, shown));
}

/**
 * Return what is said of a stage.
 * @param {object} given
 * @param {object} given.stage the stage
 * @param {number} given.layer its block; -1 outside of blocks
 * @param {ArrayLike<number>} given.measures mean, std, min, max, norm, zeros, masked
 * @param {ArrayLike<number>} given.counts its histogram
 * @param {number[]} given.shown its first numbers
 */
export function stageDetail({ stage, layer, measures, counts, shown }) {
  const [mean, std, low, high, norm, zeros, masked] = measures;
  const count = stage.shape.reduce((product, size) => product * size, 1);
  const facts = [["mean", mean], ["std", std], ["min", low], ["max", high], ["norm", norm]];
  const heads = stage.axes.includes("head") ? ", head 0" : "";
  const weights = stage.weights.map(([name, shape]) => h("li", {}, h("code", {}, name), " ", sizesOf(shape)));
  const many = stage.parameters ? `${counted(stage.parameters)} weights${stage.in_block ? " in each block" : ""}` : stage.shared ? "shared with the token embedding" : "no weights of its own";
  return [
    h("h4.ol-name", {}, stage.label, h("small", {}, layer < 0 ? "" : `block ${layer}`)),
    h("p.ol-arch-hook", {}, h("code", {}, hookName(stage, layer))),
    h("p.ol-facts", {}, stage.meaning),
    h("p.ol-arch-formula", {}, h("b", {}, stage.label), " = ", stage.formula),
    h("div.ol-arch-shape", { "aria-label": `shape: ${stage.axes.map((axis, i) => `${axis} ${stage.shape[i]}`).join(" by ")}` },
      stage.axes.map((axis, i) => [i ? h("span.ol-arch-times", {}, "×") : null, h("span.ol-arch-axis", {}, h("b", {}, String(stage.shape[i])), h("small", {}, axis === "1" ? "one" : axis))]),
      h("small", {}, `= ${counted(count)} numbers`)),
    h("div.ol-arch-numbers", {}, facts.map(([name, value]) => h("span", {}, h("small", {}, name), h("b", {}, plainNumber(value)))),
      h("span", {}, h("small", {}, "zeros"), h("b", {}, percent(zeros))),
      masked > 0 ? h("span", {}, h("small", {}, "masked"), h("b", {}, percent(masked))) : null),
    histogramEl(counts, [low, high]),
    h("p.ol-arch-values", {}, h("small", {}, `first numbers at the last token${heads}`), h("code", {}, `[${shown.filter((value) => !Number.isNaN(value)).map(plainNumber).join(", ")}${count > shown.length ? ", …" : ""}]`)),
    stage.code.length ? stage.code.map(codeEl) : h("p.ol-caption", {}, "The source of this class is not at hand."),
    h("p.ol-caption", {}, many),
    weights.length ? h("ul.ol-arch-weights", {}, weights) : null,
  ];
}
