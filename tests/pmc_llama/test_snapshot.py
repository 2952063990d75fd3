"""What is written behind training is the state of the moment of the save, under either backend."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from pmc_llama import checkpoint
from pmc_llama.backends import build_backend
from pmc_llama.backends.base import Backend
from pmc_llama.backends.flat_shard import FlatShard
from pmc_llama.config import CheckpointConfig
from pmc_llama.rectangles import Rectangles
from pmc_llama.saving import CheckpointSaver
from pmc_llama.snapshot import Snapshot
from tests.pmc_llama.small import CPU, odd_config, seeded_backend, small_recipe, train_steps
from tests.pmc_llama.test_saving import feed, manifest
from tests.ranks import run_on_ranks


def _locals(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of all that this rank holds."""
    return {name: _local(tensor).clone() for name, tensor in state.items()}


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FlatShard):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _train_on_while_writing(directory: Path) -> None:
    for name in ("deepspeed", "fsdp"):
        backend = seeded_backend(small_recipe(name), odd_config())
        train_steps(backend, 0, 2, accumulation=1)
        _check_snapshot(backend)
        _check_isolation(directory, name, backend)
        backend.close()


def _check_snapshot(backend: Backend) -> None:
    """Every element of every shard is in the copy, bit for bit, and in memory of its own."""
    state, snapshot = backend.state(), Snapshot()
    for _ in range(2):  # into new buffers, then into the same
        for name, taken in snapshot.take(state).items():
            original = state[name]
            assert taken.shape == original.shape
            assert taken.dtype == original.dtype
            if not isinstance(taken, Rectangles):
                assert torch.equal(taken, original)
                continue
            assert sum(piece.numel() for _, piece in taken.pieces) == _local(original).numel()
            for chunk, piece in taken.pieces:
                source = original.__get_tensor_shard__(MetadataIndex(name, chunk.offsets))
                assert torch.equal(piece, source), name
                assert piece.untyped_storage().nbytes() == piece.nbytes
                assert piece.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def _check_isolation(directory: Path, name: str, backend: Backend) -> None:
    root, pipe = directory / name, directory / f"{name}.pipe"
    saver = CheckpointSaver(root, CheckpointConfig(), pipe)
    said = {"seed": 1}
    before = _locals(backend.state())
    saver.save(backend.state(), manifest(2, said))
    said["seed"] = 2
    train_steps(backend, 2, 5, accumulation=1)
    assert saver.poll() == []  # it waits for its tokenizer: nothing was written before those steps
    assert checkpoint.list_checkpoints(root) == []
    dist.barrier()
    if dist.get_rank() == 0:
        feed(pipe)
    (outcome,) = saver.wait()
    assert outcome.path == root / "step-00000002"
    assert checkpoint.verify(outcome.path).recipe == {"seed": 1}
    assert all(not torch.equal(_local(t), before[key]) for key, t in backend.state().items())
    fresh = build_backend(small_recipe(name), odd_config(), CPU)
    state = fresh.state()
    checkpoint.load(state, outcome.path, dist.group.WORLD)
    assert all(torch.equal(_local(tensor), before[key]) for key, tensor in state.items())
    fresh.close()


def test_what_is_written_while_training_goes_on_is_the_state_at_the_save(tmp_path: Path) -> None:
    for backend in ("deepspeed", "fsdp"):
        os.mkfifo(tmp_path / f"{backend}.pipe")
    run_on_ranks(2, _train_on_while_writing, tmp_path)
