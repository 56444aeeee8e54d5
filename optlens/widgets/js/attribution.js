// The attribution view: the parts that wrote a logit, adding up to it, and what a head read for it.

import { slice } from "./arrays.js";
import { cssOf, inkOn, mixed } from "./colour.js";
import { h, setStyle } from "./dom.js";
import { handled, movedInList } from "./keys.js";
import { choice } from "./panel.js";
import { partMap } from "./partmap.js";
import { stepPicture } from "./picture.js";
import { largestTerms, signed, stacked, stepList } from "./steps.js";
import { promptToken } from "./tokens.js";
import { number, percent, spoken } from "./words.js";

const MOST_STEPS = 14;

/** @returns {string} a part in words */
export function partName({ kind, layer, head }) {
  if (head !== null) return `layer ${layer}, head ${head}`;
  return { mlp: `MLP of layer ${layer}`, "attention bias": `output bias of attention in layer ${layer}` }[kind] ?? kind;
}

/** @returns {string} a part as a row of a narrow list names it */
export function partShort({ kind, layer, head, label }) {
  if (head !== null) return `head ${layer}.${head}`;
  return { mlp: `MLP ${layer}`, "attention bias": `bias ${layer}`, "token embedding": "token", "position embedding": "position", "final LayerNorm bias": "final bias" }[kind] ?? label;
}

/**
 * Return one term for each sub-layer: the heads of a layer with their bias, its MLP, all else alone.
 * @param {{ kind: string, layer: number | null }[]} parts in the order of the computation
 * @param {ArrayLike<number>} values their terms
 */
export function subLayers(parts, values) {
  const groups = new Map();
  parts.forEach(({ kind, layer }, i) => {
    const attention = kind === "head" || kind === "attention bias";
    const name = attention ? `attention ${layer}` : kind === "mlp" ? `MLP ${layer}` : partShort(parts[i]);
    const group = groups.get(name) ?? { name, members: [], value: 0, rest: false };
    group.members.push(i);
    group.value += values[i];
    groups.set(name, group);
  });
  return [...groups.values()];
}

