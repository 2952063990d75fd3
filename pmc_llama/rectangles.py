"""Rectangles of a tensor, told to torch.distributed.checkpoint.

A tensor that has the three methods below (the protocol that DTensor itself follows, in
`torch/distributed/checkpoint/planner_helpers.py`) is asked which rectangles of the whole this rank holds. So
a shard of any form is read and written in place, and whatever reads such checkpoints reads what it wrote.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Rectangles(torch.Tensor):
    """One rank's rectangles of a tensor; has the size of the whole, holds the memory of the rectangles.

    Args:
        shape: of the whole tensor.
        dtype: of every piece.
        device: of every piece.
        pieces: each rectangle (offsets and sizes in the whole tensor) with the tensor that holds it.
    """

    pieces: list[tuple[ChunkStorageMetadata, Tensor]]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        pieces: list[tuple[ChunkStorageMetadata, Tensor]],
    ) -> "Rectangles":
        tensor: Rectangles = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor.pieces = pieces
        return tensor

    def __init__(self, *args: Any) -> None:
        """Everything is done in `__new__`, as wrapper subclasses must."""

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk, _ in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk, piece in self.pieces:
            if chunk.offsets == index.offset:
                return piece
        raise ValueError(f"no part of {index.fqn} begins at {index.offset} on this rank")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{cls.__name__} only describes memory; {func} is not defined on it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.__create_chunk_list__()})"
