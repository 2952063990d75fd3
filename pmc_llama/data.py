"""Sample order: the tokens of sample `i` as a pure function of (stream, mode, sequence length, seed, i).

    numbers of samples ──SampleOrder──▶ Spans of the stream ──TrainingBatches──▶ tensors of one rank

Nothing is stored and nothing is shuffled in memory. The order of an epoch is a keyed permutation computed
for just the samples that are asked for, and every random number is a function of (seed, epoch, index).
Hence a run is resumed by one number, samples consumed, at any world size and any batch size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.errors import UserError
from pmc_llama.randomness import OFFSET, PLACE, IntArray, permute, random_bits

NO_TARGET = -100  # the default `ignore_index` of torch's cross-entropy


class TokenStream(Protocol):
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

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        """The tokens of the ranges (start, stop) of the stream, in one batch of reads."""
        ...


class Spans(NamedTuple):
    """Where each of n sequences lies in the stream.

    The stream is a circle: a span that reaches its end goes on at its beginning. Of the tokens of a span
    each but the last is an input, and each but the first a target.
    """

    first: IntArray  # [n], position of the first token
    tokens: IntArray  # [n], tokens of the span, at least 1

    @property
    def targets(self) -> IntArray:
        """int64 [n]: targets of each sequence, from 0 to the sequence length."""
        return self.tokens - 1


class SampleOrder(Protocol):
    """The endless order of samples; epoch `e` is samples `e * samples_per_epoch` and following."""

    @property
    def sequence_length(self) -> int:
        """Inputs, and at most as many targets, of a sequence."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass over the stream."""
        ...

    def spans(self, samples: IntArray) -> Spans:
        """The sequences with these numbers, int64 [n], each 0 or more."""
        ...


# --- the two modes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowOrder:
    """Each epoch visits every document once and takes one uniformly placed window of it.

    A window is `sequence_length` + 1 tokens, placed at any of the document's positions where it fits, the
    last one included, or the whole document when that is shorter. Placing takes 64 random bits modulo the
    number of places, whose bias is below places / 2**64.
    """

    stream: TokenStream
    sequence_length: int
    seed: int

    @property
    def samples_per_epoch(self) -> int:
        """A sample a document."""
        return self.stream.documents

    def spans(self, samples: IntArray) -> Spans:
        """The windows with these numbers; see `SampleOrder.spans`."""
        epoch, index = np.divmod(samples, self.samples_per_epoch)
        document = permute(index, self.samples_per_epoch, self.seed, epoch)
        start = np.asarray(self.stream.starts[document])
        length = np.asarray(self.stream.starts[document + 1]) - start
        tokens = np.minimum(length, self.sequence_length + 1)
        places = (length - tokens + 1).astype(np.uint64)
        place = random_bits(self.seed, epoch, PLACE, document) % places
        return Spans(start + place.astype(np.int64), tokens)


