"""`pmc-llama plan` beside what was published: states, memory, throughput; as Markdown.

python -m benchmarks.plan > benchmarks/plan.md
python -m benchmarks.plan --fit                  the constants of pmc_llama/plan/throughput.py anew
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.published import INPUT, Published, published_runs
from pmc_llama.compare import machine, versions
from pmc_llama.config import BackendName, BatchConfig, DataConfig, Recipe, ShardingConfig
from pmc_llama.flops import model_flops_per_token
from pmc_llama.plan.cluster import GIB, GPUS, Cluster, node_bandwidth
from pmc_llama.plan.duration import Duration, corpus_size, plan_duration
from pmc_llama.plan.memory import MemoryPlan, plan_memory
from pmc_llama.plan.plan import planned_config
from pmc_llama.plan.states import States, plan_states
from pmc_llama.plan.throughput import CALIBRATION, Calibration, Shape, Workload, step_time
from pmc_llama.plan.tracking import COPIES, END, GRADIENTS, MASTERS, MOMENTS, track
from pmc_llama.recipe_file import RecipeParser

RECIPES = Path(__file__).parents[1] / "recipes"
BACKENDS: tuple[BackendName, ...] = ("deepspeed", "fsdp")
STATE_BYTES = {"deepspeed": 18, "fsdp": 16}
# Size, nodes, GPUs of a node, GPU, what of the recipe is changed.
CLUSTERS: tuple[tuple[str, int, int, str, tuple[str, ...]], ...] = (
    ("7b", 1, 1, "h200", ()),
    ("7b", 1, 8, "h100", ()),
    ("13b", 2, 8, "h100", ()),
    ("33b", 4, 8, "h100", ()),
    ("65b", 8, 8, "h100", ()),
    ("70b", 16, 8, "h100", ()),
    ("70b", 64, 8, "h100", ("--batch.micro_size=2",)),
)

REPORT = """# `pmc-llama plan` beside what was published

`python -m benchmarks.plan > benchmarks/plan.md` · {conditions}

## Plans of the recipes

Each recipe of `recipes/pretrain_*.yaml` as it stands, under both backends. GPUs of a node by NVLink, nodes
by one 400 Gbit/s adapter a GPU. Planned, not measured.

{plans}

## States

Parameters, gradients and optimizer state of a rank as planned, beside 16 bytes a parameter under FSDP2
(fp32 parameter, gradient and two moments) and 18 under ZeRO-3 (bf16 parameter, fp32 master, gradient and
two moments), over the ranks. The last column is what the sharding code itself holds after a backward, under
a fake process group of as many ranks (8 at most under ZeRO-3), for a model of two such layers.

{states}

## Peak memory beside published peaks

{memory}

torchtitan keeps fp32 logits of the whole micro-batch (7.8 GiB for 16,384 tokens of Llama 3's vocabulary,
and as much for their gradient) where `pmc_llama/model.py` keeps 1,024 rows; its selective checkpointing
keeps every second matrix product, the planned one all of them; its reported peak is memory reserved, with
what the allocator cannot fill.

## Throughput

Four constants were fitted to the {fitted} runs marked `speed`, by least squares of the logarithm: the part
of the peak that matrix products reach on A100 and on H100 for a model 4,096 wide, the power of the width
with which the H100's grows, and what a further node adds to a collective. All else is counted (FLOPs,
bytes) or from data sheets and papers, as `pmc_llama/plan/throughput.py` says. Two more were fitted to
PMC-LLaMA's own runs: the wait for a paper to be read (`input`, {input:.3f} s, in their runs alone) and the
bandwidth of host memory (`host`). Nothing was fitted to the other runs.

{errors}

{throughput}

What sources do not say is assumed as noted. Not modelled, and so left out: fp8, and tensor, pipeline and
context parallelism, with which torchtitan's 70B and 405B ran on H100. PMC-LLaMA's runs with everything
offloaded do not state their micro-batch, on which traffic to the host depends: two of the three are off by
more than 15%.
"""


@dataclass(frozen=True)
class Case:
    """A recipe planned on a cluster, and the seconds that it took to find its memory."""

    name: str
    recipe: Recipe
    config: LlamaConfig
    cluster: Cluster
    memory: MemoryPlan
    states: States
    work: Workload
    duration: Duration
    mfu: float
    seconds: float


def main() -> None:
    """Print the report, or the constants fitted anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants and print them")
    if parser.parse_args().fit:
        fit()
        return
    cases = [_plan(*where, backend) for where in CLUSTERS for backend in BACKENDS]
    runs = published_runs()
    print(
        REPORT.format(
            conditions=f"{machine()} · {versions()} · {datetime.now(UTC):%Y-%m-%d}",
            plans=_plans(cases),
            states=_states(cases),
            memory=_peaks(),
            fitted=sum(run.fitted == "speed" for run in runs),
            input=INPUT,
            errors=_errors(runs),
            throughput=_throughput(runs),
        ),
        end="",
    )


