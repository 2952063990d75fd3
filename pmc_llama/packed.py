"""The packed order: passes over the circle of a stream, each token a target exactly once a pass.

A pass cuts a space of tokens into windows and visits them in a permuted order. The space of a whole pass is
the circle of the stream. When the sequence length changes in the middle of a pass, what its windows have
left, one after another in their order of visits, is the space of another pass with windows of the new
length: so every token still comes exactly once, and a place in it is still computed, not stored.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from pmc_llama.randomness import OFFSET, REST, IntArray, inverse, permute, random_bits
from pmc_llama.spans import Spans, TokenStream, cut_at_multiples, joined


class Ranges(NamedTuple):
    """Ranges of tokens, each of them part of something that was asked for."""

    owner: IntArray  # [n], number of what it is part of
    begin: IntArray  # [n]
    end: IntArray  # [n]


class Images(NamedTuple):
    """Ranges of a space, and where in the stream each begins."""

    ranges: Ranges
    origin: IntArray  # [n]


_EMPTY = np.empty(0, np.int64)
_NOTHING = Ranges(_EMPTY, _EMPTY, _EMPTY)


@dataclass(frozen=True)
class Circle:
    """The stream as a circle of `tokens`, from the token at `offset` on round to the one before it."""

    tokens: int
    offset: int

    level = 0

    def locate(self, ranges: Ranges) -> Ranges:
        """Ranges of the circle as ranges of the stream."""
        return _around(ranges, self.tokens, self.offset)

    def taken(self, ranges: Ranges) -> tuple[Ranges, Images]:
        """Nothing is taken; what is left of ranges of the stream, and where it lies here."""
        cut = cut_at_multiples(
            ranges.begin + self.tokens - self.offset, ranges.end + self.tokens - self.offset, self.tokens
        )
        turn = cut.cell * self.tokens
        places = Ranges(ranges.owner[cut.owner], cut.begin - turn, cut.end - turn)
        return _NOTHING, Images(places, cut.begin - self.tokens + self.offset)


@dataclass(frozen=True)
class Visits:
    """One pass: the windows of a space, the last of them shorter, in a permuted order."""

    space: "Circle | Rest"
    sequence_length: int
    seed: int
    epoch: int

    @property
    def windows(self) -> int:
        """How many."""
        return -(-self.space.tokens // self.sequence_length)

    @property
    def missing(self) -> int:
        """Targets that the last window has less than the others."""
        return self.windows * self.sequence_length - self.space.tokens

    @cached_property
    def visit_of_last(self) -> int:
        """When the last window is visited."""
        return int(self.visit(np.array([self.windows - 1]))[0])

    def window(self, visit: IntArray) -> IntArray:
        """The window of each visit."""
        return permute(visit, self.windows, self._key, np.full(len(visit), self.epoch))

    def visit(self, window: IntArray) -> IntArray:
        """The visit of each window."""
        return inverse(window, self.windows, self._key, np.full(len(window), self.epoch))

    def targets(self, visit: IntArray) -> Ranges:
        """The targets of each visit, as ranges of the stream."""
        begin = self.window(visit) * self.sequence_length
        end = np.minimum(begin + self.sequence_length, self.space.tokens)
        return self.space.locate(Ranges(np.arange(len(visit)), begin, end))

    @property
    def _key(self) -> int:
        level = self.space.level
        return int(random_bits(self.seed, REST, level)) if level else self.seed


@dataclass(frozen=True)
class Rest:
    """What a pass has left after its first `made` visits: the windows to come, as visited."""

    visits: Visits
    made: int

    @property
    def level(self) -> int:
        """How many times the pass was begun anew."""
        return self.visits.space.level + 1

    @cached_property
    def tokens(self) -> int:
        """How many are left."""
        whole = (self.visits.windows - self.made) * self.visits.sequence_length
        return whole - self.visits.missing * (self.visits.visit_of_last >= self.made)

    def locate(self, ranges: Ranges) -> Ranges:
        """Ranges of what is left as ranges of the stream."""
        length = self.visits.sequence_length
        begin, end = self._padded(ranges.begin), self._padded(ranges.end - 1) + 1
        cut = cut_at_multiples(begin, end, length)
        visit = self.made + cut.cell
        full = np.where(visit == self.visits.visit_of_last, length - self.visits.missing, length)
        shift = self.visits.window(visit) * length - cut.cell * length
        stop = np.minimum(cut.end, cut.cell * length + full)
        return self.visits.space.locate(Ranges(ranges.owner[cut.owner], cut.begin + shift, stop + shift))

    def taken(self, ranges: Ranges) -> tuple[Ranges, Images]:
        """Of ranges of the stream: what was taken until here, and what is left, with its place here."""
        earlier, here = self.visits.space.taken(ranges)
        length = self.visits.sequence_length
        cut = cut_at_multiples(here.ranges.begin, here.ranges.end, length)
        visit, size = self.visits.visit(cut.cell), cut.end - cut.begin
        owner = here.ranges.owner[cut.owner]
        origin = here.origin[cut.owner] + cut.begin - here.ranges.begin[cut.owner]
        done = visit < self.made
        made = Ranges(owner[done], origin[done], (origin + size)[done])
        begin = self._unpadded((visit - self.made) * length + cut.begin - cut.cell * length)
        left = Images(Ranges(owner[~done], begin[~done], (begin + size)[~done]), origin[~done])
        return Ranges(*(np.concatenate(pair) for pair in zip(earlier, made, strict=True))), left

    # In padded places every window has the full length: after the targets of the last one comes a hole.

    @property
    def _hole(self) -> int:
        """Where the hole begins; beyond everything when the last window is not left."""
        after = self.visits.visit_of_last + 1 - self.made
        if after <= 0:
            return self.visits.space.tokens + self.visits.missing
        return after * self.visits.sequence_length - self.visits.missing

    def _padded(self, place: IntArray) -> IntArray:
        return place + self.visits.missing * (place >= self._hole)

    def _unpadded(self, place: IntArray) -> IntArray:
        return place - self.visits.missing * (place >= self._hole)


@dataclass(frozen=True)
class PackedOrder:
    """Each epoch makes every token of the stream a target exactly once.

    The circle of the stream is cut into windows of `sequence_length` targets, from an offset that each
    epoch draws anew; the last window has what is left. The input before a window's first target is the
    token before it on the circle.

    After a change of the length the first pass is what the pass before had left. A sequence may then be
    of several ranges: parts of the windows that were to come.
    """

    stream: TokenStream
    sequence_length: int
    seed: int
    epoch: int = 0  # of the first pass
    rest: Rest | None = None  # what there is of it; None for all of it
    first: int = 0  # windows taken before sample 0

    @property
    def samples_per_epoch(self) -> int:
        """Windows of the circle, the short one included."""
        return -(-self.stream.tokens // self.sequence_length)

    def spans(self, samples: IntArray) -> Spans:
        """The windows with these numbers; see `SampleOrder.spans`."""
        index = samples + self.first
        if self.rest is None:
            return self._whole(np.arange(len(index)), index // self.samples_per_epoch + self.epoch, index)
        in_first = index < self._in_first
        row = np.flatnonzero(in_first)
        targets = self._first_pass.targets(index[row])
        begun = self._spans(Ranges(row[targets.owner], targets.begin, targets.end))
        later = index[~in_first] - self._in_first
        whole = self._whole(
            np.flatnonzero(~in_first), later // self.samples_per_epoch + self.epoch + 1, later
        )
        return joined([begun, whole])

    def epoch_of(self, samples: IntArray) -> IntArray:
        """See `StreamOrder.epoch_of`."""
        later = samples + self.first - self._in_first
        return self.epoch + np.where(later < 0, 0, 1 + later // self.samples_per_epoch)

    def samples_until(self, epochs: float) -> float:
        """See `SampleOrder.samples_until`; a pass that was begun anew has its samples evenly."""
        made, more = self._made, epochs - self.epoch
        if more < 1:
            return (more - made) / (1 - made) * self._in_first - self.first
        return self._in_first + (more - 1) * self.samples_per_epoch - self.first

    def epochs_after(self, samples: int) -> float:
        """See `SampleOrder.epochs_after`."""
        index, made = samples + self.first, self._made
        if index < self._in_first:
            return self.epoch + made + (1 - made) * index / self._in_first
        return self.epoch + 1 + (index - self._in_first) / self.samples_per_epoch

    def after(self, samples: int) -> Self:
        """See `StreamOrder.after`."""
        return replace(self, first=self.first + samples)

    def with_length(self, sequence_length: int) -> Self:
        """See `StreamOrder.with_length`."""
        if sequence_length == self.sequence_length:
            return self
        changed = replace(self, sequence_length=sequence_length, first=0)
        if self.first == 0:
            return changed
        if self.first < self._in_first:
            return replace(changed, rest=Rest(self._first_pass, self.first))
        passes, made = divmod(self.first - self._in_first, self.samples_per_epoch)
        epoch = self.epoch + 1 + passes
        visits = Visits(self._circle(epoch), self.sequence_length, self.seed, epoch)
        return replace(changed, epoch=epoch, rest=Rest(visits, made) if made else None)

    @property
    def begun(self) -> bool:
        """Something of the first pass was taken."""
        return self.first > 0 or self.rest is not None

    def taken(self, ranges: Ranges) -> Ranges:
        """The parts of ranges of the stream that were targets in the first pass, before sample 0."""
        done: Ranges = Rest(self._first_pass, min(self.first, self._in_first)).taken(ranges)[0]
        return done

    @property
    def _in_first(self) -> int:
        """Windows of the first pass."""
        return -(-self.rest.tokens // self.sequence_length) if self.rest else self.samples_per_epoch

    @property
    def _made(self) -> float:
        """The part of the first pass that was made with other lengths."""
        return 1 - self.rest.tokens / self.stream.tokens if self.rest else 0.0

    @cached_property
    def _first_pass(self) -> Visits:
        return Visits(self.rest or self._circle(self.epoch), self.sequence_length, self.seed, self.epoch)

    def _circle(self, epoch: int) -> Circle:
        return Circle(self.stream.tokens, int(self._offset(np.array(epoch))))

    def _offset(self, epoch: IntArray) -> IntArray:
        offset: IntArray = (random_bits(self.seed, epoch, OFFSET) % np.uint64(self.stream.tokens)).astype(
            np.int64
        )
        return offset

    def _whole(self, row: IntArray, epoch: IntArray, index: IntArray) -> Spans:
        """The windows of whole passes, for any epochs at once: what `Visits.targets` is for one."""
        window = permute(index % self.samples_per_epoch, self.samples_per_epoch, self.seed, epoch)
        begin = window * self.sequence_length
        end = np.minimum(begin + self.sequence_length, self.stream.tokens)
        return self._spans(_around(Ranges(row, begin, end), self.stream.tokens, self._offset(epoch)))

    def _spans(self, targets: Ranges) -> Spans:
        return Spans(targets.owner, (targets.begin - 1) % self.stream.tokens, targets.begin, targets.end)


def circle_windows(tokens: int, sequence_length: int, window: IntArray) -> Spans:
    """The windows, int64 [n], of a circle of `tokens` whose first target is the stream's first token."""
    begin = window * sequence_length
    end = np.minimum(begin + sequence_length, tokens)
    return Spans(np.arange(len(window)), (begin - 1) % tokens, begin, end)


def _around(ranges: Ranges, tokens: int, offset: IntArray | int) -> Ranges:
    """Ranges of a circle that begins at `offset` of a stream, cut where the stream ends."""
    cut = cut_at_multiples(ranges.begin + offset, ranges.end + offset, tokens)
    turn = cut.cell * tokens
    return Ranges(ranges.owner[cut.owner], cut.begin - turn, cut.end - turn)
