// The neurons view: the neurons of a layer, where one of them fires, and which tokens it makes likelier.

import { cssOf, inkOn, mixed } from "./colour.js";
import { h, setStyle } from "./dom.js";
import { handled, moved, movedInList } from "./keys.js";
import { examplesPicture } from "./neuronpicture.js";
import { labelEl } from "./tokens.js";
import { number, spoken } from "./words.js";

const MOST_LISTED = 200;

/**
 * Return the places of the neurons of a layer, strongest first; of equals the first one first.
 * @param {Float32Array} tops the largest activation of each
 */
export function strongestFirst(tops) {
  return [...tops.keys()].sort((a, b) => tops[b] - tops[a] || a - b);
}

/** @returns {number} how dark a token is: its activation as a share of the largest, 0 below zero */
export function shadeOf(activation, top) {
  return top > 0 ? Math.min(Math.max(activation / top, 0), 1) : 0;
}

/** Draw the neurons part. */
export function neuronsView({ state, main, tools, theme, selection, ask, say, tip, signal }) {
  const { layers, neurons, counted } = state;
  const lists = new Map((state.lists ?? []).map((list, i) => [layers[i], list]));
  const known = new Map(state.shown.map(([layer, neuron, shown]) => [`${layer} ${neuron}`, shown]));
  let [layer, neuron] = [layers.at(-1), null];
  let list = null; // of the layer on show
  let order = [];
  let shown = null; // the neuron on show: examples, effect
  let place = [0, 0]; // which token of which example

  const names = h("div.ol-neuron-list", { role: "listbox", "aria-label": "Neurons, the strongest first", tabindex: -1 });
  const listed = h("p.ol-caption");
  const name = h("h4.ol-name", {}, "\u00a0");
  const facts = h("p.ol-facts");
  const examples = h("div.ol-examples", { role: "grid", "aria-label": "Where the neuron fires most strongly" });
  const said = h("p.ol-readout");
  const legend = h("div.ol-legend");
  const sides = h("div.ol-details");
  const caption = h("p.ol-caption", {}, "Change of the logit for an activation of 1, against the mean over all tokens, times the scale of the LayerNorm behind");
  main.classList.add("ol-neurons");
  main.append(
    h("div.ol-pane", {}, listed, names),
    h("div.ol-pane", {}, name, facts, examples, said, legend, caption, sides));

  const layerField = h("select", { onchange: () => selection.set({ layer: layers[layerField.selectedIndex], neuron: null }) },
    layers.map((each) => h("option", {}, String(each))));
  const field = h("input.ol-input.ol-number", { type: "number", min: 0, "aria-label": "Number of the neuron" });
  tools.append(
    h("label.ol-field", {}, "Layer ", layerField),
    h("form.ol-field", {
      onsubmit(event) {
        event.preventDefault();
        if (field.value !== "") selection.set({ layer, neuron: Number(field.value) });
      },
    }, h("label", {}, "Neuron ", field), " ", h("button.ol-button", { type: "submit" }, "Go")));

  // ------------------------------------------------------------------------------ the list

  const valueOf = (column) => list.tops[column];
  function drawList() {
    const at = neurons.indexOf(neuron);
    const first = order.slice(0, MOST_LISTED);
    const many = first.includes(at) || at < 0 ? first : [...first, at];
    const top = list.tops[order[0]] || 1;
    names.replaceChildren(...many.map((column) => {
      const label = list.words[list.triggers[column]];
      const chosen = column === at;
      const fires = label === undefined ? "never fires" : `${number(valueOf(column))} on ${spoken(label)}`;
      return h("div.ol-guess.ol-neuron", {
        role: "option", "aria-selected": String(chosen), tabindex: chosen ? 0 : -1, "data-column": column,
        "aria-label": `neuron ${neurons[column]}: ${fires}`,
        style: { "--ol-part": `${100 * shadeOf(valueOf(column), top)}%` },
      }, h("b", {}, String(neurons[column])), label === undefined ? h("small", {}, "silent") : labelEl(label, { most: 9 }), h("span", {}, number(valueOf(column))));
    }));
    const more = neurons.length > MOST_LISTED ? `; the first ${MOST_LISTED} of ${neurons.length}` : "";
    listed.textContent = `Layer ${layer}, largest activation${more}`;
    const chosen = names.querySelector("[aria-selected=true]");
    if (chosen) {
      const [top_, bottom] = [chosen.offsetTop - names.offsetTop, chosen.offsetTop - names.offsetTop + chosen.offsetHeight];
      if (top_ < names.scrollTop) names.scrollTop = top_;
      else if (bottom > names.scrollTop + names.clientHeight) names.scrollTop = bottom - names.clientHeight;
    }
  }
  const optionOf = (event) => event.target.closest?.(".ol-neuron");
  names.addEventListener("click", (event) => {
    const option = optionOf(event);
    if (option) selection.set({ layer, neuron: neurons[Number(option.dataset.column)] });
  }, { signal });
  names.addEventListener("keydown", (event) => {
    const options = [...names.children];
    const next = movedInList(options.indexOf(optionOf(event)), event.key, options.length, 1);
    if (next === null) return;
    handled(event);
    selection.set({ layer, neuron: neurons[Number(options[next].dataset.column)] });
    names.querySelector("[aria-selected=true]")?.focus({ preventScroll: true });
  }, { signal });

  // ---------------------------------------------------------------------------- one neuron

  const largest = () => Math.max(0, ...shown.examples.flatMap(({ activations }) => activations));
  function drawNeuron() {
    const at = neurons.indexOf(neuron);
    name.replaceChildren(`Layer ${layer}, neuron ${neuron}`);
    const count = shown?.examples.length ?? 0;
    facts.replaceChildren(
      h("span", {}, "largest activation ", h("b", {}, list ? number(valueOf(at)) : "–")),
      h("span", {}, "rank ", h("b", {}, list ? String(order.indexOf(at) + 1) : "–"), ` of ${neurons.length} here`),
      h("span", {}, h("b", {}, String(count)), count === 1 ? " example" : " examples", ` of ${counted} tokens`));
    drawExamples();
    drawSides();
  }

  function drawExamples() {
    if (!shown || !theme()) return;
    const top = largest();
    examples.replaceChildren(...shown.examples.map((each, row) => h("div.ol-example", { role: "row" },
      h("span.ol-example-name", { role: "rowheader", title: each.where }, h("b", {}, each.activation.toFixed(3)), h("small", {}, each.where)),
      h("span.ol-example-text", { role: "presentation" }, each.labels.map((label, column) => {
        const ground = mixed(theme().ramp, shadeOf(each.activations[column], top));
        const trigger = column === each.index;
        const here = row === place[0] && column === place[1];
        return h(trigger ? "span.ol-lit.ol-trigger" : "span.ol-lit", {
          role: "gridcell", tabindex: here ? 0 : -1, "aria-selected": String(here), "data-row": row, "data-column": column,
          "aria-label": `${spoken(label)}, ${number(each.activations[column])}${trigger ? ", the token it is about" : ""}`,
          style: { background: cssOf(ground), color: inkOn(ground, theme()) },
        }, labelEl(label, { most: 24 }));
      })))));
    if (!shown.examples.length) examples.replaceChildren(h("p.ol-caption", {}, "It fires nowhere in this text: no activation is above 0."));
    legend.replaceChildren(
      h("span", {}, "0", h("span.ol-ramp"), `${number(top)}: activation`),
      h("span", {}, h("span.ol-lit.ol-trigger", {}, "token"), " what an example is about"));
    readOut();
  }

  function readOut() {
    const each = shown.examples[place[0]];
    if (!each) return said.replaceChildren();
    const [row, column] = place;
    return said.replaceChildren("example ", String(row + 1), ", ", labelEl(each.labels[column]), `, ${each.where.replace(/\d+$/, (at) => String(Number(at) + column - each.index))}: activation `,
      h("b", {}, each.activations[column].toFixed(3)));
  }

  function drawSides() {
    const effect = shown?.effect;
    caption.hidden = !effect;
    if (!effect || !theme()) return sides.replaceChildren(state.has_effect && shown ? h("p.ol-caption", {}, "The effect of this neuron was not looked at.") : "");
    const top = Math.max(1e-9, ...[...effect.promoted, ...effect.suppressed].map(([, , value]) => Math.abs(value)));
    return sides.replaceChildren(...[["promoted", "Makes likelier", 4], ["suppressed", "Makes less likely", 2]].map(([side, title, colour]) =>
      h("div.ol-guesses", { role: "group", "aria-label": title, style: { "--ol-bar": theme().diverging[colour] } },
        h("p.ol-caption", {}, title),
        effect[side].map(([token, label, value]) => h("button.ol-guess", {
          type: "button", style: { "--ol-part": `${(100 * Math.abs(value)) / top}%` }, onclick: () => selection.set({ token }),
          "aria-pressed": String(selection.get().token === token), "aria-label": `${spoken(label)}: ${signed(value)}`, title: `select token ${token}`,
        }, labelEl(label, { most: 20 }), h("span", {}, signed(value)))))));
  }

  const cellOf = (event) => event.target.closest?.(".ol-lit[role]");
  const placeOf = (el) => [Number(el.dataset.row), Number(el.dataset.column)];
  function chooseToken(next) {
    place = next;
    drawExamples();
    selection.set({ token: shown.examples[place[0]].ids[place[1]] });
  }
  examples.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (cell) chooseToken(placeOf(cell));
  }, { signal });
  examples.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    const [row, column] = placeOf(cell);
    const widths = shown.examples.map(({ ids }) => ids.length);
    const next = moved([row, column], event.key, [widths.length, widths[row]]);
    if (!next) return;
    handled(event);
    // Up and down lead to what another example is about, wherever that stands in its line.
    chooseToken(next[0] === row ? next : [next[0], shown.examples[next[0]].index]);
    examples.querySelector("[tabindex='0']").focus({ preventScroll: true });
  }, { signal });
  examples.addEventListener("mouseover", (event) => {
    const cell = cellOf(event);
    if (!cell) return tip.hide();
    const [row, column] = placeOf(cell);
    const each = shown.examples[row];
    return tip.show([h("p", {}, `token ${each.ids[column]}`),
      h("div.ol-fact", {}, labelEl(each.labels[column], { most: 24 }), h("b", {}, each.activations[column].toFixed(3)))], cell);
  }, { signal });
  examples.addEventListener("mouseleave", () => tip.hide(), { signal });

  // ------------------------------------------------------------------------- what is asked

  async function show(wantedLayer, wantedNeuron) {
    const trouble = (error) => { shown = { examples: [], effect: null }; note(error.message); return null; };
    if (!lists.has(wantedLayer)) {
      const answer = await ask("list", "list", { layer: wantedLayer }).catch(trouble);
      if (!answer || wantedLayer !== layer) return;
      lists.set(wantedLayer, answer);
    }
    const { tops, triggers, words } = lists.get(wantedLayer);
    list = { tops: tops.data, triggers: triggers.data, words };
    order = strongestFirst(list.tops);
    neuron = neurons.includes(wantedNeuron) ? wantedNeuron : neurons[order[0]];
    drawList();
    const key = `${wantedLayer} ${neuron}`;
    if (!known.has(key)) {
      const asked = neuron;
      const answer = await ask("neuron", "neuron", { layer: wantedLayer, neuron: asked }).catch(trouble);
      if (wantedLayer !== layer || asked !== neuron) return;
      if (!answer) {
        if (shown) drawNeuron();
        return;
      }
      known.set(key, answer);
    }
    note("");
    shown = known.get(key);
    place = [0, shown.examples[0]?.index ?? 0];
    drawNeuron();
  }

  const trouble = h("p.ol-trouble", { role: "status" });
  tools.append(trouble);
  const note = (text) => { trouble.textContent = text; };
  const step = (by) => {
    const next = order[order.indexOf(neurons.indexOf(neuron)) + by];
    if (next === undefined) return;
    selection.set({ layer, neuron: neurons[next] });
    say(`Neuron ${neurons[next]} of layer ${layer}.`);
  };

  return {
    update({ layer: nextLayer, neuron: nextNeuron }) {
      const at = layers.includes(nextLayer) ? nextLayer : layer;
      if (Number.isInteger(nextNeuron) && !neurons.includes(nextNeuron)) note(`Neuron ${nextNeuron} was not looked at.`);
      if (shown && at === layer && (nextNeuron === neuron || !neurons.includes(nextNeuron)) && list) return drawSides();
      layer = at;
      layerField.selectedIndex = layers.indexOf(layer);
      field.value = "";
      return show(layer, nextNeuron);
    },
    paint() {
      if (list) drawList();
      if (shown) drawNeuron();
    },
    keys: [["↑ ↓", "among neurons; among examples"], ["← →", "among the tokens of an example"]],
    commands: {
      n: ["the next neuron, in the order of the list", () => step(1)],
      p: ["the neuron before", () => step(-1)],
    },
    table() {
      return {
        caption: `Layer ${layer}, neuron ${neuron}: its examples, the token they are about in brackets`,
        head: ["rank", "activation", "token", "where", "example"],
        rows: (shown?.examples ?? []).map(({ activation, labels, index, where }, i) =>
          [i + 1, activation, labels[index], where, labels.map((label, at) => (at === index ? `[${label}]` : label)).join("")]),
      };
    },
    picture: () => examplesPicture({ title: `Layer ${layer}, neuron ${neuron}`, theme: theme(), shown, shadeOf, signed }),
  };
}

/** @returns {string} an effect with its sign */
export function signed(value) {
  return `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`;
}
