// The interventions view: the prompt, what is done to the run, what that does to the prediction.

import { changeBar } from "./changebar.js";
import { ablatedRows, entryWords, nats, rowsAt, toggled } from "./clicks.js";
import { h, keepingFocus } from "./dom.js";
import { handled } from "./keys.js";
import { outcomeList, outcomePicture, writerList } from "./outcome.js";
import { pageRuns } from "./pageruns.js";
import { runRequests } from "./requests.js";
import { labelEl, promptToken } from "./tokens.js";
import { spoken } from "./words.js";

const GONE = "Saved view without a kernel: run the cell again to change the run.";
const PAGE = "A page cannot run the model. It holds what the ablation of each single head does to the next token.";
const LONG_PAGE = "A page cannot run the model, and this one is too large to hold what each ablation does; the notebook can.";
const STAYED = "From this page: the next token without that head. The other views stay as they were.";

const readable = (state) => ({ ...state, prompt: JSON.parse(state.prompt) });

/** Draw the interventions part; see `makeSection` for what comes in and what goes out. */
export function interventionsView({ state: given, prompt: givenPrompt, main, tools, theme, selection, ask, say, touch, signal }) {
  let state = readable(given);
  let prompt = givenPrompt;
  let able = false; // whether there is Python to run the model
  let page = null; // the runs of a page without Python
  const top = state.size[0] - 1;
  let place = { layer: top, head: 0, query: state.positions.at(-1) };
  let cell = { layer: top, query: place.query, token: null }; // whose writers are shown
  let writers = null;

  const inForce = () => [...state.inForce, ...(page ? page.entries() : [])];
  const nameOf = (entry) => entryWords(entry, prompt.tokens) ?? entry.call;
  const can = (name, target) => (able ? true : Boolean(page?.ablations) && name === "ablate" && target === "head");
  const columnOf = (query) => (state.positions.includes(query) ? state.positions.indexOf(query) : state.positions.length - 1);

  // ---- elements

  const field = h("textarea.ol-iv-text", { rows: 1, spellcheck: "false", "aria-label": "Prompt", oninput: () => fit() });
  const run = h("button.ol-button.ol-go", { type: "submit" }, "Run");
  const form = h("form.ol-iv-prompt", {
    onsubmit(event) {
      event.preventDefault();
      if (able) requests.change((entries) => entries, field.value);
    },
  }, field, run);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      handled(event);
      form.requestSubmit();
    } else if (event.key === "Enter") event.stopPropagation(); // a notebook would run the cell
    else if (event.key === "Escape") {
      field.value = state.prompt;
      fit();
    }
  }, { signal });
  const note = h("p.ol-iv-note", { hidden: true });
  const trouble = h("p.ol-trouble.ol-iv-trouble", { role: "status" });
  const outcomeName = h("h4.ol-iv-name");
  const outcome = h("div.ol-guesses");
  const outcomeNote = h("p.ol-caption");
  const writersName = h("h4.ol-iv-name");
  const writersList = h("div");
  const bar = changeBar({ act, refuse: fail, aimed: () => { drawBar(); markWriters(); } });
  const list = h("ol.ol-iv-list");
  const code = h("pre.ol-iv-code", { tabindex: 0, role: "region", "aria-label": "Python code for this run" });
  const tool = (text, title, onclick) => h("button.ol-button", { type: "button", title, onclick }, text);
  const undo = tool("Undo", "the run before (u)", () => go(-1));
  const redo = tool("Redo", "the run after (r)", () => go(1));
  const reset = tool("Reset", "the run without interventions", () => (page ? onPage(page.reset()) : requests.change(() => [])));
  tools.append(undo, redo, reset);
  main.classList.add("ol-iv");
  main.append(
    h("div.ol-across", {}, form, trouble, note),
    h("div.ol-pane", {}, outcomeName, outcome, outcomeNote),
    h("div.ol-pane", {}, writersName, writersList),
    h("div.ol-pane.ol-across", {}, bar.el),
    h("div.ol-pane", {}, h("h4.ol-iv-name", {}, "In force"), list),
    h("div.ol-pane", {}, h("div.ol-iv-code-head", {}, h("h4.ol-iv-name", {}, "The same in Python"), tool("Copy", "copy the code", copy)), code));

  // ---- asking for another run

  const requests = runRequests({
    ask, signal, state: () => state,
    settled(answer) {
      const next = readable(answer);
      if (next.prompt !== state.prompt) field.value = next.prompt; // else what is being typed stays
      state = next;
      say(`Run. ${inForce().map(nameOf).join("; ") || "Nothing in force"}.`);
    },
    failed(error) {
      if (error.gone) disable(GONE);
      fail(error.message);
    },
    busy(running) {
      if (running) fail("");
      main.setAttribute("aria-busy", String(running));
      run.textContent = running ? "Running…" : "Run";
      fit();
    },
  });

  function act(click) {
    if (!can(click.do, click.part)) return fail(note.textContent);
    if (page) return onPage(page.ablate(click));
    return requests.change((entries) => toggled(entries, click));
  }

  function go(by) {
    if (able) return requests.go(by);
    if (page?.canGo(by)) onPage(page.go(by));
    return null;
  }

  function onPage(problem = "") {
    draw();
    fail(problem);
    if (!problem) say(`${inForce().map(nameOf).join("; ") || "Nothing in force"}.`);
  }

  // ---- drawing

  function fail(text) {
    trouble.textContent = text;
    if (text) say(text);
  }

  let fitted = null; // the text that the field is as high as; to measure it makes the browser lay out all views
  function fit() {
    if (fitted !== field.value && field.isConnected) {
      field.style.height = "auto";
      if (field.scrollHeight) {
        field.style.height = `${field.scrollHeight + 2}px`;
        fitted = field.value;
      }
    }
    run.disabled = !able || field.value === state.prompt;
    field.disabled = !able;
  }

  /** The next tokens to show, and after which position. */
  function shown() {
    const { prediction } = state;
    if (!prediction) return null;
    const clicked = page?.clicked();
    const column = columnOf(clicked ? page.ablations.query : place.query);
    const found = { rows: rowsAt(prediction, column), words: prediction.words, query: state.positions[column], kl: prediction.kl.data[column] };
    if (!clicked) return found;
    const rows = ablatedRows(found.rows, page.ablations, clicked.layer * state.size[1] + clicked.head);
    return { ...found, rows, words: { ...found.words, ...page.ablations.words }, kl: null };
  }

  function drawOutcome() {
    const found = shown();
    if (!found) {
      outcomeName.replaceChildren("Next token");
      outcome.replaceChildren(h("p.ol-facts", {}, "This recording holds no residual stream, from which predictions are read."));
      return;
    }
    const changed = inForce().length > 0;
    outcomeName.replaceChildren("After ", promptToken(prompt, found.query, 18), h("small", {}, ` ${found.query}`));
    keepingFocus(outcome, () => outcome.replaceChildren(...outcomeList({
      ...found, changed, chosen: cell.token ?? found.rows[0].id,
      choose(token) {
        cell = { layer: top, query: found.query, token };
        selection.set({ token, query: found.query });
        drawOutcome();
        findWriters();
      },
    })));
    outcomeNote.replaceChildren(!changed ? "Nothing is changed" : found.kl === null ? STAYED : `KL(before ‖ now) ${nats(found.kl)}`);
  }

  async function findWriters() {
    const token = cell.token ?? (state.prediction ? rowsAt(state.prediction, columnOf(cell.query))[0].id : null);
    if (token === null || (!able && !page)) return drawWriters(null, "");
    const wanted = { layer: cell.layer, query: cell.query, token };
    try {
      const answer = await ask("contributors", "contributors", wanted);
      if (answer && !signal.aborted) drawWriters({ ...answer, ...wanted });
    } catch (error) {
      const message = page ? "The page holds who wrote the predictions after the last layer." : error.message;
      if (!signal.aborted) drawWriters(null, message);
    }
    return null;
  }

  function drawWriters(found, message) {
    writers = found;
    if (!found) {
      writersName.replaceChildren("Who wrote it");
      writersList.replaceChildren(h("p.ol-facts", {}, message));
      return;
    }
    const row = found.layer === "embed" ? "before the first layer" : `after layer ${found.layer}`;
    writersName.replaceChildren("Who wrote ", labelEl(found.label, { most: 18 }), h("small", {}, `${row}, at ${found.query}: logit ${found.total.toFixed(2).replace("-", "−")}`));
    if (!theme()) return;
    keepingFocus(writersList, () => writersList.replaceChildren(writerList({
      found, theme: theme(), isChosen: isAimed,
      choose(part) {
        selection.set({ layer: part.layer, ...(part.head !== null && { head: part.head }) });
        bar.aim(part.part);
      },
    })));
  }

  const isAimed = (part) => part?.part === bar.target() && part.layer === place.layer && (part.head === null || part.head === place.head);
  function markWriters() {
    writersList.querySelectorAll("button").forEach((el, i) => el.setAttribute("aria-pressed", String(isAimed(writers?.parts[i]))));
  }

  const drawBar = () => bar.draw({ place, prompt, inForce: inForce(), can, able });

  function drawList() {
    const entries = inForce();
    const remove = (i) => (able ? requests.change((now) => now.filter((_, n) => n !== i)) : onPage(page.reset()));
    keepingFocus(list, () => list.replaceChildren(...entries.map((entry, i) => h("li", { title: entry.call ?? null },
      entry.do ? h("span", {}, nameOf(entry)) : h("code", {}, entry.call),
      h("button.ol-iv-remove", { type: "button", disabled: !able && i < state.inForce.length, "aria-label": `Remove ${nameOf(entry)}`, title: "remove", onclick: () => remove(i) }, "×")))));
    if (!entries.length) list.append(h("li.ol-iv-none", {}, "Nothing: select a head, a layer or a cell and press ", h("kbd", {}, "a"), "."));
    undo.disabled = able ? state.at === 0 : !page?.canGo(-1);
    redo.disabled = able ? state.at === state.count - 1 : !page?.canGo(1);
    reset.disabled = able ? !entries.length : !page?.entries().length;
    const clicked = page?.clicked();
    code.textContent = page ? page.code(state.code) : state.code;
    touch([...state.heads, ...(clicked ? [[clicked.layer, clicked.head]] : [])]);
  }

  function draw() {
    drawOutcome();
    drawBar();
    drawList();
    fit();
  }

  async function copy() {
    try {
      await navigator.clipboard.writeText(code.textContent);
      say("Copied.");
    } catch {
      getSelection().selectAllChildren(code); // where a frame may not write to the clipboard
      say("Selected: copy it with the keyboard.");
    }
  }

  // ---- whether anything can be run

  function disable(why) {
    able = false;
    note.textContent = why;
    note.hidden = !why;
    draw();
  }

  async function connect() {
    const answer = await ask("live", "live").catch((error) => ({ live: false, gone: error.gone }));
    if (!answer || signal.aborted) return;
    able = Boolean(answer.live);
    if (answer.ablations !== undefined) page = pageRuns(answer.ablations);
    if (able) draw();
    else disable((!answer.gone && state.obstacle) || (page ? (page.ablations ? PAGE : LONG_PAGE) : GONE));
    findWriters();
  }

  field.value = state.prompt;
  connect();
  return {
    update({ layer, head, query, token }, origin = null) {
      const before = place;
      place = {
        layer: layer === "embed" || layer <= top ? layer ?? place.layer : place.layer,
        head: head !== null && head < state.size[1] ? head : place.head,
        query: query !== null && query < prompt.tokens.length ? query : place.query,
      };
      bar.aimFrom(origin);
      const old = cell;
      // A cell that was chosen, here or elsewhere; else the prediction wherever the position goes.
      if (origin === "lens" || origin === "residual" || (origin === null && token !== null)) cell = { layer: place.layer, query: place.query, token };
      else if (origin !== "interventions" && place.query !== before.query) cell = { layer: top, query: place.query, token: null };
      draw();
      if (["layer", "query", "token"].some((name) => old[name] !== cell[name])) findWriters();
      else markWriters();
    },
    /** Show another run. */
    renew(packedNext, nextPrompt) {
      const next = readable(packedNext);
      const same = String(nextPrompt.ids) === String(prompt.ids);
      if (next.prompt !== state.prompt) field.value = next.prompt;
      [state, prompt] = [next, nextPrompt];
      if (!same) {
        place = { ...place, query: state.positions.at(-1) };
        cell = { layer: top, query: place.query, token: null };
      }
      draw();
      findWriters();
    },
    paint() {
      draw();
      if (writers) drawWriters(writers);
    },
    everywhere: {
      a: ["ablate what is selected, or take that back", (kind) => { bar.aimFrom(kind); drawBar(); bar.press("ablate"); }],
      u: ["undo", () => go(-1)],
      r: ["redo", () => go(1)],
    },
    keys: [["Enter", "in the prompt: run it"], ["Esc", "in the prompt: back to the prompt as it was"]],
    table() {
      const found = shown() ?? { rows: [], words: {} };
      const shownAs = (value) => (Number.isNaN(value) ? "" : value.toPrecision(4));
      return {
        caption: `The next token after ${prompt.tokens[found.query] ?? ""} (${found.query ?? ""}), before and now`,
        head: ["token", "id", "before", "now"],
        rows: found.rows.map(({ id, before, after }) => [found.words[id], id, shownAs(before), shownAs(after)]),
      };
    },
    picture() {
      const found = shown() ?? { rows: [], words: {}, query: 0 };
      const done = inForce().map(nameOf).join("; ");
      const title = `Next token after ${spoken(prompt.tokens[found.query])}${done ? `: ${done.slice(0, 60)}` : ""}`;
      return outcomePicture({ ...found, title, changed: Boolean(done), theme: theme() });
    },
  };
}
