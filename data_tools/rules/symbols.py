"""The share of letters and digits, and of words with a letter."""

from dataclasses import dataclass

import numpy as np

from data_tools.papers import Paper
from data_tools.rules.base import Dropped
from data_tools.rules.texts import text_of


@dataclass(frozen=True)
class Symbols:
    """Leaves out a paper of which too little is letters and digits.

    Attributes:
        min_alphanumeric: the share of letters and digits among its characters, in which characters beyond
            ASCII count as letters (0.2787: Data-Juicer's recipe for the PMC of The Pile).
    """

    min_alphanumeric: float = 0.2787

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper, or `symbols`."""
        text = text_of(paper)
        digits = text.content - np.uint8(ord("0")) < 10
        kept = sum(int(np.count_nonzero(mask)) for mask in (text.letters, digits, text.beyond_ascii))
        if kept < self.min_alphanumeric * text.characters:
            return Dropped(
                "symbols",
                f"{kept / text.characters:.1%} of the characters are letters or digits, "
                f"at least {self.min_alphanumeric:.1%} are asked for",
            )
        return paper
