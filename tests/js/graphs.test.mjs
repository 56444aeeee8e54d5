// What the views of the contribution graph and of the architecture compute without a document.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [routes, drawing, graph, plan, details, architecture] =
  await Promise.all(["graphroutes", "graphdrawing", "graph", "archplan", "archdetail", "architecture"].map(from));

const table = (shape, data) => ({ shape, data: Float32Array.from(data) });
// Two layers, two heads, three tokens. The last token reads the first in layer 0 and the second in layer 1.
const STATE = {
  size: [2, 2, 3],
  residual: table([2, 3], [0.9, 0.9, 0.5, 0.9, 0.9, 0.6]),
  past_mlp: table([2, 3], [0.6, 0.6, 0.75, 0.6, 0.6, 0.97]),
  mlp: table([2, 3], [0.4, 0.4, 0.25, 0.4, 0.4, 0.03]),
  bias: table([2, 3], [0.1, 0.1, 0, 0.1, 0.1, 0]),
};
const HEADS = {
  floor: 0.01,
  weights: table([3], [0.3125, 0.125, 0.375]),
  heads: { shape: [3], data: Int32Array.from([0, 1, 3]) },
  places: { shape: [3], data: Int32Array.from([6, 7, 7]) },
};
const index = routes.graphIndex(STATE, HEADS);
const said = (edges) => edges.map(({ kind, layer, head, source }) => `${kind}${layer}${head ?? ""}<${source}`);

test("what leads into a node is listed, the strongest first", () => {
  assert.deepEqual(said(index.into(1, 2)), ["carry0<0,2", "head00<0,0", "head01<0,1"]);
  assert.deepEqual(said(index.into(4, 2)), ["carry1<3,2", "mlp1<3,2"]);
  assert.deepEqual(said(index.into(3, 2)), ["carry1<2,2", "head11<2,1"]);
  assert.deepEqual(index.into(0, 1), []);
  assert.ok(Math.abs(index.bias(3, 0) - 0.1) < 1e-6 && index.bias(4, 0) === 0);
});

test("routes are what leads to the end by edges of at least a weight", () => {
  const all = routes.routesTo(index, 2, 0.3);
  assert.deepEqual(said(all.edges), ["carry1<3,2", "carry1<2,2", "head11<2,1", "carry0<1,2", "carry0<1,1", "mlp0<1,1", "carry0<0,2", "head00<0,0", "carry0<0,1"]);
  assert.deepEqual(all.nodes.at(-1), [4, 2]);
  assert.deepEqual(all.nodes.filter(([row]) => row === 0).map(([, column]) => column), [0, 1, 2]);
  assert.equal(routes.routesTo(index, 2, 0.98).edges.length, 0);
});

test("too many edges raise the threshold, and what is drawn still leads to the end", () => {
  const all = routes.routesTo(index, 2, 0.01);
  const few = routes.limitedRoutes(index, 2, 0.01, 5);
  assert.ok(few.edges.length <= 5 && few.threshold > 0.01);
  assert.equal(few.found, all.edges.length);
  assert.deepEqual(few.edges, routes.routesTo(index, 2, few.threshold).edges);
  assert.equal(routes.limitedRoutes(index, 2, 0.01, 99).threshold, 0.01);
});

test("the ways through a node or an edge go back and on, and nowhere else", () => {
  const { edges } = routes.routesTo(index, 2, 0.3);
  assert.deepEqual(said([...routes.waysThrough(edges, [1, 1], 3)]).sort(), ["carry0<0,1", "carry0<1,1", "carry1<3,2", "head11<2,1", "mlp0<1,1"]);
  const read = edges.find(({ kind, layer }) => kind === "head" && layer === 0);
  assert.deepEqual(said([...routes.waysAlong(edges, read, 3)]).sort(), ["carry0<1,2", "carry1<2,2", "carry1<3,2", "head00<0,0"]);
  assert.deepEqual(said(routes.headsOn(edges)), ["head11<2,1", "head00<0,0"]);
});

test("thresholds begin at what the graph still holds", () => {
  assert.equal(routes.thresholdsFrom(0.01)[0], 0.01);
  assert.deepEqual(routes.thresholdsFrom(0.12).slice(0, 2), [0.12, 0.15]);
});

test("tokens left out leave a gap, keys lead along columns and rows", () => {
  const { x, gaps, wide } = routes.columnPlaces([0, 1, 5], 40, 20, 5);
  assert.deepEqual([...x.values()], [25, 65, 125]);
  assert.deepEqual([gaps, wide], [[95], 150]);
  const nodes = [[0, 0], [0, 4], [1, 4], [3, 1], [3, 4]];
  assert.deepEqual(routes.nodeFrom(nodes, [1, 4], "ArrowUp"), [0, 4]);
  assert.deepEqual(routes.nodeFrom(nodes, [1, 4], "ArrowDown"), [3, 4]);
  assert.deepEqual(routes.nodeFrom(nodes, [3, 4], "ArrowLeft"), [3, 1]);
  assert.deepEqual(routes.nodeFrom(nodes, [3, 1], "ArrowUp"), [1, 4]);
  assert.deepEqual(routes.nodeFrom(nodes, [0, 0], "End"), [0, 4]);
  assert.equal(routes.nodeFrom(nodes, [0, 0], "x"), null);
});

