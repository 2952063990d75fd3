"""Compiled layers compute what others do, under both backends alike, and keep no gathered weights."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pmc_llama.backends.base import Backend
from pmc_llama.batches import MicroBatch
from pmc_llama.config import BackendName, LoraConfig, PrecisionConfig, Recipe, ShardingConfig, SpeedConfig
from tests.pmc_llama.small import (
    SEQUENCE,
    gathered_config,
    micro_batches,
    odd_config,
    seeded_backend,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow  # a compiler runs
BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")
STEPS = 4


def _recipe(backend: BackendName, compiled: bool, **sections: Any) -> Recipe:
    recipe = small_recipe(backend, accumulation=2)
    recipe.speed = SpeedConfig(compile=compiled)
    for name, section in sections.items():
        setattr(recipe, name, section)
    return recipe


def _history(recipe: Recipe, layers: int = 2) -> list[tuple[float, float]]:
    config = odd_config()
    config.num_hidden_layers = layers
    backend = seeded_backend(recipe, config)
    history = train_steps(backend, 0, STEPS, 2)
    backend.close()
    return history


# --- the same numbers --------------------------------------------------------------------------------------


def _compiled_and_not(directory: Path) -> None:
    """12 layers are more than torch compiles one function for."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found = {}
    for precision, backend, compiled in product(("fp32", "bf16"), BACKENDS, (True, False)):
        recipe = _recipe(backend, compiled, precision=PrecisionConfig(compute=precision))  # type: ignore[arg-type]
        found[f"{precision} {backend} {compiled}"] = _history(recipe, layers=12)
    if dist.get_rank() == 0:
        (directory / "found.json").write_text(json.dumps(found))


def test_compiled_layers_have_the_losses_of_others_and_both_backends_equal_ones(tmp_path: Path) -> None:
    run_on_ranks(2, _compiled_and_not, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    # What lies between two matrix products is fused, and rounded to bf16 once where it was several times. At
    # this learning rate weights that differ by that go their own ways from the second step on.
    for precision, steps, tolerance in (("fp32", STEPS, 1e-4), ("bf16", 1, 1e-2)):
        for backend in BACKENDS:
            compiled, plain = (found[f"{precision} {backend} {which}"][:steps] for which in (True, False))
            torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=tolerance, atol=0)
            assert compiled != plain, "the layers were not compiled"
    losses = {name: [loss for loss, _ in history] for name, history in found.items()}
    assert losses["bf16 fsdp True"] == losses["bf16 deepspeed True"]


def _checkpointed_and_not(directory: Path) -> None:
    found = {}
    for backend, mode in product(BACKENDS, ("none", "selective", "full")):
        found[f"{backend} {mode}"] = _history(_recipe(backend, True, sharding=ShardingConfig(mode)))  # type: ignore[arg-type]
    if dist.get_rank() == 0:
        (directory / "found.json").write_text(json.dumps(found))


def test_activation_checkpointing_changes_no_bit_of_compiled_layers(tmp_path: Path) -> None:
    run_on_ranks(2, _checkpointed_and_not, tmp_path)
    histories = json.loads((tmp_path / "found.json").read_text())
    assert len(histories) == 6
    losses = [[loss for loss, _ in history] for history in histories.values()]
    assert all(each == losses[0] for each in losses)


# --- all shapes --------------------------------------------------------------------------------------------


def _loss(backend: Backend, width: int, positions: bool) -> float:
    """Of sequences of some width, as two documents each or as one."""
    draw = torch.Generator().manual_seed(width)
    tokens = torch.randint(0, 131, (2, width + 1), generator=draw)
    places = (torch.arange(width) % (width // 2)).expand(2, -1) if positions else None
    loss: Tensor = backend.forward_backward([MicroBatch(tokens[:, :-1], tokens[:, 1:], places)], 2 * width)
    backend.discard()
    return loss.item()


def _any_shape() -> None:
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    cases: list[tuple[BackendName, LoraConfig | None]] = [
        ("deepspeed", None),
        ("fsdp", LoraConfig(dropout=0.0)),
    ]
    for backend_name, lora in cases:
        losses = []
        for compiled in (False, True):
            recipe = _recipe(backend_name, compiled, precision=PrecisionConfig(compute="fp32"), lora=lora)
            backend = seeded_backend(recipe, odd_config())
            for number, frozen in enumerate(backend.frozen().values()):
                local = frozen.to_local() if isinstance(frozen, DTensor) else frozen
                local.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
            backend.state_loaded()
            widths = [SEQUENCE, 16, 40, 8, 56, 32, 64, 48, 24, 72]
            losses.append([_loss(backend, width, places) for width, places in product(widths, (True, False))])
            backend.close()
        torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)


def test_rows_of_any_width_with_and_without_positions_or_adapters_are_compiled_for() -> None:
    run_on_ranks(1, _any_shape)


# --- memory ------------------------------------------------------------------------------------------------


def _kept_for_backward() -> None:
    backend: Any = seeded_backend(_recipe("deepspeed", True), gathered_config())
    layer = backend.engine.module.model.layers[0]
    shapes = {tuple(parameter.ds_shape) for parameter in layer.parameters() if len(parameter.ds_shape) == 2}
    shapes |= {shape[::-1] for shape in shapes}
    [batch, _], _ = micro_batches(0, 2)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    backend.engine.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backend.engine(batch.inputs, batch.labels)
    assert kept
    # A parameter gives its memory back when it is sharded again; another tensor over it would hold that.
    assert [one.shape for one in kept if tuple(one.shape) in shapes and not hasattr(one, "ds_id")] == []
    assert all(parameter.numel() == 0 for parameter in layer.parameters() if parameter.ds_numel > 100_000)
    backend.close()


def test_no_gathered_weight_is_kept_for_backward_under_zero_3() -> None:
    run_on_ranks(2, _kept_for_backward)
