"""What this process holds in main memory; imports nothing that would take some itself."""

import threading
from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Return a field of /proc/self/status, in bytes ("VmRSS" now, "VmHWM" at its highest)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Let "VmHWM" start anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


class Watch(threading.Thread):
    """Follows the largest value of something, in a thread of its own."""

    def __init__(self, look: Callable[[], int], every: float) -> None:
        """Begin to look, every so many seconds."""
        super().__init__(daemon=True)
        self._look, self._every = look, every
        self._largest, self._done = 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Keep the largest value."""
        while not self._done.wait(self._every):
            self._largest = max(self._largest, self._look())

    def largest(self) -> int:
        """End it and return the largest value."""
        self._done.set()
        self.join()
        return self._largest
