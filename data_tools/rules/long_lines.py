"""Lines that are too long for paragraphs."""

from dataclasses import dataclass

from data_tools.papers import Paper
from data_tools.rules.base import Dropped
from data_tools.rules.texts import text_of


@dataclass(frozen=True)
class LongLines:
    """Leaves out a paper whose paragraphs are too long, as dumps of data and lost line breaks make them.

    Attributes:
        max_mean: characters of a paragraph on average (1,200: Data-Juicer's recipe for the PMC of The Pile).
        max_longest: characters of the longest paragraph (7,328: the same).
    """

    max_mean: int = 1_200
    max_longest: int = 7_328

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper, or `long_lines`."""
        text = text_of(paper)
        if not text.paragraphs:
            return paper
        mean, longest = text.characters / len(text.paragraphs), text.lengths.max()
        for what, found, limit in (("mean", mean, self.max_mean), ("longest", longest, self.max_longest)):
            if found > limit:
                return Dropped(
                    "long_lines", f"the {what} paragraph has {found:,.0f} characters, the limit is {limit:,}"
                )
        return paper
