"""Every size has the published number of parameters, and every recipe shards evenly over its ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pmc_llama.backends import fsdp
from pmc_llama.config import ModelConfig, Recipe
from pmc_llama.model import SIZES, LlamaForPretraining, llama_config
from pmc_llama.plan.throughput import Shape
from pmc_llama.recipe_file import RecipeParser

RECIPES = Path(__file__).parents[2] / "recipes"
# Parameters of the released weights.
PUBLISHED = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "33b": 32_528_943_616,
    "65b": 65_285_660_672,
    "70b": 68_976_648_192,
}
# Ranks that a recipe says it is for.
RANKS = {"7b": 8, "13b": 16, "33b": 32, "65b": 64, "70b": 128}


def on_meta(recipe: Recipe) -> LlamaForPretraining:
    with torch.device("meta"):
        return LlamaForPretraining(llama_config(recipe.model, vocab_size=32000))


def pretraining_recipe(size: str) -> Recipe:
    path = RECIPES / f"pretrain_{size}.yaml"
    recipe, _ = RecipeParser("test", path, "").read([str(path)])
    return recipe


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """One rank of a world whose others are not there; collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_size_has_the_published_number_of_parameters(size: str) -> None:
    model = on_meta(Recipe(model=ModelConfig(size=size)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[size]
    assert Shape.of(model.config).parameters == PUBLISHED[size]  # what plans count with


def test_sizes_have_the_released_epsilons_and_positions() -> None:
    configs = {size: llama_config(ModelConfig(size=size), 32000) for size in PUBLISHED}
    assert {size: config.rms_norm_eps for size, config in configs.items()} == {
        "7b": 1e-6, "13b": 1e-6, "33b": 1e-6, "65b": 1e-5, "70b": 1e-5
    }  # fmt: skip
    assert configs["65b"].max_position_embeddings == 2048
    assert configs["70b"].max_position_embeddings == 4096
    assert configs["70b"].num_key_value_heads == 8


def test_every_size_has_a_recipe_and_every_recipe_a_size() -> None:
    recipes = {path.stem.removeprefix("pretrain_") for path in RECIPES.glob("pretrain_*.yaml")}
    assert recipes == set(SIZES) - {"demo"}


@pytest.mark.parametrize("size", RANKS)
def test_every_recipe_shards_evenly_over_its_ranks(size: str) -> None:
    recipe, ranks = pretraining_recipe(size), RANKS[size]
    assert recipe.model.size == size
    assert recipe.batch.global_size % (recipe.batch.micro_size * ranks) == 0
    with fake_rank(ranks - 1, ranks):
        model = on_meta(recipe)
        mesh = fsdp.build_mesh(recipe.sharding, torch.device("cpu"))
        fsdp.shard(model, recipe, mesh, torch.device("cpu"))
        shards = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        owned = sum(shard.to_local().numel() for shard in shards)
    assert len(shards) == len(list(model.parameters()))
    assert owned * ranks == PUBLISHED[size]  # the last rank has as much as every other: nothing is padded
