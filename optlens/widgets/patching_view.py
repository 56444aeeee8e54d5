"""The view of a sweep's result: a number for every patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optlens.widgets.patching_part import PatchingPart
from optlens.widgets.subject import SubjectView

if TYPE_CHECKING:
    from optlens.patching import PatchResult
    from optlens.widgets.selection import Selection


class PatchingView(SubjectView):
    """Show what a sweep found: a table of patches, and any one of them with its interval.

    Args:
        result: what `optlens.patch_sweep`, `ablate_sweep` or another sweep found; one that was
            interrupted is shown as far as it goes, and says so.
        selection: what is selected, to link views; give `view.selection` of a view of the clean
            recording to look at the same layer, head and position in both.

    Raises:
        TypeError: if it is no such result.
        InputError: if it has more patches than a picture can show.

    Example:
        >>> import optlens
        >>> clean = "When Mary and John went to the store, John gave a drink to"
        >>> corrupt = "When Mary and John went to the store, Mary gave a drink to"
        >>> metric = optlens.metrics.logit_diff(" Mary", " John")
        >>> result = optlens.patch_sweep(
        ...     optlens.load(), clean, corrupt, "z", ("layer", "head"), metric, progress=False
        ... )
        >>> optlens.widgets.PatchingView(result)
        PatchingView(z: layer=5, head=8)
    """

    kinds = ("patching",)

    def __init__(self, result: PatchResult, selection: Selection | None = None) -> None:
        super().__init__(result, PatchingPart(result), selection)
