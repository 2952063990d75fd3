"""A model with odd shapes, and batches for it, small enough for a test on several ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from pmc_llama.backends import build_backend
from pmc_llama.backends.base import Backend
from pmc_llama.backends.flat_shard import FlatShard
from pmc_llama.checkpoint import FileTable, Manifest, read_weights
from pmc_llama.config import BackendName, BatchConfig, DataConfig, OptimizerConfig, Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.initialize import RandomWeights

VOCABULARY, SEQUENCE, MICRO = 131, 24, 2
CPU = torch.device("cpu")


def odd_config(tied: bool = False) -> LlamaConfig:
    """Vocabulary, width and feed-forward width are odd: neither 2 nor 4 ranks divide them."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=39,
        intermediate_size=101,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=8,
        pad_token_id=2,
        tie_word_embeddings=tied,
    )


def gathered_config() -> LlamaConfig:
    """As odd, but with matrices of over 100,000 elements: ZeRO-3 ranks keep smaller ones whole."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=321,
        intermediate_size=331,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=104,
    )


def bare_manifest(step: int, files: FileTable, **more: Any) -> Manifest:
    """A manifest that says no more than it must, but for what is given."""
    values: dict[str, Any] = {
        "step": step,
        "updates": step,
        "samples": 0,
        "tokens": 0,
        "data": {},
        "guard": {},
        "recipe": {},
        "model_config": {},
        "corpus": "",
        "versions": {},
        "files": files,
    }
    return Manifest(**{**values, **more})


def small_recipe(backend: BackendName, accumulation: int = 1) -> Recipe:
    """AdamW with decay, at a rate that moves the weights, clipped below the norms that occur."""
    return Recipe(
        backend=backend,
        data=DataConfig(sequence_length=SEQUENCE),
        batch=BatchConfig(global_size=MICRO * accumulation * dist.get_world_size(), micro_size=MICRO),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5),
    )


def seeded_backend(recipe: Recipe, config: LlamaConfig, seed: int = 0) -> Backend:
    """A backend with random weights drawn from `seed`."""
    backend = build_backend(recipe, config, CPU)
    weights = model_weights(backend)
    reader = RandomWeights({name: tensor.shape for name, tensor in weights.items()}, seed, std=0.02)
    read_weights(weights, reader, dist.group.WORLD)
    backend.state_loaded()
    return backend


def model_weights(backend: Backend) -> dict[str, Tensor]:
    """The masters of a backend under the model's own names."""
    return {
        name.removeprefix("model."): tensor
        for name, tensor in backend.state().items()
        if name.startswith("model.")
    }


def local_state(backend: Backend) -> dict[str, Tensor]:
    """This rank's own part of everything that a checkpoint holds; the memory itself."""
    return {name: _local(tensor) for name, tensor in backend.state().items()}


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FlatShard):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def micro_batches(step: int, accumulation: int) -> tuple[list[MicroBatch], int]:
    """This rank's part of a global batch that depends on `step` alone, and the targets of the whole.

    A third of the targets are masked, unevenly over sequences.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    draw = torch.Generator().manual_seed(step)
    sequences = MICRO * accumulation * world_size
    tokens = torch.randint(0, VOCABULARY, (sequences, SEQUENCE + 1), generator=draw)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=draw) < torch.rand((sequences, 1), generator=draw) * 0.7] = -100
    per_rank = MICRO * accumulation
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    cut = zip(tokens[mine, :-1].split(MICRO), labels[mine].split(MICRO), strict=True)
    return [MicroBatch(inputs, targets) for inputs, targets in cut], int((labels >= 0).sum())


def train_steps(backend: Backend, first: int, last: int, accumulation: int) -> list[tuple[float, float]]:
    """Global (loss, gradient norm) of the steps `first` .. `last` - 1."""
    history = []
    for step in range(first, last):
        batches, targets = micro_batches(step, accumulation)
        loss = backend.forward_backward(batches, targets)
        dist.all_reduce(loss)
        norm = backend.clip(0.5)
        backend.step(1e-2)
        history.append((float(loss) / targets, float(norm)))
    return history
