"""Scaling on paper: what each recipe keeps of its speed from 8 to 512 GPUs, beside published scaling.

python -m benchmarks.scaling > benchmarks/scaling.md
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.plan import tokens_per_second
from benchmarks.published import Published, published_runs
from pmc_llama.compare import versions
from pmc_llama.config import BackendName, Recipe
from pmc_llama.plan.cluster import GPUS, Cluster, node_bandwidth
from pmc_llama.plan.memory import least_memory
from pmc_llama.plan.plan import planned_config
from pmc_llama.plan.throughput import CALIBRATION, Workload
from pmc_llama.recipe_file import RecipeParser

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = ("7b", "13b", "33b", "65b", "70b")
GPUS_OF_ALL = (8, 16, 32, 64, 128, 256, 512)
A_NODE, GPU = 8, "h100"
BACKENDS: tuple[BackendName, ...] = ("fsdp", "deepspeed")
NETWORKS = ("ib400", "ib200", "eth100")

REPORT = """# Scaling on paper

`python -m benchmarks.scaling > benchmarks/scaling.md` · {conditions}

Efficiency is tokens/s of a GPU over that of the same recipe on the fewest GPUs of the table that hold its
states. Everything here is computed by `pmc_llama/plan/throughput.py`; **the time of a single GPU is not yet
measured**: in its place stand the rates fitted to published runs (`benchmarks/plan.md`), on H100
{matmul:.0%} of the dense bf16 peak in matrix products of a model 4,096 wide and {attention:.0%} in flash
attention, {memory:.0%} of the memory's bandwidth elsewhere, one kernel an operator.

The model of the interconnect:

- Collectives are rings. A gather or reduce-scatter of S bytes over R ranks takes (R - 1) / R x S through
  each GPU's NVLink (450 GB/s each way), and (N - 1) / N x S through the adapters of each of N nodes; the
  slower decides. Both reach {link:.0%} of the data sheet.
- What computes hides what is sent, but for {overlap:.0%} of it, and but for what takes longer than all
  computing of a micro-batch. Gradients go out in fp32 at every micro-batch, parameters are gathered twice.
- Each further node makes each collective {node:.0f} microseconds longer, unhidden (fitted as well).
- No stragglers, no failures, no contention in switches.

## Weak scaling: the recipe's micro-batches of a GPU and step stay

The global batch grows with the GPUs, as in the published tables. Nodes of 8 H100 with a 400 Gbit/s adapter
each GPU (`--interconnect ib400`).

{weak}

## Strong scaling: the recipe's global batch stays

More GPUs share the same batch: first with fewer micro-batches a step, then with smaller ones. A gap in a row:
more GPUs than the batch has sequences, or states that do not fit.

{strong}

## Networks

Efficiency of weak scaling at 64 and 512 GPUs, under FSDP2, by network, and what hybrid sharding within a node
(`--sharding.shard_group 8`) makes of it where a node holds the states.

{networks}

## Published scaling

Runs that differ in the number of GPUs alone: efficiency of the larger run over the smaller, of tokens/s of a
GPU, as published and as computed here for the same work. fms-fsdp publishes one number of GPUs a kind of
card, so that only its speed can be compared: `benchmarks/plan.md`.

{published}

