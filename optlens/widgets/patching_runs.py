"""What a model predicts under one patch of a sweep, and the code that makes that patch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optlens import checks
from optlens.interventions import Intervention
from optlens.patching import PatchResult
from optlens.patching.one_patch import OnePatch, one_patch, why_not_one
from optlens.patching.patch_code import code_of
from optlens.patching.patch_run import GivenAgain, final_logits
from optlens.recording import fingerprint
from optlens.report.markup import token_label
from optlens.widgets.branches import lock_of
from optlens.widgets.part import QuestionError

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

# A page holds the predictions of so many patches, if all their runs take no more products than this.
PAGE_PATCHES = 400
PAGE_PRODUCTS = 4e11
PAGE_CODES = 400
_NO_MODEL = (
    "What is predicted under a patch takes a run of the model, and this view has none: "
    "PatchingView(result, model) shows it."
)


class PatchRuns:
    """Run single patches of a result on demand, each once.

    Args:
        result: what a sweep found.
        model: the model that was swept; None if it is not at hand.
        interventions: those under which it was swept.
        spans: names for positions in them.
        top_k: how many tokens to list.

    Raises:
        InputError: if model or interventions are not those of the sweep.
    """

    def __init__(
        self,
        result: PatchResult,
        model: "OPTForCausalLM | None" = None,
        interventions: Intervention | Iterable[Intervention] = (),
        spans: Mapping[str, Any] | None = None,
        top_k: int = 5,
    ):
        self.result, self.model, self.top_k = result, model, top_k
        self.standing = None
        if model is not None:
            if fingerprint(model) != result.metadata.get("model"):
                raise checks.InputError(
                    "This result was measured on a model with other weights; give the one that "
                    "was swept, or none."
                )
            self.standing = GivenAgain(result, model, interventions, spans)
        self._made: dict[Any, dict[str, Any]] = {}

    # --------------------------------------------------------------------- whether there are any

    def no_code(self) -> str:
        """Say why there is no code; "" if there is."""
        return why_not_one(self.result)

    def no_predictions(self) -> str:
        """Say why there are no predictions; "" if there are."""
        return self.no_code() or (_NO_MODEL if self.model is None else "")

    def none_in_page(self) -> str:
        """Say why a page holds no predictions; "" if it does."""
        reason = self.no_predictions()
        if reason:
            return reason
        cells = self.result.per_prompt[..., 0].numel()
        if cells > PAGE_PATCHES:
            return (
                f"This page holds no predictions: it would for {PAGE_PATCHES} patches at most, and "
                f"here are {cells:,}. The notebook shows them."
            )
        tokens = len(self._prompts()[0])
        if cells * tokens * sum(p.numel() for p in self.model.parameters()) > PAGE_PRODUCTS:
            return (
                f"This page holds no predictions: {cells:,} runs of this model take too long to "
                "make all beforehand. The notebook shows them."
            )
        return ""

    def prompts_in_page(self) -> int:
        """Return for how many of the prompts, from the first on, a page holds predictions."""
        cells = self.result.per_prompt[..., 0].numel()
        return max(1, min(len(self._prompts()), PAGE_PATCHES // max(cells, 1)))

    def codes_fit(self) -> bool:
        """Tell whether a page holds the code of every patch."""
        return self.result.per_prompt[..., 0].numel() <= PAGE_CODES

    # ---------------------------------------------------------------------------------- answers

    def code(self, index: Sequence[int], which: int) -> str:
        """Return the code of a patch on one prompt."""
        standing = () if self.standing is None else self.standing.interventions
        if self.standing is None and self.result.metadata.get("interventions"):
            raise QuestionError(
                "The sweep ran under interventions, which its result names but does not hold: "
                "PatchingView(result, model, interventions=[...]) shows the code."
            )
        spans = {} if self.standing is None else self.standing.spans_of(which)
        return code_of(self._patch(index, which), self.model, standing, spans)

    def predictions(self, index: Sequence[int], which: int) -> dict[str, Any]:
        """Return what is predicted after a prompt under a patch, without it, and in the source run.

        Raises:
            QuestionError: if the model is not at hand, or no longer what was swept.
        """
        reason = self.no_predictions()
        if reason:
            raise QuestionError(reason)
        key = (tuple(index), which)
        with lock_of(self.model):
            if key not in self._made and fingerprint(self.model) != self.result.metadata["model"]:
                raise QuestionError(
                    "The model's weights were altered since the sweep: its runs are no longer "
                    "those that were measured."
                )
            patch = self._patch(index, which)
            roles = ["base", "patched"] if patch.source is None else ["source", "base", "patched"]
            runs = [self._run(role, patch, key) for role in roles]
        return {"runs": runs, "after": self._label(patch.tokens[-1]), "at": len(patch.tokens) - 1}

    def _run(self, role: str, patch: OnePatch, key: tuple[tuple[int, ...], int]) -> dict[str, Any]:
        source = tuple(patch.source or ()) if role == "source" else ()
        place = key if role == "patched" else (role, key[1], source)
        if place not in self._made:
            logits = final_logits(self.model, patch, self.standing, key[1], role)
            best = logits.softmax(-1).topk(min(self.top_k, len(logits)))
            self._made[place] = {
                "ids": best.indices.tolist(),
                "labels": [self._label(token) for token in best.indices.tolist()],
                "probs": [round(prob, 6) for prob in best.values.tolist()],
            }
        name = patch.source_name if role == "source" else patch.name
        return {"role": role, "name": name} | self._made[place]

    def _patch(self, index: Sequence[int], which: int) -> OnePatch:
        try:
            return one_patch(self.result, index, which, self.model)
        except checks.InputError as error:
            raise QuestionError(str(error)) from error

    def _prompts(self) -> list[list[int]]:
        about = self.result.metadata
        return about.get("clean") or about.get("prompts") or [[]]

    def _label(self, token: int) -> str:
        known = self.result.metadata.get("labels", {}).get(str(token))
        if known is None and self.model is not None and self.model.tokenizer is not None:
            known = self.model.tokenizer.display(token)
        return token_label(f"⟨{token}⟩" if known is None else known)
