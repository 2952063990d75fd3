"""A paper's text as the rules look at it, made once for all of them."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_tools.papers import Paper
from data_tools.render import training_text
from data_tools.words import Hashes, hashed_words

Mask = NDArray[np.bool_]


class Text:
    """The text of a paper, and what the rules look at in it, each made when it is first asked for.

    Attributes:
        paper: whose text it is.
    """

    def __init__(self, paper: Paper) -> None:
        self.paper = paper

    @cached_property
    def paragraphs(self) -> list[str]:
        """Those of abstract and body, without headings; of a plain document its lines with text."""
        return list(_paragraphs(self.paper))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Of the paragraphs, in characters: int64 `[paragraphs]`."""
        return np.fromiter(map(len, self.paragraphs), np.int64, len(self.paragraphs))

    @cached_property
    def characters(self) -> int:
        """Of all paragraphs."""
        return int(self.lengths.sum())

    @cached_property
    def content(self) -> NDArray[np.uint8]:
        """The paragraphs in UTF-8, a line feed before each and behind the last: uint8 `[bytes]`."""
        return np.frombuffer(b"\n".join([b"", *self._lines, b""]), np.uint8)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each paragraph begins in `content`: int64 `[paragraphs]`."""
        sizes = np.fromiter(map(len, self._lines), np.int64, len(self._lines))
        return np.cumsum(sizes + 1) - sizes

    @cached_property
    def letters(self) -> Mask:
        """Which bytes of `content` are ASCII letters: `[bytes]`."""
        lowered = self.content | np.uint8(0x20)
        letters: Mask = lowered - np.uint8(ord("a")) < 26
        return letters

    @cached_property
    def spaces(self) -> Mask:
        """Which bytes of `content` are spaces: `[bytes]`."""
        spaces: Mask = self.content == ord(" ")
        return spaces

    @cached_property
    def beyond_ascii(self) -> Mask:
        """Which bytes of `content` begin a character beyond ASCII: `[bytes]`."""
        beginnings: Mask = self.content >= 0xC0
        return beginnings

    @cached_property
    def training_text(self) -> str:
        """What the paper would be trained on, as it is now."""
        return training_text(self.paper)

    @cached_property
    def words(self) -> Hashes:
        """The words of the training text, hashed (`data_tools.words`): uint64 `[words]`."""
        return hashed_words(self.training_text)

    @cached_property
    def _lines(self) -> list[bytes]:
        return [text.encode(errors="replace") for text in self.paragraphs]

    def in_paragraphs(self, mask: Mask) -> NDArray[np.int64]:
        """How many bytes of each paragraph a mask of `content` marks: int64 `[paragraphs]`.

        The line feed behind a paragraph counts with it.
        """
        counts = np.add.reduceat(mask, self.starts, dtype=np.uint32)  # half the time of int64
        return counts.astype(np.int64)


class _LastText:
    """The text of the paper that was asked for last, since the rules look at one paper after another."""

    def __init__(self) -> None:
        self._text: Text | None = None

    def __call__(self, paper: Paper) -> Text:
        if self._text is None or self._text.paper is not paper:
            self._text = Text(paper)
        return self._text


text_of = _LastText()
"""The `Text` of a paper; rules that look at the same paper share it."""


def _paragraphs(paper: Paper) -> Iterator[str]:
    if paper.plain:
        for block in paper.sections:
            yield from filter(str.strip, block.text.splitlines())
        return
    yield from paper.abstract
    for block in paper.sections:
        if not block.depth:
            yield block.text
