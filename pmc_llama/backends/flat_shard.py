"""A contiguous range of a flattened tensor, told to torch.distributed.checkpoint as rectangles.

A ZeRO-3 rank owns the elements [start, stop) of each parameter in row-major order. Such a range is at most
three rectangles of a matrix: the end of a row, whole rows, the beginning of a row. A tensor that has the
three methods below (the protocol that DTensor itself follows, in
`torch/distributed/checkpoint/planner_helpers.py`) is asked which rectangles it holds. So a ZeRO-3 shard is
read and written in place, and anything that reads such checkpoints reads what it wrote.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def rectangles(shape: torch.Size, start: int, stop: int) -> list[tuple[torch.Size, torch.Size, int]]:
    """Cut the range [start, stop) of a row-major tensor into rectangles.

    Args:
        shape: of the whole tensor, one or two dimensions.
        start: first element of the range.
        stop: the element after the last.

    Returns:
        (offsets, sizes, first element) of each rectangle in order; none for an empty range.
    """
    if stop <= start:
        return []
    if len(shape) == 1:
        return [(torch.Size([start]), torch.Size([stop - start]), start)]
    width = shape[1]
    cuts = {start, min(stop, -(-start // width) * width), max(start, stop // width * width), stop}
    result = []
    for first, last in pairwise(sorted(cuts)):
        row, column = divmod(first, width)
        rows = (last - first) // width or 1
        result.append((torch.Size([row, column]), torch.Size([rows, (last - first) // rows]), first))
    return result


class FlatShard(torch.Tensor):
    """One rank's range of a tensor; has the size of the whole, holds the memory of the range.

    Args:
        local: one-dimensional; a view of the memory to read from and write into.
        start: the element of the whole tensor that `local` begins with.
        shape: of the whole tensor.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: torch.Size) -> "FlatShard":  # noqa: D102
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        shard.local = local
        shard.start = start
        return shard

    def __init__(self, local: Tensor, start: int, shape: torch.Size) -> None:
        """Everything is done in `__new__`, as wrapper subclasses must."""

    def pieces(self) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        """The rectangles with the views of `local` that hold them."""
        return [
            (ChunkStorageMetadata(offsets=offsets, sizes=sizes), self._view(first, sizes))
            for offsets, sizes, first in rectangles(self.shape, self.start, self.start + self.local.numel())
        ]

    def _view(self, first: int, sizes: torch.Size) -> Tensor:
        return self.local.narrow(0, first - self.start, sizes.numel()).view(sizes)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk, _ in self.pieces()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.pieces()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk, view in self.pieces():
            if chunk.offsets == index.offset:
                return view
        raise ValueError(f"no part of {index.fqn} begins at {index.offset} on this rank")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"a FlatShard only describes memory; {func} is not defined on it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard({tuple(self.shape)}, elements {self.start}..{self.start + self.local.numel()})"
