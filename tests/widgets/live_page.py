"""A view in a plain page with this very Python behind it: what a notebook does, without a server."""

from __future__ import annotations

import json
from typing import Any

from optlens.report.markup import visible
from optlens.widgets.arrays import as_text, packed
from optlens.widgets.modules import joined
from optlens.widgets.stylesheet import stylesheet

START = """
const given = JSON.parse(document.getElementById("given").textContent);
const shared = plainModel({ value: given.selected });
shared.save_changes = () => { window.selectInPython(shared.get("value")); };
const model = plainModel(given.state);
model.widget_manager = { get_model: async () => shared };
model.send = async (message) => {
  const { reply, update, selected } = await window.askPython(message);
  if (selected) shared.set("value", selected);
  if (update) {
    for (const [name, value] of Object.entries(update)) given.state[name] = value;
    model.tell("change:version");
  }
  model.tell("msg:custom", reply, []);
};
const drawAgain = () => renderView({ model, el: document.getElementById("view") }, { %s });
Object.assign(window, { shared, model, drawAgain });
drawAgain();
"""


class LivePage:
    """Connect a view with a page.

    Attributes:
        page: the page.
        questions: what the picture has asked, in order.
        before: called with each question before it is answered; what it raises goes to the view.
    """

    def __init__(self, page: Any, view: Any) -> None:
        self.page, self.view = page, view
        self.questions: list[dict[str, Any]] = []
        self.before: Any = lambda question: None
        page.expose_function("askPython", self._ask)
        page.expose_function("selectInPython", self._select)
        files = [f"{kind}.js" for kind in view.kinds]
        script = joined(*files, "shell.js", "standin.js")
        script += START % ", ".join(f"{kind}: {kind}View" for kind in view.kinds)
        state = self._update() | {"format": view.format, "selection": "IPY_MODEL_shared"}
        given = json.dumps({"state": state, "selected": view.selected}).replace("<", "\\u003c")
        page.set_content(
            f"<!DOCTYPE html><style>{stylesheet()}</style><main id=view></main>"
            f"<script type=application/json id=given>{given}</script>"
            f"<script type=module>{script}</script>"
        )
        page.locator(".ol-section").first.wait_for()

    def ask(self, what: str) -> list[dict[str, Any]]:
        """Return the questions of one name."""
        return [question for question in self.questions if question["what"] == what]

    def _update(self) -> dict[str, Any]:
        view = self.view
        prompt = view.selected["prompt"]
        parts = [view._part_facts(part, prompt, data=lambda state: state) for part in view._parts]
        return packed({"prompts": view.prompts, "parts": parts, "version": view.version}, as_text)

    def _select(self, value: dict[str, Any]) -> None:
        self.view.selected = value

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        question, number = message["question"], message["id"]
        self.questions.append(question)
        version, selected = self.view.version, self.view.selected
        try:
            self.before(question)
            content = packed(self.view.answer(question), as_text)
            reply = {"kind": "answer", "id": number, "content": content}
        except Exception as error:  # as `View._answer` does
            reply = {"kind": "error", "id": number, "message": visible(str(error))}
        return {
            "reply": reply,
            "update": self._update() if self.view.version != version else None,
            "selected": self.view.selected if self.view.selected != selected else None,
        }