test("kinds of edges differ by form: straight, a bow with a diamond, a curve", () => {
  const { edges } = routes.routesTo(index, 2, 0.3);
  const layout = drawing.graphLayout([0, 1, 2], edges, 5, 400);
  const form = Object.fromEntries(layout.paths.map(({ edge, d, mark }) => [edge.kind, [d.includes("V"), mark !== null]]));
  assert.deepEqual(form, { carry: [true, false], mlp: [false, true], head: [false, false] });
  assert.equal(new Set(layout.paths.map(({ d }) => d)).size, layout.paths.length);
  assert.ok(drawing.edgeWidth(0.9) > 3 * drawing.edgeWidth(0.1));
});

test("a node and the selection name each other", () => {
  assert.deepEqual(graph.selectionOfNode([0, 3]), { layer: "embed", query: 3 });
  assert.deepEqual(graph.selectionOfNode([3, 1]), { layer: 1, query: 1 });
  assert.deepEqual([["embed", 3], [1, 3], [1, 0], [9, 2], [null, 2]].map(([layer, row]) => graph.rowOfSelected(layer, row, 2)), [0, 3, 4, 2, 2]);
});

const VARIANTS = [
  { pre_ln: true, projected: false, final_ln: true }, { pre_ln: false, projected: true, final_ln: false },
  { pre_ln: true, projected: false, final_ln: false }, { pre_ln: true, projected: true, final_ln: true },
];
const keysIn = (rows) => rows.flatMap(({ on, card, aside, sum }) =>
  [on, sum, ...(card?.lines.flat() ?? []).map(([key]) => key), ...(aside ?? []).map(([key]) => key)]).filter(Boolean);

test("every variant's plan has each stage once, and lines only between what is there", () => {
  for (const variant of VARIANTS) {
    const { start, block, end } = plan.planOf(variant);
    const keys = keysIn([...start, ...block, ...end]);
    assert.equal(new Set(keys).size, keys.length);
    assert.equal(keys.includes("ln_final.hook_scale"), variant.final_ln);
    assert.equal(keys.includes("project_out") && keys.includes("embed_tokens"), variant.projected);
    for (const link of plan.linksOf(variant)) assert.ok(keys.includes(link[0]) && keys.includes(link[1]), link.join());
    const stream = block.flatMap(({ on, sum }) => on ?? sum ?? []);
    const expected = variant.pre_ln
      ? ["hook_resid_pre", "sum.attention", "hook_resid_mid", "sum.mlp", "hook_resid_post"]
      : ["hook_resid_pre", "sum.attention", "ln1.hook_normalized", "hook_resid_mid", "sum.mlp", "ln2.hook_normalized", "hook_resid_post"];
    assert.deepEqual(stream, expected);
    assert.ok(plan.linksOf(variant).some(([one, other]) => one === (variant.pre_ln ? "ln2.hook_normalized" : "hook_resid_mid") && other === "mlp.hook_pre"));
  }
});

const box = (left, top, wide = 40, tall = 20) => ({ left, right: left + wide, top, bottom: top + tall });

test("lines leave and enter boxes at their edges", () => {
  assert.equal(plan.linkPath(box(0, 0), box(0, 50), "down"), "M20 20V50");
  assert.match(plan.linkPath(box(0, 0), box(100, 50), "down"), /^M20 20C.* 120 50$/);
  assert.match(plan.linkPath(box(0, 0), box(100, 50), "out"), /^M40 10H.*V50$/);
  assert.match(plan.linkPath(box(100, 0), box(0, 50), "back"), /^M120 20V.*H40$/);
  assert.equal(plan.linkPath(box(0, 0), box(100, 0), "side"), "M40 10H100");
});

test("arrow keys lead to the nearest box in their direction", () => {
  const boxes = [box(0, 0), box(60, 0), box(120, 0), box(60, 40), box(0, 200)];
  assert.deepEqual(["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"].map((key) => plan.boxTowards(boxes, 1, key)), [2, 3, 0, 1]);
  assert.equal(plan.boxTowards(boxes, 3, "ArrowDown"), 4);
  assert.equal(plan.boxTowards(boxes, 3, "Enter"), null);
});

test("a histogram's bars are as tall as their share of the largest", () => {
  assert.equal(plan.histogramPath([0, 4, 2]), "M0 20V20.00H33.33V1.00H66.67V10.50H100.00V20Z");
  assert.deepEqual([plan.sizesOf([16, 8, 32]), plan.counted(4998400)], ["16 × 8 × 32", "4,998,400"]);
});

test("stages are named by their hook, means by their spread", () => {
  assert.equal(details.hookName({ key: "attn.hook_q", hook: true, in_block: true }, 3), "blocks.3.attn.hook_q");
  assert.equal(details.hookName({ key: "hook_embed", hook: true, in_block: false }, -1), "hook_embed");
  assert.equal(details.hookName({ key: "lm_head", hook: false, in_block: false }, -1), "output of lm_head");
  assert.deepEqual([details.spreadText(-0.00001, 1), details.spreadText(-2.5, 3)], ["0 ± 1.00", "−2.50 ± 3.00"]);
});

test("a stage of a block is found in the order of the computation", () => {
  const order = [[0, -1], [1, 0], [2, 0], [1, 1], [2, 1], [3, -1]];
  assert.deepEqual([architecture.placeOfStage(order, 1, 1), architecture.placeOfStage(order, 3, 1), architecture.placeOfStage(order, 2, 7)], [3, 5, 2]);
});
