"""Sharding backends behind one protocol. A new one is a file here and a line in `_MODULES`."""

from importlib import import_module

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.backends.base import Backend
from pmc_llama.config import Recipe

_MODULES = {"deepspeed": "pmc_llama.backends.deepspeed", "fsdp": "pmc_llama.backends.fsdp"}


def build_backend(recipe: Recipe, config: LlamaConfig, device: torch.device) -> Backend:
    """The backend that the recipe names, its model sharded and its weights still to be loaded.

    Only the module of that backend is imported: the other's library need not even be installed.

    Raises:
        UserError: see `check_sharding`.
    """
    check_sharding(recipe, dist.get_world_size())
    _check_layers(recipe, config.num_hidden_layers)
    backend: Backend = import_module(_MODULES[recipe.backend]).build(recipe, config, device)
    return backend


def check_sharding(recipe: Recipe, ranks: int) -> None:
    """Check what recipe and ranks say of sharding and compiling; takes no time and no memory.

    Args:
        recipe: the run's.
        ranks: of the whole run.

    Raises:
        UserError: names the key that these ranks, or the backend, cannot have.
    """
    sharding = recipe.sharding
    group = sharding.shard_group
    if group is not None and (group < 2 or group >= ranks or ranks % group):
        raise UserError(
            f"sharding.shard_group is {group}, expected 2 or more that divide the {ranks} ranks into several "
            "groups, the GPUs of a node as a rule; null shards over all ranks."
        )
    if sharding.checkpointed_layers is not None and sharding.activation_checkpointing == "none":
        raise UserError(
            f"sharding.checkpointed_layers is {sharding.checkpointed_layers}, expected null while "
            "sharding.activation_checkpointing is none; set that to full or selective."
        )
    if recipe.speed.compile and recipe.lora and recipe.backend == "deepspeed":
        raise UserError(
            "speed.compile is true, expected null or false for lora with backend deepspeed, which frees "
            "adapters before a compiled layer has their gradients; take backend fsdp to have it."
        )
    import_module(_MODULES[recipe.backend]).check_sharding(sharding)


def _check_layers(recipe: Recipe, layers: int) -> None:
    checkpointed = recipe.sharding.checkpointed_layers
    if checkpointed is not None and checkpointed > layers:
        raise UserError(
            f"sharding.checkpointed_layers is {checkpointed}, expected at most the model's {layers} decoder "
            "layers; null is all of them."
        )
