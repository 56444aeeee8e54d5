"""Write the page of a recording to a file."""

import os
from typing import TYPE_CHECKING

from optlens.files import replacing
from optlens.report.facts import gather
from optlens.report.page import html_page

if TYPE_CHECKING:
    from optlens.recording import Recording


def write_html(recording: "Recording", path: str | os.PathLike, top_k: int = 5) -> None:
    """Write one self-contained page about a recording: no kernel, no network.

    The page shows the tokens, the next-token predictions and their way through the layers, the
    logit lens, every attention head and the residual stream, in light and dark. The same recording
    gives the same bytes. What was not recorded is left out.

    Args:
        recording: what to show; of a batch, every prompt.
        path: the file to write; an existing one is replaced when the page is complete.
        top_k: how many tokens a cell of the logit lens lists.

    Raises:
        OSError: when the file cannot be written; nothing is changed then.
        ValueError: when `top_k` is under 1.

    Example:
        >>> import optlens
        >>> recording = optlens.load().record("The cat sat on the")
        >>> write_html(recording, "recording.html")  # doctest: +SKIP
    """
    page = html_page(gather(recording, top_k))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
