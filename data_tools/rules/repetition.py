"""Text that says the same again and again."""

from dataclasses import dataclass

import numpy as np

from data_tools.papers import Paper
from data_tools.rules.base import Dropped
from data_tools.rules.texts import text_of
from data_tools.words import Hashes, ngrams


@dataclass(frozen=True)
class Repetition:
    """Leaves out a paper that repeats itself.

    Attributes:
        words: n of the n-grams of words.
        max_share: of n-grams that come more than once (10 and 0.5981: Data-Juicer's recipe for the PMC of The
            Pile).
        max_duplicate_paragraphs: the share of characters in paragraphs that came before (0.2: Gopher, Rae et
            al. 2021, table A1).
    """

    words: int = 10
    max_share: float = 0.5981
    max_duplicate_paragraphs: float = 0.2

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper, or `repetition`."""
        text = text_of(paper)
        total = text.characters
        again = total - sum(map(len, set(text.paragraphs)))
        if again > self.max_duplicate_paragraphs * total:
            return Dropped(
                "repetition",
                f"{again / total:.1%} of the characters in paragraphs that came before, "
                f"the limit is {self.max_duplicate_paragraphs:.1%}",
            )
        grams = ngrams(text.words, self.words)
        share = _repeated(grams, self.max_share) / max(1, len(grams))
        if share > self.max_share:
            return Dropped(
                "repetition",
                f"{share:.1%} of the {self.words}-grams come more than once, "
                f"the limit is {self.max_share:.1%}",
            )
        return paper


def _repeated(grams: Hashes, enough: float) -> int:
    """How many values of an array come more than once; where it is no more than a share `enough`, a bound."""
    last_place = np.uint64((1 << (2 * len(grams)).bit_length()) - 1)  # of a table, which needs no sorting
    taken = np.zeros(int(last_place) + 1, np.bool_)
    taken[(grams & last_place).view(np.int64)] = True
    bound = 2 * (len(grams) - int(np.count_nonzero(taken)))  # each that came to a taken place, and the first
    if bound <= enough * len(grams):
        return bound
    ordered = np.sort(grams)
    equal = np.zeros(len(ordered) + 1, np.bool_)
    equal[1:-1] = ordered[1:] == ordered[:-1]
    return int((equal[1:] | equal[:-1]).sum())
