"""The keys of `sharding`: what each becomes in either library, what is refused, that no number changes."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.backends import build_backend, check_sharding
from pmc_llama.backends.deepspeed import engine_settings
from pmc_llama.config import (
    BackendName,
    LoraConfig,
    ModelConfig,
    PrecisionConfig,
    Recipe,
    ShardingConfig,
    SpeedConfig,
)
from pmc_llama.model import llama_config
from tests.pmc_llama.small import (
    CPU,
    gathered_config,
    local_state,
    micro_batches,
    odd_config,
    seeded_backend,
    small_recipe,
    train_steps,
)
from tests.ranks import run_on_ranks

BACKENDS: tuple[BackendName, BackendName] = ("deepspeed", "fsdp")
LAYER_7B = 202_383_360  # parameters of a decoder layer: 4 * 4096^2 + 3 * 4096 * 11008 + 2 * 4096


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _zero3(
    sharding: ShardingConfig, precision: PrecisionConfig | None = None, device: str = "cpu"
) -> DeepSpeedZeroConfig:
    """What DeepSpeed itself understands of a recipe's settings; it refuses keys that it does not know."""
    recipe = Recipe(sharding=sharding, precision=precision or PrecisionConfig())
    settings = engine_settings(recipe, llama_config(ModelConfig("7b"), 32000), torch.device(device))
    return DeepSpeedZeroConfig(**settings["zero_optimization"])


# --- what the keys become ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("world_of_one")
def test_deepspeed_gathers_ahead_as_many_layers_as_the_recipe_says() -> None:
    one, three = _zero3(ShardingConfig()), _zero3(ShardingConfig(prefetch_layers=3))
    assert (one.prefetch_bucket_size, three.prefetch_bucket_size) == (LAYER_7B, 3 * LAYER_7B)
    assert three.max_live_parameters - one.max_live_parameters == 2 * LAYER_7B


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    ("megabytes", "reduce", "elements"),
    [(None, "fp32", LAYER_7B), (100, "fp32", 25_000_000), (100, "bf16", 50_000_000)],
)
def test_deepspeed_reduces_one_layer_or_the_megabytes_that_the_recipe_says(
    megabytes: int | None, reduce: Any, elements: int
) -> None:
    settings = _zero3(ShardingConfig(reduce_bucket_mb=megabytes), PrecisionConfig(reduce=reduce))
    assert settings.reduce_bucket_size == elements


@pytest.mark.usefixtures("world_of_one")
def test_deepspeed_keeps_parameters_gathered_only_when_told_to() -> None:
    kept, freed = _zero3(ShardingConfig(reshard_after_forward=False)), _zero3(ShardingConfig())
    assert freed.max_reuse_distance < 32 * LAYER_7B < kept.max_reuse_distance
    assert freed.max_live_parameters < 32 * LAYER_7B < kept.max_live_parameters


def _check_gatherings_of_fsdp() -> None:
    for reshard, expected in ((True, 3 + 1 + 1 + 1), (False, 3)):
        recipe = small_recipe("fsdp", accumulation=2)
        recipe.sharding = ShardingConfig(reshard_after_forward=reshard)
        backend = seeded_backend(recipe, gathered_config())
        for step in range(2):
            with _Operators() as operators:
                backend.forward_backward(*micro_batches(step, 2), step)
            backend.clip(1.0)
            backend.step(1e-3)
            assert operators.count["c10d._allgather_base_"] == expected
        backend.close()


