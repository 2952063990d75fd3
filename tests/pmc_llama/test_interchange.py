"""The promise of one checkpoint: either backend goes on from what the other wrote, at any world size."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from pmc_llama import checkpoint
from pmc_llama.backends import build_backend
from pmc_llama.backends.base import Backend
from pmc_llama.backends.flat_shard import FlatShard
from tests.pmc_llama.small import CPU, bare_manifest, odd_config, seeded_backend, small_recipe, train_steps
from tests.ranks import run_on_ranks

BACKENDS = ("deepspeed", "fsdp")
WORLD_SIZES = (1, 2, 4)


def _name(backend: str, world_size: int, tied: bool) -> str:
    return f"{backend}-{world_size}-{'tied' if tied else 'untied'}"


def _write(directory: Path) -> None:
    """Train a little under each backend; save, and let each library tell the whole tensors its own way."""
    for tied in (False, True):
        for backend_name in BACKENDS:
            backend = seeded_backend(small_recipe(backend_name), odd_config(tied))
            train_steps(backend, 0, 2, accumulation=1)
            root = directory / _name(backend_name, dist.get_world_size(), tied)
            checkpoint.save(
                backend.state(),
                root,
                lambda files: bare_manifest(2, files),
                Path(__file__),
                dist.group.WORLD,
            )
            whole = _told_by_the_library(backend)
            if dist.get_rank() == 0:
                torch.save(whole, root / "whole.pt")
            backend.close()


def _told_by_the_library(backend: Backend) -> dict[str, Tensor]:
    if hasattr(backend, "engine"):
        whole = {}
        for name, parameter in backend.engine.module.named_parameters():
            whole[f"model.{name}"] = safe_get_full_fp32_param(parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                whole[f"optim.{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment)
        return {name: tensor.clone() for name, tensor in whole.items()}
    return {name: t.full_tensor() for name, t in backend.state().items() if isinstance(t, DTensor)}


def _read(directory: Path) -> None:
    """Load every checkpoint under each backend at this world size and compare this rank's shards."""
    for tied in (False, True):
        for backend_name in BACKENDS:
            backend = build_backend(small_recipe(backend_name), odd_config(tied), CPU)
            for writer in BACKENDS:
                for world_size in WORLD_SIZES:
                    root = directory / _name(writer, world_size, tied)
                    whole = torch.load(root / "whole.pt", weights_only=True)
                    _load_and_compare(backend, root / "step-00000002", whole)
            backend.close()


def _load_and_compare(backend: Backend, source: Path, whole: dict[str, Tensor]) -> None:
    state = backend.state()
    for tensor in state.values():
        _local(tensor).fill_(-1)
    checkpoint.load(state, source, dist.group.WORLD)
    backend.state_loaded()
    assert set(state) == set(whole) | {"optim.step"}
    assert state["optim.step"] == 2
    for name, expected in whole.items():
        found = state[name]
        assert found.shape == expected.shape
        if isinstance(found, FlatShard):
            stop = found.start + found.local.numel()
            assert torch.equal(found.local, expected.flatten()[found.start : stop]), name
        else:
            assert torch.equal(found.full_tensor(), expected), name


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FlatShard):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("interchange")
    for world_size in WORLD_SIZES:
        run_on_ranks(world_size, _write, directory)
    return directory


@pytest.mark.parametrize(
    "world_size",
    [2, *(pytest.param(number, marks=pytest.mark.slow) for number in WORLD_SIZES if number != 2)],
)
def test_checkpoints_of_either_backend_load_in_both_with_all_bits(written: Path, world_size: int) -> None:
    run_on_ranks(world_size, _read, written)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stock_tools_read_the_checkpoints(written: Path, tmp_path: Path, backend: str, tied: bool) -> None:
    root = written / _name(backend, 4, tied)
    dcp_to_torch_save(root / "step-00000002", tmp_path / "plain.pt")
    found = torch.load(tmp_path / "plain.pt", weights_only=True)
    expected = torch.load(root / "whole.pt", weights_only=True)
    assert found.pop("optim.step") == 2
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ("model.lm_head.weight" in found) is not tied


def test_moments_and_masters_are_not_trivial(written: Path) -> None:
    whole = torch.load(written / _name("deepspeed", 2, False) / "whole.pt", weights_only=True)
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in whole.values())
