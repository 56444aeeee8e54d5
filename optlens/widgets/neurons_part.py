"""The numbers of the neurons view: where each neuron fires, and which tokens it makes likelier.

A result may hold every neuron of a model. The state has the list of neurons, strongest first, and
the examples themselves where these are few; the picture asks for the others one by one.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens import checks
from optlens.neurons import TopExamples, VocabularyEffect
from optlens.neurons.result import NeuronResult
from optlens.report.markup import Html, el, token_label
from optlens.report.pieces import token
from optlens.widgets.part import QuestionError
from optlens.widgets.subject import SubjectPart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.neurons import Example

_EAGER_LISTED = 2**15  # neurons whose list travels with the state
_EAGER_SHOWN = 64  # neurons whose examples travel with it
_PAGE = 1_500_000  # bytes of examples in a page
_FALLBACK = 5  # examples in plain markup


class NeuronsPart(SubjectPart):
    """Hold the strongest examples of neurons, and what these write.

    Args:
        examples: what `optlens.neurons.top_examples` found.
        effect: what `optlens.neurons.vocabulary_effect` found for the same model, if wanted.

    Raises:
        TypeError: if one of the two is something else.
        ValueError: if they are of different models, or no neuron has both.
    """

    kind = "neurons"
    title = "Neurons"

    def __init__(self, examples: TopExamples, effect: VocabularyEffect | None = None):
        _check(examples, effect)
        self.examples, self.effect = examples, effect
        self.tops = examples.values[..., 0].float().numpy()  # [layer, neuron]
        self.triggers = examples.tokens[:, :, 0, examples.before].numpy().astype(np.int32)
        count = f"{len(examples.neurons):,} neurons of {len(examples.layers)} layers"
        super().__init__(examples, f"{count}, over {examples.counted:,} tokens")

    def first(self) -> dict[str, Any]:
        """Return the neuron that fires most strongly in the last layer."""
        row = len(self.examples.layers) - 1
        neuron = self.examples.neurons[int(self.tops[row].argmax())]
        return {"layer": self.examples.layers[row], "neuron": neuron}

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return which neurons there are; lists and examples where these are few."""
        found, small = self.examples, self.tops.size <= _EAGER_SHOWN
        listed = self.tops.size <= _EAGER_LISTED
        return {
            "layers": found.layers,
            "neurons": found.neurons,
            "counted": found.counted,
            "has_effect": self.effect is not None,
            "lists": [self._list(row) for row in range(len(found.layers))] if listed else None,
            "shown": [
                [layer, neuron, self._shown(layer, neuron)]
                for layer in (found.layers if small else ())
                for neuron in found.neurons
            ],
        }

    def answer_list(self, prompt: int, layer: int) -> dict[str, Any]:
        """Return the largest activation of every neuron of a layer, and the token it fires on."""
        if layer not in self.examples.layers:
            raise QuestionError(f"Layer {layer} was not looked at.")
        return self._list(self.examples.layers.index(layer))

    def answer_neuron(self, prompt: int, layer: int, neuron: int) -> dict[str, Any]:
        """Return one neuron's examples, and what it promotes and suppresses."""
        try:
            return self._shown(layer, neuron)
        except checks.InputError as error:
            raise QuestionError(str(error)) from error

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the lists, and the strongest neurons of each layer as far as they fit."""
        layers, neurons = self.examples.layers, self.examples.neurons
        if self.tops.size > _EAGER_LISTED:
            for layer in layers:
                yield {"what": "list", "layer": layer}, self.answer_list(prompt, layer)
        if self.tops.size <= _EAGER_SHOWN:
            return
        left = _PAGE
        for columns in np.argsort(-self.tops, kind="stable").T:  # of each layer the next one
            for layer, column in zip(layers, columns.tolist(), strict=True):
                place = {"layer": layer, "neuron": neurons[column]}
                answer = self._shown(**place)
                left -= len(json.dumps(answer))
                if left < 0:
                    return
                yield {"what": "neuron", **place}, answer

    def counts(self) -> str:
        """Return layers, neurons and examples."""
        found = self.examples
        effect = ", with effect" if self.effect else ""
        size = f"layers={len(found.layers)}, neurons={len(found.neurons)}"
        return f"{size}, examples={found.values.shape[-1]}{effect}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the selected neuron's examples with its bars; with `detail`, the examples alone."""
        from optlens import plots

        layer, neuron = self._place(selected)
        examples = self.examples.of(layer, neuron)
        sides = None if detail else self._sides(layer, neuron)
        return plots.neuron_examples(
            [[token_label(text) for text in each.labels] for each in examples],
            [each.activations for each in examples],
            [each.index for each in examples],
            promoted=sides and [(text, value) for _, text, value in sides["promoted"]],
            suppressed=sides and [(text, value) for _, text, value in sides["suppressed"]],
            title=f"Layer {layer}, neuron {neuron}",
            style=style,
        )

    def fallback(self, prompt: int) -> list[Html]:
        """Return the examples of the strongest neuron of the last layer, the trigger in bold."""
        layer, neuron = self._place(self.first())
        rows = [
            el("tr", el("td", f"{each.activation:.3f}"), el("td", _marked(each)))
            for each in self.examples.of(layer, neuron)[:_FALLBACK]
        ]
        head = el("tr", el("th", "activation"), el("th", "example, the token it is about in bold"))
        caption = el("caption", f"Layer {layer}, neuron {neuron}: where it fires most strongly")
        found = [el("table", caption, el("thead", head), el("tbody", rows))]
        sides = self._sides(layer, neuron)
        for side in ("promoted", "suppressed") if sides else ():
            words = [[token(text), f" {value:+.3f}; "] for _, text, value in sides[side]]
            found.append(el("p", f"{side.capitalize()}: ", words))
        return found

    # ------------------------------------------------------------------------------- gathering

    def _place(self, selected: dict[str, Any]) -> tuple[int, int]:
        layer, neuron = selected.get("layer"), selected.get("neuron")
        first = self.first()
        layer = layer if layer in self.examples.layers else first["layer"]
        if neuron not in self.examples.neurons:
            row = self.examples.layers.index(layer)
            neuron = self.examples.neurons[int(self.tops[row].argmax())]
        return layer, neuron

    def _list(self, row: int) -> dict[str, Any]:
        triggers = self.triggers[row]
        words = {str(i): self._label(i) for i in np.unique(triggers[triggers >= 0]).tolist()}
        return {"tops": self.tops[row], "triggers": triggers, "words": words}

    def _label(self, number: int) -> str:
        return token_label(self.examples.label(number))

    def _shown(self, layer: int, neuron: int) -> dict[str, Any]:
        examples = [
            {
                "activation": _short(each.activation),
                "ids": each.tokens,
                "labels": [token_label(text) for text in each.labels],
                "activations": [_short(value) for value in each.activations],
                "index": each.index,
                "where": f"document {each.document}, token {each.offset}",
            }
            for each in self.examples.of(layer, neuron)
        ]
        return {"examples": examples, "effect": self._sides(layer, neuron)}

    def _sides(self, layer: int, neuron: int) -> dict[str, Any] | None:
        """Return id, label and effect of what a neuron promotes and suppresses."""
        effect = self.effect
        if effect is None or layer not in effect.layers or neuron not in effect.neurons:
            return None
        at = effect.place(layer, neuron)
        mean = float(effect.mean[at])  # adding one number to all logits would change nothing
        sides = {
            "promoted": (effect.promoted_tokens, effect.promoted),
            "suppressed": (effect.suppressed_tokens, effect.suppressed),
        }
        return {
            side: [
                [number, token_label(effect.label(number)), _short(value - mean)]
                for number, value in zip(ids[at].tolist(), values[at].tolist(), strict=True)
            ]
            for side, (ids, values) in sides.items()
        }


