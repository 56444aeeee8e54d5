// What every view has around its pictures: headings, tool bars, the state of the kernel, panels; and
// the one way in, `renderView`, that serves notebooks and pages alike.

import { unpacked } from "./arrays.js";
import { download, focusIn, h } from "./dom.js";
import { handled, isCommand } from "./keys.js";
import { keysPanel, tablePanel } from "./panel.js";
import { makePeer } from "./peer.js";
import { makeSelection, sharedSelection } from "./selection.js";
import { readTheme, watchTheme } from "./theme.js";
import { makeTip } from "./tip.js";

// The meaning of a view's state; `View.FORMAT` in Python is the same number.
const FORMAT = 1;
const STATES = {
  asking: "",
  busy: "The kernel is busy; this will be filled in when it has time.",
  silent: "No answer from the kernel. If it was restarted, run the cell again.",
  gone: "Saved view without a kernel: run the cell again for what is missing.",
};

/** Draw a view as `renderView` does, or say in its place that it cannot be drawn. */
export async function renderOrTell(given, modules) {
  try {
    return await renderView(given, modules);
  } catch (error) {
    const words = "This view cannot be drawn: what was saved of it is not complete, or of another version. Run its cell again.";
    given.el.replaceChildren(h("div.ol", {}, h("div.ol-status", { role: "alert" }, `${words} (${error.message})`)));
    return () => {};
  }
}

/**
 * Draw a view into an element.
 * @param {{ model: object, el: HTMLElement }} given as anywidget gives them
 * @param {Record<string, (context: object) => object>} modules what draws each kind of part
 * @returns {Promise<() => void>} a function that ends it
 */
export async function renderView({ model, el }, modules) {
  const life = new AbortController();
  const shared = await sharedSelection(model);
  const say = (text) => { live.textContent = text; };
  const again = h("button.ol-button", { type: "button", onclick: () => peer.again() }, "Ask again");
  const status = h("div.ol-status", { role: "status", hidden: true });
  const live = h("div.ol-hidden", { "aria-live": "polite" });
  const body = h("div");
  const root = h("div.ol", {}, status, body, live);
  el.replaceChildren(root);
  const format = model.get("format");
  if (format !== FORMAT) {
    status.hidden = false;
    status.textContent = `This view was saved by another version of optlens (format ${format ?? "unknown"}; this one draws format ${FORMAT}). Run the cell again.`;
    return () => life.abort();
  }
  // A letter that means nothing here may mean "delete this cell" to the notebook around it.
  root.addEventListener("keydown", (event) => {
    if (event.key.length === 1 && !event.ctrlKey && !event.metaKey) event.stopPropagation();
  }, { signal: life.signal });
  const tip = makeTip(root);
  const sections = [];
  const selection = makeSelection(shared, (selected) => update(selected), life.signal);
  const peer = makePeer(model, {
    live: selection.live,
    report(state) {
      const text = STATES[state] ?? "";
      status.hidden = !text;
      status.replaceChildren(text, state === "silent" ? again : "");
    },
  });
  const noticed = () => { if (!selection.live()) peer.lost(); };
  shared.on("comm_live_update", noticed);
  life.signal.addEventListener("abort", () => {
    shared.off("comm_live_update", noticed);
    peer.close();
  });

  let prompts = model.get("prompts");
  let theme = readTheme(root);
  let shown = null; // the prompt on show
  let states = model.get("parts").map((part) => unpacked(part.state));
  let origin = null; // the kind of part in which a place is being chosen
  let touched = []; // heads on which something acts, [layer, head]

  const make = (part, number, prompt, before) => makeSection({
    part, number, prompt: prompts[prompt], state: states[number], modules, tip, say, before,
    theme: () => theme,
    selection: {
      ...selection,
      set(patch) {
        origin = part.kind;
        try { selection.set(patch); } finally { origin = null; }
      },
    },
    ask: (channel, what, more) =>
      peer.ask(`${number} ${channel}`, { part: number, prompt, what, ...more }),
    listen: (run) => peer.listen(number, run),
    everywhere: () => Object.assign({}, ...sections.map((section) => section.everywhere)),
    touch(heads) {
      touched = heads;
      for (const section of sections) section.touch(touched);
    },
  });
  const start = (section) => {
    section.touch(touched);
    section.start();
  };

  function build(prompt) {
    for (const section of sections.splice(0)) section.close();
    shown = prompt;
    const parts = model.get("parts").map((part, number) => {
      const section = make(part, number, prompt, {});
      sections.push(section);
      return section.el;
    });
    body.replaceChildren(promptChoice(prompts, prompt, selection), ...parts);
    for (const section of sections) start(section);
  }

  /** Show another run: Python has put other parts in place of these. */
  function renew() {
    const count = prompts.length;
    prompts = model.get("prompts");
    const parts = model.get("parts");
    states = parts.map((part) => unpacked(part.state));
    tip.hide();
    if (parts[0].prompt !== shown || prompts.length !== count || parts.length !== sections.length) return build(parts[0].prompt);
    parts.forEach((part, number) => {
      const old = sections[number];
      if (old.renew(states[number], prompts[shown])) return;
      const focus = focusIn(old.el);
      const next = make(part, number, shown, old.kept());
      old.close();
      old.el.replaceWith(next.el);
      sections[number] = next;
      start(next);
      focus(next.el);
    });
    return null;
  }
  model.on("change:version", renew);
  life.signal.addEventListener("abort", () => model.off("change:version", renew));

  async function update(selected) {
    const { prompt } = selected;
    if (prompt === shown || prompt >= prompts.length) {
      for (const section of sections) section.update(selected, origin);
      return;
    }
    const asked = model.get("parts").map((_, number) =>
      peer.ask(`${number} state`, { part: number, prompt, what: "state" }));
    const found = await Promise.all(asked).catch((error) => { say(error.message); return [null]; });
    if (found.includes(null) || life.signal.aborted) return; // a newer choice is on its way
    states = found;
    build(prompt);
  }

  build(model.get("parts")[0].prompt);
  if (selection.get().prompt !== shown) update(selection.get());
  watchTheme(root, (next) => {
    theme = next;
    for (const section of sections) section.paint();
  }, life.signal);

  return () => {
    life.abort();
    for (const section of sections) section.close();
  };
}

