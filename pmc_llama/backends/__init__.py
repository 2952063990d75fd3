"""Sharding backends behind one protocol. A new one is a file here and a line in `build_backend`."""

from importlib import import_module

import torch
from transformers import LlamaConfig

from pmc_llama.backends.base import Backend
from pmc_llama.config import Recipe


def build_backend(recipe: Recipe, config: LlamaConfig, device: torch.device) -> Backend:
    """The backend that the recipe names, its model sharded and its weights still to be loaded.

    Only the module of that backend is imported: the other's library need not even be installed.
    """
    modules = {"deepspeed": "pmc_llama.backends.deepspeed", "fsdp": "pmc_llama.backends.fsdp"}
    backend: Backend = import_module(modules[recipe.backend]).build(recipe, config, device)
    return backend
