// The architecture view: the model drawn, one block open, every box the real tensor of this prompt.

import { slice } from "./arrays.js";
import { hookName, histogramEl, plainNumber, spreadText, stageDetail } from "./archdetail.js";
import { archPicture } from "./archpicture.js";
import { boxTowards, counted, linkPath, linksOf, planOf, sizesOf } from "./archplan.js";
import { h, setStyle, whenSeen } from "./dom.js";
import { handled } from "./keys.js";

/** @returns {number} the place in the order of the computation of a stage in a block, or outside */
export function placeOfStage(order, number, layer) {
  const found = order.findIndex(([stage, at]) => stage === number && (at === layer || at < 0));
  return found < 0 ? order.findIndex(([stage]) => stage === number) : found;
}

/** Draw the architecture part. */
export function architectureView({ state, prompt, main, tools, theme, selection, say, tip, signal }) {
  const { stages, order, variant, sizes } = state;
  const numberOf = new Map(stages.map(({ key }, i) => [key, i]));
  const plan = planOf(variant);
  const links = linksOf(variant).filter(([, to]) => to.startsWith("sum") || numberOf.has(to));
  let layer = sizes.n_layers - 1;
  let at = placeOfStage(order, numberOf.get("hook_resid_pre"), layer);
  let focus = null; // key of the box that Tab leads to
  let boxes = new Map(); // key to element

  const facts = h("p.ol-facts", {}, [
    [variant.pre_ln ? "pre-LN" : "post-LN", variant.pre_ln ? "normalises before each sub-layer" : "normalises after each sub-layer"],
    [String(sizes.n_layers), sizes.n_layers === 1 ? "block" : "blocks"], [String(sizes.n_heads), `heads of ${sizes.d_head}`],
    [String(sizes.d_model), "wide"], [String(sizes.d_mlp), "neurons each"], [counted(state.parameters), "weights"],
  ].map(([value, what]) => h("span", {}, h("b", {}, value), ` ${what}`)));
  const lines = h("svg:svg.ol-arch-lines", { "aria-hidden": "true" });
  const rows = h("div");
  const drawing = h("div.ol-arch-drawing", { role: "group", "aria-label": "The model from tokens to logits, one block open" }, lines, rows);
  const detail = h("div.ol-arch-detail", { "aria-live": "off" });
  const progress = h("span.ol-arch-progress");
  const back = h("button.ol-button", { type: "button", onclick: () => step(-1), title: "the stage before (p)" }, "Previous");
  const next = h("button.ol-button.ol-go", { type: "button", onclick: () => step(1), title: "the next stage (n)" }, "Next stage");
  main.classList.add("ol-arch");
  main.append(
    h("div.ol-pane", {}, facts, drawing),
    h("div.ol-pane.ol-arch-side", {}, h("div.ol-arch-steps", { role: "group", "aria-label": "Stage by stage" }, back, next, progress), detail));
  const field = h("select", { onchange: () => selection.set({ layer: Number(field.value) }) },
    Array.from({ length: sizes.n_layers }, (_, i) => h("option", { value: i }, `block ${i}`)));
  tools.append(h("label.ol-field", {}, "Open ", field));

  const stageAt = (place) => stages[order[place][0]];
  const placeOf = (key) => placeOfStage(order, numberOf.get(key), layer);
  const of = (values, place) => slice(values, place).data;

  // ------------------------------------------------------------------------------- drawing

  function box(key, kind = "") {
    const stage = stages[numberOf.get(key)];
    const place = placeOf(key);
    const [mean, std] = of(state.measures, place);
    const el = h(`button.ol-arch-box${kind}`, {
      type: "button", "data-key": key, tabindex: -1,
      "aria-label": `${stage.label}${stage.in_block ? ` of block ${layer}` : ""}: ${stage.axes.map((axis, i) => `${axis} ${stage.shape[i]}`).join(" by ")}, mean ${plainNumber(mean)}, std ${plainNumber(std)}`,
      onclick: () => choose(place),
    }, h("b", {}, stage.label), h("small", {}, sizesOf(stage.shape)), h("small.ol-arch-spread", {}, spreadText(mean, std)), histogramEl(of(state.counts, place)));
    boxes.set(key, el);
    return el;
  }
  function sum(key) {
    const el = h("span.ol-arch-sum", { title: "added to the residual stream", "aria-hidden": "true" }, "+");
    boxes.set(key, el);
    return el;
  }
  const kindOf = { attention: "ol-arch-attention", mlp: "ol-arch-mlp", ends: "ol-arch-first" };
  const boxLine = (line) => h("div.ol-arch-line", {}, line.map(([key, wide]) =>
    h("div.ol-arch-cell", { style: { "--ol-wide": String(wide) } }, key && box(key))));
  function row({ on = null, card = null, aside = null, sum: plus = null }) {
    const stream = on ? box(on, on.startsWith("hook_resid") ? ".ol-arch-stream" : ".ol-arch-on") : plus ? sum(plus) : null;
    const beside = card ? h(`div.ol-arch-card.${kindOf[card.kind]}`, {}, h("div.ol-arch-title", {}, card.title,
      h("small", {}, card.kind === "attention" ? `${sizes.n_heads} heads of ${sizes.d_head}` : card.kind === "mlp" ? `${sizes.d_mlp} ${sizes.act_fn} neurons` : `${counted(sizes.d_vocab)} tokens, ${counted(sizes.n_ctx)} positions`)),
    card.lines.map(boxLine)) : aside ? h("div.ol-arch-aside", {}, boxLine(aside)) : null;
    return h("div.ol-arch-row", {}, h("div.ol-arch-rail", {}, stream), h("div.ol-arch-beside", {}, beside));
  }
  function closed(from, to) {
    if (from > to) return null;
    const chips = Array.from({ length: to - from + 1 }, (_, i) => h("button.ol-arch-chip", {
      type: "button", tabindex: -1, onclick: () => selection.set({ layer: from + i }), "data-layer": from + i, "aria-label": `open block ${from + i}`,
    }, String(from + i)));
    return h("div.ol-arch-row", {}, h("div.ol-arch-rail", {}, h("span.ol-arch-stack", { "aria-hidden": "true" }, from === to ? "block" : "blocks")),
      h("div.ol-arch-beside.ol-arch-chips", {}, chips));
  }

  function draw() {
    const focused = drawing.contains(document.activeElement);
    boxes = new Map();
    const n = sizes.n_layers;
    rows.replaceChildren(...[
      h("div.ol-arch-row", {}, h("div.ol-arch-rail"), h("p.ol-arch-input", {}, h("b", {}, String(prompt.tokens.length)), " tokens in")),
      ...plan.start.map(row), closed(0, layer - 1),
      h("div.ol-arch-block", { role: "group", "aria-label": `Block ${layer}` }, h("p.ol-arch-block-name", {}, `Block ${layer}`, h("small", {}, ` of ${n}`)), plan.block.map(row)),
      closed(layer + 1, n - 1), ...plan.end.map(row),
    ].filter(Boolean));
    field.value = String(layer);
    mark();
    connect();
    if (focused) drawing.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
  }

  const frameOf = (el) => {
    const [frame, own] = [drawing.getBoundingClientRect(), el.getBoundingClientRect()];
    return { left: own.left - frame.left, right: own.right - frame.left, top: own.top - frame.top, bottom: own.bottom - frame.top };
  };
  const pathsNow = () => links.map(([from, to, way]) => linkPath(frameOf(boxes.get(from)), frameOf(boxes.get(to)), way));
  const stemNow = () => {
    const [first, last] = ["sum", "lm_head"].map((key) => frameOf(boxes.get(key)));
    return { x: (first.left + first.right) / 2, top: first.top, bottom: last.top };
  };
  function connect() {
    const { offsetWidth: wide, offsetHeight: tall } = drawing;
    if (!wide || !boxes.size) return;
    lines.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    const current = stageAt(at).key;
    const stem = stemNow();
    lines.replaceChildren(h("svg:path.ol-arch-stem", { d: `M${stem.x} ${stem.top}V${stem.bottom}` }),
      ...pathsNow().map((d, i) => h("svg:path.ol-arch-link", { d, "data-on": links[i][1] === current || links[i][0] === current })));
  }

  function mark() {
    const { key } = stageAt(at);
    const listed = [...boxes].filter(([name]) => numberOf.has(name));
    if (!boxes.has(focus) || !numberOf.has(focus)) focus = key;
    for (const [name, el] of listed) {
      el.tabIndex = name === focus ? 0 : -1;
      if (name === key) el.setAttribute("aria-current", "step");
      else el.removeAttribute("aria-current");
    }
  }

  function describe() {
    const [number, of_] = order[at];
    detail.replaceChildren(...stageDetail({
      stage: stages[number], layer: of_, measures: of(state.measures, at), counts: of(state.counts, at), shown: [...of(state.shown, at)],
    }).flat().filter(Boolean));
    progress.replaceChildren("stage ", h("b", {}, String(at + 1)), ` of ${order.length}`);
    back.disabled = at === 0;
    next.disabled = at === order.length - 1;
  }

  // ------------------------------------------------------------------------------ choosing

  function choose(place) {
    at = place;
    const [number, of_] = order[at];
    focus = stages[number].key;
    if (of_ >= 0 && of_ !== layer) {
      layer = of_;
      draw();
    } else {
      mark();
      connect();
    }
    describe();
    if (of_ >= 0) selection.set({ layer: of_ });
  }
  function step(by) {
    if (order[at + by] === undefined) return;
    const stayed = document.activeElement;
    choose(at + by);
    const { label } = stageAt(at);
    if (drawing.contains(stayed) || stayed === document.body) boxes.get(stageAt(at).key)?.focus({ preventScroll: true });
    say(`Stage ${at + 1} of ${order.length}: ${label}${order[at][1] < 0 ? "" : ` of block ${order[at][1]}`}.`);
  }

  const boxOf = (el) => el.closest?.("[data-key], [data-layer]");
  drawing.addEventListener("keydown", (event) => {
    const here = boxOf(event.target);
    if (!here || !/^Arrow/.test(event.key)) return;
    handled(event);
    const all = [...drawing.querySelectorAll("[data-key], [data-layer]")];
    const to = all[boxTowards(all.map(frameOf), all.indexOf(here), event.key)];
    if (to.dataset.key) {
      focus = to.dataset.key;
      mark();
    }
    to.focus({ preventScroll: true });
  }, { signal });
  function point(el) {
    const key = el?.dataset.key;
    if (!key) return tip.hide();
    const stage = stages[numberOf.get(key)];
    const line = stage.code[0]?.lines.find(([, , named]) => named);
    return tip.show([
      h("p", {}, hookName(stage, layer)),
      h("div.ol-fact", {}, h("span", {}, stage.axes.join(" × ")), h("b", {}, sizesOf(stage.shape))),
      line ? h("p.ol-arch-tip-code", {}, h("small", {}, `${stage.code[0].file}, line ${line[0]}`), h("code", {}, line[1].trim())) : null,
    ].filter(Boolean), el);
  }
  drawing.addEventListener("mouseover", (event) => point(boxOf(event.target)), { signal });
  drawing.addEventListener("mouseleave", () => tip.hide(), { signal });
  drawing.addEventListener("focusin", (event) => { if (event.target.matches?.(":focus-visible")) point(boxOf(event.target)); }, { signal });
  drawing.addEventListener("focusout", () => tip.hide(), { signal });

  let seen = 0;
  const observer = new ResizeObserver(() => {
    if (Math.abs(drawing.offsetWidth - seen) < 1) return;
    seen = drawing.offsetWidth;
    connect();
  });
  observer.observe(drawing);
  signal.addEventListener("abort", () => observer.disconnect());
  whenSeen(drawing, connect, signal);

  return {
    update({ layer: wanted }) {
      const to = Number.isInteger(wanted) && wanted >= 0 && wanted < sizes.n_layers ? wanted : layer;
      if (to !== layer || !boxes.size) {
        const { key, in_block: inBlock } = stageAt(at);
        layer = to;
        if (inBlock) at = placeOf(key);
        draw();
      }
      describe();
    },
    paint() {
      const [blue, , green] = theme().series;
      setStyle(main, { "--ol-arch-blue": blue, "--ol-arch-green": green });
      connect();
    },
    keys: [["← → ↑ ↓", "among boxes"], ["Enter", "what this box holds; open a block"]],
    commands: {
      n: ["the next stage, in the order of the computation", () => step(1)],
      p: ["the stage before", () => step(-1)],
    },
    table: () => ({
      caption: `${order.length} tensors in the order in which they were computed`,
      head: ["tensor", "shape", "mean", "std", "min", "max", "norm", "zeros", "formula"],
      rows: order.map(([number, of_], place) => [hookName(stages[number], of_), sizesOf(stages[number].shape),
        ...[...of(state.measures, place)].slice(0, 6).map((value) => value.toPrecision(5)), stages[number].formula]),
    }),
    picture: () => archPicture({
      title: `OPT, ${variant.pre_ln ? "pre-LN" : "post-LN"}: block ${layer} of ${sizes.n_layers}`, theme: theme(), paths: pathsNow(),
      size: [drawing.offsetWidth, drawing.offsetHeight], cards: [...drawing.querySelectorAll(".ol-arch-card, .ol-arch-block")].map(frameOf),
      stem: stemNow(),
      boxes: [
        ...[...boxes].map(([key, el]) => (numberOf.has(key)
          ? { box: frameOf(el), lines: [stages[numberOf.get(key)].label, sizesOf(stages[numberOf.get(key)].shape)], counts: of(state.counts, placeOf(key)), on: el.matches(".ol-arch-stream") }
          : { box: frameOf(el), lines: ["+"], counts: null, on: "sum" })),
        ...[...drawing.querySelectorAll("[data-layer]")].map((el) => ({ box: frameOf(el), lines: [el.textContent], counts: null, on: false })),
      ],
    }),
  };
}
