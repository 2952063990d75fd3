"""Whole documents: those of a step packed into rows, each seen alone, with loss on what follows its prompt.

documents of a step ──lengths──▶ rows ──▶ micro-batches and ranks ──read──▶ MicroBatches of one rank

Every rank computes the rows of all ranks, from lengths alone. Which documents a step trains on depends on the
count of samples only; into how many rows they are packed, on the ranks as well.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.errors import UserError
from pmc_llama.batches import NO_TARGET, Batch, MicroBatch
from pmc_llama.randomness import IntArray
from pmc_llama.sample_order import SampleOrder
from pmc_llama.spans import DocumentReader, DocumentStream, Spans

_WIDTH = 8  # a micro-batch is this many columns wide, or a multiple: tensor cores want it of bf16 matrices


@dataclass(frozen=True)
class Deal:
    """How rows go to the ranks.

    Rows are numbered from the fullest. The first `micro_size` * `world_size` make the first micro-batch of
    all ranks, and so on; within it the ranks take rows in turn, so that theirs are about equally long.

    Attributes:
        row_length: tokens that a row holds at most.
        micro_size: rows of a micro-batch of one rank.
        rank: this rank, from 0 to `world_size` - 1.
        world_size: data-parallel ranks.
    """

    row_length: int
    micro_size: int
    rank: int
    world_size: int

    @property
    def at_once(self) -> int:
        """Rows that all ranks take through forward and backward at once."""
        return self.micro_size * self.world_size


def pack(lengths: IntArray, row_length: int, multiple: int) -> tuple[IntArray, int]:
    """Put documents into rows: the longest first, each to the emptiest row, which fills them evenly.

    There are as few rows as this works with, in a multiple of `multiple`; some may stay empty.

    Args:
        lengths: of the documents, int64 [n], each from 0 to `row_length`.
        row_length: what a row holds.
        multiple: rows come in this number.

    Returns:
        The row of each document, int64 [n], rows numbered from the fullest; and how many rows there are.
    """
    order = np.argsort(-lengths, kind="stable")
    rows = multiple * max(1, -(-int(lengths.sum()) // (row_length * multiple)))
    while (found := _emptiest_first(lengths[order].tolist(), rows, row_length)) is None:
        rows += multiple
    row = np.empty(len(lengths), np.int64)
    row[order] = found
    fullest_first = np.argsort(-np.bincount(row, lengths, rows), kind="stable")
    return np.argsort(fullest_first)[row], rows


class WholeBatches:
    """The batches of one data-parallel rank, as `batches.TrainingBatches`; a sample is a document.

    Args:
        stream: where the tokens are.
        order: which document a sample is; none has more than `row_length` inputs.
        global_size: documents in one optimizer step, over all ranks.
        deal: how their rows go to the ranks.
        first_sample: number of the order's first sample.

    Raises:
        UserError: `global_size` or `micro_size` is below 1.
    """

    def __init__(
        self, stream: DocumentReader, order: SampleOrder, global_size: int, deal: Deal, first_sample: int = 0
    ) -> None:
        for name, size in (("global_size", global_size), ("micro_size", deal.micro_size)):
            if size < 1:
                raise UserError(f"batch.{name} is {size}; it must be 1 or more.")
        self._stream, self._order, self._deal = stream, order, deal
        self._global_size, self._first_sample = global_size, first_sample

    def tokens(self, first_sample: int) -> int:
        """Inputs of the batch at `first_sample` over all ranks, without padding."""
        return self._spans(first_sample).targets

    def batch(self, first_sample: int) -> Batch:
        """The batch whose documents, over all ranks, are `first_sample` .. `first_sample` + global_size - 1.

        No communication. There are as many micro-batches as the rows need, the same number on every rank;
        each is as wide as its longest row, and rows that are not needed are empty.
        """
        spans = self._spans(first_sample)
        with_loss = self._stream.loss_starts(spans.before)
        targets = int(np.maximum(spans.end - with_loss, 0).sum())
        return Batch(_micro_batches(self._stream, spans, with_loss, self._deal), targets)

    def _spans(self, first_sample: int) -> Spans:
        first = first_sample - self._first_sample
        return self._order.spans(np.arange(first, first + self._global_size))


def whole_heldout_batches(stream: DocumentStream, deal: Deal, max_documents: int) -> Iterator[MicroBatch]:
    """The first `max_documents` documents of the held-out stream, packed like those of a step."""
    documents = min(max_documents, stream.documents)
    if documents:
        starts = np.asarray(stream.starts[: documents + 1])
        spans = Spans(np.arange(documents), starts[:-1], starts[:-1] + 1, starts[1:])
        yield from _micro_batches(stream, spans, stream.loss_starts(spans.before), deal)


def require_short(stream: DocumentStream, row_length: int, where: str) -> None:
    """Refuse documents that a row cannot hold: none is cut.

    Args:
        stream: the documents.
        row_length: inputs of a row.
        where: the stream is; told to the user.

    Raises:
        UserError: how many are longer, and the length that all need.
    """
    inputs = np.diff(stream.starts) - 1
    longer = int((inputs > row_length).sum())
    if longer:
        raise UserError(
            f"{longer:,} of {stream.documents:,} documents of {where} are longer than data.sequence_length, "
            f"{row_length}, and data.mode whole cuts none; set data.sequence_length to {int(inputs.max())} "
            f"or more, or make the prompts with --max-tokens {row_length + 1}."
        )


def _micro_batches(stream: DocumentReader, spans: Spans, with_loss: IntArray, deal: Deal) -> list[MicroBatch]:
    """The micro-batches of one rank.

    Args:
        stream: where the tokens are.
        spans: the documents, a row each.
        with_loss: the first target of each that has loss, a place of the stream, int64 [n].
        deal: how their rows go to the ranks.
    """
    lengths = spans.end - spans.begin
    row, rows = pack(lengths, deal.row_length, deal.at_once)
    mine = np.flatnonzero(row % deal.at_once % deal.world_size == deal.rank)
    mine = mine[np.argsort(row[mine], kind="stable")]
    batch, place = row[mine] // deal.at_once, row[mine] % deal.at_once // deal.world_size
    own = deal.micro_size * batch + place  # the row among those of this rank
    filled = np.bincount(own, lengths[mine], deal.micro_size * (rows // deal.at_once)).astype(np.int64)
    before = np.cumsum(lengths[mine]) - lengths[mine]
    column = before - (np.cumsum(filled) - filled)[own]
    blanks = [_Blank(widest, deal) for widest in filled.reshape(-1, deal.micro_size).max(axis=1).tolist()]
    ranges = list(zip(spans.before[mine].tolist(), spans.end[mine].tolist(), strict=True))
    silent = (with_loss - spans.begin)[mine].tolist()
    places = zip(batch.tolist(), place.tolist(), column.tolist(), silent, strict=True)
    for (number, *where), tokens in zip(places, stream.read(ranges) if ranges else [], strict=True):
        blanks[number].fill(*where, tokens)
    return [blank.micro_batch() for blank in blanks]


class _Blank:
    """A micro-batch to be filled; where no document comes there is no target."""

    def __init__(self, widest: int, deal: Deal) -> None:
        width = min(max(-(-widest // _WIDTH), 1) * _WIDTH, deal.row_length)
        shape = (deal.micro_size, width)
        self.inputs = np.zeros(shape, np.int64)
        self.labels = np.full(shape, NO_TARGET, np.int64)
        self.positions = np.tile(np.arange(width), (deal.micro_size, 1))

    def fill(self, row: int, column: int, silent: int, tokens: NDArray[np.integer]) -> None:
        """Put a document at a place, its first `silent` targets without loss."""
        end = column + len(tokens) - 1
        self.inputs[row, column:end] = tokens[:-1]
        self.labels[row, column + silent : end] = tokens[1 + silent :]
        self.positions[row, column:end] = np.arange(len(tokens) - 1)

    def micro_batch(self) -> MicroBatch:
        """As tensors."""
        return MicroBatch(*map(torch.from_numpy, (self.inputs, self.labels, self.positions)))


def _emptiest_first(lengths: list[int], rows: int, row_length: int) -> list[int] | None:
    """The row of each document in turn, always the emptiest; None when one is too long for that."""
    heap = [(0, row) for row in range(rows)]
    found = []
    for length in lengths:
        filled, row = heap[0]
        if filled + length > row_length:
            return None
        heapq.heapreplace(heap, (filled + length, row))
        found.append(row)
    return found