What is computed keeps {least:.1f} to {most:.1f} points more than what was published: expect as much less of
the tables above.
"""


def main() -> None:
    """Print the report."""
    gpu, compared = GPUS[GPU], _published()
    points = [float(row[4]) for row in compared]
    print(
        REPORT.format(
            conditions=f"{versions()} · {datetime.now(UTC):%Y-%m-%d}",
            matmul=CALIBRATION.matmul_part(gpu, 4096),
            attention=CALIBRATION.attention_part(gpu),
            memory=CALIBRATION.memory,
            link=CALIBRATION.link,
            overlap=CALIBRATION.overlap_loss,
            node=CALIBRATION.node_seconds * 1e6,
            weak=_table(("recipe", *map(str, GPUS_OF_ALL)), list(_scaling(weak_speed))),
            strong=_table(("recipe", *map(str, GPUS_OF_ALL)), list(_scaling(strong_speed))),
            networks=_networks(),
            published=_table(("run", "GPUs", "published", "computed", "points", "source"), compared),
            least=min(points),
            most=max(points),
        ),
        end="",
    )


def weak_speed(recipe: Recipe, gpus: int, network: str = "ib400") -> float | None:
    """Tokens/s of a GPU when the batch grows with the GPUs; None where the states do not fit.

    Args:
        recipe: whose micro-batch and accumulation, on as many GPUs as its plan names, are kept.
        gpus: how many.
        network: between nodes, by its name in `plan.cluster.INTERCONNECTS`.
    """
    grown = copy.deepcopy(recipe)
    accumulation = max(
        1, recipe.batch.global_size // (recipe.batch.micro_size * _GPUS_OF_RECIPE[recipe.model.size])
    )
    grown.batch.global_size = grown.batch.micro_size * accumulation * gpus
    return _speed(grown, gpus, network)


def strong_speed(recipe: Recipe, gpus: int) -> float | None:
    """Tokens/s of a GPU when the global batch stays; None where it cannot be shared or does not fit."""
    shared = copy.deepcopy(recipe)
    if shared.batch.global_size % gpus:
        return None
    share = shared.batch.global_size // gpus
    shared.batch.micro_size = max(
        size for size in range(1, min(share, shared.batch.micro_size) + 1) if share % size == 0
    )
    return _speed(shared, gpus, "ib400")


# On which `benchmarks/plan.md` plans them, which their comments name.
_GPUS_OF_RECIPE = {"7b": 8, "13b": 16, "33b": 32, "65b": 64, "70b": 128}


def _speed(recipe: Recipe, gpus: int, network: str) -> float | None:
    config = planned_config(recipe, None)
    cluster = Cluster(GPUS[GPU], gpus // A_NODE, A_NODE, node_bandwidth(network, A_NODE))
    if least_memory(recipe, config, gpus) > cluster.gpu.memory_bytes:
        return None
    return tokens_per_second(Workload.of(recipe, config, gpus), cluster)


def _recipe(size: str, backend: BackendName, *changes: str) -> Recipe:
    path = RECIPES / f"pretrain_{size}.yaml"
    recipe, _ = RecipeParser("scaling", path, "").read([str(path), f"--backend={backend}", *changes])
    return recipe


def _scaling(speed: Callable[[Recipe, int], float | None]) -> Iterator[list[str]]:
    for size in SIZES:
        for backend in BACKENDS:
            recipe = _recipe(size, backend)
            speeds = [speed(recipe, gpus) for gpus in GPUS_OF_ALL]
            first = next(found for found in speeds if found)
            shape = f"{recipe.batch.micro_size} x {recipe.data.sequence_length}"
            cells = [f"{found / first:.1%} ({found:,.0f})" if found else "" for found in speeds]
            yield [f"{size}, {backend}, {shape}", *cells]


def _networks() -> str:
    rows = []
    for size in SIZES:
        for network in NETWORKS:
            cells = []
            for changes in ((), (f"--sharding.shard_group={A_NODE}",)):
                recipe = _recipe(size, "fsdp", *changes)
                first = weak_speed(_recipe(size, "fsdp"), _least_gpus(_recipe(size, "fsdp")))
                for gpus in (64, 512):
                    found = weak_speed(recipe, gpus, network)
                    cells.append(f"{found / first:.1%}" if found and first else "does not fit")
            rows.append([size, network, *cells])
    columns = ("recipe", "network", "64", "512", "64, hybrid", "512, hybrid")
    return _table(columns, rows)


def _least_gpus(recipe: Recipe) -> int:
    return next(gpus for gpus in GPUS_OF_ALL if weak_speed(recipe, gpus))


def _published() -> list[list[str]]:
    """Pairs of published runs of the same work on fewer and on more of the same GPUs."""
    groups: dict[object, list[Published]] = {}
    for run in published_runs():
        groups.setdefault((run.source, run.cluster.gpu, run.work), []).append(run)
    rows = []
    for runs in groups.values():
        smallest, *larger = sorted(runs, key=lambda run: run.cluster.ranks)
        for run in larger:
            told = run.tokens_per_second / smallest.tokens_per_second
            here = tokens_per_second(run.work, run.cluster) / tokens_per_second(
                smallest.work, smallest.cluster
            )
            name, _, gpus = smallest.name.rpartition(", ")
            between = f"{gpus} to {run.cluster.ranks}"
            rows.append(
                [name, between, f"{told:.1%}", f"{here:.1%}", f"{100 * (here - told):+.1f}", run.source]
            )
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


if __name__ == "__main__":
    main()