def tokens_per_second(work: Workload, cluster: Cluster, calibration: Calibration = CALIBRATION) -> float:
    """Of a GPU."""
    return work.micro_tokens * work.accumulation / step_time(work, cluster, calibration).total


# --- plans -------------------------------------------------------------------------------------------------


def _plan(size: str, nodes: int, gpus: int, gpu: str, options: tuple[str, ...], backend: BackendName) -> Case:
    path = RECIPES / f"pretrain_{size}.yaml"
    recipe, _ = RecipeParser("plan", path, "").read([str(path), f"--backend={backend}", *options])
    config = planned_config(recipe, None)
    cluster = Cluster(GPUS[gpu], nodes, gpus, node_bandwidth("ib400", gpus))
    begin = time.perf_counter()
    memory = plan_memory(recipe, config, cluster.ranks)
    seconds = time.perf_counter() - begin
    work = Workload.of(recipe, config, cluster.ranks)
    step = step_time(work, cluster)
    flops = tokens_per_second(work, cluster) * model_flops_per_token(config, recipe.data.sequence_length)
    name = f"{size.upper()}, {cluster.ranks} x {gpu}, {backend}"
    print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return Case(
        name=name,
        recipe=recipe,
        config=config,
        cluster=cluster,
        memory=memory,
        states=plan_states(recipe, config, cluster.ranks),
        work=work,
        duration=plan_duration(recipe, work, step, cluster, corpus_size(recipe, None, None)),
        mfu=flops / cluster.gpu.peak_flops,
        seconds=seconds,
    )


def _plans(cases: Iterable[Case]) -> str:
    rows = []
    for case in cases:
        device = case.cluster.gpu.memory_bytes
        rows.append(
            (
                case.name,
                f"{case.work.micro_size} x {case.work.sequence_length}",
                f"{case.memory.total / GIB:.1f} of {device / GIB:.1f}",
                "yes" if case.memory.total <= device else "no",
                f"{tokens_per_second(case.work, case.cluster):,.0f}",
                f"{case.mfu:.1%}",
                f"{case.duration.gpu_hours:,.0f}",
                f"{case.duration.wall_seconds / 86400:.1f}",
                f"{case.seconds:.0f}",
            )
        )
    head = ["plan", "micro-batch", "peak, GiB", "fits", "tok/s a GPU", "MFU", "GPU-hours", "days"]
    return _table([*head, "memory found in, s"], rows)


def tracked_states(recipe: Recipe, config: LlamaConfig, ranks: int) -> float:
    """States of a model of two layers, tracked through the backend, over 16 or 18 bytes a parameter.

    Under ZeRO-3 on 8 ranks at most, as many as its shards are made for in reasonable time.
    """
    recipe, config = copy.deepcopy(recipe), copy.deepcopy(config)
    ranks = min(ranks, 8) if recipe.backend == "deepspeed" else ranks
    config.num_hidden_layers = 2
    recipe.sharding.checkpointed_layers = None
    recipe.data.sequence_length, recipe.batch = 8, BatchConfig(global_size=ranks, micro_size=1)
    end = track(recipe, config, ranks)[END]
    states = sum(end[part] for part in (MASTERS, COPIES, GRADIENTS, MOMENTS))
    return states * ranks / (STATE_BYTES[recipe.backend] * Shape.of(config).parameters)


def _states(cases: Iterable[Case]) -> str:
    rows = []
    for case in cases:
        closed = STATE_BYTES[case.recipe.backend] * case.work.shape.parameters / case.cluster.ranks
        planned = case.states.total
        rows.append(
            (
                case.name,
                f"{planned / GIB:.2f}",
                f"{closed / GIB:.2f}",
                f"{planned / closed - 1:+.2%}",
                f"{tracked_states(case.recipe, case.config, case.cluster.ranks) - 1:+.2%}",
            )
        )
    head = ["plan", "planned, GiB", "closed form, GiB", "planned less that", "tracked less that, two layers"]
    return _table(head, rows)


