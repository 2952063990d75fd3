"""How far a long read or write is: plain lines, the same on a terminal and in a log file."""

import sys
import time

_SECONDS_BETWEEN_LINES = 5.0


class ByteProgress:
    """Prints bytes done, rate and time left on standard error, every few seconds and at the end.

    Args:
        label: what is going on.
        total: bytes in all.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._begin = self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """Count `count` more bytes."""
        self._done += count
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._told = now
            rate = self._done / max(now - self._begin, 1e-9)
            print(
                f"{self._label}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, "
                f"{rate / 1e6:,.0f} MB/s, {(self._total - self._done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
