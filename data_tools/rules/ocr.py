"""Dirt of optical character recognition."""

from dataclasses import dataclass

import numpy as np

from data_tools.papers import Paper
from data_tools.rules.base import Dropped
from data_tools.rules.texts import Text, text_of


@dataclass(frozen=True)
class Ocr:
    """Leaves out a paper with words torn to letters, or with many characters that could not be decoded.

    Attributes:
        max_broken_words: "A b str" in 10,000 characters (peS2o leaves out abstracts with more than 4;
            Soldaini and Lo 2023).
        max_undecoded: U+FFFD in 10,000 characters.
    """

    max_broken_words: float = 4.0
    max_undecoded: float = 10.0

    def __call__(self, paper: Paper) -> Paper | Dropped:
        """The paper, or `ocr`."""
        text = text_of(paper)
        per = 10_000 / max(10_000, text.characters)
        broken = per * _broken_words(text)
        if broken > self.max_broken_words:
            return Dropped(
                "ocr",
                f"{broken:.1f} broken words in 10,000 characters, the limit is {self.max_broken_words:g}",
            )
        undecoded = per * sum(one.count("\ufffd") for one in text.paragraphs)
        if undecoded > self.max_undecoded:
            return Dropped(
                "ocr", f"{undecoded:.1f} U+FFFD in 10,000 characters, the limit is {self.max_undecoded:g}"
            )
        return paper


def _broken_words(text: Text) -> int:
    """How often a letter and then a small letter stand alone before another small letter: "A b str"."""
    content, letters = text.content, text.letters
    gaps = text.spaces | (content == ord("\n"))
    places = np.flatnonzero(gaps[:-5] & gaps[2:-3] & gaps[4:-1])
    for offset in (1, 3, 5):
        places = places[letters[places + offset]]
    for offset in (3, 5):
        places = places[content[places + offset] >= ord("a")]
    small = content[places + 1] >= ord("a")
    count, end = int(np.count_nonzero(~small)), 0
    for place in places[small].tolist():
        if place >= end:  # of small letters that are all apart, three are one
            count, end = count + 1, place + 6
    return count
