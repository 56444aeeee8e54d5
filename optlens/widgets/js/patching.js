// The patching view: a number for every patch, two axes as a table, the others by pickers.

import { cellGrid } from "./cellgrid.js";
import { cssOf, inkOn, mixed } from "./colour.js";
import { h } from "./dom.js";
import { makeFilling } from "./filling.js";
import { gauge } from "./gauge.js";
import { makeOutcomes } from "./outcomes.js";
import { choice } from "./panel.js";
import { cellPicture } from "./picture.js";
import { labelEl } from "./tokens.js";
import { number, short, spoken } from "./words.js";

/** @returns {number} where a cell lies among values `[*shape]` */
export function flatIndex(index, shape) {
  return index.reduce((at, place, axis) => at * shape[axis] + place, 0);
}

/** @returns {number[]} the cell that a selection names; axes it says nothing of stay as they are */
export function cellOfSelection(axes, selected, before) {
  return axes.map(({ place, entries }, axis) => {
    const at = place ? entries.indexOf(selected[place] ?? NaN) : -1;
    return at < 0 ? before[axis] : at;
  });
}

/** @returns {object} the places of the selection that a cell names */
export function selectionOfCell(axes, index) {
  const named = axes.map(({ place, entries }, axis) => [place, entries[index[axis]]]);
  return Object.fromEntries(named.filter(([place, entry]) => place && entry !== null));
}

/** @returns {string} a number with as many decimals as suit the largest of its table */
export function fixedFor(value, limit) {
  if (Number.isNaN(value)) return "–";
  if (limit < 0.01) return value ? value.toExponential(1) : "0";
  const decimals = limit < 0.1 ? 3 : limit < 10 ? 2 : limit < 100 ? 1 : 0;
  return (Number(value.toFixed(decimals)) + 0).toFixed(decimals); // + 0: no minus sign before a zero
}

/** @returns {number[]} flat places of the strongest cells, strongest first; weak ones are left out */
export function strongestOf(values, base, most = 15, least = 0.01) {
  const size = (i) => Math.abs(values[i] - base);
  const found = [];
  for (let i = 0; i < values.length; i += 1) {
    if (!(size(i) > 0) || (found.length === most && size(i) <= size(found.at(-1)))) continue;
    let at = found.length;
    while (at && size(found[at - 1]) < size(i)) at -= 1;
    found.splice(at, 0, i);
    if (found.length > most) found.pop();
  }
  return found.filter((i) => size(i) >= least * size(found[0]));
}

/** @returns {number[]} the index of a cell among values `[*shape]` */
export function indexOfFlat(at, shape) {
  return shape.map((_, axis) => Math.floor(at / shape.slice(axis + 1).reduce((product, size) => product * size, 1)) % shape[axis]);
}

/** @returns {string} an entry of an axis in words */
export function entryName({ name, bare, headings, numbers }, at) {
  return `${bare ? "" : `${name} `}${numbers[at] ? `${numbers[at]} ` : ""}${short(headings[at], 24)}`;
}

/** The ways to colour the table, with what each needs; numbers that are to change are copies. */
function modesOf(state) {
  const own = (array) => (state.filling ? { shape: array.shape, data: array.data.slice() } : array);
  const modes = { values: { text: state.metric, numbers: own(state.values), base: state.base, low: state.low, high: state.high } };
  if (state.normalized) modes.normalized = { text: "normalized", numbers: own(state.normalized), base: state.unpatched, low: state.normalized_low, high: state.normalized_high };
  return modes;
}

