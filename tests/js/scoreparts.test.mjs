// What the attention view computes of a score, and what it says of arcs.

import assert from "node:assert/strict";
import test from "node:test";

const from = (name) => import(new URL(`../../optlens/widgets/js/${name}.js`, import.meta.url));
const [parts, arcs] = await Promise.all(["scoreparts", "arcs"].map(from));

test("products are those of query and key, scaled, and dimensions come by their size or as they are", () => {
  const products = parts.productsOf(Float32Array.of(1, -2, 3, 0), Float32Array.of(4, 3, -2, 9), 0.5);
  assert.deepEqual([...products], [2, -3, -3, 0]);
  assert.deepEqual(parts.termOrder(products, "size"), [1, 2, 0, 3]);
  assert.deepEqual(parts.termOrder(products, "dimension"), [0, 1, 2, 3]);
});

test("a track has room for all products and for zero", () => {
  const x = parts.termScale([-1, 3]);
  assert.deepEqual([-1, 0, 3].map(x), [0, 25, 100]);
  assert.deepEqual([parts.termScale([2, 4])(0), parts.termScale([-2, -4])(0), parts.termScale([0])(0)], [0, 100, 0]);
});

test("scores are ranked, and signs are written for adding by eye", () => {
  assert.deepEqual([0, 1, 2, 3].map((key) => parts.scoreRank(Float32Array.of(1, 5, 5, -2), key)), [2, 0, 0, 3]);
  assert.deepEqual([1.5, -0.25, -0.0001].map((value) => parts.withSign(value, 3)), ["+1.500", "−0.250", "0.000"]);
});

test("it is said which arcs are drawn", () => {
  assert.equal(arcs.arcWords([0.5, 0.5, NaN]), "Arcs: all 2 keys");
  assert.equal(arcs.arcWords([0.995, 0.005, NaN]), "Arcs: 1 of 2 keys, those with at least 1.0 %");
  const many = [...Array(40).fill(0.02), ...Array(10).fill(0)];
  assert.equal(arcs.arcWords(many), "Arcs: 24 of 50 keys, the largest of 40 with at least 1.0 %");
  assert.equal(arcs.arcsOf(many).length, 24);
});
