"""Batches that are read by a thread while the step before them is computed."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from pmc_llama.batches import Batch, MicroBatch


class Batches(Protocol):
    """The batches of one rank: `batches.TrainingBatches` or `whole.WholeBatches`."""

    def batch(self, first_sample: int) -> Batch:
        """The batch that begins at a sample."""

    def tokens(self, first_sample: int) -> int:
        """Inputs of the batch at `first_sample` over all ranks."""


class ReadAhead:
    """The batches of one rank, of which the next one is always being read.

    A step waits for as long as its batch takes beyond the step before. What goes wrong while reading is
    raised where the batch is asked for.

    Args:
        batches: to read from; their stream is read by another thread from now on.
        global_size: samples from one batch to the next.
        pinned: give tensors in pinned memory, which a GPU copies from while the host goes on.
    """

    def __init__(self, batches: Batches, global_size: int, pinned: bool) -> None:
        self._batches, self._global_size, self._pinned = batches, global_size, pinned
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, first_sample: int) -> Batch:
        """The batch that begins at a sample; the one behind it is begun."""
        expected, self._next = self._next, None
        if expected and expected[0] == first_sample:
            future = expected[1]
        else:
            future = self._thread.submit(self._read, first_sample)
        following = first_sample + self._global_size
        self._next = following, self._thread.submit(self._read, following)
        return future.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, first_sample: int) -> Batch:
        batch = self._batches.batch(first_sample)
        return _pin(batch) if self._pinned else batch


def _pin(batch: Batch) -> Batch:
    def pinned(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.pin_memory()

    micro_batches = [
        MicroBatch(each.inputs.pin_memory(), each.labels.pin_memory(), pinned(each.positions))
        for each in batch.micro_batches
    ]
    return Batch(micro_batches, batch.targets)
