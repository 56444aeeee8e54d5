// The edges of a contribution graph: what leads into a node, and the ways back from an end. Pure.

/**
 * Index a graph's edges by the node that they lead into. Nodes are rows and columns: row 0 is the
 * embedding, 2 L + 1 what layer L's attention leaves, 2 L + 2 what its MLP leaves.
 * @param {object} state sizes, what goes straight up, `[layer, pos]`
 * @param {{ weights: object, heads: object, places: object, floor: number }} heads edges of heads
 * @returns {{ into: (row: number, column: number) => object[], bias: (row: number, column: number) => number, size: number[], floor: number }}
 */
export function graphIndex(state, heads) {
  const [nLayers, nHeads, nPos] = state.size;
  const [weights, numbers, places] = [heads.weights.data, heads.heads.data, heads.places.data];
  // Edges by layer and query, in one list with the place where each query's begin.
  const queryOf = (edge) => Math.floor(numbers[edge] / nHeads) * nPos + Math.floor(places[edge] / nPos);
  const starts = new Int32Array(nLayers * nPos + 1);
  for (let edge = 0; edge < weights.length; edge += 1) starts[queryOf(edge) + 1] += 1;
  for (let i = 0; i < nLayers * nPos; i += 1) starts[i + 1] += starts[i];
  const next = starts.slice();
  const order = new Int32Array(weights.length);
  for (let edge = 0; edge < weights.length; edge += 1) {
    const query = queryOf(edge);
    order[next[query]] = edge;
    next[query] += 1;
  }

  function into(row, column) {
    if (row === 0) return [];
    const layer = (row - 1) >> 1;
    const at = layer * nPos + column;
    const straight = (kind, values) => ({
      kind, layer, head: null, weight: values.data[at], source: [row - 1, column], target: [row, column],
    });
    if (row % 2 === 0) return [straight("carry", state.past_mlp), straight("mlp", state.mlp)].sort((a, b) => b.weight - a.weight);
    const found = [straight("carry", state.residual)];
    for (let i = starts[at]; i < starts[at + 1]; i += 1) {
      const edge = order[i];
      found.push({
        kind: "head", layer, head: numbers[edge] % nHeads, weight: weights[edge],
        source: [row - 1, places[edge] % nPos], target: [row, column],
      });
    }
    return found.sort((a, b) => b.weight - a.weight);
  }

  const bias = (row, column) => (row % 2 ? state.bias.data[((row - 1) >> 1) * nPos + column] : 0);
  return { into, bias, size: [nLayers, nHeads, nPos], floor: heads.floor };
}

/** @returns {number} a node as one number */
const nodeId = ([row, column], nPos) => row * nPos + column;

/**
 * Return the edges of at least a weight that lead to the last stream of a token, the last row first.
 * @returns {{ edges: object[], nodes: number[][], threshold: number }} nodes from the embedding down
 */
export function routesTo(graph, end, threshold) {
  const [nLayers, , nPos] = graph.size;
  const rows = Array.from({ length: 2 * nLayers + 1 }, () => new Set());
  rows[2 * nLayers].add(end);
  const edges = [];
  for (let row = 2 * nLayers; row > 0; row -= 1) {
    for (const column of rows[row]) {
      for (const edge of graph.into(row, column)) {
        if (edge.weight < threshold || edge.weight <= 0) break; // the strongest come first
        edges.push(edge);
        rows[row - 1].add(edge.source[1]);
      }
    }
  }
  const nodes = rows.flatMap((columns, row) => [...columns].sort((a, b) => a - b).map((column) => [row, column]));
  return { edges, nodes, threshold };
}

