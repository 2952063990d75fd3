"""Memory of one GPU and of its part of the host, by what it is for."""

import copy
from collections import Counter
from dataclasses import asdict, dataclass

from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.config import Recipe, ShardingConfig
from pmc_llama.plan.states import States, layer_parameters, plan_states
from pmc_llama.plan.throughput import masks_documents
from pmc_llama.plan.tracking import (
    ACTIVATIONS,
    COPIES,
    END,
    GATHERED,
    GRADIENTS,
    LOGITS,
    MASTERS,
    MOMENTS,
    REDUCTION,
    Phase,
    track,
)

_MIB = 2**20
# What a GPU holds before the first tensor and beside all tensors: the context with its kernels, cuBLAS'
# workspace (32 MiB a stream on Hopper), and NCCL's buffers and channels for the groups of a run. Rounded up
# from what is commonly seen; not measured here.
_OVERHEAD = 1536 * _MIB
# Of what is allocated and freed in a step, the part that torch's allocator cannot fill again: pools of
# several streams, blocks of 2 MiB and more that are split. States are allocated once and lose nothing.
_FRAGMENTATION = 0.10
# ZeRO-3's shards are cut from lists of a view a rank, which 512 ranks make slow; its buffers do not depend on
# it.
_TRACKED_RANKS = {"deepspeed": 4}


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of a step on the fullest rank, in bytes.

    Attributes:
        parameters: sharded parameters: fp32 masters, and the compute-dtype shards of ZeRO-3.
        gradients: sharded gradients, fp32, as far as they exist at the peak.
        optimizer: both moments, fp32.
        gathered: parameters gathered for the layers in use and those ahead, with the buffers of collectives.
        reduction: gradients on their way into the sum over the ranks.
        activations: what backward needs of forward, and what a layer computes with for a moment.
        logits: of the micro-batch, their gradient and the loss's fp32 chunk.
        temporary: what the update takes for a moment; 0 where the peak is in backward.
        margin: CUDA context, workspaces, buffers of NCCL, and what the allocator cannot fill.
        host_states: states of this rank in host memory.
        host_snapshot: the copy of the state from which a checkpoint is written behind training.
        moment: where in the step the peak is: `forward`, `loss`, `backward` or `update`.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    reduction: int
    activations: int
    logits: int
    temporary: int
    margin: int
    host_states: int
    host_snapshot: int
    moment: str

    @property
    def parts(self) -> dict[str, int]:
        """The parts on the GPU, in the order of a stacked bar."""
        values = asdict(self)
        return {name: size for name, size in values.items() if not name.startswith(("host_", "moment"))}

    @property
    def allocated(self) -> int:
        """What torch counts: `torch.cuda.max_memory_allocated`."""
        return self.total - self.margin

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.parts.values())

    @property
    def host(self) -> int:
        """Bytes of host memory that this rank takes."""
        return self.host_states + self.host_snapshot


def plan_memory(recipe: Recipe, config: LlamaConfig, world_size: int) -> MemoryPlan:
    """What a rank of `world_size` needs to train a model of `config` by `recipe`.

    States are the closed form of `states.py`. The rest is tracked through the backend itself (`tracking.py`)
    on models of few layers, and extended to the depth of `config`: at the same place of the step, counted
    from either end of the model, each further layer adds the same. So every place is a line in the number of
    layers, and the peak is the highest of them. What tensors do not show is added: attention's workspace and
    `margin`.

    Args:
        recipe: the whole of it; corpus and output are not opened.
        config: of the whole model.
        world_size: ranks, one a GPU.

    Raises:
        UserError: the recipe cannot be run on so many ranks.
    """
    check_batch(recipe, world_size)
    states = plan_states(recipe, config, world_size)
    moments = _moments(recipe, config, world_size)
    end = moments[END]
    on_gpu = _on_gpu(recipe.sharding)
    workspace = _attention_workspace(recipe, config) + _staging(recipe, config, world_size)
    masks = _masks(recipe, config)
    candidates = []
    for phase, parts in moments.items():
        sizes = {
            part: _like(getattr(states, part), parts[part], end[part]) if part in on_gpu else 0
            for part in (MASTERS, COPIES, GRADIENTS, MOMENTS)
        }
        backward = phase[0] == "backward"
        candidates.append(
            _plan(
                recipe,
                states,
                {**parts, **sizes, ACTIVATIONS: parts[ACTIVATIONS] + masks + (workspace if backward else 0)},
                temporary=states.update if phase == END else 0,
                moment=_MOMENTS[phase[0]],
            )
        )
    return max(candidates, key=lambda plan: plan.total)


