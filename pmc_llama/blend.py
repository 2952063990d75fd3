"""Blends: which corpus each sample comes from, exact to one sample at every prefix."""

import heapq
from collections.abc import Sequence
from functools import cached_property
from math import gcd

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from pmc_llama.randomness import IntArray
from pmc_llama.sample_order import SampleOrder
from pmc_llama.spans import DocumentReader, Spans, joined

MOST_WEIGHT = 100_000  # the schedule of one period is kept, a few bytes a corpus and sample


class Blend:
    """A periodic schedule of samples over corpora.

    With the weights in lowest terms w and their sum W, any W samples on end that begin at a multiple of W
    have w[c] of corpus c, and of the first n samples the number of corpus c is less than 1 away from
    n * w[c] / W. Each sample of a corpus thereby has a first and a last place; the one with the earliest
    last place goes first, which keeps all of them because places do suffice (Tijdeman, "The chairman
    assignment problem", Discrete Mathematics 32, 1980).

    Args:
        weights: a whole number of 1 or more for each corpus.

    Raises:
        UserError: a weight is below 1, or the sum of all in lowest terms is above `MOST_WEIGHT`.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        if not weights or min(weights) < 1:
            raise UserError(f"data.corpora has the weights {list(weights)}; each must be 1 or more.")
        divisor = gcd(*weights)
        self.weights = [weight // divisor for weight in weights]
        self.period = sum(self.weights)
        if self.period > MOST_WEIGHT:
            raise UserError(
                f"The weights of data.corpora add up to {self.period} in lowest terms; give rounder ones, "
                f"with a sum of {MOST_WEIGHT} at most."
            )

    def locate(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """For each sample, int64 [n]: its corpus, and its number among the samples of that corpus."""
        period, place = np.divmod(samples, self.period)
        corpus = self._corpus[place]
        return corpus, period * np.array(self.weights)[corpus] + self._before[place, corpus]

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each corpus."""
        periods, place = divmod(samples, self.period)
        before = self._before[place].tolist()
        return [periods * weight + more for weight, more in zip(self.weights, before, strict=True)]

    def samples_until(self, corpus: int, samples: float) -> float:
        """About how many samples there are until `samples` are of the corpus: off by less than a period."""
        return samples * self.period / self.weights[corpus]

    @cached_property
    def _corpus(self) -> IntArray:
        """The corpus of each place of a period: int64 [period]."""
        return np.array(_earliest_deadline_first(self.weights), dtype=np.int64)

    @cached_property
    def _before(self) -> IntArray:
        """How many samples of each corpus come before each place: int64 [period, corpora]."""
        counts: IntArray = np.cumsum(self._corpus[:, None] == np.arange(len(self.weights)), axis=0)
        return np.concatenate([np.zeros((1, len(self.weights)), np.int64), counts[:-1]])


def _earliest_deadline_first(weights: Sequence[int]) -> list[int]:
    """The corpus of each place of one period.

    Sample k of a corpus, from 0, may not come before place floor(k * W / w), or the corpus would be a whole
    sample ahead, nor after place ceil((k + 1) * W / w) - 1, or it would be one behind.
    """
    period = sum(weights)
    places: list[int] = []
    waiting = [(0, corpus, 0) for corpus in range(len(weights))]  # (first place, corpus, sample)
    ready: list[tuple[int, int, int]] = []  # (last place, corpus, sample)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, corpus, sample = heapq.heappop(waiting)
            last = -(-(sample + 1) * period // weights[corpus]) - 1
            heapq.heappush(ready, (last, corpus, sample))
        _, corpus, sample = heapq.heappop(ready)
        places.append(corpus)
        if sample + 1 < weights[corpus]:
            first = (sample + 1) * period // weights[corpus]
            heapq.heappush(waiting, (first, corpus, sample + 1))
    return places


class BlendedOrder:
    """The samples of several orders, in the ratio of a blend, as `sample_order.SampleOrder`.

    Spans are of the streams one after another (`BlendedStream`).

    Args:
        orders: of each corpus, of one sequence length.
        sizes: tokens of each stream.
        blend: which of them a sample is of.
    """

    def __init__(self, orders: Sequence[SampleOrder], sizes: Sequence[int], blend: Blend) -> None:
        self._orders, self._blend = orders, blend
        self._bases = np.cumsum([0, *sizes])

    @property
    def sequence_length(self) -> int:
        """See `SampleOrder.sequence_length`."""
        return self._orders[0].sequence_length

    def spans(self, samples: IntArray) -> Spans:
        """See `SampleOrder.spans`."""
        corpus, index = self._blend.locate(samples)
        parts = []
        for number, order in enumerate(self._orders):
            rows, base = np.flatnonzero(corpus == number), self._bases[number]
            row, *places = order.spans(index[rows])
            parts.append(Spans(rows[row], *(place + base for place in places)))
        return joined(parts)

    def samples_until(self, epochs: float) -> float:
        """See `SampleOrder.samples_until`: an epoch of a blend is one of its first corpus."""
        return self._blend.samples_until(0, self._orders[0].samples_until(epochs))

    def epochs_after(self, samples: int) -> float:
        """See `SampleOrder.epochs_after`: an epoch of a blend is one of its first corpus."""
        return self._orders[0].epochs_after(self._blend.counts(samples)[0])


class BlendedStream:
    """Several streams, one after another; a batch is one read of each.

    Args:
        streams: where the tokens are.
        sizes: tokens of each.
    """

    def __init__(self, streams: Sequence[DocumentReader], sizes: Sequence[int]) -> None:
        self._streams = streams
        self._bases = np.cumsum([0, *sizes])

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        """The tokens of the ranges (start, stop), none of them empty, each within one stream."""
        begins = np.array([start for start, _ in ranges], dtype=np.int64)
        stream_of = np.searchsorted(self._bases, begins, side="right") - 1
        found: dict[int, NDArray[np.integer]] = {}
        for number, stream in enumerate(self._streams):
            mine, base = np.flatnonzero(stream_of == number).tolist(), int(self._bases[number])
            own = [(ranges[place][0] - base, ranges[place][1] - base) for place in mine]
            found.update(zip(mine, stream.read(own), strict=True))
        return [found[place] for place in range(len(ranges))]

    def loss_starts(self, begins: IntArray) -> IntArray:
        """See `DocumentReader.loss_starts`."""
        stream_of = np.searchsorted(self._bases, begins, side="right") - 1
        found = np.empty_like(begins)
        for number, stream in enumerate(self._streams):
            mine, base = stream_of == number, self._bases[number]
            found[mine] = stream.loss_starts(begins[mine] - base) + base
        return found
