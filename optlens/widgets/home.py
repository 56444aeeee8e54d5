"""On which thread the questions of a picture are answered: on the one that runs the user's cells.

JupyterLab may hand a view's messages to another thread of the kernel, beside a running cell. What an
answer does to a model (hooks while it runs) would then act on the cell's own runs too, without a
word. So answers wait for the loop that runs the cells, which is free when no cell runs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable


class Home:
    """The loop of the main thread, if it runs where this is made; in a kernel's cell it does."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        if threading.current_thread() is threading.main_thread():
            try:
                self._loop = asyncio.get_running_loop()
            except RuntimeError:  # plain Python: who asks, asks from his own thread
                pass

    def run(self, work: Callable[[], None]) -> None:
        """Do something on the main thread, now if this is it, else when it is free."""
        away = threading.current_thread() is not threading.main_thread()
        if away and self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(work)
        else:
            work()
