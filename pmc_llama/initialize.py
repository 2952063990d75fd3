"""Random first weights, as a checkpoint that is computed instead of stored.

torch.distributed.checkpoint asks a storage reader for the rectangles that each rank holds. This one draws
each tensor from the seed and its own name and hands out the parts asked for, so the weights are the same at
any world size and under any backend, and no rank holds more than one tensor whole.
"""

from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future


class RandomWeights(StorageReader):
    """Normal matrices of standard deviation `std`, norms of one, biases of zero, as transformers has it.

    Args:
        shapes: of every tensor that may be asked for, by name.
        seed: of the recipe.
        std: the model configuration's `initializer_range`.
    """

    def __init__(self, shapes: dict[str, torch.Size], seed: int, std: float) -> None:
        self.shapes = shapes
        self.seed = seed
        self.std = std

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor as one piece."""
        return Metadata({name: _whole(shape) for name, shape in self.shapes.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors that `plan` names, drawing each once."""
        by_name: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_name.setdefault(item.storage_index.fqn, []).append(item)
        for name, items in by_name.items():
            weights = self.draw(name)
            for item in items:
                self._fill(planner, item, weights)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def draw(self, name: str) -> Tensor:
        """The whole fp32 tensor called `name`."""
        if "norm" in name:
            return torch.ones(self.shapes[name])
        if name.endswith(".bias"):
            return torch.zeros(self.shapes[name])
        return torch.empty(self.shapes[name]).normal_(0.0, self.std, generator=self.generator(name))

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for the tensor called `name`, the same at every call."""
        return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{self.seed}/{name}".encode()) >> 1)

    def _fill(self, planner: LoadPlanner, item: ReadItem, weights: Tensor) -> None:
        for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            weights = weights.narrow(dimension, offset, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(weights)
        planner.commit_tensor(item, target)

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Every rank reads for itself."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return plans

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is remembered between loads."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There is no path to be valid or not."""
        return True


def _whole(shape: torch.Size) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, [chunk])
