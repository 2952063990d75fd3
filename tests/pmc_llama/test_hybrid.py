"""Hybrid sharding on four ranks as two groups of two: the promises of sharding over all ranks hold.

One set of runs, most of them with state in host memory as well; each test reads one promise from it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pmc_llama import checkpoint
from pmc_llama.backends.base import Backend
from pmc_llama.config import BackendName, ShardingConfig
from pmc_llama.snapshot import Snapshot
from tests.pmc_llama.small import (
    bare_manifest,
    gathered_config,
    local_state,
    micro_batches,
    seeded_backend,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow

BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")
OTHER: dict[BackendName, BackendName] = {"deepspeed": "fsdp", "fsdp": "deepspeed"}
HYBRID = ShardingConfig(shard_group=2)
SAVED, LAST = 3, 5  # the steps before the checkpoint, and all
ELSEWHERE = 1000  # a step whose batch is not trained on


def _backend(name: BackendName, sharding: ShardingConfig, accumulation: int, seed: int = 0) -> Backend:
    recipe = small_recipe(name, accumulation)
    recipe.sharding = sharding
    return seeded_backend(recipe, gathered_config(), seed)


def _save_while_training(backend: Backend, root: Path, accumulation: int) -> list[tuple[float, float]]:
    """Copy the state, train on, and only then write the copy; the history of the training."""
    copy = Snapshot().take(backend.state())
    history = train_steps(backend, SAVED, LAST, accumulation)
    checkpoint.save(copy, root, lambda files: bare_manifest(SAVED, files), Path(__file__), dist.group.WORLD)
    return history


def _go_on(name: BackendName, sharding: ShardingConfig, accumulation: int, source: Path, root: Path) -> None:
    """Load, write what was loaded while training on, and note the history."""
    backend = _backend(name, sharding, accumulation, seed=1)
    train_steps(backend, 0, 1, accumulation)  # so that loading has something to undo
    checkpoint.load(backend.state(), _published(source), dist.group.WORLD)
    backend.state_loaded()
    _write(root, history=_save_while_training(backend, root, accumulation))
    backend.close()


def _write(root: Path, **facts: Any) -> None:
    if dist.get_rank() == 0:
        root.mkdir(exist_ok=True)
        (root / "facts.json").write_text(json.dumps(facts))


def _published(root: Path) -> Path:
    return root / f"step-{SAVED:08d}"


# --- the runs ----------------------------------------------------------------------------------------------


def _sharded_over_all_and_hybrid(directory: Path) -> None:
    """Four ranks: each backend without groups, then with, there with a step that is taken back."""
    for name in BACKENDS:
        plain = _backend(name, ShardingConfig(), 1)
        _write(directory / f"{name}-plain", history=train_steps(plain, 0, LAST, 1))
        plain.close()
        backend = _backend(name, HYBRID, 1)
        history = train_steps(backend, 0, 1, 1)
        backend.forward_backward(*micro_batches(ELSEWHERE, 1))
        backend.clip(0.5)
        backend.discard()
        begun = _collectives()
        history += train_steps(backend, 1, SAVED, 1)
        within = [count - begun[group] for group, count in _collectives().items() if group.size() == 2]
        root = directory / f"{name}-1"
        history += _save_while_training(backend, root, 1)
        members: list[dict[str, list[int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(members, _groups())
        _write(root, history=history, within=within, groups=members, same=_the_groups_agree(backend, name))
        backend.close()


def _collectives() -> dict[dist.ProcessGroup, int]:
    groups = list(dist.distributed_c10d._world.pg_map)
    return {group: group._get_sequence_number_for_group() for group in groups}  # type: ignore[attr-defined]


def _groups() -> dict[str, list[int]]:
    """The process groups of this rank by the names that the watchdog compares over all ranks."""
    groups = dist.distributed_c10d._world.pg_map
    return {group.group_name: dist.get_process_group_ranks(group) for group in groups}


def _the_groups_agree(backend: Backend, name: BackendName) -> bool:
    """Whether ranks that hold the same shards (fsdp: those of the other group) hold the same bits."""
    if name == "deepspeed":  # no masters or moments are held twice
        return True
    bits = xxhash.xxh3_64()
    for tensor in local_state(backend).values():
        bits.update(tensor.contiguous().view(-1).numpy())
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, bits.hexdigest())
    return everyone[:2] == everyone[2:]


def _on_two_ranks_under_the_other(directory: Path) -> None:
    for name in BACKENDS:
        # What lives in host memory differs as well: all of it, or the optimizer alone.
        sharding = ShardingConfig(offload="all" if name == "deepspeed" else "optimizer")
        _go_on(OTHER[name], sharding, 2, directory / f"{name}-1", directory / f"{name}-2")


def _back_in_hybrid_with_offload(directory: Path) -> None:
    for name in BACKENDS:
        sharding = ShardingConfig("full", shard_group=2, offload="all")
        _go_on(name, sharding, 1, directory / f"{name}-2", directory / f"{name}-3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hybrid")
    run_on_ranks(4, _sharded_over_all_and_hybrid, directory)
    run_on_ranks(2, _on_two_ranks_under_the_other, directory)
    run_on_ranks(4, _back_in_hybrid_with_offload, directory)
    return directory


def _facts(root: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((root / "facts.json").read_text())
    return facts


def _losses(root: Path) -> list[float]:
    return [loss for loss, _ in _facts(root)["history"]]


# --- the promises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_hybrid_has_the_losses_of_sharding_over_all_ranks_and_a_discarded_step_changes_none(
    runs: Path, backend: BackendName
) -> None:
    plain, hybrid = _facts(runs / f"{backend}-plain")["history"], _facts(runs / f"{backend}-1")["history"]
    assert plain[0] != plain[-1], "the weights must move"
    assert [loss for loss, _ in hybrid] == [loss for loss, _ in plain]
    # The norm counts each element once, however many ranks hold it.
    assert [norm for _, norm in hybrid] == pytest.approx([norm for _, norm in plain], rel=1e-12)


def test_both_backends_have_bitwise_equal_losses_in_hybrid(runs: Path) -> None:
    assert _losses(runs / "deepspeed-1") == _losses(runs / "fsdp-1")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_are_gathered_within_a_group(runs: Path, backend: BackendName) -> None:
    assert max(_facts(runs / f"{backend}-1")["within"]) > 0


def test_groups_that_hold_the_same_shards_keep_the_same_bits(runs: Path) -> None:
    assert _facts(runs / "fsdp-1")["same"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_goes_on_under_the_other_backend_on_half_the_ranks_and_back_with_all_bits(
    runs: Path, tmp_path: Path, backend: BackendName
) -> None:
    found = []
    for number in (1, 2, 3):
        path = tmp_path / f"{number}.pt"
        dcp_to_torch_save(_published(runs / f"{backend}-{number}"), path)
        found.append(torch.load(path, weights_only=True))
    first, *others = found
    assert all(tensor.abs().sum() > 0 for tensor in first.values()), "moments and masters must not be trivial"
    for other in others:
        assert set(other) == set(first)
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(runs: Path, backend: BackendName) -> None:
    uninterrupted = _losses(runs / f"{backend}-1")[SAVED:]
    assert _losses(runs / f"{backend}-3") == uninterrupted
    # On two ranks gradients are summed in another order.
    assert _losses(runs / f"{backend}-2") == pytest.approx(uninterrupted, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_shard_is_written_once_however_many_ranks_hold_it(
    runs: Path, tmp_path: Path, backend: BackendName
) -> None:
    source = _published(runs / f"{backend}-1")
    dcp_to_torch_save(source, tmp_path / "plain.pt")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    payload = sum(tensor.nbytes for tensor in state.values())
    written = sum(file.stat().st_size for file in source.glob("*.distcp"))
    assert payload <= written < 1.1 * payload


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_watchdog_can_tell_the_groups_apart_by_name(runs: Path, backend: BackendName) -> None:
    groups = _facts(runs / f"{backend}-1")["groups"]
    for rank, own in enumerate(groups):
        assert any(len(members) == 2 for members in own.values())
        for name, members in own.items():
            assert rank in members
            assert [other for other in range(4) if name in groups[other]] == sorted(members)