def least_memory(recipe: Recipe, config: LlamaConfig, world_size: int) -> int:
    """Bytes on the GPU below which no plan of `recipe` can be: the states alone."""
    states, on_gpu = plan_states(recipe, config, world_size), _on_gpu(recipe.sharding)
    least: int = _OVERHEAD + sum(getattr(states, part) for part in on_gpu - {GRADIENTS})
    return least


def check_batch(recipe: Recipe, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share; in `whole` mode its documents fill as many rows as needed.

    Raises:
        UserError: names the keys.
    """
    batch, group = recipe.batch, recipe.sharding.shard_group
    if recipe.data.mode != "whole" and batch.global_size % (batch.micro_size * world_size):
        raise UserError(
            f"batch.global_size is {batch.global_size}, expected a multiple of batch.micro_size "
            f"{batch.micro_size} times the {world_size} ranks; change one of the three."
        )
    if group is not None and world_size % group:
        raise UserError(
            f"sharding.shard_group is {group}, expected a divisor of the {world_size} ranks; change it, "
            "or set it to null."
        )


_MOMENTS = {
    "start": "forward",
    "forward": "forward",
    "head": "loss",
    "backward": "backward",
    "end": "update",
}


def _on_gpu(sharding: ShardingConfig) -> frozenset[str]:
    everywhere = frozenset({MASTERS, COPIES, GRADIENTS, MOMENTS})
    return {"none": everywhere, "optimizer": frozenset({COPIES}), "all": frozenset()}[sharding.offload]


def _like(size: int, tracked: float, complete: float) -> int:
    """Of a state in closed form, the part that exists while `tracked` of `complete` tracked bytes do."""
    return round(size * tracked / complete) if complete else 0


def _plan(recipe: Recipe, states: States, parts: dict[str, float], temporary: int, moment: str) -> MemoryPlan:
    elsewhere = {MASTERS, COPIES, GRADIENTS, MOMENTS} - _on_gpu(recipe.sharding)
    lasting = parts[MASTERS] + parts[COPIES] + parts[GRADIENTS] + parts[MOMENTS]
    passing = sum(parts.values()) + temporary - lasting
    return MemoryPlan(
        parameters=round(parts[MASTERS] + parts[COPIES]),
        gradients=round(parts[GRADIENTS]),
        optimizer=round(parts[MOMENTS]),
        gathered=round(parts.get(GATHERED, 0)),
        reduction=round(parts.get(REDUCTION, 0)),
        activations=round(parts[ACTIVATIONS]),
        logits=round(parts.get(LOGITS, 0)),
        temporary=temporary,
        margin=_OVERHEAD + round(_FRAGMENTATION * passing),
        host_states=sum(getattr(states, part) for part in elsewhere),
        host_snapshot=states.snapshot if recipe.checkpoint.asynchronous else 0,
        moment=moment,
    )


# --- from few layers to many -------------------------------------------------------------------------------


def _moments(recipe: Recipe, config: LlamaConfig, world_size: int) -> dict[Phase, Counter[str]]:
    """For each place of the step the parts held there, of the whole model.

    The first layers may be computed again and the others not: two regions, each a line of its own.
    """
    sharding = recipe.sharding
    layers = config.num_hidden_layers
    counted = layers if sharding.checkpointed_layers is None else min(sharding.checkpointed_layers, layers)
    first = 0 if sharding.activation_checkpointing == "none" else counted
    regions = (first, layers - first)
    edge = _edge(recipe, config)
    base = (min(regions[0], 2 * edge), min(regions[1], 2 * edge))
    moments = _tracked(recipe, config, world_size, base, edge)
    whole = {phase: Counter(parts) for phase, parts in moments.items()}
    for region in (0, 1):
        more = regions[region] - base[region]
        if more:
            deeper = (base[0] + (region == 0), base[1] + (region == 1))
            longer = _tracked(recipe, config, world_size, deeper, edge)
            for phase, parts in moments.items():
                for part in {*parts, *longer[phase]}:
                    whole[phase][part] += more * (longer[phase][part] - parts[part])
    return whole


def _edge(recipe: Recipe, config: LlamaConfig) -> int:
    """Layers from either end of a region within which one may differ from the next: those gathered at once.

    FSDP2 gathers `prefetch_layers` ahead. ZeRO-3 keeps parameters gathered up to
    `stage3_max_live_parameters`, which `backends/deepspeed.py` sets to two layers more, with embedding and
    output.
    """
    ahead = recipe.sharding.prefetch_layers
    if recipe.backend == "fsdp":
        return ahead + 1
    outside = 2 * int(config.vocab_size) * int(config.hidden_size)
    return ahead + 2 + -(-outside // layer_parameters(config))


def _tracked(
    recipe: Recipe, config: LlamaConfig, world_size: int, regions: tuple[int, int], edge: int
) -> dict[Phase, Counter[str]]:
    """The phases of a model with so many layers in its regions, layers named by their nearer end."""
    ranks = min(world_size, _TRACKED_RANKS.get(recipe.backend, world_size))
    recipe, config = copy.deepcopy(recipe), copy.deepcopy(config)
    config.num_hidden_layers = sum(regions)
    recipe.sharding.checkpointed_layers = regions[0]
    recipe.batch.global_size = -(-recipe.batch.global_size // world_size) * ranks
    if ranks < world_size and recipe.sharding.shard_group is not None:
        recipe.sharding.shard_group = ranks // 2
    elsewhere = {MASTERS, COPIES, GRADIENTS, MOMENTS} - _on_gpu(recipe.sharding)
    peaks = track(recipe, config, ranks, elsewhere)
    return {_aligned(phase, regions, edge): parts for phase, parts in peaks.items()}


def _aligned(phase: Phase, regions: tuple[int, int], edge: int) -> Phase:
    """The phase of a layer by a number that adding layers in the middle of its region leaves as it is."""
    name, layer = phase
    if name not in ("forward", "backward"):
        return phase
    region = int(layer >= regions[0])
    offset = layer - region * regions[0]
    if offset >= edge:
        offset -= regions[region]
    return name, 1000 * region + offset


# --- what tensors do not show ------------------------------------------------------------------------------


def _attention_workspace(recipe: Recipe, config: LlamaConfig) -> int:
    """What the backward of flash attention takes beside its inputs and outputs.

    FlashAttention-2 sums the gradient of the queries in fp32 and keeps an fp32 row sum (Dao 2023, arXiv
    2307.08691, section 3.1); with grouped queries, gradients of keys and values for every head as well. The
    CPU's kernel, which stands for it in the tracked run, saves the same tensors for backward: queries, keys,
    values, output and an fp32 number a row and head.
    """
    tokens = recipe.batch.micro_size * recipe.data.sequence_length
    heads = int(config.num_attention_heads)
    width = heads * int(config.head_dim)
    grouped = config.num_key_value_heads < heads
    return tokens * (4 * width + 4 * heads + (4 * width if grouped else 0))


def _masks(recipe: Recipe, config: LlamaConfig) -> int:
    """The masks of isolated documents, which the tracked run does not make, since they depend on the tokens.

    One boolean [micro-batch, 1, L, L] for all layers; from it SDPA makes one in the compute dtype in each
    layer, which a layer that is not computed again keeps for its backward.
    """
    data, sharding = recipe.data, recipe.sharding
    if not masks_documents(data):
        return 0
    layers = int(config.num_hidden_layers)
    counted = layers if sharding.checkpointed_layers is None else min(sharding.checkpointed_layers, layers)
    kept = layers if sharding.activation_checkpointing == "none" else layers - counted + 1
    element = {"bf16": 2, "fp32": 4}[recipe.precision.compute]
    return recipe.batch.micro_size * data.sequence_length**2 * (1 + element * kept)


def _staging(recipe: Recipe, config: LlamaConfig, world_size: int) -> int:
    """Shards of a layer on their way between host and GPU: parameters, and under FSDP2 gradients."""
    if recipe.sharding.offload != "all":
        return 0
    group = recipe.sharding.shard_group or world_size
    return (8 if recipe.backend == "fsdp" else 2) * layer_parameters(config) // group
