"""How far an evaluation is: plain lines, the same on a terminal and in a log file."""

import sys
import time

_SECONDS_BETWEEN_LINES = 5.0


class TokenProgress:
    """Prints tokens done, rate and time left on standard error, every few seconds. To be called."""

    def __init__(self) -> None:
        self._begin = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Note that so many tokens of this rank's are behind."""
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = done / (now - self._begin)
        print(
            f"evaluate: {done:,} of {total:,} tokens of rank 0 ({done / total:.0%}), {rate:,.0f} tokens/s, "
            f"{(total - done) / rate:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def ignore(done: int, total: int) -> None:
    """The progress of a rank that is silent."""
