"""The views of one thing each that a recording holds: attention, logit lens, residual stream."""

from __future__ import annotations

from typing import Any

from optlens.recording import Recording
from optlens.widgets.attention_part import AttentionPart
from optlens.widgets.lens_part import LensPart
from optlens.widgets.residual_part import ResidualPart
from optlens.widgets.selection import Selection
from optlens.widgets.view import View


class AttentionView(View):
    """Show the attention of every head, and one of them large.

    Args:
        recording: one that holds "attention"; if it holds "v" too, weights can be shown times the
            length of what the head writes for each key.
        value_norms: these lengths, `[layer, head, key]`, if you have them.
        selection: what is selected, to link views; all views of one recording share one by default.

    Raises:
        NotRecordedError: if the recording holds no attention.

    Example:
        >>> import optlens
        >>> view = optlens.widgets.AttentionView(optlens.load().record("The cat sat on the"))
        >>> view
        AttentionView(layers=5, heads=8, tokens=6)
        >>> view.selected = {"layer": 3, "head": 1}  # also what a click does
    """

    kinds = ("attention",)

    def __init__(
        self,
        recording: Recording,
        value_norms: Any = None,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(recording, [AttentionPart(recording, value_norms)], selection)


class LensView(View):
    """Show what the model would predict after each layer, at each position.

    Args:
        recording: one that holds "logit_lens", or "residual" and its model.
        top_k: how many tokens to list for a cell.
        sublayers: also read the stream between attention and MLP; needs "resid_mid".
        selection: what is selected, to link views; all views of one recording share one by default.

    Raises:
        NotRecordedError: if the recording lacks what is needed.

    Example:
        >>> import optlens
        >>> rec = optlens.load().record("The cat sat on the")
        >>> optlens.widgets.LensView(rec, top_k=10)
        LensView(rows=6, tokens=6)
    """

    kinds = ("lens",)

    def __init__(
        self,
        recording: Recording,
        top_k: int = 5,
        sublayers: bool = False,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(recording, [LensPart(recording, top_k, sublayers)], selection)


class ResidualView(View):
    """Show the residual stream: how long it is, and how each layer turns it.

    Args:
        recording: one that holds "residual".
        selection: what is selected, to link views; all views of one recording share one by default.

    Raises:
        NotRecordedError: if the recording holds no residual stream.

    Example:
        >>> import optlens
        >>> optlens.widgets.ResidualView(optlens.load().record("The cat sat on the"))
        ResidualView(rows=6, tokens=6)
    """

    kinds = ("residual",)

    def __init__(self, recording: Recording, selection: Selection | None = None) -> None:
        super().__init__(recording, [ResidualPart(recording)], selection)
