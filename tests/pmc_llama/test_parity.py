"""The promise of one flag: the backend changes no number."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from pmc_llama import checkpoint
from tests.pmc_llama.small import odd_config, seeded_backend, small_recipe, train_steps
from tests.ranks import run_on_ranks

STEPS = 8


def _train_under_both(directory: Path, accumulation: int, checkpointing: str) -> None:
    """Rank 0 writes what each backend saw, both going on from the seed checkpoint that ZeRO-3 wrote."""
    world = dist.group.WORLD
    for backend_name in ("deepspeed", "fsdp"):
        recipe = small_recipe(backend_name, accumulation)
        recipe.sharding.activation_checkpointing = checkpointing
        backend = seeded_backend(recipe, odd_config(), seed=0 if backend_name == "deepspeed" else 1)
        if backend_name == "deepspeed":
            seed = checkpoint.save(
                backend.state(),
                directory,
                lambda files: checkpoint.Manifest(0, 0, 0, {}, {}, "", {}, files),
                Path(__file__),
                world,
            )
        checkpoint.load(backend.state(), seed, world)
        backend.state_loaded()
        history = train_steps(backend, 0, STEPS, accumulation)
        backend.close()
        if dist.get_rank() == 0:
            (directory / f"{backend_name}.json").write_text(json.dumps(history))


@pytest.mark.parametrize(("accumulation", "checkpointing"), [(1, "none"), (2, "none"), (2, "full")])
def test_both_backends_have_bitwise_equal_losses_from_one_seed_checkpoint(
    tmp_path: Path, accumulation: int, checkpointing: str
) -> None:
    run_on_ranks(2, _train_under_both, tmp_path, accumulation, checkpointing)
    zero3, fsdp2 = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("deepspeed", "fsdp"))
    assert [loss for loss, _ in zero3] == [loss for loss, _ in fsdp2]
    assert all(norm > 0.5 for _, norm in zero3), "clipping must be at work in this test"
    assert [norm for _, norm in zero3] == pytest.approx([norm for _, norm in fsdp2], rel=1e-12)
    assert zero3[-1][0] != zero3[0][0], "the weights must move"
