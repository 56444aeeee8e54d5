// The plan of an OPT: which box stands where, which leads to which, and the lines between. Pure.

const BENDING = 9; // radius of a corner

/**
 * Return the rows of the drawing from tokens to logits. A row has a box or a sum on the residual
 * stream, a card of boxes beside it, or both.
 * @param {{ pre_ln: boolean, projected: boolean, final_ln: boolean }} variant
 * @returns {{ start: object[], block: object[], end: object[] }}
 */
export function planOf({ pre_ln: pre, projected, final_ln: last }) {
  const norm = (name) => [[`${name}.hook_scale`, 1], [`${name}.hook_normalized`, 2]];
  const attention = {
    title: "Attention", kind: "attention",
    lines: [
      ...(pre ? [norm("ln1")] : []),
      [["attn.hook_q", 1], ["attn.hook_k", 1], ["attn.hook_v", 1]],
      [["attn.hook_attn_scores", 2], [null, 1]], [["attn.hook_pattern", 2], [null, 1]], [["attn.hook_z", 3]],
      [["attn.hook_result", 1], ["hook_attn_out", 2]],
    ],
  };
  const mlp = {
    title: "MLP", kind: "mlp",
    lines: [...(pre ? [norm("ln2")] : []), [["mlp.hook_pre", 3]], [["mlp.hook_post", 3]], [["hook_mlp_out", 3]]],
  };
  const embeddings = projected
    ? [[["embed_tokens", 1.5]], [["hook_embed", 1.5], ["hook_pos_embed", 1.5]]] : [[["hook_embed", 1.5], ["hook_pos_embed", 1.5]]];
  const after = (name) => (pre ? [] : [{ aside: [[`${name}.hook_scale`, 1]], on: `${name}.hook_normalized` }]);
  return {
    start: [{ card: { title: "Embedding", kind: "ends", lines: embeddings } }, { sum: "sum" }],
    block: [
      { on: "hook_resid_pre" }, { card: attention }, { sum: "sum.attention" }, ...after("ln1"),
      { on: "hook_resid_mid" }, { card: mlp }, { sum: "sum.mlp" }, ...after("ln2"), { on: "hook_resid_post" },
    ],
    end: [
      ...(last ? [{ aside: [["ln_final.hook_scale", 1]], on: "ln_final.hook_normalized" }] : []),
      ...(projected ? [{ on: "project_out" }] : []), { on: "lm_head" },
    ],
  };
}

/**
 * Return which box leads to which; the residual stream itself is not among them.
 * @returns {[string, string, "down" | "out" | "back" | "side"][]}
 */
export function linksOf({ pre_ln: pre, projected, final_ln: last }) {
  const read = (name, boxes) => boxes.map((box) => [name, box, pre ? "down" : "out"]);
  const links = [
    ["hook_embed", "sum", "back"], ["hook_pos_embed", "sum", "back"],
    ...read(pre ? "ln1.hook_normalized" : "hook_resid_pre", ["attn.hook_q", "attn.hook_k", "attn.hook_v"]),
    ["attn.hook_q", "attn.hook_attn_scores", "down"], ["attn.hook_k", "attn.hook_attn_scores", "down"],
    ["attn.hook_attn_scores", "attn.hook_pattern", "down"], ["attn.hook_pattern", "attn.hook_z", "down"],
    ["attn.hook_v", "attn.hook_z", "down"], ["attn.hook_z", "attn.hook_result", "down"], ["attn.hook_z", "hook_attn_out", "down"],
    ["hook_attn_out", "sum.attention", "back"],
    ...read(pre ? "ln2.hook_normalized" : "hook_resid_mid", ["mlp.hook_pre"]),
    ["mlp.hook_pre", "mlp.hook_post", "down"], ["mlp.hook_post", "hook_mlp_out", "down"], ["hook_mlp_out", "sum.mlp", "back"],
  ];
  if (projected) links.push(["embed_tokens", "hook_embed", "down"]);
  for (const [name, stream] of [["ln1", "hook_resid_pre"], ["ln2", "hook_resid_mid"]]) {
    if (pre) links.push([stream, `${name}.hook_normalized`, "out"], [`${name}.hook_scale`, `${name}.hook_normalized`, "side"]);
    else links.push([`${name}.hook_scale`, `${name}.hook_normalized`, "side"]);
  }
  if (last) links.push(["ln_final.hook_scale", "ln_final.hook_normalized", "side"]);
  return links;
}

