"""Ranges of tokens, as arrays: what a sequence is made of, and how ranges are cut."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pmc_llama.randomness import IntArray


class TokenReader(Protocol):
    """Where tokens are read."""

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        """The tokens of the ranges (start, stop) of the stream, in one batch of reads."""
        ...


class DocumentReader(TokenReader, Protocol):
    """Where documents are read that may begin with a prompt."""

    def loss_starts(self, begins: IntArray) -> IntArray:
        """For the documents that begin at these places of the stream, int64 [n]: the first target with loss.

        A place of the stream, behind the document's first token: the prompt's end, where there is a prompt.
        """
        ...


class TokenStream(TokenReader, Protocol):
    """The counted documents of a corpus' split, one after another (`data_tools.corpus.Split`)."""

    @property
    def documents(self) -> int:
        """How many documents."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens, the EOD that ends each document included."""
        ...

    @property
    def starts(self) -> IntArray:
        """int64 [documents + 1]: where each document begins in the stream; closed by `tokens`."""
        ...


class DocumentStream(TokenStream, DocumentReader, Protocol):
    """A stream whose documents may begin with a prompt (`data_tools.corpus.Split`)."""


class Spans(NamedTuple):
    """The targets of n sequences, as m ranges of the stream; those of a sequence stand in its order.

    The input of a target is the token before it. For the first target of a range that is named, because on
    the circle of a stream the token before the first is the last.
    """

    row: IntArray  # [m], number of the sequence, from 0 to n - 1, ascending
    before: IntArray  # [m], position of the input of the first target
    begin: IntArray  # [m], position of the first target
    end: IntArray  # [m], position after the last target; `begin` when there is none

    @property
    def targets(self) -> int:
        """Targets of all sequences together."""
        return int((self.end - self.begin).sum())


class Cut(NamedTuple):
    """Ranges cut into pieces, those of a range side by side and in order."""

    owner: IntArray  # [pieces], which range it is of
    cell: IntArray  # [pieces], number of the cell that it lies in
    begin: IntArray  # [pieces]
    end: IntArray  # [pieces]


def cut_at_multiples(begin: IntArray, end: IntArray, size: int) -> Cut:
    """Cut ranges, none of them empty, at the multiples of `size`; a cell is what lies between two."""
    first = begin // size
    owner, number = repeated((end - 1) // size - first + 1)
    cell = first[owner] + number
    return Cut(owner, cell, np.maximum(begin[owner], cell * size), np.minimum(end[owner], (cell + 1) * size))


def cut_at_documents(begin: IntArray, end: IntArray, starts: IntArray) -> Cut:
    """Cut ranges of a stream where documents begin; a cell is a document.

    Args:
        begin: int64 [ranges].
        end: int64 [ranges]; an empty range stays one empty piece.
        starts: of the stream's documents, int64 [documents + 1].
    """
    # An empty range may lie at the very end.
    first = np.minimum(np.searchsorted(starts, begin, side="right"), len(starts) - 1) - 1
    last = np.maximum(np.searchsorted(starts, end, side="left") - 1, first)
    owner, number = repeated(last - first + 1)
    cell = first[owner] + number
    return Cut(
        owner,
        cell,
        np.maximum(begin[owner], np.asarray(starts[cell])),
        np.minimum(end[owner], np.asarray(starts[cell + 1])),
    )


def isolated(spans: Spans, starts: IntArray) -> Spans:
    """The same targets, with a range for each document.

    The EOD that ends a document is the input of the next one's first target, and is taken with that one.
    """
    cut = cut_at_documents(spans.begin, spans.end, starts)
    before = np.where(cut.begin > spans.begin[cut.owner], cut.begin - 1, spans.before[cut.owner])
    return Spans(spans.row[cut.owner], before, cut.begin, cut.end)


def joined(parts: list[Spans]) -> Spans:
    """The ranges of all parts, in the order of their rows; a row is in one part only."""
    together = Spans(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(together.row, kind="stable")
    return Spans(*(array[order] for array in together))


def repeated(counts: IntArray) -> tuple[IntArray, IntArray]:
    """For each of `counts[i]` pieces of every i: i, and the number of the piece among those, from 0."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