@dataclass(frozen=True)
class PackedOrder:
    """Each epoch makes every token of the stream a target exactly once.

    The circle of the stream is cut into windows of `sequence_length` targets, from an offset that each
    epoch draws anew; the last window has what is left. The input before a window's first target is the
    token before it on the circle.
    """

    stream: TokenStream
    sequence_length: int
    seed: int

    @property
    def samples_per_epoch(self) -> int:
        """Windows of the circle, the short one included."""
        return -(-self.stream.tokens // self.sequence_length)

    def spans(self, samples: IntArray) -> Spans:
        """The windows with these numbers; see `SampleOrder.spans`."""
        epoch, index = np.divmod(samples, self.samples_per_epoch)
        window = permute(index, self.samples_per_epoch, self.seed, epoch)
        offset = random_bits(self.seed, epoch, OFFSET) % np.uint64(self.stream.tokens)
        return _circle_windows(self.stream.tokens, self.sequence_length, window, offset.astype(np.int64))


def _circle_windows(tokens: int, sequence_length: int, window: IntArray, offset: IntArray | int) -> Spans:
    """The windows, int64 [n], of a circle of `tokens` whose first target is at `offset`."""
    begin = window * sequence_length
    targets = np.minimum(sequence_length, tokens - begin)
    return Spans((offset + begin - 1) % tokens, targets + 1)


def sample_order(
    stream: TokenStream, mode: Literal["window", "packed"], sequence_length: int, seed: int
) -> SampleOrder:
    """The order in which a run with these settings sees the stream.

    Raises:
        UserError: `sequence_length` is below 1, or the stream has no document.
    """
    if sequence_length < 1:
        raise UserError(f"data.sequence_length is {sequence_length}; it must be 1 or more.")
    if stream.documents == 0:
        raise UserError(
            "The corpus (data.corpus) has no document to train on; "
            "`pmc-data stats` says how many were set aside, and why."
        )
    order = WindowOrder if mode == "window" else PackedOrder
    return order(stream, sequence_length, seed)


# --- batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that one rank takes through forward and backward at once, in host memory."""

    inputs: Tensor  # int64 [micro_size, sequence_length]; 0 where there is nothing
    labels: Tensor  # int64 [micro_size, sequence_length], already shifted; -100 where there is no target


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

    Raises:
        UserError: `global_size` is not a positive multiple of `micro_size` * `world_size`.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: SampleOrder,
        global_size: int,
        micro_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        _check_divides(global_size, micro_size, world_size)
        self._stream = stream
        self._order = order
        self._global_size = global_size
        self._micro_size = micro_size
        per_rank = global_size // world_size
        self._mine = slice(rank * per_rank, (rank + 1) * per_rank)

    def batch(self, first_sample: int) -> Batch:
        """The batch whose samples, over all ranks, are `first_sample` .. `first_sample` + global_size - 1.

        No communication: every rank computes the spans of the whole step and reads those of its own.
        `targets` is 0 when every document of the step is a lone EOD.
        """
        spans = self._order.spans(np.arange(first_sample, first_sample + self._global_size))
        mine = Spans(spans.first[self._mine], spans.tokens[self._mine])
        whole = _read_sequences(self._stream, mine, len(mine.first), self._order.sequence_length)
        cuts = [slice(row, row + self._micro_size) for row in range(0, len(mine.first), self._micro_size)]
        micro_batches = [MicroBatch(whole.inputs[cut], whole.labels[cut]) for cut in cuts]
        return Batch(micro_batches, int(spans.targets.sum()))


def heldout_batches(
    stream: TokenStream, sequence_length: int, micro_size: int, rank: int, world_size: int, max_sequences: int
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
        spans = _circle_windows(stream.tokens, sequence_length, np.arange(begin, end), offset=0)
        yield _read_sequences(stream, spans, micro_size, sequence_length)


def _read_sequences(stream: TokenStream, spans: Spans, rows: int, sequence_length: int) -> MicroBatch:
    """The sequences of the spans by one read, and after them empty ones up to `rows`."""
    ranges: list[tuple[int, int]] = []
    row_of_range: list[int] = []
    for row, (first, tokens) in enumerate(zip(spans.first.tolist(), spans.tokens.tolist(), strict=True)):
        stop = first + tokens
        ranges.append((first, min(stop, stream.tokens)))
        row_of_range.append(row)
        if stop > stream.tokens:  # past the end of the circle
            ranges.append((0, stop - stream.tokens))
            row_of_range.append(row)

    tokens_of_row = np.zeros((rows, sequence_length + 1), dtype=np.int64)
    filled = [0] * rows
    for row, piece in zip(row_of_range, stream.read(ranges), strict=True):
        tokens_of_row[row, filled[row] : filled[row] + len(piece)] = piece
        filled[row] += len(piece)

    has_target = np.arange(1, sequence_length + 1) < np.array(filled)[:, None]
    inputs = np.where(has_target, tokens_of_row[:, :-1], 0)
    labels = np.where(has_target, tokens_of_row[:, 1:], NO_TARGET)
    return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(labels))


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
