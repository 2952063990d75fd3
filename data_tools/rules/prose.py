"""Paragraphs that are no prose: rows of tables, sequences, letters that OCR has set apart."""

import re
from dataclasses import dataclass
from itertools import count

import numpy as np
from msgspec.structs import replace

from data_tools.papers import Paper
from data_tools.rules.texts import Text, text_of

_SPACED_LETTERS = re.compile(r"(?:(?<!\w)[A-Za-z] ){5,}[A-Za-z](?!\w)")
_LONG_WORD = re.compile(r"(?<!\S)(?!https?:)[^\s/]{60,}")


@dataclass(frozen=True)
class Prose:
    """Drops the paragraph, not the paper, that is no prose.

    Readers cut tables and displayed formulas where the source marks them; what text from PDF has of them is
    left to this rule. It asks three things of a paragraph of body or abstract:

    Attributes:
        min_letters: the share of letters and spaces among its characters (Gopher asks for a letter in 80% of
            the words of a document, Rae et al. 2021; this is milder, for paragraphs full of numbers are
            results).
        max_in_long_words: the share of characters in words of 60 characters or more, as of sequences.
        max_spaced: the share of characters in letters set apart ("A b s t r a c t", which peS2o counts:
            Soldaini and Lo 2023).
        shortest: characters of a paragraph that is looked at.
    """

    min_letters: float = 0.5
    max_in_long_words: float = 0.3
    max_spaced: float = 0.3
    shortest: int = 40

    def __call__(self, paper: Paper) -> Paper:
        """The paper without them; a plain document as it is."""
        if paper.plain:
            return paper
        gone = self._no_prose(text_of(paper))
        if not gone:
            return paper
        places = count()
        return replace(
            paper,
            abstract=tuple(text for text in paper.abstract if next(places) not in gone),
            sections=tuple(block for block in paper.sections if block.depth or next(places) not in gone),
        )

    def _no_prose(self, text: Text) -> set[int]:
        """The places of the paragraphs that are none."""
        looked_at = text.lengths >= self.shortest
        spaces = text.in_paragraphs(text.spaces)
        letters = text.in_paragraphs(text.letters | text.beyond_ascii) + spaces
        gone = set(np.flatnonzero(looked_at & (letters < self.min_letters * text.lengths)).tolist())
        # Ordinary prose has a space every seven characters; only other text is searched.
        for pattern, limit, suspects in (
            (_LONG_WORD, self.max_in_long_words, spaces * 12 < text.lengths),
            (_SPACED_LETTERS, self.max_spaced, spaces * 4 >= text.lengths),
        ):
            for place in np.flatnonzero(looked_at & suspects).tolist():
                paragraph = text.paragraphs[place]
                if _characters(pattern, paragraph) > limit * len(paragraph):
                    gone.add(place)
        return gone


def _characters(pattern: re.Pattern[str], text: str) -> int:
    return sum(len(match) for match in pattern.findall(text))
