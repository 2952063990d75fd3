"""`torch.compile`, a decoder layer at a time, under either backend."""

import torch
from torch import nn

from pmc_llama.config import Recipe
from pmc_llama.model import LlamaForPretraining


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether the layers of a run are compiled, see `speed.compile`."""
    if recipe.speed.compile is None:
        return device.type == "cuda" and recipe.backend == "fsdp"
    return recipe.speed.compile


def compile_layers(model: LlamaForPretraining) -> None:
    """Compile the forward of every decoder layer; to be called before the model is sharded.

    It is the method that is compiled, not the module: activation checkpointing and the hooks of the backend,
    which gather and free parameters, stay outside of the graph. All layers have one graph, since parameters
    are inputs of it, so that compiling takes no longer for more layers.
    """
    for layer in model.model.layers:
        _compile(layer)


def _compile(layer: nn.Module) -> None:
    compiled = torch.compile(layer.forward)
    layer.forward = compiled
