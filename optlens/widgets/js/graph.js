// The contribution graph: what every residual stream is made of, followed back from one prediction.

import { h, whenSeen } from "./dom.js";
import { edgeClass, edgeColours, edgeElement, edgeLegend, graphLayout, graphPicture, nodeElement } from "./graphdrawing.js";
import { graphIndex, headsOn, limitedRoutes, nodeFrom, thresholdsFrom, waysAlong, waysThrough } from "./graphroutes.js";
import { handled } from "./keys.js";
import { choice } from "./panel.js";
import { promptToken } from "./tokens.js";
import { percent, spoken } from "./words.js";

const MOST_DRAWN = 1500; // edges; more would be slow, and a web that nobody can read
const FINEST_HELD = 0.0101; // of a graph that holds all edges that can be asked for
const MOST_HEADS = 8;
const MOST_WAYS = 14; // lines of the list of what leads into a node

/** @returns {object} the layer, and the position, that a node stands for in the shared selection */
export function selectionOfNode([row, column]) {
  return { layer: row === 0 ? "embed" : (row - 1) >> 1, query: column };
}

/** @returns {number} the row that a selected layer means: that node's own, if it is of this layer */
export function rowOfSelected(layer, row, nLayers) {
  if (layer === "embed") return 0;
  if (!Number.isInteger(layer) || layer < 0 || layer >= nLayers) return row;
  return row > 0 && (row - 1) >> 1 === layer ? row : 2 * layer + 2;
}

