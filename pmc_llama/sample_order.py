"""Sample order: the tokens of sample `i` as a pure function of (stream, mode, sequence length, seed, i).

Nothing is stored and nothing is shuffled in memory. The order of an epoch is a keyed permutation computed
for just the samples that are asked for, and every random number is a function of (seed, epoch, index).
Hence a run is resumed by one number, samples consumed, at any world size and any batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from data_tools.errors import UserError
from pmc_llama.packed import PackedOrder
from pmc_llama.randomness import PLACE, IntArray, permute, random_bits
from pmc_llama.spans import Spans, TokenStream, isolated

Mode = Literal["window", "packed", "whole"]


class Stretch(NamedTuple):
    """Samples that a run has taken of one stream, one after another."""

    mode: Mode
    sequence_length: int
    samples: int


class SampleOrder(Protocol):
    """The endless order of samples, numbered from 0."""

    @property
    def sequence_length(self) -> int:
        """Inputs, and at most as many targets, of a sequence."""
        ...

    def spans(self, samples: IntArray) -> Spans:
        """The sequences with these numbers, int64 [n], each 0 or more."""
        ...

    def samples_until(self, epochs: float) -> float:
        """Samples to take until this many passes over the stream are made, in parts of a sample."""
        ...

    def epochs_after(self, samples: int) -> float:
        """Passes over the stream that are made when this many samples are taken."""
        ...


class StreamOrder(SampleOrder, Protocol):
    """The order of samples of one stream, which may begin in the middle of a pass."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one whole pass over the stream."""
        ...

    def after(self, samples: int) -> Self:
        """The order that is left when the first `samples` are taken."""
        ...

    def with_length(self, sequence_length: int) -> Self:
        """The order that goes on from here with sequences of another length, in the same pass."""
        ...

    def epoch_of(self, samples: IntArray) -> IntArray:
        """The pass, from 0, that each sample is of: int64 [n]."""
        ...


Order = TypeVar("Order", bound=StreamOrder)


@dataclass(frozen=True)
class WindowOrder:
    """Each epoch visits every document once and takes one uniformly placed window of it.

    A window is `sequence_length` + 1 tokens, placed at any of the document's positions where it fits, the
    last one included, or the whole document when that is shorter. All but its first token are targets.
    """

    stream: TokenStream
    sequence_length: int
    seed: int
    first: int = 0  # windows taken before sample 0

    @property
    def samples_per_epoch(self) -> int:
        """A sample a document."""
        return self.stream.documents

    def spans(self, samples: IntArray) -> Spans:
        """The windows with these numbers; see `SampleOrder.spans`."""
        epoch, index = np.divmod(samples + self.first, self.stream.documents)
        document = permute(index, self.stream.documents, self.seed, epoch)
        begin, end = window_targets(self.stream, self.sequence_length, self.seed, document, epoch)
        return Spans(np.arange(len(samples)), begin - 1, begin, end)

    def samples_until(self, epochs: float) -> float:
        """See `SampleOrder.samples_until`; an epoch has a sample a document."""
        return epochs * self.stream.documents - self.first

    def epochs_after(self, samples: int) -> float:
        """See `SampleOrder.epochs_after`."""
        return (self.first + samples) / self.stream.documents

    def epoch_of(self, samples: IntArray) -> IntArray:
        """See `StreamOrder.epoch_of`."""
        return (samples + self.first) // self.stream.documents

    def after(self, samples: int) -> Self:
        """See `StreamOrder.after`."""
        return replace(self, first=self.first + samples)

    def with_length(self, sequence_length: int) -> Self:
        """See `StreamOrder.with_length`: which document comes when does not depend on the length."""
        return replace(self, sequence_length=sequence_length)


@dataclass(frozen=True)
class WholeOrder(WindowOrder):
    """Each epoch visits every document once, in the order of the windows, and takes all of it.

    All but its first token are targets. `sequence_length` is that of the rows into which documents are packed
    (`whole.pack`); no document is cut by it.
    """

    def spans(self, samples: IntArray) -> Spans:
        """The documents with these numbers; see `SampleOrder.spans`."""
        epoch, index = np.divmod(samples + self.first, self.stream.documents)
        document = permute(index, self.stream.documents, self.seed, epoch)
        begin = np.asarray(self.stream.starts[document])
        end = np.asarray(self.stream.starts[document + 1])
        return Spans(np.arange(len(samples)), begin, begin + 1, end)


def window_targets(
    stream: TokenStream, sequence_length: IntArray | int, seed: int, document: IntArray, epoch: IntArray
) -> tuple[IntArray, IntArray]:
    """The targets (begin, end), int64 [n] each, of each document's window in each epoch.

    Placing takes 64 random bits modulo the number of places, whose bias is below places / 2**64.
    """
    start = np.asarray(stream.starts[document])
    length = np.asarray(stream.starts[document + 1]) - start
    tokens = np.minimum(length, sequence_length + 1)
    places = (length - tokens + 1).astype(np.uint64)
    first = start + (random_bits(seed, epoch, PLACE, document) % places).astype(np.int64)
    return first + 1, first + tokens


@dataclass(frozen=True)
class IsolatedOrder:
    """The samples of an order, with a range for each document of a sequence (`spans.isolated`)."""

    order: SampleOrder
    starts: IntArray

    @property
    def sequence_length(self) -> int:
        """See `SampleOrder.sequence_length`."""
        return self.order.sequence_length

    def spans(self, samples: IntArray) -> Spans:
        """See `SampleOrder.spans`."""
        return isolated(self.order.spans(samples), self.starts)

    def samples_until(self, epochs: float) -> float:
        """See `SampleOrder.samples_until`."""
        return self.order.samples_until(epochs)

    def epochs_after(self, samples: int) -> float:
        """See `SampleOrder.epochs_after`."""
        return self.order.epochs_after(samples)


def sample_order(
    stream: TokenStream, mode: Mode, sequence_length: int, seed: int, taken: Sequence[Stretch] = ()
) -> StreamOrder:
    """The order in which a run with these settings sees the stream.

    Args:
        stream: the tokens.
        mode: `window`, `packed` or `whole`.
        sequence_length: targets of a sequence.
        seed: of the run.
        taken: what the run has already taken of the stream. Each mode goes on where it stopped.

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
    order: StreamOrder = _KINDS[mode](stream, sequence_length, seed)
    return after_stretches(order, mode, taken).with_length(sequence_length)


def after_stretches(order: Order, mode: Mode, taken: Sequence[Stretch]) -> Order:
    """What an order of this mode has left when the stretches in that mode are taken."""
    for stretch in (one for one in taken if one.mode == mode):
        order = order.with_length(stretch.sequence_length).after(stretch.samples)
    return order


_KINDS: dict[Mode, type[WindowOrder | PackedOrder]] = {
    "window": WindowOrder,
    "packed": PackedOrder,
    "whole": WholeOrder,
}
