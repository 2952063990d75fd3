"""Parameters, gradients and optimizer state of one rank, in closed form from the shapes of the parameters."""

import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pmc_llama.config import Recipe
from pmc_llama.model import LlamaForPretraining

_BYTES = {"fp32": 4, "bf16": 2}
# DeepSpeed's default `sub_group_size`: elements of a rank that are updated at once.
_SUB_GROUP = 10**9


@dataclass(frozen=True)
class States:
    """What a rank holds between the last backward of a step and its update, in bytes, wherever it is.

    Attributes:
        masters: fp32 parameters.
        copies: under ZeRO-3, the shards in the compute dtype that are gathered; with hpZ those of the group
            too.
        gradients: accumulated in fp32; twice under ZeRO-3 with an offloaded optimizer, which sums them in one
            buffer and updates from another.
        moments: both of AdamW, fp32.
        update: that the update takes for a moment (`Backend.step_bytes`).
        snapshot: of the copy in pinned host memory from which a checkpoint is written behind training; torch
            rounds each tensor of it up to a power of two.
    """

    masters: int
    copies: int
    gradients: int
    moments: int
    update: int
    snapshot: int

    @property
    def total(self) -> int:
        """Bytes of the states themselves."""
        return self.masters + self.copies + self.gradients + self.moments


def plan_states(recipe: Recipe, config: LlamaConfig, world_size: int) -> States:
    """The states of rank 0, which no other rank exceeds.

    FSDP2 cuts each parameter by rows, the rows rounded up to a multiple of the ranks
    (`_get_dim0_padded_size`); ZeRO-3 cuts the flattened parameter (`partition_parameters.py`,
    `_partition_param`), rounded up likewise.

    Args:
        recipe: backend, precision and sharding are read.
        config: of the whole model.
        world_size: ranks.
    """
    shapes = parameter_shapes(config)
    sharding = recipe.sharding
    group = sharding.shard_group or world_size
    if recipe.backend == "fsdp":
        shards = [-(-shape[0] // group) * math.prod(shape[1:]) for shape in shapes.values()]
        owned = sum(shards)
        copies, gradients, update = 0, 4 * owned, 0
    else:
        shards = [-(-math.prod(shape) // world_size) for shape in shapes.values()]
        owned = sum(shards)
        compute = _BYTES[recipe.precision.compute]
        copies = compute * owned
        if sharding.shard_group is not None:
            copies += compute * sum(-(-math.prod(shape) // group) for shape in shapes.values())
        offloaded = sharding.offload != "none"
        gradients = (8 if offloaded else 4) * owned
        update = 0 if offloaded else 4 * _largest_sub_group(dict(zip(shapes, shards, strict=True)))
    return States(
        masters=4 * owned,
        copies=copies,
        gradients=gradients,
        moments=8 * owned,
        update=update,
        snapshot=sum(3 * _power_of_two(4 * shard) for shard in shards),
    )


def parameter_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """The shape of every parameter by name; one that is tied has one name."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in LlamaForPretraining(config).named_parameters()}


def layer_parameters(config: LlamaConfig) -> int:
    """Elements of one decoder layer."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in LlamaDecoderLayer(config, 0).parameters())


def _largest_sub_group(shards: dict[str, int]) -> int:
    """Elements of the largest sub-group of ZeRO-3: matrices in order, closed when they reach the limit.

    Norm weights are a parameter group of their own, which is never the largest. From `stage3.py`,
    `_create_fp16_sub_groups`.
    """
    largest = current = 0
    for name, shard in shards.items():
        if "norm" in name:
            continue
        current += shard
        if current >= _SUB_GROUP:
            largest, current = max(largest, current), 0
    return max(largest, current)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
