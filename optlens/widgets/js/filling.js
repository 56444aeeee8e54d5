// A sweep that fills in: asks for more as long as it is wanted, shows how far it is, cancels, goes on.

import { h, setStyle } from "./dom.js";

const QUARTERS = 4; // how often progress is announced to screen readers

/** @returns {number} seconds that the rest will take at the pace since `from`; NaN while that is unknown */
export function timeLeft(elapsed, from, share) {
  return share > from && elapsed > 0.5 ? (elapsed * (1 - share)) / (share - from) : NaN;
}

/** @returns {string} a time as one says it: "about 12 s", "about 3 min" */
export function durationWords(seconds) {
  if (seconds < 1.5) return "about 1 s";
  if (seconds < 90) return `about ${Math.round(seconds)} s`;
  return seconds < 5400 ? `about ${Math.round(seconds / 60)} min` : `about ${Math.round(seconds / 3600)} h`;
}

/**
 * @returns {{ words: string, action: string, busy: boolean }} what a state means to who looks at it; `action` is
 *   the text of the button, "" for none
 */
export function fillWords({ state, done, all, trouble }, left) {
  const count = `${done} of ${all} patches`;
  const rest = Number.isNaN(left) ? "" : `, ${durationWords(left)} left`;
  switch (state) {
    case "running": return { words: `${count}${rest}`, action: "Cancel", busy: true };
    case "python": return { words: `${count}${rest}; computed by a cell of the notebook`, action: "", busy: true };
    case "paused": return { words: `Cancelled: ${count} are done.`, action: "Go on", busy: false };
    case "failed": return { words: `${trouble} ${count} are done and kept.`, action: "Try again", busy: false };
    case "gone": return { words: `Partial: ${count} were done when this was saved. Run the cell again for the others.`, action: "", busy: false };
    default: return { words: `All ${all} patches are done.`, action: "", busy: false };
  }
}

/**
 * Return the line that shows how far a sweep is, and what keeps it going.
 * @param {object} given
 * @param {object} given.first how far it is, as Python describes it
 * @param {(channel: string, what: string, more?: object) => Promise<object | null>} given.ask
 * @param {(news: object) => void} given.take called with patches that are new
 * @param {() => void} given.ended called once all are done
 * @param {() => void} given.leave called to put the focus elsewhere, as its button goes
 */
export function makeFilling({ first, ask, take, ended, leave, say, signal }) {
  let facts = first;
  let since = first.to;
  let wanted = false; // whether to ask for more: the newest press of the button decides
  let pulling = false;
  let turn = 0; // how often it was told to go on: a cancel that comes late is known by its turn
  const by = Math.random().toString(36).slice(2);
  let [start, from, said] = [0, 0, 0];

  const fill = h("span");
  const bar = h("div.ol-fill-bar", { role: "progressbar", "aria-label": "Patches", "aria-valuemin": 0 }, fill);
  const words = h("span.ol-fill-words");
  const button = h("button.ol-button", { type: "button", onclick: () => (wanted ? cancel() : goOn()) });
  const el = h("div.ol-fill", {}, bar, words, button);

  function show() {
    const left = timeLeft((performance.now() - start) / 1000, from, facts.share);
    const { words: text, action, busy } = fillWords(facts, start ? left : NaN);
    words.textContent = text;
    el.setAttribute("data-state", facts.state);
    words.setAttribute("class", facts.state === "failed" ? "ol-fill-words ol-trouble" : "ol-fill-words");
    setStyle(fill, { width: `${100 * facts.share}%` });
    bar.setAttribute("aria-valuemax", facts.all);
    bar.setAttribute("aria-valuenow", facts.done);
    bar.setAttribute("aria-valuetext", text);
    bar.setAttribute("aria-busy", String(busy));
    if (document.activeElement === button && !action) leave();
    button.hidden = !action;
    button.textContent = action;
    el.hidden = facts.state === "done";
  }

  /** Note how far it is; announce quarters, and every change of what it does. */
  function note(next) {
    const changed = next.state !== facts.state;
    facts = { ...facts, ...next };
    const quarter = Math.floor((QUARTERS * facts.done) / facts.all);
    if (changed && facts.state !== "running") say(fillWords(facts, NaN).words);
    else if (quarter > said) say(`${facts.done} of ${facts.all} patches.`);
    said = quarter;
    show();
  }

  /** Take an answer, or what Python sends unasked; parts of it may be known already. */
  function hear(news) {
    if (signal.aborted) return;
    if (news.since > since) { // something in between was lost: it can be asked for
      note({ ...news, to: since });
      pull();
      return;
    }
    const known = since - news.since;
    since = Math.max(since, news.to);
    if (news.cells.data.length > known) take(news, known);
    const done = news.state === "done" && facts.state !== "done";
    if (news.state === "python" && facts.state !== "python") [start, from] = [performance.now(), facts.share];
    note(news);
    if (news.state === "running") return;
    wanted = false;
    if (done) ended();
  }

  async function pull() {
    if (pulling) return;
    pulling = true;
    try {
      do {
        const sent = turn;
        const next = await ask("more", "more", { since, by, turn });
        if (!next) continue;
        let { state } = next;
        if (state === "running" && !wanted) state = "paused"; // this was on its way when it was cancelled
        if (state === "paused" && wanted && turn > sent) state = "running"; // and this when it was told to go on
        hear({ ...next, state });
      } while (wanted && !signal.aborted);
    } catch (error) {
      wanted = false;
      if (!signal.aborted) note(error.gone ? { state: "gone" } : { state: "failed", trouble: error.message });
    } finally {
      pulling = false;
    }
  }

  function begin() {
    wanted = true;
    [start, from] = [performance.now(), facts.share];
    pull();
  }

  function goOn() {
    turn += 1;
    note({ state: "running", trouble: "" });
    begin();
  }

  function cancel() {
    if (!wanted) return;
    wanted = false;
    note({ state: "paused" });
    ask("pause", "pause", { by, turn }).catch(() => {}); // not to ask any more is what cancels
  }

  show();
  return {
    el,
    hear,
    cancel,
    goOn,
    runs: () => wanted,
    isOver: () => facts.state === "done",
    canGoOn: () => ["paused", "failed"].includes(facts.state),
    /** Begin with what Python says is the case now; null if nobody is there to say. */
    open(now) {
      if (now === null) note({ state: facts.state === "done" ? "done" : "gone" });
      else {
        note({ ...now, to: since, state: now.state === "done" && since < now.to ? "running" : now.state });
        if (now.to > since || now.state === "running") begin();
      }
    },
  };
}
