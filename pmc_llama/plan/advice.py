"""What fits: the largest micro-batch, and the changes of a recipe that make it fit."""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import LlamaConfig

from pmc_llama.config import Recipe
from pmc_llama.plan.batch_sizes import divisors, micro_sizes
from pmc_llama.plan.cluster import Cluster
from pmc_llama.plan.memory import MemoryPlan, least_memory, plan_memory
from pmc_llama.plan.throughput import Workload, step_time

# Changes that are told: the cheapest, and what else there is.
_TOLD = 3


@dataclass(frozen=True)
class Change:
    """A recipe that fits, made from one that does not.

    Attributes:
        settings: what is set, as on the command line: `--batch.micro_size 2`, ...; `--nodes 4`.
        recipe: with it set.
        nodes: to run it on.
        memory: what it then needs.
        step_seconds: of a step then.
    """

    settings: tuple[str, ...]
    recipe: Recipe
    nodes: int
    memory: MemoryPlan
    step_seconds: float


def largest_micro_size(recipe: Recipe, config: LlamaConfig, cluster: Cluster) -> int | None:
    """Sequences of the largest micro-batch that fits, of those that `micro_sizes` has.

    None when not even one sequence fits. Memory rises with the micro-batch, so the sizes are bisected.
    """
    sizes = micro_sizes(recipe, cluster.ranks)
    # What is known already comes first: the recipe's own size decides which half is left.
    low, high = 0, len(sizes)
    middle = sizes.index(recipe.batch.micro_size)
    while low < high:
        if _fits(plan_memory(_with_micro_size(recipe, sizes[middle]), config, cluster.ranks), cluster):
            low = middle + 1
        else:
            high = middle
        middle = min((low + high) // 2, low + 1)
        middle = min(middle, high - 1)
    return sizes[low - 1] if low else None


Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch that fits with one kind of activation checkpointing.

    Attributes:
        checkpointing: `sharding.activation_checkpointing`, of all layers.
        micro_size: sequences; None when not even one fits.
        memory: that it needs; None likewise.
        tokens_per_second: of a GPU, predicted; 0 likewise.
    """

    checkpointing: Checkpointing
    micro_size: int | None
    memory: MemoryPlan | None
    tokens_per_second: float

    @property
    def settings(self) -> tuple[str, ...]:
        """What to set, as on the command line."""
        return _told(
            {"batch.micro_size": self.micro_size, "sharding.activation_checkpointing": self.checkpointing}
        )


def find_batches(recipe: Recipe, config: LlamaConfig, cluster: Cluster) -> Iterator[Batch]:
    """The largest micro-batch that fits, for each kind of activation checkpointing, as each is found.

    The global batch stays, so no result changes. A plan of each size that is tried takes seconds.
    """
    for checkpointing in get_args(Checkpointing):
        tried = _changed(
            recipe,
            {"sharding.activation_checkpointing": checkpointing, "sharding.checkpointed_layers": None},
        )
        size = largest_micro_size(tried, config, cluster)
        if size is None:
            yield Batch(checkpointing, None, None, 0.0)
            continue
        found = _with_micro_size(tried, size)
        work = Workload.of(found, config, cluster.ranks)
        speed = work.micro_tokens * work.accumulation / step_time(work, cluster).total
        yield Batch(checkpointing, size, plan_memory(found, config, cluster.ranks), speed)


def changes_that_fit(recipe: Recipe, config: LlamaConfig, cluster: Cluster) -> list[Change]:
    """The changes after which `recipe` fits, the one that costs least GPU time first, three at most.

    Tried are smaller micro-batches, recomputation, sharding over all ranks, offload, more nodes, and the
    usual ones together; none changes the loss. Their cost is that of `throughput.step_time`, in GPU seconds a
    step. Memory is planned for one after another in the order of cost, until enough fit.
    """
    tried = []
    for settings, changed, nodes in _candidates(recipe, config, cluster):
        where = dataclasses.replace(cluster, nodes=nodes)
        seconds = step_time(Workload.of(changed, config, where.ranks), where).total
        tried.append((seconds * where.ranks, settings, changed, where, seconds))
    changes: list[Change] = []
    for _, settings, changed, where, seconds in sorted(tried, key=lambda entry: entry[0]):
        if any(set(change.settings) < set(settings) for change in changes):
            continue  # more than is needed
        if least_memory(changed, config, where.ranks) > cluster.gpu.memory_bytes:
            continue
        memory = plan_memory(changed, config, where.ranks)
        if _fits(memory, cluster):
            changes.append(Change(settings, changed, where.nodes, memory, seconds))
        if len(changes) == _TOLD:
            break
    return changes


def _fits(plan: MemoryPlan, cluster: Cluster) -> bool:
    return plan.total <= cluster.gpu.memory_bytes


def _candidates(
    recipe: Recipe, config: LlamaConfig, cluster: Cluster
) -> Iterator[tuple[tuple[str, ...], Recipe, int]]:
    """Each change as it is told, the recipe with it, and the nodes; all of them can be run."""
    micro = recipe.batch.micro_size
    smaller = [size for size in divisors(micro) if size < micro][-2:]
    if micro > 1 and 1 not in smaller:
        smaller.insert(0, 1)
    batches: list[dict[str, object]] = [{}]
    batches += [{"batch.micro_size": size} for size in smaller]
    for batch in batches:
        for recomputation in _recomputations(recipe, config):
            for offload in _offloads(recipe):
                settings = {**batch, **recomputation, **offload}
                if settings:
                    yield _told(settings), _changed(recipe, settings), cluster.nodes
    group = recipe.sharding.shard_group
    if group is not None and group < cluster.ranks:
        alone: dict[str, object] = {"sharding.shard_group": None}
        yield _told(alone), _changed(recipe, alone), cluster.nodes
    nodes = 2 * cluster.nodes
    while recipe.batch.global_size % (micro * nodes * cluster.gpus_per_node) == 0:
        yield (f"--nodes {nodes}",), recipe, nodes
        nodes *= 2


def _recomputations(recipe: Recipe, config: LlamaConfig) -> list[dict[str, object]]:
    """Nothing, and what recomputes more than the recipe does."""
    mode, layers = "sharding.activation_checkpointing", "sharding.checkpointed_layers"
    sharding = recipe.sharding
    stronger: list[dict[str, object]] = [{}]
    if sharding.activation_checkpointing == "none" and recipe.backend == "fsdp":
        stronger.append({mode: "selective"})
    if sharding.activation_checkpointing == "none":
        stronger.append({mode: "full", layers: config.num_hidden_layers // 2})
    if sharding.checkpointed_layers is not None and sharding.activation_checkpointing == "full":
        stronger.append({layers: None})
    elif sharding.activation_checkpointing != "full":
        stronger.append({mode: "full"})
    return stronger


def _offloads(recipe: Recipe) -> list[dict[str, object]]:
    """Nothing, and what moves more to host memory than the recipe does; FSDP2 moves all or nothing."""
    order = ["none", "optimizer", "all"] if recipe.backend == "deepspeed" else ["none", "all"]
    further = order[order.index(recipe.sharding.offload) + 1 :]
    moved: list[dict[str, object]] = [{}]
    moved += [{"sharding.offload": offload} for offload in further]
    return moved


def _changed(recipe: Recipe, settings: dict[str, object]) -> Recipe:
    changed = copy.deepcopy(recipe)
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(changed, section), name, value)
    return changed


def _told(settings: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"--{key} {'null' if value is None else value}" for key, value in settings.items())


def _with_micro_size(recipe: Recipe, size: int) -> Recipe:
    return _changed(recipe, {"batch.micro_size": size})
