"""The one error of this package: a checkpoint that cannot be read or written."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be found, read, trusted or written; the message says what to do."""


def listing(names: list[str], limit: int = 5) -> str:
    """Return `names` joined for a message, shortened after `limit`.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