/**
 * Return a line between two boxes as an SVG path.
 * @param {{ left: number, right: number, top: number, bottom: number }} from
 * @param {{ left: number, right: number, top: number, bottom: number }} to
 * @param {"down" | "out" | "back" | "side"} way below each other; from the stream into a card, whose
 *   box is entered from above; from a card back to the stream; beside each other
 */
export function linkPath(from, to, way) {
  const middle = (box) => [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
  const [[fromX, fromY], [toX, toY]] = [middle(from), middle(to)];
  if (way === "out") {
    const bend = Math.min(BENDING, Math.max(0, to.top - fromY), Math.abs(toX - from.right));
    return `M${from.right} ${fromY}H${toX - bend}Q${toX} ${fromY} ${toX} ${fromY + bend}V${to.top}`;
  }
  if (way === "back") {
    const bend = Math.min(BENDING, Math.max(0, toY - from.bottom), Math.abs(fromX - to.right));
    return `M${fromX} ${from.bottom}V${toY - bend}Q${fromX} ${toY} ${fromX - bend} ${toY}H${to.right}`;
  }
  if (way === "side") return fromX < toX ? `M${from.right} ${fromY}H${to.left}` : `M${from.left} ${fromY}H${to.right}`;
  // Straight down where the boxes overlap enough, else with a bend.
  const straight = Math.max(from.left, to.left) + 8 <= Math.min(from.right, to.right) - 8;
  const narrow = from.right - from.left < to.right - to.left ? fromX : toX;
  const x = straight ? Math.min(Math.max(narrow, Math.max(from.left, to.left) + 8), Math.min(from.right, to.right) - 8) : fromX;
  if (straight) return `M${x} ${from.bottom}V${to.top}`;
  const half = (from.bottom + to.top) / 2;
  return `M${fromX} ${from.bottom}C${fromX} ${half} ${toX} ${half} ${toX} ${to.top}`;
}

/**
 * Return the box that an arrow key leads to: the nearest one in that direction, or null.
 * @param {{ left: number, right: number, top: number, bottom: number }[]} boxes
 * @param {number} at number of the box that one is at
 */
export function boxTowards(boxes, at, key) {
  const middle = (box) => [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
  const [x, y] = middle(boxes[at]);
  const along = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowRight: [1, 0], ArrowLeft: [-1, 0] }[key];
  if (!along) return null;
  let [best, least] = [at, Infinity];
  boxes.forEach((box, i) => {
    const [dx, dy] = [middle(box)[0] - x, middle(box)[1] - y];
    const forward = dx * along[0] + dy * along[1];
    const aside = Math.abs(dx * along[1]) + Math.abs(dy * along[0]);
    // To the side, only what stands beside it; up and down, rather the next line than the same column.
    if (i === at || forward < 4 || (along[0] && aside > (box.bottom - box.top) / 2 + 4)) return;
    const cost = forward + (along[0] ? 3 : 0.4) * aside;
    if (cost < least) [best, least] = [i, cost];
  });
  return best;
}

/** @returns {string} a histogram as a filled path in a box of 100 by 20 */
export function histogramPath(counts) {
  const top = Math.max(1, ...counts);
  const wide = 100 / counts.length;
  const steps = [...counts].map((count, i) => `V${(20 - (19 * count) / top).toFixed(2)}H${((i + 1) * wide).toFixed(2)}`);
  return `M0 20${steps.join("")}V20Z`;
}

/** @returns {string} sizes of a tensor, "16 × 8 × 32" */
export function sizesOf(shape) {
  return shape.join(" × ");
}

/** @returns {string} a whole number with its thousands apart */
export function counted(value) {
  return String(value).replace(/\B(?=(\d{3})+$)/g, ",");
}