def test_fsdp_gathers_nothing_again_that_it_has_at_hand() -> None:
    """Of two layers and the rest, over two micro-batches, in a step.

    The first forward gathers all three, the first backward the first layer again; the second forward the
    last layer, the second backward the first layer.
    """
    run_on_ranks(2, _check_gatherings_of_fsdp)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    ("offload", "optimizer", "parameters"),
    [("none", False, False), ("optimizer", True, False), ("all", True, True)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_offloads_what_the_recipe_says_and_pins_it_only_for_a_gpu(
    offload: Any, optimizer: bool, parameters: bool, device: str
) -> None:
    settings = _zero3(ShardingConfig(offload=offload), device=device)
    for found, expected in ((settings.offload_optimizer, optimizer), (settings.offload_param, parameters)):
        assert (found is not None) == expected
        assert found is None or (found.device, found.pin_memory) == ("cpu", device == "cuda")


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "ranks", "sharding", "sentence"),
    [
        (
            "fsdp",
            8,
            ShardingConfig(shard_group=3),
            r"sharding\.shard_group is 3, .* the 8 ranks into several",
        ),
        (
            "deepspeed",
            8,
            ShardingConfig(shard_group=8),
            r"sharding\.shard_group is 8, .* null shards over all",
        ),
        ("deepspeed", 1, ShardingConfig(shard_group=2), r"sharding\.shard_group is 2, .* the 1 ranks"),
        ("fsdp", 8, ShardingConfig(shard_group=1), r"sharding\.shard_group is 1, expected 2 or more"),
        ("fsdp", 8, ShardingConfig(offload="optimizer"), r"sharding\.offload is optimizer, .* set it to all"),
        ("fsdp", 8, ShardingConfig(prefetch_layers=0), r"sharding\.prefetch_layers is 0, .* set it to 1"),
        ("fsdp", 8, ShardingConfig(reduce_bucket_mb=5), r"sharding\.reduce_bucket_mb is 5, .* remove it"),
        ("fsdp", 8, ShardingConfig(checkpointed_layers=2), r"checkpointed_layers is 2, .* full or selective"),
    ],
)
def test_what_a_backend_or_these_ranks_cannot_do_is_refused_by_key_with_what_to_do(
    backend: BackendName, ranks: int, sharding: ShardingConfig, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        check_sharding(Recipe(backend=backend, sharding=sharding), ranks)


def test_adapters_under_zero_3_are_not_compiled() -> None:
    recipe = Recipe(backend="deepspeed", lora=LoraConfig(), speed=SpeedConfig(compile=True))
    with pytest.raises(UserError, match=r"speed\.compile is true, .* take backend fsdp"):
        check_sharding(recipe, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharding", [ShardingConfig(), ShardingConfig("selective", 2, 4, "all", 3)])
def test_what_both_backends_can_do_is_accepted_by_both(
    backend: BackendName, sharding: ShardingConfig
) -> None:
    check_sharding(Recipe(backend=backend, sharding=sharding), 8)


@pytest.mark.usefixtures("world_of_one")
def test_more_checkpointed_layers_than_the_model_has_are_refused() -> None:
    recipe = Recipe(backend="fsdp", sharding=ShardingConfig("full", checkpointed_layers=3))
    with pytest.raises(UserError, match=re.escape("sharding.checkpointed_layers is 3, expected at most")):
        build_backend(recipe, odd_config(), CPU)


def test_every_key_is_explained_in_the_help() -> None:
    documented = (ShardingConfig.__doc__ or "").split("Args:")[1]
    assert re.findall(r"^        (\w+): ", documented, re.MULTILINE) == list(asdict(ShardingConfig()))


# --- activation checkpointing ------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Counts the operators that are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func.overloadpacket).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def _operators(config: LlamaConfig, *checkpointing: Any) -> dict[str, int]:
    """Activations computed, layer matrix products and attentions, forward and backward, in one step."""
    recipe = small_recipe("fsdp")
    recipe.sharding = ShardingConfig(*checkpointing)
    backend = seeded_backend(recipe, config)
    with _Operators() as operators:
        backend.forward_backward(*micro_batches(0, 1))
    backend.close()
    return {
        "silu": operators.count["silu"],
        "products": operators.count["mm"] + operators.count["bmm"],
        "attention": operators.count["_scaled_dot_product_flash_attention_for_cpu"],
    }


@pytest.mark.usefixtures("world_of_one")
def test_selective_computes_again_all_but_products_and_attention_and_full_everything() -> None:
    config = odd_config()
    layers = config.num_hidden_layers
    none = _operators(config, "none")
    assert (none["silu"], none["attention"]) == (layers, layers)
    assert _operators(config, "selective") == {**none, "silu": 2 * layers}
    full = _operators(config, "full")
    assert (full["silu"], full["attention"]) == (2 * layers, 2 * layers)
    # Backward does not need the result of the last of a layer's seven products, which torch may then spare.
    assert full["products"] - none["products"] in (6 * layers, 7 * layers)


@pytest.mark.usefixtures("world_of_one")
def test_only_as_many_layers_as_the_recipe_says_are_computed_again() -> None:
    config = odd_config()
    assert _operators(config, "selective", 1)["silu"] == config.num_hidden_layers + 1
    assert _operators(config, "full", 1)["attention"] == config.num_hidden_layers + 1


# --- no number changes -------------------------------------------------------------------------------------

VARIANTS = {
    "plain": ShardingConfig(),
    "full": ShardingConfig("full"),
    "full for one layer": ShardingConfig("full", 1),
    "selective": ShardingConfig("selective"),
    "selective for one layer": ShardingConfig("selective", 1),
    "far ahead": ShardingConfig(prefetch_layers=3),
    "gathered throughout": ShardingConfig(reshard_after_forward=False),
}


def _train_in_each_variant(directory: Path) -> None:
    """Rank 0 writes the history of each; every rank compares its own state with the plain one's."""
    for backend_name in BACKENDS:
        variants = dict(VARIANTS)
        if backend_name == "deepspeed":
            variants["small buckets"] = ShardingConfig(reduce_bucket_mb=1)
        histories = {}
        plain: dict[str, torch.Tensor] = {}
        for name, sharding in variants.items():
            recipe = small_recipe(backend_name, accumulation=2)
            recipe.sharding = sharding
            backend = seeded_backend(recipe, gathered_config())
            histories[name] = train_steps(backend, 0, 2, 2)
            loss = backend.evaluate(micro_batches(9, 2)[0][0]).item()
            histories[name] += [(loss, 0.0), *train_steps(backend, 2, 3, 2)]
            state = {key: tensor.clone() for key, tensor in local_state(backend).items()}
            plain = plain or state
            for key, tensor in state.items():
                assert torch.equal(tensor, plain[key]), (key, name, backend_name)
            backend.close()
        if dist.get_rank() == 0:
            (directory / f"{backend_name}.json").write_text(json.dumps(histories))


@pytest.mark.slow
def test_checkpointing_prefetch_and_buckets_change_no_bit_under_either_backend(tmp_path: Path) -> None:
    run_on_ranks(2, _train_in_each_variant, tmp_path)
    zero3, fsdp2 = (json.loads((tmp_path / f"{name}.json").read_text()) for name in BACKENDS)
    for found in (zero3, fsdp2):
        assert found["plain"][0] != found["plain"][-1], "the weights must move"
        assert all(history == found["plain"] for history in found.values())
    losses = [[loss for loss, _ in found["selective"]] for found in (zero3, fsdp2)]
    assert losses[0] == losses[1]