def _check(examples: Any, effect: Any) -> None:
    """Check that both are results, and of one model."""
    wanted = (
        (examples, TopExamples, "top_examples"),
        (effect, VocabularyEffect, "vocabulary_effect"),
    )
    for given, kind, maker in wanted:
        if not isinstance(given, kind) and not (given is None and kind is VocabularyEffect):
            raise TypeError(
                f"NeuronsView takes what optlens.neurons.{maker} returns, not {type(given).__name__}."
            )
    if effect is None:
        return
    prints = [_fingerprint(examples), _fingerprint(effect)]
    if None not in prints and prints[0] != prints[1]:
        raise ValueError(
            "The examples and the effect are of models with different weights; make both from one."
        )
    both = set(examples.layers) & set(effect.layers), set(examples.neurons) & set(effect.neurons)
    if not all(both):
        raise ValueError(
            "No neuron has both examples and an effect; give vocabulary_effect the same layers= and "
            "neurons= as top_examples."
        )


def _fingerprint(result: NeuronResult) -> Any:
    return result.metadata.get("fingerprint")


def _short(value: float) -> float:
    """Return a number with the digits that are shown, and a few more: a page is half as large."""
    return float(f"{value:.6g}")


def _marked(example: "Example") -> list[Html]:
    return [
        el("b", token(token_label(text))) if place == example.index else token(token_label(text))
        for place, text in enumerate(example.labels)
    ]