/** Draw the contribution graph. */
export function graphView({ state, prompt, main, tools, theme, selection, ask, say, tip, signal }) {
  const [nLayers, , nPos] = state.size;
  const lastRow = 2 * nLayers;
  const whole = graphIndex(state, state);
  const graphs = new Map(); // by end, of graphs that did not fit whole
  let graph = whole;
  let end = nPos - 1;
  let place = [lastRow, end];
  let columnsShown = "routes";
  let thresholds = thresholdsFrom(graph.floor);
  let wanted = state.threshold; // what was chosen; a graph that was cut may not go so low
  let threshold = Math.max(wanted, graph.floor);
  let routes = null;
  let layout = null;
  let [key, head] = [null, null];
  let pointed = null; // what the mouse is over: a node or an edge
  let room = 700;

  const slider = h("input.ol-slider.ol-graph-slider", {
    type: "range", min: 0, step: 1, "aria-label": "Least weight of an edge", oninput: () => setThreshold(thresholds[Number(slider.value)]),
  });
  const shownThreshold = h("b.ol-graph-threshold");
  const picker = choice("Tokens", [["routes", "tokens on the routes"], ["all", "all tokens"]], columnsShown, (next) => {
    columnsShown = next;
    picker.set(next);
    draw();
  });
  const trouble = h("p.ol-trouble", { role: "status" });
  tools.append(h("label.ol-field.ol-graph-field", {}, "Edges of at least ", slider, shownThreshold), picker.el, trouble);

  const heading = h("div.ol-graph-top");
  const names = h("div.ol-graph-names", { "aria-hidden": "true" });
  const lines = h("svg:g");
  const dots = h("svg:g");
  const bands = h("svg:g");
  const svg = h("svg:svg.ol-graph-svg", { role: "group", "aria-label": "Nodes are residual streams: rows are layers from the embedding down, columns tokens" }, bands, lines, dots);
  const scroll = h("div.ol-scroll.ol-graph-scroll", {}, heading, h("div.ol-graph-body", {}, names, svg));
  const facts = h("p.ol-facts");
  const legend = h("div.ol-legend");
  const title = h("h4.ol-name");
  const about = h("p.ol-facts");
  const ways = h("div.ol-guesses", { role: "group", "aria-label": "What it is made of" });
  const rest = h("p.ol-caption");
  const heads = h("div.ol-guesses", { role: "group", "aria-label": "Heads on the routes" });
  const headsCaption = h("p.ol-caption");
  main.classList.add("ol-graph");
  main.append(h("div.ol-pane", {}, facts, scroll, legend), h("div.ol-pane", {}, title, about, ways, rest, headsCaption, heads));

  const nameOf = ([row, column]) => `${state.rows[row]} at ${spoken(prompt.tokens[column])}, ${column}`;
  const same = (one, other) => one[0] === other[0] && one[1] === other[1];
  const isReached = (place_) => routes.nodes.some((node) => same(node, place_));
  const edgeName = (edge) => (edge.kind === "head" ? `head ${edge.layer}.${edge.head}` : edge.kind === "mlp" ? `MLP ${edge.layer}` : "carried along");

  // ------------------------------------------------------------------------------- drawing

  function setThreshold(next) {
    if (next === threshold) return;
    [wanted, threshold] = [next, next];
    draw();
    say(`Edges of at least ${percent(threshold)}: ${routes.edges.length}.`);
  }

  function draw() {
    if (!theme()) return;
    routes = limitedRoutes(graph, end, threshold, MOST_DRAWN);
    const reached = [...new Set([...routes.nodes.map(([, column]) => column), end])].sort((a, b) => a - b);
    const columns = columnsShown === "all" ? [...Array(nPos).keys()] : reached;
    layout = graphLayout(columns, routes.edges, state.rows.length, room);
    const colours = edgeColours(theme());
    const bottom = layout.tall;
    svg.setAttribute("viewBox", `0 0 ${layout.wide} ${bottom}`);
    svg.setAttribute("width", layout.wide);
    svg.setAttribute("height", bottom);
    bands.replaceChildren(...Array.from({ length: nLayers }, (_, layer) => (layer % 2 ? null : h("svg:rect.ol-graph-band", {
      x: 0, width: layout.wide, y: layout.y[2 * layer] + 11, height: layout.y[2 * layer + 2] - layout.y[2 * layer],
    }))).filter(Boolean));
    lines.replaceChildren(...layout.paths.map((path, i) => [path, i]).sort(([a], [b]) => a.edge.weight - b.edge.weight)
      .map(([path, i]) => edgeElement(path, colours[path.edge.kind], i)));
    names.replaceChildren(...state.rows.map((name, row) => h(row % 2 ? "small.ol-graph-name" : "span.ol-graph-name", { style: { top: `${layout.y[row]}px` } }, name)));
    heading.replaceChildren(h("span.ol-graph-corner", {}, "after layer"), ...[...layout.x].map(([column, x]) => h("span.ol-graph-token", {
      style: { "--ol-x": `${x}px`, "--ol-wide": `${layout.pitch}px` }, "data-column": column, title: "follow this token",
    }, promptToken(prompt, column, Math.floor(layout.pitch / 7.4)), h("small", {}, String(column)))), ...layout.gaps.map((x) =>
      h("span.ol-graph-gap", { style: { "--ol-x": `${x}px` }, title: "no edge reaches the tokens between" }, "⋯")));
    drawNodes();
    drawFacts();
    legend.replaceChildren(...edgeLegend(theme()));
  }

  function drawNodes() {
    const focused = dots.contains(document.activeElement);
    const on = isReached(place);
    dots.replaceChildren(...routes.nodes.map((node) => nodeElement(node, layout, {
      label: spokenNode(node), selected: same(node, place), focus: same(node, on ? place : [lastRow, end]), end: node[0] === lastRow,
    })));
    for (const el of heading.querySelectorAll(".ol-graph-token")) {
      const column = Number(el.dataset.column);
      el.toggleAttribute("data-selected", column === place[1]);
      el.toggleAttribute("data-end", column === end);
    }
    if (focused) dots.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
    light();
    drawNode();
  }

  function drawFacts() {
    slider.max = thresholds.length - 1;
    slider.value = Math.max(0, thresholds.findLastIndex((value) => value <= threshold + 1e-9));
    slider.setAttribute("aria-valuetext", percent(threshold));
    shownThreshold.textContent = percent(threshold);
    const [count, raised] = [routes.edges.length, routes.threshold > threshold];
    facts.replaceChildren(...[
      h("span", {}, "to the last stream after ", promptToken(prompt, end, 16), h("small", {}, ` ${end}`)),
      h("span", {}, h("b", {}, String(count)), count === 1 ? " edge" : " edges", ` between ${routes.nodes.length} places`),
      raised && h("span.ol-graph-note", {}, `of ${routes.found}; drawn are those of at least ${percent(routes.threshold)}`),
      graph.floor > FINEST_HELD && h("span.ol-graph-note", {}, `this view holds no heads' edges below ${percent(graph.floor)}`),
    ].filter(Boolean));
  }

  /** Show the ways through what the mouse is over, else through the selected node. */
  function light() {
    const all = !pointed && (place[0] === lastRow || !isReached(place));
    const through = pointed?.edge ? waysAlong(routes.edges, pointed.edge, nPos) : waysThrough(routes.edges, pointed?.node ?? place, nPos);
    svg.toggleAttribute("data-lit", !all);
    for (const el of lines.children) {
      const { edge } = layout.paths[Number(el.dataset.edge)];
      el.toggleAttribute("data-on", !all && through.has(edge));
      el.toggleAttribute("data-chosen", edge.kind === "head" && edge.head === head && edge.source[1] === key && same(edge.target, place));
    }
    const lit = new Set([...through].flatMap(({ source, target }) => [source.join(" "), target.join(" ")]));
    if (!pointed?.edge) lit.add((pointed?.node ?? place).join(" "));
    for (const el of dots.children) el.toggleAttribute("data-on", all || lit.has(`${el.dataset.row} ${el.dataset.column}`));
  }

  const spokenNode = (node) => {
    const into = graph.into(...node).filter(({ weight }) => weight >= threshold);
    const parts = into.slice(0, 4).map((edge) => `${percent(edge.weight)} ${edgeName(edge)}${edge.kind === "head" ? ` from ${spoken(prompt.tokens[edge.source[1]])} at ${edge.source[1]}` : ""}`);
    return [nameOf(node), ...parts, into.length > 4 ? `and ${into.length - 4} more` : ""].filter(Boolean).join(", ");
  };

  function drawNode() {
    const [row, column] = place;
    const focused = [ways, heads].find((list) => list.contains(document.activeElement));
    title.replaceChildren(state.rows[row], h("small", {}, "at"), promptToken(prompt, column, 18), h("small", {}, String(column)));
    const into = graph.into(row, column).filter(({ weight }) => weight > 0);
    const bias = graph.bias(row, column);
    const listed = into.slice(0, MOST_WAYS);
    const known = listed.reduce((sum, { weight }) => sum + weight, bias);
    const away = isReached(place) ? "" : `; no route at ${percent(routes.threshold)} leads from here to that end`;
    about.replaceChildren(h("span", {}, row === 0 ? "token and position embedding: where all ways begin"
      : row % 2 ? `what layer ${(row - 1) >> 1} read, and what its heads bring` : `that stream, and what the MLP of layer ${(row - 1) >> 1} adds`, away));
    const biasLine = h("div.ol-guess", { style: { "--ol-part": "0%" } }, h("span", {}, "output bias of attention"), h("span", {}, percent(bias)));
    ways.replaceChildren(...listed.map((edge) => wayButton(edge, false)), bias > 0 ? biasLine : "");
    const missing = Math.max(0, 1 - known);
    rest.textContent = row === 0 ? "" : `${missing > 0.0005 ? `All others together: ${percent(missing)}. ` : ""}Shares of this stream's length (${state.measure}); all terms add up to 100 %.`;
    const strongest = headsOn(routes.edges);
    headsCaption.textContent = strongest.length ? `Heads on the routes, each by its strongest edge${strongest.length > MOST_HEADS ? `; ${MOST_HEADS} of ${strongest.length}` : ""}` : "";
    heads.replaceChildren(...strongest.slice(0, MOST_HEADS).map((edge) => wayButton(edge, true)));
    (focused?.querySelector("[aria-pressed=true]") ?? focused?.querySelector("button"))?.focus({ preventScroll: true });
  }

  /** Return a line for an edge, which selects it; with both its ends, or only where it comes from. */
  function wayButton(edge, both) {
    const chosen = edge.kind === "head" && edge.head === head && edge.source[1] === key && same(edge.target, place);
    const tokenAt = (word, column) => [h("small", {}, word), promptToken(prompt, column, 11), h("small", {}, String(column))];
    const from = edge.kind === "head" ? ` from ${spoken(prompt.tokens[edge.source[1]])} at ${edge.source[1]}` : "";
    const to = both ? ` to ${spoken(prompt.tokens[edge.target[1]])} at ${edge.target[1]}` : "";
    return h(`button.ol-guess.ol-graph-way.${edgeClass(edge.kind)}`, {
      type: "button", "aria-pressed": String(chosen), onclick: () => choose(edge), "data-weak": edge.weight < threshold,
      style: { "--ol-part": `${100 * edge.weight}%`, "--ol-hue": edgeColours(theme())[edge.kind] },
      "aria-label": `${edgeName(edge)}${from}${to}: ${percent(edge.weight)}`,
    }, h("span.ol-graph-from", {}, edgeName(edge), from && tokenAt("from", edge.source[1]), both && tokenAt("to", edge.target[1])), h("b", {}, percent(edge.weight)));
  }

  // ------------------------------------------------------------------------------ choosing

  const chooseNode = (node) => {
    place = node;
    const before = selection.get();
    selection.set({ ...selectionOfNode(node), key: null });
    if (selection.get() === before) drawNodes(); // another row of the same layer
    say(spokenNode(place));
  };

  /** Select what an edge is: a head with the token it reads, or the node that it comes from. */
  function choose(edge) {
    if (edge.kind === "head") {
      place = edge.target;
      selection.set({ layer: edge.layer, head: edge.head, query: edge.target[1], key: edge.source[1] });
      say(`Head ${edge.layer}.${edge.head} selected.`);
    } else chooseNode(edge.source);
  }

  const isCut = whole.floor > FINEST_HELD;
  /** Take another end; of a graph that came without its weak edges, ask for those that lead there. */
  async function follow(next) {
    end = next;
    use(graphs.get(end) ?? whole);
    if (!isCut || graphs.has(end)) return;
    trouble.textContent = "";
    const answer = await ask("routes", "routes", { query: next }).catch((error) => { trouble.textContent = error.message; return state; });
    if (!answer) return;
    graphs.set(next, answer === state ? whole : graphIndex(state, answer));
    if (next === end) use(graphs.get(end));
  }

  function use(next) {
    graph = next;
    thresholds = thresholdsFrom(graph.floor);
    threshold = Math.max(wanted, graph.floor);
    draw();
    reveal(dots.querySelector("[tabindex='0']"));
  }

  const placeOf = (el) => (el?.classList.contains("ol-graph-node") ? [Number(el.dataset.row), Number(el.dataset.column)] : null);
  const edgeOf = (el) => el.closest?.(".ol-graph-edge[data-edge]");
  svg.addEventListener("click", (event) => {
    const node = placeOf(event.target);
    const edge = edgeOf(event.target);
    if (node) chooseNode(node);
    else if (edge) choose(layout.paths[Number(edge.dataset.edge)].edge);
  }, { signal });
  svg.addEventListener("keydown", (event) => {
    const node = placeOf(event.target);
    const next = node && nodeFrom(routes.nodes, node, event.key);
    if (node && (event.key === "Enter" || event.key === " ")) {
      handled(event);
      return nextHead(1);
    }
    if (!next) return null;
    handled(event);
    chooseNode(next);
    const el = dots.querySelector("[tabindex='0']");
    el?.focus({ preventScroll: true });
    return reveal(el);
  }, { signal });
  heading.addEventListener("click", (event) => {
    const token = event.target.closest(".ol-graph-token");
    if (token) chooseNode([lastRow, Number(token.dataset.column)]);
  }, { signal });

  /** Scroll the drawing, and nothing around it, until a node is in sight. */
  function reveal(el) {
    if (!el) return;
    const [box, frame] = [el.getBoundingClientRect(), scroll.getBoundingClientRect()];
    if (box.left < frame.left + 80) scroll.scrollLeft -= frame.left + 80 - box.left;
    if (box.right > frame.right - 20) scroll.scrollLeft += box.right - frame.right + 20;
    if (box.top < frame.top + 60) scroll.scrollTop -= frame.top + 60 - box.top;
    if (box.bottom > frame.bottom - 20) scroll.scrollTop += box.bottom - frame.bottom + 20;
  }

  function nextHead(by) {
    const heads = graph.into(...place).filter(({ kind, weight }) => kind === "head" && weight >= threshold);
    if (!heads.length) return say("No head brings so much here.");
    const at = heads.findIndex((edge) => edge.head === head && edge.source[1] === key);
    return choose(heads[(at + by + heads.length) % heads.length]);
  }

  function point(next, anchor) {
    if (next?.edge === pointed?.edge && next?.node?.join() === pointed?.node?.join()) return;
    pointed = next;
    light();
    if (!next) return void tip.hide();
    const line = (edge) => h("div.ol-fact", {}, h("span", {}, edgeName(edge), edge.kind === "head" && [" from ", promptToken(prompt, edge.source[1], 12), ` ${edge.source[1]}`]), h("b", {}, percent(edge.weight)));
    const node = next.node ?? next.edge.target;
    const shown = next.edge ? [next.edge] : graph.into(...node).filter(({ weight }) => weight >= threshold).slice(0, 6);
    tip.show([h("p", {}, `${next.edge ? "into " : ""}${state.rows[node[0]]} at `, promptToken(prompt, node[1], 14), ` ${node[1]}`), ...shown.map(line)], anchor);
  }
  svg.addEventListener("mouseover", (event) => {
    const node = placeOf(event.target);
    const edge = edgeOf(event.target);
    if (node) point({ node }, event.target);
    else if (edge) point({ edge: layout.paths[Number(edge.dataset.edge)].edge }, dots.querySelector(`[data-row="${layout.paths[Number(edge.dataset.edge)].edge.target[0]}"][data-column="${layout.paths[Number(edge.dataset.edge)].edge.target[1]}"]`) ?? svg);
    else point(null);
  }, { signal });
  svg.addEventListener("mouseleave", () => point(null), { signal });

  const measured = () => {
    const now = Math.max(240, scroll.clientWidth - 70);
    if (!scroll.clientWidth || Math.abs(now - room) < 8) return;
    room = now;
    draw();
  };
  const observer = new ResizeObserver(measured);
  observer.observe(scroll);
  signal.addEventListener("abort", () => observer.disconnect());
  whenSeen(scroll, measured, signal);

  const step = (by) => {
    const next = thresholds[Number(slider.value) + by];
    if (next !== undefined) setThreshold(next);
  };

  const view = {
    update(selected) {
      [key, head] = [selected.key, selected.head];
      const { layer, query } = selected;
      const column = Number.isInteger(query) && query < nPos ? query : place[1];
      place = [rowOfSelected(layer, place[0], nLayers), column];
      if (!theme()) return null;
      const next = layer === nLayers - 1 ? column : end;
      if (next !== end || !routes || (isCut && !graphs.has(end))) return follow(next);
      drawNodes();
      drawFacts();
      return reveal(dots.querySelector("[tabindex='0']"));
    },
    paint: () => (routes ? draw() : view.update(selection.get())),
    keys: [["← → ↑ ↓", "among places that edges reach"], ["Enter", "the next head that leads here"]],
    commands: {
      ",": ["more edges: a lower threshold", () => step(-1)],
      ".": ["fewer edges: a higher threshold", () => step(1)],
      e: ["follow this token to its end", () => chooseNode([lastRow, place[1]])],
      a: ["all tokens, or those on the routes", () => {
        columnsShown = columnsShown === "all" ? "routes" : "all";
        picker.set(columnsShown);
        draw();
      }],
    },
    table: () => ({
      caption: `Edges that lead to the last stream after ${prompt.tokens[end]} (${end})`,
      head: ["part", "layer", "head", "from", "token", "to", "token", "stream", "weight"],
      rows: (routes?.edges ?? []).map((edge) => [edgeName(edge), edge.layer, edge.head ?? "", edge.source[1], prompt.tokens[edge.source[1]],
        edge.target[1], prompt.tokens[edge.target[1]], state.rows[edge.target[0]], edge.weight.toPrecision(5)]),
    }),
    picture: () => graphPicture({
      title: `What the last stream after ${prompt.tokens[end]} is made of`, theme: theme(), layout, nodes: routes.nodes, end,
      rows: state.rows, tokens: prompt.tokens, note: `edges of at least ${percent(routes.threshold)} (${state.measure})`,
    }),
  };
  return view;
}
