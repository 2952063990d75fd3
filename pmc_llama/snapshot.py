"""A copy of a sharded state in host memory, which later steps cannot change."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from data_tools.errors import UserError
from pmc_llama.rectangles import Rectangles

_HOST = torch.device("cpu")


class Snapshot:
    """Host memory for one copy of a state, filled anew by every `take`.

    Each rank copies its own shards; nothing is gathered. Every rectangle has a buffer of its own, because
    torch.distributed.checkpoint would clone a view of a larger one and keep all clones until its file is
    written. Buffers for a GPU's tensors are pinned, so that the copies run at the speed of the bus; torch
    rounds each of those up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `state`, on whatever device it is, and return when all of it is copied.

        Args:
            state: of a backend (`Backend.state`), the same names and shards at every call.

        Returns:
            The same names; shards have become `Rectangles` in host memory, other tensors plain tensors
            there. The next call overwrites them.

        Raises:
            UserError: host memory does not hold the copy.
        """
        copies = {name: self._copy(name, tensor) for name, tensor in state.items()}
        for device in {tensor.device for tensor in state.values()}:
            if device.type == "cuda":  # copies into pinned memory have only been queued
                torch.cuda.current_stream(device).synchronize()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor | Rectangles):
            return self._fill((name, 0), tensor)
        pieces = []
        for number, chunk in enumerate(tensor.__create_chunk_list__()):
            if chunk.sizes.numel():
                piece = tensor.__get_tensor_shard__(MetadataIndex(name, chunk.offsets))
                pieces.append((chunk, self._fill((name, number), piece)))
        return Rectangles(tensor.shape, tensor.dtype, _HOST, pieces)

    def _fill(self, key: tuple[str, int], source: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = _host_memory(source)
        return buffer.copy_(source, non_blocking=True)


def _host_memory(source: Tensor) -> Tensor:
    try:
        return torch.empty(
            source.shape, dtype=source.dtype, device=_HOST, pin_memory=source.device.type == "cuda"
        )
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"Host memory does not hold a copy of the training state ({error}); set "
            "checkpoint.asynchronous to false."
        ) from error


def local_bytes(tensor: Tensor) -> int:
    """Bytes that this rank holds of a tensor of a state."""
    if isinstance(tensor, Rectangles):
        return sum(piece.nbytes for _, piece in tensor.pieces)
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
