"""The view of neurons: where they fire, and what they write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optlens.widgets.neurons_part import NeuronsPart
from optlens.widgets.subject import SubjectView

if TYPE_CHECKING:
    from optlens.neurons import TopExamples, VocabularyEffect
    from optlens.widgets.selection import Selection


class NeuronsView(SubjectView):
    """Show what neurons fire on, and which tokens they promote and suppress.

    Args:
        examples: what `optlens.neurons.top_examples` found.
        effect: what `optlens.neurons.vocabulary_effect` found, for bars of tokens; None for none.
        selection: what is selected, to link views; its "layer" and "neuron" say which neuron is on
            show, "token" which token of an example was chosen.

    Raises:
        TypeError: if one of the two results is something else.
        ValueError: if they are of different models, or no neuron has both.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> texts = ["Mary gave a pen to John.", "The cat sat on the mat."]
        >>> found = optlens.neurons.top_examples(model, texts, layers=1, k=5, progress=False)
        >>> effect = optlens.neurons.vocabulary_effect(model, layers=1)
        >>> view = optlens.widgets.NeuronsView(found, effect)
        >>> view
        NeuronsView(layers=1, neurons=1024, examples=5, with effect)
        >>> view.selected = {"neuron": 986}
    """

    kinds = ("neurons",)

    def __init__(
        self,
        examples: TopExamples,
        effect: VocabularyEffect | None = None,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(examples, NeuronsPart(examples, effect), selection)
