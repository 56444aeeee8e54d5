// A page's stand-in for the notebook: the same model interface, answers from what the page holds.

/** Return a model as a notebook's widget manager gives it, over plain values. */
export function plainModel(values) {
  const heard = new Map();
  const model = {
    comm_live: true,
    get: (name) => values[name],
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      model.tell(`change:${name}`);
    },
    save_changes() {},
    on(event, run) {
      heard.set(event, [...(heard.get(event) ?? []), run]);
    },
    off(event, run) {
      heard.set(event, (heard.get(event) ?? []).filter((other) => other !== run));
    },
    tell(event, ...given) {
      for (const run of heard.get(event) ?? []) run(...given);
    },
    send() {},
  };
  return model;
}

/** @returns {string} a question as a key: the same for the same question, whatever its order */
export function questionKey(question) {
  return JSON.stringify(Object.entries(question).sort(([a], [b]) => (a < b ? -1 : 1)));
}

/**
 * Return the model of a view over what a page holds.
 * @param {{ state: object, selected?: object, answers: [object, any][] }} contents
 * @param {object} shared the model of the selection, where several views have one
 */
export function pageModel({ state, selected, answers }, shared = plainModel({ value: selected })) {
  const known = new Map(answers.map(([question, answer]) => [questionKey(question), answer]));
  const model = plainModel(state);
  model.widget_manager = { get_model: async () => shared };
  model.send = ({ id, question }) => {
    const content = known.get(questionKey(question));
    const reply = content === undefined
      ? { kind: "error", id, message: "This page does not hold that; the notebook does." }
      : { kind: "answer", id, content };
    queueMicrotask(() => model.tell("msg:custom", reply, []));
  };
  return model;
}

/** Draw the view of a page. */
export function startPage(page, render) {
  const contents = JSON.parse(page.getElementById("contents").textContent);
  return render({ model: pageModel(contents), el: page.getElementById("view") });
}