/** Draw the patching part. */
export function patchingView({ state: first, main, tools, theme, selection, ask, listen, say, tip, signal }) {
  let state = first;
  const { axes } = state;
  const { shape } = state.values;
  const single = { name: "", bare: true, place: null, entries: [null], headings: [state.metric], others: [null], numbers: [""] };
  const rowsAxis = axes.length > 1 ? axes.at(-2) : single;
  const columnsAxis = axes.at(-1);
  const modes = modesOf(state);
  const hasShares = Boolean(state.normalized);
  let mode = hasShares ? "normalized" : "values";
  let top = state.top; // the strongest patches
  let index = top[0] ?? axes.map(() => 0);
  measure();

  const indexOf = (row, column) => (axes.length > 1 ? [...index.slice(0, -2), row, column] : [column]);
  const at = (where, which = modes[mode].numbers) => (which ? which.data[flatIndex(where, shape)] : NaN);
  const placeName = (where) => axes.map((axis, i) => entryName(axis, where[i])).join(", ");
  const shown = (value) => fixedFor(value, modes[mode].limit);
  const gap = () => (state.missing ? "not computed" : "no number"); // which a metric may say
  const colours = (value) => {
    if (Number.isNaN(value)) return [theme().masked, theme().muted];
    const { base, limit } = modes[mode];
    const ground = mixed(theme().diverging, ((value - base) / limit + 1) / 2);
    return [cssOf(ground), inkOn(ground, theme())];
  };
  const heading = (axis, i, most = 7) => {
    const other = axis.others[i];
    return [axis.numbers[i] ? labelEl(axis.headings[i], { most }) : axis.headings[i],
      other ? h("span.ol-other", { title: `the other prompt: ${other}` }, labelEl(other, { most })) : null,
      axis.numbers[i] ? h("small", {}, axis.numbers[i]) : null];
  };

  const grid = cellGrid({
    label: `${state.title}: rows are ${rowsAxis.name || "one"}, columns ${columnsAxis.name}`,
    rows: rowsAxis.headings.map((name, i) => (rowsAxis.numbers[i] ? `${rowsAxis.numbers[i]} ${name}` : name)),
    prompt: { tokens: columnsAxis.headings, special: [] }, positions: columnsAxis.headings.map((_, i) => i), width: 54, signal,
    corner: axes.length > 1 ? `${rowsAxis.name} ↓\n${columnsAxis.name} →` : columnsAxis.name,
    heading: (column) => heading(columnsAxis, column),
    cell(row, column) {
      const where = indexOf(row, column);
      const value = at(where);
      const [ground, ink] = theme() ? colours(value) : [];
      return {
        children: [shown(value)], ground, ink,
        label: `${placeName(where)}: ${modes[mode].text} ${Number.isNaN(value) ? gap() : shown(value)}`,
      };
    },
    choose: (row, column) => choose(indexOf(row, column)),
    point(cell, el) {
      if (!cell || !el) tip.hide();
      else tip.show([h("p", {}, placeName(indexOf(...cell))), ...lines(indexOf(...cell))], el);
    },
  });

  const pickers = axes.slice(0, -2).map((axis, i) => {
    const select = h("select", { onchange: () => choose(index.map((place, k) => (k === i ? select.selectedIndex : place))) },
      axis.headings.map((_, entry) => h("option", {}, entryName({ ...axis, bare: true }, entry))));
    tools.append(h("label.ol-field", {}, `${axis.name} `, select));
    return select;
  });
  const picker = choice("Show", Object.entries(modes).reverse().map(([value, { text }]) => [value, text]), mode, (value) => show(value));
  if (hasShares) tools.append(picker.el);
  const name = h("h4.ol-name");
  const detail = h("div");
  const strongest = h("div.ol-guesses", { role: "group", "aria-label": "The strongest patches" });
  const legend = h("div.ol-legend");
  const missing = h("p.ol-partial", { role: "note" });
  const outcomes = makeOutcomes({ count: state.n_prompts, ask, say, signal });
  const filling = state.filling && makeFilling({ first: state.filling, ask, take, ended, leave, say, signal });
  if (filling) listen(filling.hear);
  main.classList.add("ol-patching");
  main.append(
    h("div.ol-pane", {}, filling?.el, missing, prompts(), grid.el, legend),
    h("div.ol-pane.ol-details", {},
      h("div", {}, name, detail),
      h("div", {}, h("p.ol-caption", {}, "The strongest patches"), strongest)),
    h("div.ol-pane", {}, outcomes.el));
  look();

  /** Ask what can be asked; nobody answers in a notebook that was opened without its kernel. */
  async function look() {
    const found = await ask("outlook", "outlook").catch(() => null);
    if (signal.aborted) return;
    outcomes.open(found);
    filling?.open(found?.filling ?? null);
  }

  /** Find the largest effect of each way to colour, where its colours end. */
  function measure() {
    for (const each of Object.values(modes)) {
      each.limit = each.numbers.data.reduce((most, value) => (Number.isNaN(value) ? most : Math.max(most, Math.abs(value - each.base))), 0) || 1;
    }
  }

  /** Take patches that were computed since, those before `from` being known. */
  function take(news, from) {
    news.cells.data.subarray(from).forEach((cell, i) => {
      modes.values.numbers.data[cell] = news.values.data[from + i];
      if (hasShares) modes.normalized.numbers.data[cell] = news.normalized.data[from + i];
    });
    measure();
    const { numbers, base } = modes[hasShares ? "normalized" : "values"];
    top = strongestOf(numbers.data, base).map((place) => indexOfFlat(place, shape));
    state.missing = modes.values.numbers.data.reduce((count, value) => count + Number.isNaN(value), 0);
    if (theme()) drawAll();
  }

  /** All is computed: now there are intervals too. */
  async function ended() {
    const found = await ask("state", "state").catch(() => null); // without it, what is here stays
    if (!found || signal.aborted) return;
    state = found;
    Object.entries(modesOf(state)).forEach(([key, each]) => Object.assign(modes[key], each));
    top = state.top;
    measure();
    drawAll();
  }

  function leave() {
    grid.el.querySelector(".ol-cell[tabindex='0']")?.focus({ preventScroll: true });
  }

  function drawAll() {
    grid.refresh();
    drawDetail();
    drawStrongest();
    drawLegend();
  }

  /** The two prompts, one above the other, marked where they differ. */
  function prompts() {
    const pair = state.pairs[0];
    if (!pair) return null;
    const [first, second] = state.corrupt === null ? ["prompt", ""] : ["clean", "corrupt"];
    const line = (text, tokens, others) => h("p.ol-pair", {}, h("small", {}, text),
      h("span", {}, tokens.map((label, i) => (others && others[i] !== label ? h("mark.ol-differs", {}, labelEl(label, { most: 24 })) : labelEl(label, { most: 24 })))));
    const more = state.n_prompts > 1 ? h("p.ol-caption", {}, `and ${state.n_prompts - 1} more ${pair.other ? "pairs of prompts" : "prompts"}; values are means`) : null;
    return h("div.ol-pairs", {}, line(first, pair.tokens, pair.other), pair.other ? line(second, pair.other, pair.tokens) : null, more);
  }

  function choose(where) {
    index = where;
    selection.set(selectionOfCell(axes, where));
    draw();
  }

  function show(next) {
    mode = next;
    picker.set(next);
    draw();
    say(`Shown: ${modes[next].text}.`);
  }

  function lines(where) {
    return Object.values(modes).reverse().map(({ text, numbers, low, high }) => {
      const [value, ends] = [at(where, numbers), [at(where, low), at(where, high)]];
      const known = !ends.some(Number.isNaN);
      return h("div.ol-fact", {}, h("span", {}, text),
        h("span", {}, h("b", {}, Number.isNaN(value) ? gap() : number(value)), known ? ` [${number(ends[0])}, ${number(ends[1])}]` : ""));
    });
  }

  function drawDetail() {
    name.replaceChildren(...axes.map((axis, i) => h("span", {}, axis.bare ? "" : `${axis.name} `, heading(axis, index[i], 18))));
    const [value, ends] = [at(index, modes.values.numbers), [at(index, modes.values.low), at(index, modes.values.high)]];
    const pair = axes.map(({ others, headings }, i) => (others[index[i]] ? [headings[index[i]], others[index[i]]] : null)).find(Boolean);
    const [mine, theirs] = state.patched_first ? ["clean", "corrupt"] : ["corrupt", "clean"];
    detail.replaceChildren(
      ...lines(index),
      Number.isNaN(ends[0]) ? "" : h("p.ol-caption", {}, "In brackets: 95 % bootstrap interval over the prompts"),
      pair ? h("p.ol-facts", {}, h("span", {}, `${mine} prompt: `, labelEl(pair[0])), h("span", {}, `${theirs} prompt: `, labelEl(pair[1]))) : "",
      theme() ? gauge({ value, ends, clean: state.clean, corrupt: state.corrupt, metric: state.metric }) : "",
      h("p.ol-caption", {}, `${state.meaning} ${state.doing}`));
  }

  function drawStrongest() {
    if (!theme()) return;
    const { base, limit } = modes[mode];
    const items = top.slice(0, 10).map((where) => {
      const value = at(where);
      return h("button.ol-guess", {
        type: "button", "aria-pressed": String(where.every((place, i) => place === index[i])), onclick: () => choose(where),
        "aria-label": `${spoken(placeName(where))}: ${number(value)}`,
        style: { "--ol-part": `${(100 * Math.abs(value - base)) / limit}%`, "--ol-bar": theme().diverging[value < base ? 2 : 4] },
      }, h("bdi", {}, placeName(where)), h("span", {}, shown(value)));
    });
    strongest.replaceChildren(...(items.length ? items : [h("p.ol-caption", {}, state.missing ? "None yet." : "No patch changes the metric.")]));
  }

  function draw() {
    pickers.forEach((select, i) => { select.selectedIndex = index[i]; });
    grid.select(...(axes.length > 1 ? index.slice(-2) : [0, index[0]]));
    drawDetail();
    drawStrongest();
    drawLegend();
    outcomes.at(index);
  }

  function drawLegend() {
    const { base, limit, text } = modes[mode];
    const partial = state.missing && (!filling || filling.isOver());
    missing.hidden = !partial;
    missing.textContent = partial ? `Not complete: ${state.missing} of ${modes.values.numbers.data.length} patches ${filling ? "have no number" : "were not computed"}.` : "";
    legend.replaceChildren(
      h("span", {}, number(base - limit), h("span.ol-ramp.ol-both"), `${number(base + limit)}: ${text}, no colour where nothing changes (${number(base)})`),
      hasShares && mode === "normalized" ? h("span", {}, state.reading) : "",
      axes.some(({ others }) => others.some(Boolean)) ? h("span", {}, "two tokens: that of the patched prompt and ", h("span.ol-other", {}, "that of the other")) : "",
      state.missing ? h("span", {}, h("span.ol-swatch"), "not computed") : "");
  }

  return {
    update(selected) {
      index = cellOfSelection(axes, selected, index);
      draw();
    },
    paint: draw,
    keys: [["← → ↑ ↓", "among patches"]],
    get commands() {
      return {
        m: ["normalized, or the metric itself", () => { if (hasShares) show(mode === "values" ? "normalized" : "values"); }],
        b: ["the strongest patch", () => { if (top.length) choose(top[0]); }],
        c: ["the code of the patch", () => outcomes.toggle()],
        ...(filling?.runs() ? { Escape: ["cancel the sweep", filling.cancel] } : {}), // else it leaves the view
        ...(filling?.canGoOn() ? { g: ["go on with the sweep", filling.goOn] } : {}),
      };
    },
    table() {
      const [rows, columns] = [rowsAxis.headings.length, columnsAxis.headings.length];
      const names = axes.map(({ name: each }) => each);
      const cells = Array.from({ length: rows * columns }, (_, i) => indexOf(Math.floor(i / columns), i % columns));
      const text = (value) => (Number.isNaN(value) ? "" : value.toPrecision(5));
      return {
        caption: state.title,
        head: [...names, ...Object.values(modes).map((each) => each.text)],
        rows: cells.map((where) => [...where.map((place, i) => entryName({ ...axes[i], bare: true }, place)), ...Object.values(modes).map(({ numbers }) => text(at(where, numbers)))]),
      };
    },
    picture: () => cellPicture({
      title: `${state.title} (${modes[mode].text})`, theme: theme(), rows: rowsAxis.headings, columns: columnsAxis.headings, width: 54,
      cell(row, column) {
        const value = at(indexOf(row, column));
        const [ground, ink] = colours(value);
        return { ground, ink, text: shown(value) };
      },
    }),
  };
}
