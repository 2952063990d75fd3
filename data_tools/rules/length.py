"""Too short or too long."""

from dataclasses import dataclass

import numpy as np

from data_tools.papers import Paper
from data_tools.rules.base import Dropped
from data_tools.rules.texts import text_of


@dataclass(frozen=True)
class Length:
    """Leaves out what is too short to be a paper, and what is too long to be one.

    Attributes:
        min_words: of abstract and body (500: peS2o, Soldaini and Lo 2023).
        min_paragraphs: of abstract and body (5: peS2o).
        max_words: of abstract and body (23,305: Data-Juicer's recipe for the PMC of The Pile).
    """

    min_words: int = 500
    min_paragraphs: int = 5
    max_words: int = 23_305

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper, or `too_few_words`, `too_few_paragraphs` or `too_many_words`."""
        text = text_of(paper)
        paragraphs = len(text.paragraphs)
        # Words are parted by single spaces.
        count = int(np.count_nonzero(text.spaces)) + int(np.count_nonzero(text.lengths))
        if count < self.min_words:
            return Dropped("too_few_words", f"{count} words, at least {self.min_words} are asked for")
        if paragraphs < self.min_paragraphs:
            return Dropped(
                "too_few_paragraphs", f"{paragraphs} paragraphs, at least {self.min_paragraphs} are asked for"
            )
        if count > self.max_words:
            return Dropped("too_many_words", f"{count} words, at most {self.max_words} are let through")
        return paper
