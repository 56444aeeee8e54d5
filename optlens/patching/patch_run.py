"""The runs behind one patch of a sweep: the prompt with it, without it, and the prompt it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.interventions import Freeze, Intervention
from optlens.interventions.edits import Session
from optlens.interventions.store import describe_edits
from optlens.patching.one_patch import OnePatch
from optlens.patching.pairs import undisturbed
from optlens.patching.result import PatchResult

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM


class GivenAgain:
    """The interventions under which a sweep ran, for runs of one of its prompts.

    Args:
        result: What the sweep found.
        model: The model.
        interventions: Those that were given to the sweep.
        spans: Likewise.

    Raises:
        InputError: If the sweep ran under others.
    """

    def __init__(
        self,
        result: PatchResult,
        model: OPTForCausalLM,
        interventions: Intervention | Iterable[Intervention] = (),
        spans: Mapping[str, Any] | None = None,
    ) -> None:
        """Check them against what the result says of its own."""
        session = Session(model, interventions, spans)
        self.interventions = [edit.intervention for edit in session.edits]
        self.spans = dict(spans or {})
        described = result.metadata.get("interventions", [])
        if describe_edits(session.edits) != described:
            raise checks.InputError(
                f"The sweep ran under {len(described)} interventions, and those given here are "
                "others. Give interventions= and spans= as they were given to the sweep."
            )

    def spans_of(self, prompt: int) -> dict[str, Any]:
        """Return the positions that names stand for in one prompt."""
        plain = int, range
        return {
            name: entry if isinstance(entry, plain) else [entry[prompt]]
            for name, entry in self.spans.items()
        }


def final_logits(
    model: OPTForCausalLM,
    patch: OnePatch,
    standing: GivenAgain,
    prompt: int = 0,
    which: str = "patched",
) -> Tensor:
    """Run a patch by itself, with `model.intervene`.

    Args:
        model: The model.
        patch: The patch.
        standing: What else acts on the run.
        prompt: Which prompt of the sweep it is.
        which: "patched"; "base" for the same prompt without the patch; or "source" for the prompt
            whose values are written.

    Returns:
        The logits after the last token, `[d_vocab]`, in float32 at least.

    Raises:
        InputError: If hook functions are attached to the model.
    """
    spans, others = standing.spans_of(prompt), standing.interventions
    tokens = torch.tensor([patch.source if which == "source" else patch.tokens])
    with undisturbed(model):
        acting = list(others)
        if which == "patched":
            acting.append(_under(model, patch, others, spans))
        with model.intervene(acting, spans):
            logits = model(tokens, logits_to_keep=1).logits[0, -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def _under(model, patch: OnePatch, others: list[Intervention], spans: dict[str, Any]):
    """Take what is written from a source run under the sweep's interventions."""
    written = patch.intervention
    if not others or not isinstance(written, Freeze) or patch.source_name == "reference":
        return written
    with model.intervene(others, spans):
        hooks = written.address.hooks(model.config)
        _, held = model.run_with_cache(torch.tensor([patch.source]), names_filter=hooks)
    return dataclasses.replace(written, source=held)
