"""The promise of one flag: the backend changes no number."""

import json
from pathlib import Path
from typing import Literal

import pytest
import torch.distributed as dist

from pmc_llama import checkpoint
from pmc_llama.config import BackendName, PrecisionConfig, ShardingConfig
from tests.pmc_llama.small import bare_manifest, odd_config, seeded_backend, small_recipe, train_steps
from tests.ranks import run_on_ranks

STEPS = 8
BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")


def _train_under_both(
    directory: Path, accumulation: int, tied: bool, sharding: ShardingConfig, precision: PrecisionConfig
) -> None:
    """Rank 0 writes what each backend saw, both going on from one seed checkpoint that neither made first."""
    world = dist.group.WORLD
    for number, backend_name in enumerate(BACKENDS):
        recipe = small_recipe(backend_name, accumulation)
        recipe.sharding, recipe.precision = sharding, precision
        backend = seeded_backend(recipe, odd_config(tied), seed=number)
        if number == 0:
            seed = checkpoint.save(
                backend.state(),
                directory,
                lambda files: bare_manifest(0, files),
                Path(__file__),
                world,
            )
            train_steps(backend, 0, 1, accumulation)  # so that loading has something to undo here too
        checkpoint.load(backend.state(), seed, world)
        backend.state_loaded()
        history = train_steps(backend, 0, STEPS, accumulation)
        backend.close()
        if dist.get_rank() == 0:
            (directory / f"{backend_name}.json").write_text(json.dumps(history))


def _histories(directory: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    zero3, fsdp2 = (json.loads((directory / f"{name}.json").read_text()) for name in BACKENDS)
    assert zero3[-1][0] != zero3[0][0], "the weights must move"
    assert all(norm > 0.5 for _, norm in zero3), "clipping must be at work"
    return zero3, fsdp2


@pytest.mark.parametrize(
    ("ranks", "accumulation", "tied", "checkpointing"),
    [
        (2, 1, False, "none"),
        pytest.param(2, 2, False, "none", marks=pytest.mark.slow),
        (2, 2, True, "full"),
        pytest.param(4, 1, False, "none", marks=pytest.mark.slow),
    ],
)
def test_both_backends_have_bitwise_equal_losses_from_one_seed_checkpoint(
    tmp_path: Path, ranks: int, accumulation: int, tied: bool, checkpointing: Literal["none", "full"]
) -> None:
    sharding = ShardingConfig(checkpointing)
    run_on_ranks(ranks, _train_under_both, tmp_path, accumulation, tied, sharding, PrecisionConfig())
    zero3, fsdp2 = _histories(tmp_path)
    assert [loss for loss, _ in zero3] == [loss for loss, _ in fsdp2]
    assert [norm for _, norm in zero3] == pytest.approx([norm for _, norm in fsdp2], rel=1e-12)


@pytest.mark.parametrize(
    ("ranks", "precision", "tolerance"),
    [
        pytest.param(2, PrecisionConfig("fp32", "fp32"), 1e-5, marks=pytest.mark.slow),
        pytest.param(3, PrecisionConfig("bf16", "bf16"), 1e-3, marks=pytest.mark.slow),
    ],
)
def test_other_precisions_and_rank_counts_agree_to_rounding(
    tmp_path: Path, ranks: int, precision: PrecisionConfig, tolerance: float
) -> None:
    run_on_ranks(ranks, _train_under_both, tmp_path, 2, False, ShardingConfig(), precision)
    zero3, fsdp2 = _histories(tmp_path)
    assert [loss for loss, _ in zero3] == pytest.approx([loss for loss, _ in fsdp2], rel=tolerance)
