"""A contiguous range of a flattened tensor, told to torch.distributed.checkpoint as rectangles.

A ZeRO-3 rank owns the elements [start, stop) of each parameter in row-major order. Such a range is at most
three rectangles of a matrix: the end of a row, whole rows, the beginning of a row.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from pmc_llama.rectangles import Rectangles


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


class FlatShard(Rectangles):
    """One rank's range of a flattened tensor; has the size of the whole, holds the memory of the range.

    Args:
        local: one-dimensional; a view of the memory to read from and write into.
        start: the element of the whole tensor that `local` begins with.
        shape: of the whole tensor.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: torch.Size) -> "FlatShard":  # noqa: D102
        pieces = [
            (
                ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                local.narrow(0, first - start, sizes.numel()).view(sizes),
            )
            for offsets, sizes, first in rectangles(shape, start, start + local.numel())
        ]
        shard = cast(FlatShard, Rectangles.__new__(cls, shape, local.dtype, local.device, pieces))
        shard.local = local
        shard.start = start
        return shard