def _peaks() -> str:
    """Llama-3.1-8B as torchtitan ran it; without compilation, so that the kernels are those of the plan."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    rows = []
    for ranks, published in ((8, 82.4), (128, 67.0)):
        recipe = Recipe(
            backend="fsdp",
            data=DataConfig(mode="packed", sequence_length=8192),
            batch=BatchConfig(global_size=2 * ranks, micro_size=2),
            sharding=ShardingConfig(activation_checkpointing="selective"),
        )
        planned = plan_memory(recipe, config, ranks).total / GIB
        rows.append((f"torchtitan Llama-3.1-8B 8192 x 2 SAC, {ranks} GPUs", f"{published}", f"{planned:.1f}"))
    return _table(("run", "published, GiB", "planned, GiB"), rows)


# --- throughput --------------------------------------------------------------------------------------------


def _throughput(runs: Iterable[Published]) -> str:
    rows = []
    for run in runs:
        computed = tokens_per_second(run.work, run.cluster)
        error = computed / run.tokens_per_second - 1
        rows.append(
            (
                run.name,
                f"{run.tokens_per_second:,.0f}",
                f"{computed:,.0f}",
                f"{error:+.1%}",
                run.fitted,
                run.note,
                run.source,
            )
        )
    return _table(("run", "published", "planned", "error", "fitted", "assumed", "source"), rows)


def _errors(runs: Sequence[Published]) -> str:
    groups = {
        "fitted (`speed`)": [run for run in runs if run.fitted == "speed"],
        "held out": [run for run in runs if not run.fitted and "offload all" not in run.name],
        "fitted (`input`, `host`)": [run for run in runs if run.fitted in ("input", "host")],
        "held out, micro-batch not stated": [run for run in runs if "offload all" in run.name],
    }
    rows = []
    for name, group in groups.items():
        errors = [tokens_per_second(run.work, run.cluster) / run.tokens_per_second - 1 for run in group]
        root = math.sqrt(sum(error**2 for error in errors) / len(errors))
        rows.append((name, str(len(group)), f"{root:.1%}", f"{min(errors):+.1%}", f"{max(errors):+.1%}"))
    return _table(("runs", "how many", "root mean square", "lowest", "highest"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- fitting -----------------------------------------------------------------------------------------------


def fit() -> None:
    """Least squares of the logarithm of computed over published throughput, by coordinate search."""
    runs = published_runs()
    speed = [run for run in runs if run.fitted == "speed"]
    for overlap in (0.0, 0.2, 0.3, CALIBRATION.overlap_loss):
        calibration, error = _fit_speed(speed, overlap)
        print(f"overlap_loss {overlap}: root mean square {error:.1%} of {len(speed)} runs")
    print(f"matmul {calibration.matmul}, width {calibration.width}, node {calibration.node_seconds:.2e} s")

    def waiting(run: Published, seconds: float, host: float) -> float:
        work = replace(run.work, input_seconds=seconds)
        return tokens_per_second(work, replace(run.cluster, host_bandwidth=host), calibration)

    read = [run for run in runs if run.fitted == "input"]
    (seconds,) = _search([INPUT], lambda values: _error(read, lambda run: waiting(run, values[0], 100e9)))
    offloaded = [run for run in runs if run.fitted == "host"]
    (host,) = _search([100e9], lambda values: _error(offloaded, lambda run: waiting(run, seconds, values[0])))
    print(f"reading a paper {seconds:.3f} s; host memory {host / 1e9:.0f} GB/s")


def _fit_speed(runs: Sequence[Published], overlap: float) -> tuple[Calibration, float]:
    """The constants with which throughput comes out best, and the root mean square of what is left."""

    def error(values: Sequence[float]) -> float:
        calibration = _calibration(values, overlap)
        return _error(runs, lambda run: tokens_per_second(run.work, run.cluster, calibration))

    values = _search([0.7, 0.5, 0.1, 1e-5], error)
    return _calibration(values, overlap), math.sqrt(error(values) / len(runs))


def _calibration(values: Sequence[float], overlap: float) -> Calibration:
    ampere, hopper, width, node = values
    return replace(
        CALIBRATION,
        matmul={"ampere": ampere, "hopper": hopper},
        width={"ampere": 0.0, "hopper": width},
        overlap_loss=overlap,
        node_seconds=node,
    )


def _error(runs: Sequence[Published], computed: Callable[[Published], float]) -> float:
    return sum(math.log(computed(run) / run.tokens_per_second) ** 2 for run in runs)


def _search(values: list[float], error: Callable[[Sequence[float]], float]) -> list[float]:
    """Multiply and divide one value at a time by ever smaller factors, as long as that helps."""
    best, factor = error(values), 1.3
    while factor > 1.0001:
        improved = False
        for place in range(len(values)):
            for change in (factor, 1 / factor):
                tried = [value * change if at == place else value for at, value in enumerate(values)]
                if (found := error(tried)) < best:
                    values, best, improved = tried, found, True
        if not improved:
            factor = math.sqrt(factor)
    return values


if __name__ == "__main__":
    main()
