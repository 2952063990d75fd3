"""Coverage: which tokens of a stream were targets at least once, counted exactly, with nothing kept.

A target is new when no earlier sample had it. What earlier samples had is computed from where they lie,
sample by sample: the windows of the same documents in earlier epochs, and the windows of a packed pass that
were visited before, found by the inverse of its permutation. So a batch costs in proportion to its size and
to the epochs made. A document taken whole is covered as a whole, its prompt and first token included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmc_llama.packed import PackedOrder, Ranges
from pmc_llama.randomness import IntArray, inverse
from pmc_llama.sample_order import Mode, StreamOrder, Stretch, after_stretches, sample_order, window_targets
from pmc_llama.spans import TokenStream, cut_at_documents, repeated


@dataclass(frozen=True)
class Coverage:
    """What the samples of an order add to the tokens of a stream seen as targets.

    Attributes:
        stream: the tokens.
        seed: of the run.
        mode: of the order.
        order: the samples from now on, numbered from 0.
        packed: the packed pass as it stands before sample 0.
        windows: the stretches in `window` mode, those of `order` included, the last without an end.
        wholes: documents taken in `whole` mode before sample 0.
    """

    stream: TokenStream
    seed: int
    mode: Mode
    order: StreamOrder
    packed: PackedOrder
    windows: Sequence[Stretch]
    wholes: int

    @classmethod
    def of(
        cls, stream: TokenStream, mode: Mode, sequence_length: int, seed: int, taken: Sequence[Stretch]
    ) -> "Coverage":
        """The coverage of a run that has taken these stretches of the stream and goes on in this regime."""
        now = Stretch(mode, sequence_length, 2**62)
        windows = [stretch for stretch in [*taken, now] if stretch.mode == "window"]
        order = sample_order(stream, mode, sequence_length, seed, taken)
        packed = after_stretches(PackedOrder(stream, sequence_length, seed), "packed", taken)
        wholes = sum(stretch.samples for stretch in taken if stretch.mode == "whole")
        return cls(stream, seed, mode, order, packed, windows, wholes)

    def new_targets(self, samples: IntArray) -> IntArray:
        """Targets of each sample, int64 [n], that no earlier sample of the run had: int64 [n]."""
        row, first, begin, end = self.order.spans(samples)
        if self.mode == "whole":
            begin = first
        before = [
            self.windows_before(begin, end, self._window_bounds(samples)[row]),
            self.wholes_before(begin, end, self._whole_bounds(samples)[row]),
        ]
        if self.mode == "packed":
            fresh = self.order.epoch_of(samples) == 0
        else:
            all_seen = self.packed.epoch_of(np.zeros(1, np.int64))[0] > 0
            fresh = np.full(len(samples), not all_seen)
            some = np.flatnonzero((end > begin) & self.packed.begun)
            before.append(self.packed.taken(Ranges(some, begin[some], end[some])))
        by = Ranges(*(np.concatenate(arrays) for arrays in zip(*before, strict=True)))
        new = end - begin - covered(begin, end, by)
        counts: IntArray = np.bincount(row, new, len(samples)).astype(np.int64)
        counts[~fresh] = 0
        return counts

    def windows_before(self, begin: IntArray, end: IntArray, bound: IntArray) -> Ranges:
        """The targets, among ranges of the stream, of windows with a number below each range's bound."""
        documents = self.stream.documents
        piece = cut_at_documents(begin, end, self.stream.starts)
        epochs = -(-bound[piece.owner] // documents)
        of_piece, epoch = repeated(epochs)
        document, owner = piece.cell[of_piece], piece.owner[of_piece]
        number = epoch * documents + inverse(document, documents, self.seed, epoch)
        visited = number < bound[owner]
        of_piece, epoch, document, owner, number = (
            array[visited] for array in (of_piece, epoch, document, owner, number)
        )
        target_begin, target_end = window_targets(
            self.stream, self._window_length(number), self.seed, document, epoch
        )
        return Ranges(owner, target_begin, target_end)

    def wholes_before(self, begin: IntArray, end: IntArray, bound: IntArray) -> Ranges:
        """The documents, among ranges of the stream, that were taken whole by the first `bound` visits."""
        ranges = np.flatnonzero(bound > 0)
        piece = cut_at_documents(begin[ranges], end[ranges], self.stream.starts)
        owner = ranges[piece.owner]
        visit = inverse(piece.cell, self.stream.documents, self.seed, np.zeros_like(piece.cell))
        taken = visit < bound[owner]
        document = piece.cell[taken]
        starts = self.stream.starts
        return Ranges(owner[taken], np.asarray(starts[document]), np.asarray(starts[document + 1]))

    def _whole_bounds(self, samples: IntArray) -> IntArray:
        """For each sample, how many documents the run had taken whole before it: int64 [n]."""
        return self.wholes + (samples if self.mode == "whole" else np.zeros_like(samples))

    def _window_bounds(self, samples: IntArray) -> IntArray:
        """For each sample, how many windows the run had taken before it: int64 [n]."""
        if self.mode == "window":
            return samples + sum(stretch.samples for stretch in self.windows[:-1])
        return np.full(len(samples), sum(stretch.samples for stretch in self.windows))

    def _window_length(self, number: IntArray) -> IntArray:
        """The sequence length of the windows with these numbers."""
        ends = np.cumsum([stretch.samples for stretch in self.windows])
        lengths = np.array([stretch.sequence_length for stretch in self.windows], dtype=np.int64)
        return lengths[np.searchsorted(ends, number, side="right")]


def covered(begin: IntArray, end: IntArray, by: Ranges) -> IntArray:
    """How many tokens of each range (begin, end), int64 [n], lie in at least one of those of its own in `by`.

    The ranges are laid side by side, so that one sweep over all the others from left to right counts for each
    what reaches further than everything before it.
    """
    base = np.cumsum(end - begin) - (end - begin)
    shift = (base - begin)[by.owner]
    left = np.maximum(by.begin, begin[by.owner]) + shift
    right = np.minimum(by.end, end[by.owner]) + shift
    inside = left < right
    left, right, owner = left[inside], right[inside], by.owner[inside]
    order = np.argsort(left, kind="stable")
    left, right, owner = left[order], right[order], owner[order]
    reached = np.concatenate([[0], np.maximum.accumulate(right)[:-1]]) if len(right) else right
    more = np.maximum(right - np.maximum(left, reached), 0)
    return np.bincount(owner, more, len(begin)).astype(np.int64)
