"""How a build or a verification gets on: a live line on a terminal, a plain line now and then in a log."""

import sys
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
_MEGABYTE = 1e6


class Progress:
    """Shows records and bytes done, their rates and the time left, on standard error. A context manager.

    Args:
        total_bytes: of all files to read.
        records: what they are, in the plural.
        console: where to write; standard error when not given.
        quiet: what ends within so many seconds leaves no line behind.
    """

    def __init__(
        self, total_bytes: int, records: str, console: Console | None = None, quiet: float = 0.0
    ) -> None:
        self._console = console or Console(file=sys.stderr)
        self._total = total_bytes
        self._records = records
        self._quiet = quiet
        self._done: dict[int, tuple[int, int]] = {}
        self._begin = self._last_line = monotonic()
        self._live = Live(console=self._console, transient=True, get_renderable=self._renderable)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        if kind is None and monotonic() - self._begin >= self._quiet:
            self._console.print(self.line(), highlight=False, soft_wrap=True)

    def report(self, task: int, records: int, size: int) -> None:
        """Note how many records and input bytes a task has behind it."""
        self._done[task] = (records, size)
        now = monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES and not self._console.is_terminal:
            self._last_line = now
            self._console.print(self.line(), highlight=False, soft_wrap=True)

    def line(self) -> str:
        """The state in one line."""
        records = sum(records for records, _ in self._done.values())
        size = sum(size for _, size in self._done.values())
        seconds = max(monotonic() - self._begin, 1e-3)
        left = (self._total - size) * seconds / size if size else None
        return (
            f"{size / max(self._total, 1):4.0%}  {records:,} {self._records}  "
            f"{size / _MEGABYTE:,.1f} of {self._total / _MEGABYTE:,.1f} MB  "
            f"{records / seconds:,.0f} {self._records}/s  {size / _MEGABYTE / seconds:,.1f} MB/s  "
            f"{_duration(seconds)} gone  {_duration(left)} left"
        )

    def _renderable(self) -> Text:
        return Text(self.line(), no_wrap=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
