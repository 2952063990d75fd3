"""Permutations and random numbers: complete, fair, and the same whoever asks for what else."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pmc_llama.randomness import inverse, permute, random_bits


@settings(deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(), epoch=st.integers(0, 10**6))
def test_permutation_reaches_every_index_once(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size, seed, np.full(size, epoch))
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(2, 300), seed=st.integers(0, 99), data=st.data())
def test_permutation_of_an_index_does_not_depend_on_what_else_is_asked(
    size: int, seed: int, data: st.DataObject
) -> None:
    epochs = np.arange(4).repeat(size)
    whole = permute(np.tile(np.arange(size), 4), size, seed, epochs).reshape(4, size)
    epoch, index = data.draw(st.integers(0, 3)), data.draw(st.integers(0, size - 1))
    assert permute(np.array([index]), size, seed, np.array([epoch]))[0] == whole[epoch, index]


@settings(deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(), first_epoch=st.integers(0, 10**6))
def test_the_inverse_leads_every_image_back_to_its_index(size: int, seed: int, first_epoch: int) -> None:
    index = np.arange(size)
    epoch = first_epoch + index % 3
    assert np.array_equal(inverse(permute(index, size, seed, epoch), size, seed, epoch), index)
    assert np.array_equal(permute(inverse(index, size, seed, epoch), size, seed, epoch), index)


def chi_square_excess(counts: NDArray[np.integer], freedom: int) -> float:
    """Standard deviations by which the chi-square statistic of equal odds exceeds its mean."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [13, 16, 100])
def test_over_epochs_every_item_comes_equally_often_at_every_place(size: int) -> None:
    epochs = 5000
    order = permute(np.tile(np.arange(size), epochs), size, 7, np.arange(epochs).repeat(size))
    pairs = np.tile(np.arange(size), epochs) * size + order
    assert chi_square_excess(np.bincount(pairs, minlength=size**2), (size - 1) ** 2) < 5


def test_over_epochs_every_item_follows_every_other_equally_often() -> None:
    size, epochs = 13, 5000
    order = permute(np.tile(np.arange(size), epochs), size, 7, np.arange(epochs).repeat(size))
    order = order.reshape(epochs, size)
    counts = np.bincount((order[:, :-1] * size + order[:, 1:]).ravel(), minlength=size**2)
    distinct = counts.reshape(size, size)[~np.eye(size, dtype=bool)]
    assert chi_square_excess(distinct, distinct.size - 1) < 5


def test_random_numbers_differ_by_seed_epoch_purpose_and_index() -> None:
    keys = list(itertools.product(range(8), range(8), range(3), range(50)))
    numbers = {int(random_bits(seed, epoch, purpose, index)) for seed, epoch, purpose, index in keys}
    assert len(numbers) == len(keys)
    assert len({int(random_bits(seed, 0)) for seed in (-1, 0, 1, 2**63, 2**64 - 2)}) == 5
