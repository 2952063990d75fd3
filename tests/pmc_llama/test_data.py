"""What a training step sees: each promise of the sample order, checked against a stream whose token at
position p is the number p, so that tensors tell where they were read."""

import itertools
from collections import Counter
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from pmc_llama.data import (
    NO_TARGET,
    MicroBatch,
    TrainingBatches,
    heldout_batches,
    sample_order,
)
from tests.pmc_llama.streams import NumberedStream
from tests.pmc_llama.test_randomness import chi_square_excess

Mode = Literal["window", "packed"]
modes = st.sampled_from(["window", "packed"])
document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def rows(micro_batches: list[MicroBatch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, labels) of each sequence."""
    return [
        (tuple(inputs), tuple(labels))
        for batch in micro_batches
        for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True)
    ]


def targets(micro_batches: list[MicroBatch]) -> list[int]:
    return [label for _, labels in rows(micro_batches) for label in labels if label != NO_TARGET]


def pure_sequence(
    stream: NumberedStream, mode: Mode, length: int, seed: int, sample: int
) -> list[MicroBatch]:
    """Sample `sample` by itself: one rank, a batch of one."""
    order = sample_order(stream, mode, length, seed)
    return TrainingBatches(stream, order, 1, 1, 0, 1).batch(sample).micro_batches


def one_epoch(stream: NumberedStream, mode: Mode, length: int, seed: int, epoch: int) -> list[MicroBatch]:
    order = sample_order(stream, mode, length, seed)
    per_epoch = order.samples_per_epoch
    return TrainingBatches(stream, order, per_epoch, 1, 0, 1).batch(epoch * per_epoch).micro_batches


# --- an epoch ---


@settings(deadline=None)
@given(lengths=document_lengths, length=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_window_visits_every_document_exactly_once_an_epoch(
    lengths: list[int], length: int, seed: int, epoch: int
) -> None:
    stream = NumberedStream(lengths)
    order = sample_order(stream, "window", length, seed)
    assert order.samples_per_epoch == len(lengths)
    spans = order.spans(np.arange(len(lengths)) + epoch * len(lengths))
    document = np.searchsorted(stream.starts, spans.before, side="right") - 1
    assert sorted(document.tolist()) == list(range(len(lengths)))
    assert np.all(spans.end <= stream.starts[document + 1])
    assert np.array_equal(spans.end - spans.before, np.minimum(np.array(lengths)[document], length + 1))


@settings(deadline=None)
@given(lengths=document_lengths, length=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_packed_makes_every_token_a_target_exactly_once_an_epoch(
    lengths: list[int], length: int, seed: int, epoch: int
) -> None:
    stream = NumberedStream(lengths)
    assert sorted(targets(one_epoch(stream, "packed", length, seed, epoch))) == list(range(stream.tokens))


def test_packed_has_one_short_window_and_no_other() -> None:
    stream = NumberedStream([30, 17, 56])
    batches = one_epoch(stream, "packed", 10, seed=0, epoch=3)
    sizes = [sum(label != NO_TARGET for label in labels) for _, labels in rows(batches)]
    assert sorted(sizes) == [3] + [10] * 10


def test_window_starts_at_every_place_equally_often_the_last_one_included() -> None:
    stream = NumberedStream([20, 3])
    order = sample_order(stream, "window", 7, seed=5)
    first = order.spans(np.arange(2 * 13_000)).before
    counts = np.bincount(first[first < 20], minlength=20)
    assert np.all(counts[13:] == 0)  # 8 tokens fit at 0 .. 12
    assert chi_square_excess(counts[:13], 12) < 5


def test_packed_offset_reaches_every_token_equally_often() -> None:
    stream = NumberedStream([11])
    order = sample_order(stream, "packed", 11, seed=5)
    spans = order.spans(np.arange(11_000))
    first_of_row = np.unique(spans.row, return_index=True)[1]
    counts = np.bincount(spans.before[first_of_row], minlength=11)
    assert chi_square_excess(counts, 10) < 5


@pytest.mark.parametrize("mode", ["window", "packed"])
def test_epochs_and_seeds_differ_in_order(mode: Mode) -> None:
    stream = NumberedStream([25] * 40)
    orders = {
        (seed, epoch): targets(one_epoch(stream, mode, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert all(a != b for a, b in itertools.combinations(orders.values(), 2))
    assert targets(one_epoch(stream, mode, 8, 0, 1)) == orders[0, 1]


# --- sequences ---


@settings(deadline=None)
@given(lengths=document_lengths, mode=modes, length=st.integers(1, 50), sample=st.integers(0, 200))
def test_labels_are_the_next_token_and_padding_has_no_target(
    lengths: list[int], mode: Mode, length: int, sample: int
) -> None:
    stream = NumberedStream(lengths)
    [(inputs, labels)] = rows(pure_sequence(stream, mode, length, 3, sample))
    assert len(inputs) == len(labels) == length
    count = sum(label != NO_TARGET for label in labels)
    assert labels[count:] == (NO_TARGET,) * (length - count)
    assert inputs[count:] == (0,) * (length - count)
    for j in range(count):
        assert labels[j] == (inputs[j] + 1) % stream.tokens
        assert j == 0 or inputs[j] == labels[j - 1]


def test_window_pads_a_short_document_and_trains_on_all_its_tokens_but_the_first() -> None:
    [(inputs, labels)] = rows(pure_sequence(NumberedStream([4]), "window", 6, 0, 0))
    assert inputs == (0, 1, 2, 0, 0, 0)
    assert labels == (1, 2, 3, NO_TARGET, NO_TARGET, NO_TARGET)


def test_tensors_are_int64_of_micro_size_by_sequence_length() -> None:
    stream = NumberedStream([50] * 8)
    batches = TrainingBatches(stream, sample_order(stream, "window", 16, 0), 8, 2, 1, 2).batch(0)
    assert len(batches.micro_batches) == 2
    for tensor in (t for m in batches.micro_batches for t in (m.inputs, m.labels)):
        assert tensor.shape == (2, 16)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


# --- batches ---


@settings(deadline=None)
@given(
    lengths=document_lengths,
    mode=modes,
    length=st.integers(1, 30),
    world_size=st.integers(1, 5),
    micro_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    first=st.integers(0, 100),
)
def test_ranks_and_steps_together_are_the_pure_order_at_any_world_size_batch_and_resume_point(
    lengths: list[int],
    mode: Mode,
    length: int,
    world_size: int,
    micro_size: int,
    accumulation: int,
    first: int,
) -> None:
    stream = NumberedStream(lengths)
    order = sample_order(stream, mode, length, seed=1)
    global_size = world_size * micro_size * accumulation
    seen = []
    for step in range(2):
        of_ranks = [
            TrainingBatches(stream, order, global_size, micro_size, rank, world_size).batch(
                first + step * global_size
            )
            for rank in range(world_size)
        ]
        assert {len(batch.micro_batches) for batch in of_ranks} == {accumulation}
        total = sum(len(targets(batch.micro_batches)) for batch in of_ranks)
        assert {batch.targets for batch in of_ranks} == {total}
        seen += [row for batch in of_ranks for row in rows(batch.micro_batches)]
    expected = [
        row
        for sample in range(first, first + 2 * global_size)
        for row in rows(pure_sequence(stream, mode, length, 1, sample))
    ]
    assert seen == expected


def test_a_batch_may_hold_several_epochs_of_a_small_corpus() -> None:
    stream = NumberedStream([5, 6, 7])
    order = sample_order(stream, "packed", 18, seed=0)
    batch = TrainingBatches(stream, order, 4, 4, 0, 1).batch(10)
    assert Counter(targets(batch.micro_batches)) == dict.fromkeys(range(18), 4)


def test_a_batch_is_one_read() -> None:
    stream = NumberedStream([5] * 32)
    batches = TrainingBatches(stream, sample_order(stream, "window", 4, 0), 16, 2, 0, 2)
    batches.batch(0)
    assert stream.reads == [8]


# --- held-out ---


@settings(deadline=None)
@given(
    lengths=document_lengths,
    length=st.integers(1, 30),
    micro_size=st.integers(1, 4),
    world_size=st.integers(1, 4),
)
def test_heldout_has_every_token_as_target_once_and_equally_many_batches_on_every_rank(
    lengths: list[int], length: int, micro_size: int, world_size: int
) -> None:
    stream = NumberedStream(lengths)
    of_ranks = [
        list(heldout_batches(stream, length, micro_size, rank, world_size, max_sequences=10**6))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1
    assert all(m.inputs.shape == (micro_size, length) for batches in of_ranks for m in batches)
    in_turn = [micro_batch for turn in zip(*of_ranks, strict=True) for micro_batch in turn]
    assert targets(in_turn) == list(range(stream.tokens))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_heldout_stops_at_max_sequences_whatever_the_world_size(world_size: int) -> None:
    stream = NumberedStream([100])
    of_ranks = [list(heldout_batches(stream, 8, 2, rank, world_size, 5)) for rank in range(world_size)]
    found = sorted(target for batches in of_ranks for target in targets(batches))
    assert found == list(range(40))


def test_an_empty_heldout_split_has_no_batch() -> None:
    assert list(heldout_batches(NumberedStream([]), 8, 2, 0, 2, 5)) == []


# --- errors ---


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_nearest_that_they_can() -> None:
    stream = NumberedStream([50])
    order = sample_order(stream, "window", 8, 0)
    with pytest.raises(
        UserError, match=r"batch\.global_size is 130.*3 ranks.*batch\.micro_size 4.*nearest is 132"
    ):
        TrainingBatches(stream, order, 130, 4, 0, 3)
    with pytest.raises(UserError, match=r"nearest is 8"):
        TrainingBatches(stream, order, 1, 4, 0, 2)
    with pytest.raises(UserError, match=r"batch\.global_size is 0"):
        TrainingBatches(stream, order, 0, 4, 0, 2)
    with pytest.raises(UserError, match=r"batch\.micro_size is 0"):
        TrainingBatches(stream, order, 8, 0, 0, 2)


def test_a_sequence_length_below_one_and_an_empty_corpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length is 0"):
        sample_order(NumberedStream([5]), "packed", 0, 0)
    with pytest.raises(UserError, match="no document"):
        sample_order(NumberedStream([]), "packed", 8, 0)
