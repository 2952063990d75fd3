"""Batches come as if nothing were read ahead, and what goes wrong is raised where it belongs."""

import threading

import pytest
import torch

from data_tools.errors import UserError
from pmc_llama.batches import Batch, MicroBatch
from pmc_llama.read_ahead import ReadAhead

SIZE = 8


class Numbered:
    """A batch holds its first sample; from `damaged` on nothing can be read."""

    def __init__(self, damaged: int = 1 << 60) -> None:
        self.damaged, self.read, self.begun = damaged, list[int](), threading.Semaphore(0)

    def batch(self, first_sample: int) -> Batch:
        self.read.append(first_sample)
        self.begun.release()
        if first_sample >= self.damaged:
            raise UserError(f"sample {first_sample} cannot be read")
        tokens = torch.full((1, 1), first_sample)
        return Batch([MicroBatch(tokens, tokens)], first_sample)

    def tokens(self, first_sample: int) -> int:
        return SIZE


@pytest.mark.parametrize("asked", [[0, 8, 16, 24], [0, 8, 32, 40, 0, 8], [5, 5, 5]])
def test_each_batch_is_the_one_that_was_asked_for(asked: list[int]) -> None:
    ahead = ReadAhead(Numbered(), SIZE, pinned=False)
    assert [ahead.batch(sample).targets for sample in asked] == asked
    ahead.close()


def test_the_next_batch_is_read_before_it_is_asked_for_and_once() -> None:
    batches = Numbered()
    ahead = ReadAhead(batches, SIZE, pinned=False)
    for step in range(3):
        ahead.batch(step * SIZE)
        for _ in range(1 if step else 2):
            assert batches.begun.acquire(timeout=60)
    ahead.close()
    assert batches.read == [0, 8, 16, 24]


def test_what_cannot_be_read_is_told_at_its_own_step() -> None:
    ahead = ReadAhead(Numbered(damaged=16), SIZE, pinned=False)
    assert ahead.batch(0).targets == 0
    assert ahead.batch(8).targets == 8
    with pytest.raises(UserError, match="sample 16 cannot be read"):
        ahead.batch(16)
    ahead.close()
