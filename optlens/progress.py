"""Progress bars that their user can switch off from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int | None, shown: bool, **options: Any) -> tqdm:
    """Return a progress bar, which also the environment variable `TQDM_DISABLE` hides.

    Args:
        total: How many steps there are; None if nobody knows.
        shown: Whether to show it.
        **options: Further arguments of `tqdm`.
    """
    from tqdm.auto import tqdm

    # `disable=False` would be the caller's word against that of the environment
    hidden = {} if shown else {"disable": True}
    return tqdm(total=total, **options, **hidden)