/** Draw the attribution part. */
export function attributionView({ state, prompt, main, tools, theme, selection, ask, say, tip, signal }) {
  const [nLayers, nHeads] = state.size;
  const parts = state.labels.map((label, i) => ({ label, kind: state.kinds[i], layer: state.layers[i], head: state.heads[i] }));
  const places = new Map(parts.map(({ label }, i) => [label, i]));
  const biased = places.has("b_O0");
  const columns = [...Array(nHeads).keys()].map((head) => ({ name: String(head), title: `head ${head}`, wide: false }));
  if (biased) columns.push({ name: "bias", title: "attention's output bias", wide: true });
  columns.push({ name: "MLP", title: "MLP", wide: true });
  const labelAt = (layer, column) => (column < nHeads ? `L${layer}H${column}` : columns[column].name === "MLP" ? `mlp${layer}` : `b_O${layer}`);
  const indexAt = (layer, column) => places.get(labelAt(layer, column));
  const outside = parts.map((part, i) => ({ ...part, i })).filter(({ layer }) => layer === null);
  const modes = { largest: "largest parts", layers: "layer by layer" };
  const sources = new Map(); // a head's terms by token
  let mode = "largest";
  let over = "one";
  let chosen = indexAt(nLayers - 1, 0);
  let last = { layer: null, head: null };
  let steps = [];

  const values = () => (over === "mean" ? state.mean.values : state.values).data;
  const sums = () => (over === "mean" ? state.mean.total : state.total).data;
  const read = state.position;

  const list = stepList({
    label: "Terms that add up to the logit", signal,
    choose(i) {
      const { members, rest } = steps[i];
      if (!rest) choose(members.reduce((best, at) => (Math.abs(values()[at]) > Math.abs(values()[best]) ? at : best)));
    },
  });
  const map = partMap({
    layers: nLayers, columns, tip, signal, say: (layer, column) => partName(parts[indexAt(layer, column)]),
    choose: (layer, column) => choose(indexAt(layer, column)),
  });
  const title = h("h4.ol-name", {}, state.metric, h("small", {}, "after"), promptToken(prompt, read, 18), h("small", {}, String(read)));
  const facts = h("p.ol-facts");
  const others = h("div.ol-outside", { role: "group", "aria-label": "Parts outside of the layers" });
  const legend = h("div.ol-legend");
  const about = h("div");
  const tokens = h("div"); // kept while the head is the same, and with it the focus
  const detail = h("div.ol-chosen-part", {}, about, tokens);
  let strip = null; // { index, theme, mark } of the tokens on show
  main.classList.add("ol-attribution");
  main.append(
    h("div.ol-pane", {}, title, facts, list.el),
    h("div.ol-pane", {}, h("h4.ol-name", {}, "Layer by layer"), h("p.ol-facts", {}, "what each head, bias and MLP adds, in logits"),
      h("div.ol-scroll.ol-parts-scroll", {}, map.el), others, legend, detail));
  const picker = choice("Terms", Object.entries(modes), mode, (next) => show(next));
  tools.append(picker.el);
  if (state.mean) {
    const which = choice("Prompts", [["one", "this prompt"], ["mean", "mean of all prompts"]], over, (next) => {
      over = next;
      which.set(next);
      draw();
      say(next === "mean" ? "Mean over all prompts." : "This prompt.");
    });
    tools.append(which.el);
  }

  function show(next) {
    mode = next;
    picker.set(next);
    drawSteps();
    say(`Terms: ${modes[next]}.`);
  }

  function choose(index) {
    chosen = index;
    const { layer, head } = parts[index];
    selection.set({ ...(layer !== null && { layer }), ...(head !== null && { head }), query: read });
    last = selection.get();
    drawChosen();
  }

  function drawSteps() {
    if (!theme()) return;
    const terms = mode === "largest" ? largestTerms(values(), MOST_STEPS) : subLayers(parts, values());
    steps = stacked(terms).map((step) => {
      const only = parts[step.members[0]];
      const name = step.rest ? `${step.members.length} others` : step.name ?? partShort(only);
      return { ...step, name, spoken: step.rest || step.members.length > 1 ? name : partName(only) };
    });
    const marked = [...steps.keys()].filter((i) => !steps[i].rest && steps[i].members.includes(chosen));
    const [own, sum, error] = sums();
    list.paint(theme());
    list.show(steps, marked, { sum, own });
    facts.replaceChildren(
      h("span", {}, `${parts.length} parts add up to `, h("b", {}, sum.toFixed(3).replace("-", "−"))),
      h("span", {}, "the model's own ", h("b", {}, own.toFixed(3).replace("-", "−"))),
      h("span", { title: "rounding, unless the stream itself was edited" }, "they differ by ", h("b", {}, number(Math.abs(error)))));
  }

  function drawMap() {
    if (!theme()) return;
    const terms = values();
    const inside = parts.flatMap(({ layer }, i) => (layer === null ? [] : [Math.abs(terms[i])]));
    const limit = Math.max(...inside, 1e-9);
    const total = (layer) => parts.reduce((sum, part, i) => (part.layer === layer ? sum + terms[i] : sum), 0);
    map.show({ value: (layer, column) => terms[indexAt(layer, column)], total, limit }, theme());
    legend.replaceChildren(h("span", {}, signed(-limit), h("span.ol-ramp.ol-both"), signed(limit), " logits, square-root scale"));
    others.replaceChildren(...outside.map((part) => h("button.ol-button", {
      type: "button", "aria-pressed": String(part.i === chosen), onclick: () => choose(part.i), title: part.kind,
      "aria-label": `${partName(part)}: ${signed(terms[part.i])}`,
    }, partName(part), " ", h("b", {}, signed(terms[part.i])))));
  }

  function drawChosen() {
    const { layer, head, kind } = parts[chosen];
    const column = kind === "mlp" ? columns.length - 1 : kind === "attention bias" ? nHeads : head;
    map.select(layer === null ? null : [layer, column]);
    drawMap();
    drawSteps();
    drawDetail();
  }

  async function drawDetail() {
    if (!theme()) return null;
    const part = parts[chosen];
    const value = values()[chosen];
    const rank = [...values()].filter((other) => Math.abs(other) > Math.abs(value)).length + 1;
    const share = sums()[1] ? value / sums()[1] : NaN;
    const name = partName(part);
    about.replaceChildren(
      h("h4.ol-name", {}, name[0].toUpperCase() + name.slice(1), h("b", {}, signed(value, 3)), h("small", {}, "logits")),
      h("p.ol-facts", {}, h("span", {}, h("b", {}, share < 0 ? `−${percent(-share)}` : percent(share)), " of the sum"),
        h("span", {}, "number ", h("b", {}, String(rank)), ` of ${parts.length} by size`)));
    const index = part.head === null || !state.by_source || over === "mean" ? null : chosen;
    if (strip && strip.index === index && strip.theme === theme()) return strip.mark(selection.get().key);
    strip = null;
    tokens.replaceChildren();
    if (index === null) return null;
    if (!sources.has(index)) {
      const found = state.sources ? slice(state.sources, part.layer, part.head)
        : await ask("sources", "sources", { layer: part.layer, head: part.head }).then((answer) => answer?.values, (error) => { tokens.textContent = error.message; return null; });
      if (!found) return null;
      sources.set(index, found.data);
    }
    if (index === chosen && !strip) showTokens(index);
    return null;
  }

  /** Show the prompt's tokens with what the head wrote from each. */
  function showTokens(index) {
    const terms = [...sources.get(index)].slice(0, read + 1);
    const sizes = terms.map(Math.abs);
    const limit = Math.max(...sizes, 1e-9);
    const items = terms.map((term, position) => {
      const ground = mixed(theme().diverging, (term / limit + 1) / 2);
      const word = promptToken(prompt, position, 16);
      setStyle(word, { background: cssOf(ground), color: inkOn(ground, theme()) });
      return h("li", {
        role: "option", "aria-label": `${spoken(prompt.tokens[position])} at ${position}: ${signed(term, 3)}`,
        onclick: () => pick(position),
      }, word, h("small", {}, brief3(term)));
    });
    const pick = (position) => {
      selection.set({ key: position, query: read });
      items[position].focus();
    };
    const largest = sizes.indexOf(Math.max(...sizes));
    const mark = (key) => items.forEach((item, position) => {
      item.tabIndex = position === (key !== null && key < items.length ? key : largest) ? 0 : -1;
      item.setAttribute("aria-selected", String(position === key));
      item.toggleAttribute("data-key", position === key);
    });
    const el = h("ol.ol-strip", { role: "listbox", "aria-label": "What it wrote from each token", "aria-orientation": "horizontal" }, items);
    el.addEventListener("keydown", (event) => {
      const next = movedInList(items.indexOf(event.target), event.key, items.length, 1);
      if (next === null) return;
      handled(event);
      pick(next);
    }, { signal });
    const box = h("div.ol-scroll.ol-strip-scroll", {}, el);
    tokens.replaceChildren(h("p.ol-caption", {}, "Divided among the tokens that it read; they add up to its term"), box);
    mark(selection.get().key);
    strip = { index, theme: theme(), mark };
    box.scrollLeft = items[largest].offsetLeft - el.offsetLeft - box.clientWidth / 2;
  }
  const brief3 = (term) => signed(term, Math.abs(term) >= 9.95 ? 1 : 2);

  const draw = () => drawChosen();

  return {
    update(selected) {
      const { layer, head } = selected;
      const [was, moved] = [parts[chosen], layer !== last.layer || head !== last.head];
      last = selected;
      const here = places.get(`L${layer}H${head}`);
      if (moved && here !== undefined && !(was.layer === layer && was.head === head)) chosen = here;
      draw();
    },
    paint: draw,
    keys: [["← → ↑ ↓", "among bars, among the parts of the table, among tokens"]],
    commands: { m: ["largest parts, or layer by layer", () => show(mode === "largest" ? "layers" : "largest")] },
    table() {
      const all = stacked([...values()].map((value) => ({ value })));
      return {
        caption: `${state.metric}: all parts in the order of the computation`,
        head: ["part", "kind", "layer", "head", "term (logits)", "sum so far"],
        rows: parts.map((part, i) => [part.label, part.kind, part.layer ?? "", part.head ?? "", values()[i].toPrecision(5), all[i].end.toPrecision(6)]),
      };
    },
    picture: () => stepPicture({ title: `Who wrote ${state.metric}`, theme: theme(), steps, total: sums()[1] }),
  };
}
