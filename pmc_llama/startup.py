"""What the time from the start of the process to the end of the first step goes into."""

import time


class StartUp:
    """A clock that is told what has just been reached.

    Args:
        started: `time.time()` at the start of the process.
    """

    def __init__(self, started: float) -> None:
        self._started = self._last = started
        self._parts: dict[str, float] = {}

    def reached(self, part: str) -> None:
        """The time since the last call went into `part`."""
        now = time.time()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items())
        return f"first step {self._last - self._started:.1f} s after the start of the process: {parts}"