function promptChoice(prompts, current, selection) {
  if (prompts.length < 2) return "";
  const options = prompts.map((prompt, index) =>
    h("option", { value: index, selected: index === current }, `${index}: ${prompt.text.slice(0, 100)}`));
  const set = (event) => selection.set({ prompt: Number(event.target.value), query: null, key: null });
  return h("label.ol-prompt", {}, "Prompt ", h("select", { onchange: set }, options));
}

/** Return one part's section: its head with tools, what its module draws, its panels. */
function makeSection({ part, number, prompt, state, modules, theme, say, before, everywhere, ...context }) {
  const life = new AbortController();
  const tools = h("div.ol-tools");
  const main = h("div.ol-main");
  const panels = h("div");
  const title = `ol-title-${number}`;
  const buttons = h("div.ol-buttons", { role: "group", "aria-label": `${part.title}: more` });
  const el = h("section.ol-section", { "aria-label": part.title },
    h("div.ol-head-bar", {}, h("h3.ol-title", { id: title }, part.title), tools, buttons), main, panels);
  const drawn = modules[part.kind]({
    ...context, state, prompt, theme, say, tools, main, kept: before.drawn ?? {}, signal: life.signal,
  });

  let open = null;
  const toggle = (name, make) => {
    open = open === name ? null : name;
    if (panels.contains(document.activeElement)) toggles[name].focus();
    panels.replaceChildren(open ? make() : "");
    for (const [key, button] of Object.entries(toggles)) {
      button.setAttribute("aria-expanded", String(open === key));
    }
  };
  const commands = {
    t: ["the numbers as a table", () => toggle("table", () => tablePanel(drawn.table(), say))],
    s: ["save the picture as PNG", () => savePicture(drawn, part.kind, say)],
    "?": ["these keys", () => toggle("keys", () => keysPanel(keyList(drawn, { ...everywhere(), ...commands })))],
  };
  const button = (key, text) => h("button.ol-button", {
    type: "button", onclick: commands[key][1], title: `${commands[key][0]} (${key})`, "aria-expanded": key === "s" ? null : "false",
  }, text);
  const toggles = { table: button("t", "Table"), keys: button("?", "Keys") };
  buttons.append(toggles.table, button("s", "PNG"), toggles.keys);

  el.addEventListener("keydown", (event) => {
    const run = { ...everywhere(), ...drawn.commands, ...commands }[event.key]?.[1];
    if (!run || !isCommand(event)) return;
    handled(event);
    run(part.kind);
  }, { signal: life.signal });

  return {
    el,
    start() {
      if (theme()) drawn.paint();
      drawn.update(context.selection.get());
      if (before.open) commands[{ table: "t", keys: "?" }[before.open]][1]();
    },
    update(selected, origin) {
      drawn.update(selected, origin);
      if (open === "table") panels.replaceChildren(tablePanel(drawn.table(), say));
    },
    paint: () => drawn.paint(),
    everywhere: drawn.everywhere ?? {},
    touch: (heads) => drawn.touch?.(heads),
    /** Show another run in the section as it is; false if a new section has to take its place. */
    renew(next, nextPrompt) {
      drawn.renew?.(next, nextPrompt);
      if (drawn.renew && open === "table") panels.replaceChildren(tablePanel(drawn.table(), say));
      return Boolean(drawn.renew);
    },
    /** What a section that takes its place begins with: the open panel, the part's own settings. */
    kept: () => ({ open, drawn: drawn.kept?.() }),
    close: () => life.abort(),
  };
}

function keyList(drawn, commands) {
  const own = Object.entries(drawn.commands ?? {}).map(([key, [what]]) => [key, what]);
  const common = Object.entries(commands).map(([key, [what]]) => [key, what]);
  return [["Tab", "to the next control"], ...drawn.keys, ...own, ...common];
}

function savePicture(drawn, kind, say) {
  drawn.picture().toBlob((blob) => {
    download(blob, `optlens-${kind}.png`);
    say("Saved as PNG.");
  });
}
