"""State in host memory: nothing that training or a checkpoint sees changes by a bit."""

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pmc_llama.backends.base import Backend
from pmc_llama.config import BackendName, ShardingConfig
from pmc_llama.rectangles import Rectangles
from pmc_llama.snapshot import Snapshot
from tests.pmc_llama.small import (
    gathered_config,
    local_state,
    micro_batches,
    seeded_backend,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow

MODES: dict[BackendName, tuple[str, ...]] = {
    "deepspeed": ("none", "optimizer", "all"),
    "fsdp": ("none", "all"),
}
ELSEWHERE = 1000  # a step whose batch is not trained on
ACCUMULATION = 2


def _train_in_each_mode(directory: Path, name: BackendName) -> None:
    """Rank 0 writes each history; every rank compares its state with that of the run without offload."""
    histories, step_bytes = {}, {}
    expected: dict[str, Tensor] = {}
    for mode in MODES[name]:
        recipe = small_recipe(name, ACCUMULATION)
        recipe.sharding = ShardingConfig(offload=cast(Any, mode))
        backend = seeded_backend(recipe, gathered_config())
        histories[mode] = _disturbed_steps(backend)
        step_bytes[mode] = backend.step_bytes()
        state = {key: tensor.clone() for key, tensor in local_state(backend).items()}
        expected = expected or state
        for key, tensor in state.items():
            assert torch.equal(tensor, expected[key]), (key, name, mode)
        _check_that_a_copy_stays_as_it_was(backend, state)
        if name == "deepspeed":
            found = (backend.zero.offload_optimizer, backend.zero.offload_param)  # type: ignore[attr-defined]
            assert found == (mode != "none", mode == "all"), "DeepSpeed's own offloading must be at work"
        backend.close()
    if dist.get_rank() == 0:
        (directory / f"{name}.json").write_text(json.dumps([histories, step_bytes]))


def _disturbed_steps(backend: Backend) -> list[tuple[float, float]]:
    """Three steps; between them one is taken back, then one with gradients that are not finite."""
    history = train_steps(backend, 0, 1, ACCUMULATION)
    batches, targets = micro_batches(ELSEWHERE, ACCUMULATION)
    backend.forward_backward(batches, targets)
    backend.clip(0.5)
    backend.discard()
    history += train_steps(backend, 1, 2, ACCUMULATION)
    backend.forward_backward(batches, cast(int, 1e-42))  # scaled beyond fp32
    assert not math.isfinite(backend.clip(0.5))
    backend.discard()
    history += train_steps(backend, 2, 3, ACCUMULATION)
    return history


def _check_that_a_copy_stays_as_it_was(backend: Backend, state: dict[str, Tensor]) -> None:
    copies = Snapshot().take(backend.state())
    train_steps(backend, 3, 4, ACCUMULATION)
    for name, copy in copies.items():
        pieces = [piece for _, piece in copy.pieces] if isinstance(copy, Rectangles) else [copy]
        flat = torch.cat([piece.flatten() for piece in pieces]) if pieces else torch.empty(0)
        assert torch.equal(flat, state[name].flatten()), name
        moved = not torch.equal(local_state(backend)[name], state[name])
        assert moved or not state[name].numel(), (name, "the step must change what was copied")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offload")
    for name in MODES:
        run_on_ranks(2, _train_in_each_mode, directory, name)
    return directory


@pytest.mark.parametrize("name", MODES)
def test_offloading_changes_no_bit_of_losses_norms_state_or_copies_and_discarding_leaves_none(
    runs: Path, name: str
) -> None:
    histories, _ = json.loads((runs / f"{name}.json").read_text())
    assert histories["none"][0] != histories["none"][-1], "the weights must move"
    assert all(history == histories["none"] for history in histories.values())


def test_both_backends_have_bitwise_equal_losses_with_all_state_in_host_memory(runs: Path) -> None:
    losses = []
    for name in MODES:
        histories, _ = json.loads((runs / f"{name}.json").read_text())
        losses.append([loss for loss, _ in histories["all"]])
    assert losses[0] == losses[1]


def test_an_offloaded_update_takes_no_memory_of_the_device(runs: Path) -> None:
    _, step_bytes = json.loads((runs / "deepspeed.json").read_text())
    assert step_bytes["none"] > 0
    assert step_bytes["optimizer"] == step_bytes["all"] == 0
