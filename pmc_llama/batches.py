"""Batches: the sequences of a step as tensors of one rank.

numbers of samples ──order──▶ Spans of the stream ──read──▶ MicroBatches of one rank
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.errors import UserError
from pmc_llama.packed import circle_windows
from pmc_llama.sample_order import SampleOrder
from pmc_llama.spans import Spans, TokenReader, TokenStream, isolated

NO_TARGET = -100  # the default `ignore_index` of torch's cross-entropy


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that one rank takes through forward and backward at once, in host memory."""

    inputs: Tensor  # int64 [micro_size, sequence_length]; 0 where there is nothing
    labels: Tensor  # int64 [micro_size, sequence_length], already shifted; -100 where there is no target
    positions: Tensor | None = None  # int64, the same shape, from 0 in each document; None: one from 0 on


@dataclass(frozen=True)
class Batch:
    """What one rank does in one optimizer step."""

    micro_batches: list[MicroBatch]
    targets: int  # targets of the step over all ranks, the divisor of the step's summed loss


class TrainingBatches:
    """The batches of one data-parallel rank.

    Args:
        stream: where the tokens are.
        order: which of them a sample is.
        global_size: sequences in one optimizer step, over all ranks.
        micro_size: sequences in one micro-batch.
        rank: this rank, from 0 to `world_size` - 1.
        world_size: data-parallel ranks.
        first_sample: number of the order's first sample.
        positions: give positions, which start anew with each range of the order's spans.

    Raises:
        UserError: `global_size` is not a positive multiple of `micro_size` * `world_size`.
    """

    def __init__(
        self,
        stream: TokenReader,
        order: SampleOrder,
        global_size: int,
        micro_size: int,
        rank: int,
        world_size: int,
        first_sample: int = 0,
        positions: bool = False,
    ) -> None:
        _check_divides(global_size, micro_size, world_size)
        self._stream = stream
        self._order = order
        self._global_size = global_size
        self._micro_size = micro_size
        self._per_rank = global_size // world_size
        self._first_row = rank * self._per_rank
        self._first_sample = first_sample
        self._positions = positions

    def tokens(self, first_sample: int) -> int:
        """Inputs of the batch at `first_sample` over all ranks, padding included."""
        return self._global_size * self._order.sequence_length

    def batch(self, first_sample: int) -> Batch:
        """The batch whose samples, over all ranks, are `first_sample` .. `first_sample` + global_size - 1.

        No communication: every rank computes the spans of the whole step and reads those of its own.
        `targets` is 0 when every document of the step is a lone EOD.
        """
        first = first_sample - self._first_sample
        spans = self._order.spans(np.arange(first, first + self._global_size))
        rows, length = self._per_rank, self._order.sequence_length
        mine = _rows(spans, self._first_row, self._first_row + rows)
        whole = _read_sequences(self._stream, mine, rows, length, self._positions)
        cuts = [slice(row, row + self._micro_size) for row in range(0, rows, self._micro_size)]
        return Batch([_cut(whole, cut) for cut in cuts], spans.targets)


def heldout_batches(
    stream: TokenStream,
    sequence_length: int,
    micro_size: int,
    rank: int,
    world_size: int,
    max_sequences: int,
    isolate_documents: bool = False,
) -> Iterator[MicroBatch]:
    """The held-out stream in order, every token a target once; its first `max_sequences` sequences at most.

    The ranks take micro-batches in turn. Every rank gets equally many, so that collectives match; what is
    missing at the end is filled with sequences without targets. The first token's input is the stream's
    last one, an EOD, as before every other document. An empty stream has no micro-batch.
    """
    sequences = min(max_sequences, -(-stream.tokens // sequence_length))
    for round_start in range(0, sequences, micro_size * world_size):
        begin = min(round_start + rank * micro_size, sequences)
        end = min(begin + micro_size, sequences)
        spans = circle_windows(stream.tokens, sequence_length, np.arange(begin, end))
        if isolate_documents:
            spans = isolated(spans, stream.starts)
        yield _read_sequences(stream, spans, micro_size, sequence_length, isolate_documents)


def _rows(spans: Spans, first: int, stop: int) -> Spans:
    """The ranges of the sequences `first` .. `stop` - 1, which are then numbered from 0."""
    cut = slice(*np.searchsorted(spans.row, [first, stop]).tolist())
    return Spans(spans.row[cut] - first, spans.before[cut], spans.begin[cut], spans.end[cut])


def _cut(batch: MicroBatch, rows: slice) -> MicroBatch:
    positions = None if batch.positions is None else batch.positions[rows]
    return MicroBatch(batch.inputs[rows], batch.labels[rows], positions)


def _read_sequences(
    reader: TokenReader, spans: Spans, rows: int, sequence_length: int, with_positions: bool
) -> MicroBatch:
    """The sequences of the spans by one read; those of `rows` that have no span are empty."""
    inputs = np.zeros((rows, sequence_length), dtype=np.int64)
    labels = np.full((rows, sequence_length), NO_TARGET, dtype=np.int64)
    positions = np.tile(np.arange(sequence_length), (rows, 1)) if with_positions else None
    filled = [0] * rows
    for row, tokens in _read(reader, spans):
        place = slice(filled[row], filled[row] + len(tokens) - 1)
        inputs[row, place] = tokens[:-1]
        labels[row, place] = tokens[1:]
        if positions is not None:
            positions[row, place] = np.arange(len(tokens) - 1)
        filled[row] = place.stop
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        None if positions is None else torch.from_numpy(positions),
    )


def _read(reader: TokenReader, spans: Spans) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """The row and the tokens of each range that has a target, the input of the first included."""
    ranges: list[tuple[int, int]] = []
    pieces: list[tuple[int, bool]] = []
    for row, before, begin, end in zip(*(array.tolist() for array in spans), strict=True):
        if begin == end:
            continue
        apart = before != begin - 1  # at the other end of the circle
        pieces.append((row, apart))
        ranges += [(before, before + 1), (begin, end)] if apart else [(before, end)]
    found = iter(reader.read(ranges))
    for row, apart in pieces:
        yield row, np.concatenate([next(found), next(found)]) if apart else next(found)


def _check_divides(global_size: int, micro_size: int, world_size: int) -> None:
    """Refuse a global batch that the ranks cannot share in whole micro-batches."""
    if micro_size < 1:
        raise UserError(f"batch.micro_size is {micro_size}; it must be 1 or more.")
    together = micro_size * world_size
    if global_size < 1 or global_size % together:
        nearest = max(1, round(global_size / together)) * together
        raise UserError(
            f"batch.global_size is {global_size}, but {world_size} rank{'s' * (world_size > 1)} of "
            f"batch.micro_size {micro_size} take {together} sequences at a time; "
            f"set batch.global_size to a multiple of {together}, the nearest is {nearest}."
        )
