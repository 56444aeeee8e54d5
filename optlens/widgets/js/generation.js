// The generation view: a text with its steps, what could have been written at each, and its branches.

import { cssOf, inkOn, mixed } from "./colour.js";
import { h } from "./dom.js";
import { branchList, forkForm } from "./forking.js";
import { handled, movedInList } from "./keys.js";
import { cellPicture } from "./picture.js";
import { candidatesAt, manner, stepChart, surpriseAt } from "./scrubber.js";
import { labelEl } from "./tokens.js";
import { number, percent, spoken } from "./words.js";

const MOST_SURPRISE = 5; // nats: the dark end of the ramp

/** Draw the generation part. */
export function generationView({ state: given, main, theme, selection, ask, say, signal }) {
  let state = given;
  let chosen = 0; // the branch on show
  let step = 0;
  let requests = 0;
  let live = false; // whether Python is there to fork with
  const branch = () => state.branches[chosen];
  const count = () => branch().ids.length - state.start;
  const label = (id) => state.words[id];
  const go = (next) => selection.set({ query: state.start + next, token: branch().ids[state.start + next] });

  const flow = h("div.ol-flow", { role: "group", "aria-label": "The text; arrows go from step to step" });
  const slider = h("input.ol-slider", { type: "range", min: 0, step: 1, "aria-label": "Step", oninput: () => go(Number(slider.value)) });
  const steps = h("output.ol-step-now");
  const scale = h("p.ol-caption");
  const chart = h("div");
  const legend = h("div.ol-legend");
  const name = h("h4.ol-name");
  const facts = h("p.ol-facts");
  const list = h("div.ol-guesses");
  const branches = h("div");
  const form = forkForm({ fork });
  main.append(
    h("div.ol-pane", {}, flow, legend),
    h("div.ol-pane.ol-scrub", {}, h("div.ol-scrub-line", {}, steps, slider), chart, scale),
    h("div.ol-pane.ol-details", {}, h("div", {}, name, facts, list),
      h("div", {}, h("h4.ol-name", {}, "Branches"), branches, form.el)));

  // ---- forking, where Python is there

  async function connect() {
    const answer = await ask("live", "live").catch(() => null); // without it, the form stays away
    if (signal.aborted) return;
    if (answer?.live && answer.state.branches.length > state.branches.length) renew(answer.state, chosen, step);
    live = Boolean(answer?.live);
    form.allow(live);
    drawList();
  }

  async function fork(wanted) {
    const [from, at] = [chosen, step];
    requests += 1;
    const request = `${Date.now()} ${requests} ${Math.random()}`;
    const answer = await ask("fork", "fork", { branch: from, step: at, request, ...wanted });
    if (!answer || signal.aborted) return;
    form.clear();
    renew(answer.state, answer.branch, at);
    say(`Branch ${answer.branch + 1} written.`);
  }

  function renew(next, number, at) {
    state = next;
    show(number, at);
  }

  function show(number, at = step) {
    chosen = number;
    step = Math.max(0, Math.min(at, count() - 1));
    draw();
    if (count()) go(step);
  }

  // ---- drawing

  const ramp = (share) => {
    const ground = mixed(theme().ramp, share);
    return { background: cssOf(ground), color: inkOn(ground, theme()) };
  };

  function drawFlow() {
    const { ids, special } = branch();
    const token = (place) => labelEl(label(ids[place]), { special: special.includes(place), most: 24 });
    flow.replaceChildren(
      h("span.ol-flow-prompt", {}, ids.slice(0, state.start).map((_, place) => h("span.ol-flow-token", {}, token(place)))),
      ...ids.slice(state.start).map((id, i) => h("button.ol-flow-token", {
        type: "button", "data-step": i, tabindex: i === step ? 0 : -1, "aria-current": i === step ? "step" : null,
        "aria-label": `step ${i}: ${spoken(label(id))}, surprise ${number(surpriseAt(branch(), state.start, i))} nats`,
        onclick: () => go(i), style: theme() ? ramp(Math.min(1, surpriseAt(branch(), state.start, i) / MOST_SURPRISE)) : {},
        class: i > step ? "ol-flow-token ol-flow-later" : "ol-flow-token",
      }, token(state.start + i))));
  }

  function markStep() {
    for (const el of flow.querySelectorAll("button")) {
      const i = Number(el.dataset.step);
      el.tabIndex = i === step ? 0 : -1;
      if (i === step) el.setAttribute("aria-current", "step");
      else el.removeAttribute("aria-current");
      el.classList.toggle("ol-flow-later", i > step);
    }
  }

  function drawChart() {
    if (!theme() || !count()) return;
    const entropies = [0, 1].map((kind) => [...Array(count()).keys()].map((i) => branch().entropy.data[2 * i + kind]));
    const series = entropies.map((values, i) => ({ values, color: theme().series[i], name: ["the model's own", "processed"][i] }))
      .filter(({ values }) => !values.some(Number.isNaN));
    const top = Math.max(1e-9, ...series.flatMap(({ values }) => values));
    chart.replaceChildren(stepChart({ label: `Entropy over the steps: ${series.map((one) => one.name).join(", ")}`, series, top, at: step, choose: go }));
    scale.replaceChildren("Entropy over the steps, 0 to ", h("b", {}, number(top)), " nats: ",
      ...series.map((one) => h("span.ol-line-key", {}, h("span", { style: { color: one.color }, "aria-hidden": "true" }, "▬ "), one.name)));
  }

  function drawStep() {
    slider.max = String(Math.max(0, count() - 1));
    slider.value = String(step);
    slider.disabled = !count();
    steps.replaceChildren(count() ? `Step ${step} of 0–${count() - 1}` : "Nothing was written");
    if (!count()) {
      for (const el of [name, facts, list, chart, scale]) el.replaceChildren();
      return;
    }
    const id = branch().ids[state.start + step];
    slider.setAttribute("aria-valuetext", `step ${step}: ${spoken(label(id))}`);
    name.replaceChildren(`Step ${step}: `, labelEl(label(id), { most: 20 }), branch().forced && step === branch().step ? " was put there" : " was written");
    const [own, after] = branch().entropy.data.slice(2 * step, 2 * step + 2);
    const fact = (text, ...shown) => h("span", {}, `${text} `, shown);
    facts.replaceChildren(
      Number.isNaN(own) ? "" : fact("entropy", h("b", {}, number(own)), " nats"),
      Number.isNaN(after) ? "" : fact(Number.isNaN(own) ? "entropy" : "processed", h("b", {}, number(after)), " nats"),
      fact("tokens to choose from", h("b", {}, branch().allowed.data[step].toLocaleString("en"))),
      fact("rank", h("b", {}, `#${branch().rank.data[step] + 1}`)));
    form.at(h("b", {}, `step ${step} of branch ${chosen + 1}`));
    drawList();
    markStep();
    for (const line of chart.querySelectorAll(".ol-at")) {
      for (const end of ["x1", "x2"]) line.setAttribute(end, String((1000 * (step + 0.5)) / count()));
    }
  }

  function drawList() {
    if (!count()) return;
    const found = candidatesAt(branch(), state.start, step);
    const both = found.some(({ own, after }) => !Number.isNaN(own) && !Number.isNaN(after));
    const head = h("div.ol-guess-head", { "aria-hidden": "true" }, h("span", {}, "token"),
      both ? [h("span", {}, "own (line)"), h("span", {}, "processed (bar)")] : h("span", {}, Number.isNaN(found[0].after) ? "own" : "probability"));
    list.replaceChildren(head, ...found.map((one) => candidate(one, both)));
  }

  function candidate({ id, own, after, chosen: taken, cut }, both) {
    const shown = Number.isNaN(after) ? own : after;
    const words = `${spoken(label(id))}, ${both ? `own ${percent(own)}, ${cut ? "cut off" : `processed ${percent(after)}`}` : percent(shown)}${taken ? ", taken" : ""}`;
    const kind = `${cut ? ".ol-cut" : ""}${taken ? ".ol-taken" : ""}`;
    return h(`${live ? "button" : "div"}.ol-guess.ol-candidate${kind}`, {
      type: live ? "button" : null, role: live ? null : "group", "aria-label": words, "aria-pressed": live ? String(form.chosen() === id) : null,
      title: live ? "fork with this token" : null,
      style: { "--ol-part": `${100 * shown}%`, "--ol-own": `${both ? 100 * own : 0}%` },
      onclick: live ? () => { say(form.put(id, label(id)) ? `Token ${spoken(label(id))} for the fork.` : "The model's choice."); drawList(); } : () => null,
    }, h("span.ol-candidate-name", {}, labelEl(label(id), { most: 20 }), taken ? h("small", {}, branch().forced && step === branch().step ? "put there" : "taken") : null),
    both ? [h("span", {}, percent(own)), h("span", {}, cut ? "cut off" : percent(after))] : h("span", {}, percent(shown)));
  }

  function draw() {
    drawFlow();
    drawChart();
    branches.replaceChildren(branchList({ branches: state.branches, start: state.start, words: state.words, current: chosen, choose: (number) => show(number) }));
    legend.replaceChildren(h("span", {}, "0", h("span.ol-ramp"), `${MOST_SURPRISE} nats or more · surprise of each token, −ln of its ${Number.isNaN(branch().own.data[0]) ? "" : "own "}probability`),
      h("span", {}, `branch ${chosen + 1}: ${manner(branch())}`));
    drawStep();
  }

  flow.addEventListener("keydown", (event) => {
    const next = movedInList(step, event.key, count(), 10);
    if (next === null || !event.target.dataset.step) return;
    handled(event);
    go(next);
    flow.querySelector(`[data-step="${next}"]`)?.focus({ preventScroll: true });
  }, { signal });

  connect();
  let drawn = false;
  return {
    update({ query }) {
      const at = query === null ? count() - 1 : query - state.start;
      step = Math.max(0, Math.min(at, count() - 1));
      if (drawn) drawStep();
      else draw();
      drawn = true;
    },
    paint: () => draw(),
    keys: [["← →", "from step to step, in the text"]],
    commands: { b: ["the next branch", () => { show((chosen + 1) % state.branches.length); say(`Branch ${chosen + 1}.`); }] },
    table() {
      const shown = (value) => (Number.isNaN(value) ? "" : value.toPrecision(4));
      return {
        caption: `Steps of branch ${chosen + 1}: ${manner(branch())}`,
        head: ["step", "written", "id", "own probability", "after processing", "rank", "could be chosen", "own entropy", "entropy after"],
        rows: [...Array(count()).keys()].map((i) => {
          const one = candidatesAt(branch(), state.start, i).find(({ chosen: taken }) => taken);
          return [i, label(one.id), one.id, shown(one.own), shown(one.after), branch().rank.data[i] + 1, branch().allowed.data[i],
            shown(branch().entropy.data[2 * i]), shown(branch().entropy.data[2 * i + 1])];
        }),
      };
    },
    picture: () => cellPicture({
      title: "What could have been written at each step, the likeliest first", theme: theme(), width: 84,
      rows: [...Array(branch().tokens.shape[1]).keys()].map((rank) => `#${rank + 1}`),
      columns: branch().ids.slice(state.start).map(label),
      cell(rank, i) {
        const one = candidatesAt(branch(), state.start, i)[rank];
        if (!one) return { ground: theme().paper, ink: theme().ink, text: "" };
        const { background, color } = ramp(Number.isNaN(one.after) ? one.own : one.after);
        return { ground: background, ink: color, text: `${one.chosen ? "▸" : ""}${label(one.id)}` };
      },
    }),
  };
}
