"""Blends: exact to one sample at every prefix, and each corpus in its own order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from pmc_llama.batches import TrainingBatches
from pmc_llama.blend import Blend, BlendedOrder, BlendedStream
from pmc_llama.sample_order import Mode, sample_order
from tests.pmc_llama.streams import NumberedStream
from tests.pmc_llama.test_data import rows

weights_lists = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@settings(max_examples=200)
@given(weights=weights_lists)
def test_every_corpus_is_less_than_a_sample_from_its_share_at_every_prefix(weights: list[int]) -> None:
    blend, total = Blend(weights), sum(weights)
    n = np.arange(1, 2 * total + 3)
    corpus, _ = blend.locate(n - 1)
    counts = np.cumsum(corpus[:, None] == np.arange(len(weights)), axis=0)
    assert np.all(np.abs(counts * total - n[:, None] * np.array(weights)) < total)
    assert [blend.counts(int(k)) for k in n] == counts.tolist()


@given(weights=weights_lists, first=st.integers(0, 10**12))
def test_the_samples_of_a_corpus_are_numbered_without_a_gap_from_any_point_on(
    weights: list[int], first: int
) -> None:
    blend = Blend(weights)
    corpus, index = blend.locate(np.arange(first, first + 50))
    for number, before in enumerate(blend.counts(first)):
        mine = index[corpus == number]
        assert mine.tolist() == list(range(before, before + len(mine)))


@pytest.mark.parametrize("mode", ["window", "packed"])
def test_a_blended_batch_has_the_samples_of_each_corpus_in_its_own_order_by_one_read_of_each(
    mode: Mode,
) -> None:
    streams = [NumberedStream([13, 29, 8]), NumberedStream([40, 5]), NumberedStream([9] * 6)]
    orders = [sample_order(stream, mode, 10, 3) for stream in streams]
    sizes, blend = [stream.tokens for stream in streams], Blend([3, 4, 5])
    together = BlendedStream(streams, sizes)
    found = []
    for rank in range(2):
        batches = TrainingBatches(together, BlendedOrder(orders, sizes, blend), 24, 4, rank, 2)
        found += rows(batches.batch(7).micro_batches)
        assert [len(stream.reads) for stream in streams] == [rank + 1] * 3
    for row, corpus, index in zip(found, *blend.locate(np.arange(7, 31)), strict=True):
        alone = TrainingBatches(streams[corpus], orders[corpus], 1, 1, 0, 1).batch(int(index))
        assert row == rows(alone.micro_batches)[0]


def test_an_epoch_of_a_blend_is_one_of_its_first_corpus() -> None:
    streams = [NumberedStream([5] * 30), NumberedStream([5] * 7)]
    orders = [sample_order(stream, "window", 4, 3) for stream in streams]
    order = BlendedOrder(orders, [stream.tokens for stream in streams], Blend([15, 5]))
    assert order.samples_until(2.0) == 80
    assert order.epochs_after(80) == 2.0


@pytest.mark.parametrize(("weights", "expected"), [([3, 0], "1 or more"), ([99_991, 99_989], "rounder")])
def test_weights_that_make_no_schedule_are_refused(weights: list[int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Blend(weights)
