"""The most frequent word."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_tools.papers import Paper
from data_tools.rules.base import Dropped
from data_tools.rules.texts import text_of
from data_tools.words import Hashes, word_hashes

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_USUAL = frozenset(word_hashes("the of and in to a de la der die et le les und").tolist())
"""What the most frequent word of a paper is, nearly always; others are counted one by one."""
_LAST_PLACE = np.uint64((1 << 13) - 1)
_SURELY = 0.8
"""Hashed words end at a hyphen too, so there are more of them than words here."""


@dataclass(frozen=True)
class TopWord:
    """Leaves out a paper whose most frequent word is too frequent or is no word, as in lists and tables.

    The rule and its limit are those of peS2o (Soldaini and Lo 2023).

    Attributes:
        max_share: of the words of the text, above which it is too frequent.
    """

    max_share: float = 0.075

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper, or `top_word`."""
        text = text_of(paper)
        if self._is_usual(text.words):
            return paper
        counts = Counter(_WORD.findall(text.training_text.lower()))
        if not counts:
            return paper
        ((word, count),) = counts.most_common(1)
        share = count / counts.total()
        if not word.isalpha() or share > self.max_share:
            return Dropped(
                "top_word",
                f"the most frequent word is {word}, {share:.1%} of all; the limit is {self.max_share:.1%}",
            )
        return paper

    def _is_usual(self, words: Hashes) -> bool:
        """Whether the most frequent word is surely a usual one and rare enough.

        Words are counted in a small table, in which those that share a place count as one.
        """
        if not len(words):
            return False
        places = (words & _LAST_PLACE).view(np.int64)
        counts = np.bincount(places)
        top = counts.argmax()
        if counts[top] > _SURELY * self.max_share * len(words):
            return False
        word = words[np.argmax(places == top)]
        alone = np.count_nonzero(words == word)
        counts[top] -= alone
        return int(word) in _USUAL and bool(counts.max() <= alone)