/** Return the routes with a threshold raised so far that there are at most so many edges. */
export function limitedRoutes(graph, end, threshold, most) {
  const all = routesTo(graph, end, threshold);
  if (all.edges.length <= most) return { ...all, found: all.edges.length };
  const weights = [...new Set(all.edges.map(({ weight }) => weight))].sort((a, b) => a - b);
  let [low, high] = [0, weights.length - 1]; // too many at low; the largest weight alone is few
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (routesTo(graph, end, weights[middle]).edges.length > most) low = middle;
    else high = middle;
  }
  return { ...routesTo(graph, end, weights[high]), found: all.edges.length };
}

/** @returns {Set<object>} the edges of all ways through a node: back to the embedding, on to the end */
export function waysThrough(edges, place, nPos) {
  const here = nodeId(place, nPos);
  const found = new Set();
  const reached = new Set([here]);
  for (const edge of edges) { // from the last row up
    if (!reached.has(nodeId(edge.target, nPos))) continue;
    found.add(edge);
    reached.add(nodeId(edge.source, nPos));
  }
  const led = new Set([here]);
  for (const edge of [...edges].reverse()) {
    if (!led.has(nodeId(edge.source, nPos))) continue;
    found.add(edge);
    led.add(nodeId(edge.target, nPos));
  }
  return found;
}

/** @returns {object[]} each head's strongest edge, the strongest first */
export function headsOn(edges) {
  const best = new Map();
  for (const edge of edges) {
    const name = `${edge.layer} ${edge.head}`;
    if (edge.kind === "head" && !(best.get(name)?.weight >= edge.weight)) best.set(name, edge);
  }
  return [...best.values()].sort((a, b) => b.weight - a.weight);
}

/** @returns {Set<object>} the edges of all ways through an edge */
export function waysAlong(edges, edge, nPos) {
  const back = [...waysThrough(edges, edge.source, nPos)].filter(({ target }) => target[0] <= edge.source[0]);
  const on = [...waysThrough(edges, edge.target, nPos)].filter(({ target }) => target[0] > edge.target[0]);
  return new Set([...back, edge, ...on]);
}

/** @returns {number[]} the thresholds to choose from, none below what a graph still holds */
export function thresholdsFrom(floor) {
  const round = [0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5];
  const above = round.filter((value) => value > floor * 1.0001);
  return [floor, ...above];
}

/**
 * Return where the columns of some tokens stand, with a gap where tokens between them are left out.
 * @returns {{ x: Map<number, number>, gaps: number[], wide: number }} middles, gaps' middles, the width
 */
export function columnPlaces(columns, pitch, gap, margin = 0) {
  const x = new Map();
  const gaps = [];
  let at = margin;
  columns.forEach((column, i) => {
    if (i && column !== columns[i - 1] + 1) {
      gaps.push(at + gap / 2);
      at += gap;
    }
    x.set(column, at + pitch / 2);
    at += pitch;
  });
  return { x, gaps, wide: at + margin };
}

/**
 * Return where a key leads from a node: along its column, or to the nearest node of its row.
 * @param {number[][]} nodes rows and columns of all nodes
 */
export function nodeFrom(nodes, [row, column], key) {
  const inRow = (wanted) => nodes.filter(([other]) => other === wanted).map(([, at]) => at).sort((a, b) => a - b);
  const here = inRow(row);
  const at = here.indexOf(column);
  if (key === "ArrowLeft") return here[at - 1] === undefined ? [row, column] : [row, here[at - 1]];
  if (key === "ArrowRight") return here[at + 1] === undefined ? [row, column] : [row, here[at + 1]];
  if (key === "Home") return [row, here[0] ?? column];
  if (key === "End") return [row, here.at(-1) ?? column];
  const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -2, PageDown: 2 }[key];
  if (!step) return null;
  const rows = [...new Set(nodes.map(([other]) => other))].sort((a, b) => a - b);
  const wanted = rows[Math.min(Math.max(rows.indexOf(row) + step, 0), rows.length - 1)];
  if (wanted === undefined) return [row, column];
  const near = inRow(wanted).reduce((best, other) => (Math.abs(other - column) < Math.abs(best - column) ? other : best));
  return [wanted, near];
}
