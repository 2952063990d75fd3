"""What changes at a resume: a new sequence length, another mode; and coverage, counted against bitmaps."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_llama.batches import TrainingBatches
from pmc_llama.coverage import Coverage
from pmc_llama.sample_order import Mode, Stretch, sample_order
from tests.pmc_llama.streams import NumberedStream
from tests.pmc_llama.test_data import document_lengths, targets

modes = st.sampled_from(["window", "packed"])
regimes = st.tuples(modes, st.integers(1, 40), st.integers(0, 30))


def seen(stream: NumberedStream, mode: Mode, length: int, taken: list[Stretch], samples: int) -> list[int]:
    """The targets of the first samples of the order that goes on after `taken`."""
    if samples == 0:
        return []
    order = sample_order(stream, mode, length, 7, taken)
    return targets(TrainingBatches(stream, order, samples, 1, 0, 1).batch(0).micro_batches)


@settings(max_examples=100)
@given(lengths=document_lengths, changes=st.lists(regimes, max_size=5), last=st.integers(1, 60))
def test_an_epoch_has_every_token_once_whatever_lengths_it_was_cut_into(
    lengths: list[int], changes: list[tuple[Mode, int, int]], last: int
) -> None:
    stream = NumberedStream(lengths)
    found: list[int] = []
    taken: list[Stretch] = []
    for _, length, samples in changes:
        found += seen(stream, "packed", length, taken, samples)
        taken.append(Stretch("packed", length, samples))
    order = sample_order(stream, "packed", last, 7, taken)
    epoch = int(order.epoch_of(np.zeros(1, np.int64))[0])
    left = round(order.samples_until(epoch + 1))
    found += seen(stream, "packed", last, taken, left)
    assert np.array_equal(np.bincount(found, minlength=stream.tokens), np.full(stream.tokens, epoch + 1))
    assert round(order.epochs_after(left), 9) == epoch + 1


@settings(max_examples=50)
@given(lengths=document_lengths, changes=st.lists(regimes, min_size=1, max_size=4))
def test_windows_of_a_new_length_go_on_with_the_documents_that_the_epoch_has_left(
    lengths: list[int], changes: list[tuple[Mode, int, int]]
) -> None:
    stream = NumberedStream(lengths)
    taken = [Stretch(mode, length, samples) for mode, length, samples in changes]
    windows = sum(samples for mode, _, samples in changes if mode == "window")
    plain = sample_order(stream, "window", 9, 7)
    changed = sample_order(stream, "window", 9, 7, taken)
    for ours, theirs in zip(
        changed.spans(np.arange(30)), plain.spans(np.arange(windows, windows + 30)), strict=True
    ):
        assert np.array_equal(ours, theirs)


@settings(max_examples=120)
@given(lengths=document_lengths, changes=st.lists(regimes, min_size=1, max_size=5))
def test_coverage_is_what_a_bitmap_of_the_corpus_says_after_every_sample(
    lengths: list[int], changes: list[tuple[Mode, int, int]]
) -> None:
    stream = NumberedStream(lengths)
    bitmap = np.zeros(stream.tokens, bool)
    taken: list[Stretch] = []
    for mode, length, samples in changes:
        expected = []
        order = sample_order(stream, mode, length, 7, taken)
        batches = TrainingBatches(stream, order, 1, 1, 0, 1)
        for sample in range(samples):
            before = bitmap.sum()
            bitmap[targets(batches.batch(sample).micro_batches)] = True
            expected.append(int(bitmap.sum() - before))
        coverage = Coverage.of(stream, mode, length, 7, taken)
        assert coverage.new_targets(np.arange(samples)).tolist() == expected
        taken.append(Stretch(mode, length, samples))
