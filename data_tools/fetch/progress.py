"""How a fetch gets on where the bytes to come are not known: in articles."""

from datetime import timedelta
from time import monotonic

from rich.console import Console

from data_tools.progress import Progress


class ListingProgress(Progress):
    """Shows the article versions listed so far, of a number that nobody knows."""

    def __init__(self, console: Console) -> None:
        self._listed = 0
        super().__init__(0, "article versions", console)

    def listed(self, versions: int) -> None:
        """Note how many article versions are listed."""
        self._listed = versions
        self.report(0, versions, 0)

    def line(self) -> str:
        """The state in one line."""
        seconds = max(monotonic() - self._begin, 1e-3)
        return (
            f"listing: {self._listed:,} article versions  {self._listed / seconds:,.0f} a second  "
            f"{_duration(seconds)} gone"
        )


class ArticleProgress(Progress):
    """Shows articles looked at, bytes of those that were wanted, their rates and the time left.

    Args:
        articles: to be looked at.
        console: where to write.
    """

    def __init__(self, articles: int, console: Console) -> None:
        self._to_come = articles
        self._looked_at = self._bytes = 0
        super().__init__(articles, "articles", console)

    def found(self, articles: int) -> None:
        """Note articles that an earlier run has finished: they are not part of the rates."""
        self._to_come -= articles

    def looked_at(self, size: int) -> None:
        """Note one more article, and the bytes it gave."""
        self._looked_at += 1
        self._bytes += size
        self.report(0, self._looked_at, self._bytes)

    def line(self) -> str:
        """The state in one line."""
        seconds = max(monotonic() - self._begin, 1e-3)
        rate = self._looked_at / seconds
        left = _duration((self._to_come - self._looked_at) / rate) if rate else "?"
        share = (self._total - self._to_come + self._looked_at) / max(self._total, 1)
        return (
            f"{share:4.0%}  {self._looked_at:,} of {self._to_come:,} articles  {self._bytes / 1e6:,.1f} MB  "
            f"{rate:,.0f} articles/s  {self._bytes / 1e6 / seconds:,.1f} MB/s  "
            f"{_duration(seconds)} gone  {left} left"
        )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
