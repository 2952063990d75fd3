"""A plan: what a recipe needs on a cluster, in one value, and what was assumed to find it."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import LlamaConfig

from data_tools.corpus import Corpus
from pmc_llama.config import Recipe, plain
from pmc_llama.flops import model_flops_per_token
from pmc_llama.model import SIZES, for_training, llama_config
from pmc_llama.plan.advice import Batch, Change, changes_that_fit, largest_micro_size
from pmc_llama.plan.cluster import GIB, Cluster
from pmc_llama.plan.duration import CorpusSize, Duration, plan_duration, rows_of_step
from pmc_llama.plan.memory import MemoryPlan, plan_memory
from pmc_llama.plan.throughput import CALIBRATION, StepTime, Workload, step_time


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a cluster.

    Attributes:
        recipe: planned.
        config: its model.
        cluster: where.
        corpus: its size.
        memory: of a GPU at the peak of a step.
        largest_micro_size: sequences of the largest micro-batch that fits; None when not even one does.
        changes: that make it fit, the cheapest first; none when it fits.
        work: a step of a rank.
        step: its seconds.
        duration: of the run.
    """

    recipe: Recipe
    config: LlamaConfig
    cluster: Cluster
    corpus: CorpusSize
    memory: MemoryPlan
    largest_micro_size: int | None
    changes: list[Change]
    work: Workload
    step: StepTime
    duration: Duration

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory.total <= self.cluster.gpu.memory_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of a GPU."""
        return self.work.micro_tokens * self.work.accumulation / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, as `flops.py` defines it."""
        flops = model_flops_per_token(self.config, self.recipe.data.sequence_length)
        return self.tokens_per_second * flops / self.cluster.gpu.peak_flops


def planned_config(recipe: Recipe, corpus_at: str | None) -> LlamaConfig:
    """The model of a recipe; its vocabulary is the recipe's, the corpus' (where one is here), or the size's.

    Raises:
        UserError: `model.size` names none, or the corpus is damaged.
    """
    if corpus_at is not None:
        vocabulary = Corpus.open(corpus_at).vocab_size
    else:
        vocabulary = SIZES.get(recipe.model.size, {}).get("vocab_size", 32000)
    return for_training(llama_config(recipe.model, vocabulary))


def make_plan(recipe: Recipe, config: LlamaConfig, cluster: Cluster, corpus: CorpusSize) -> Plan:
    """Plan a recipe.

    Raises:
        UserError: the recipe cannot be run on so many ranks.
    """
    memory = plan_memory(recipe, config, cluster.ranks)
    work = Workload.of(recipe, config, cluster.ranks, rows_of_step(recipe, corpus, cluster.ranks))
    step = step_time(work, cluster)
    fits = memory.total <= cluster.gpu.memory_bytes
    return Plan(
        recipe=recipe,
        config=config,
        cluster=cluster,
        corpus=corpus,
        memory=memory,
        largest_micro_size=largest_micro_size(recipe, config, cluster),
        changes=[] if fits else changes_that_fit(recipe, config, cluster),
        work=work,
        step=step,
        duration=plan_duration(recipe, work, step, cluster, corpus),
    )


def assumptions(plan: Plan) -> list[str]:
    """What the plan rests on, a sentence each."""
    gpu, cluster, work = plan.cluster.gpu, plan.cluster, plan.work
    peak, used = f"{gpu.peak_flops / 1e12:,.0f} TFLOP/s", CALIBRATION
    part = CALIBRATION.matmul_part(gpu, plan.config.hidden_size)
    attention = {
        "causal": "what lies above the diagonal is not computed",
        "full": "documents are masked from one another, so all of it is computed",
    }
    said = [
        f"Corpus: {plan.corpus.papers:,} papers, {plan.corpus.tokens:,} tokens ({plan.corpus.source}).",
        f"Matrix products reach {part:.0%} of {peak} (dense bf16 of {gpu.name}).",
        f"Flash attention reaches {used.attention_part(gpu):.0%} of those; {attention[work.attention]}.",
        f"Norms, rotary embedding, activations, loss and optimizer run at {used.memory:.0%} of "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s, one kernel an operator.",
    ]
    if plan.recipe.precision.compute == "fp32":
        said.append(
            "precision.compute is fp32, which takes several times as long: the times here are those of bf16."
        )
    if not used.fitted(gpu):
        said.append(f"No published run on {gpu.architecture} was fitted: the constants are those of Hopper.")
    if cluster.ranks > 1:
        said.append(
            f"Rings reach {used.link:.0%} of {gpu.link_bandwidth / 1e9:,.0f} GB/s between GPUs of a node; "
            f"of a transfer behind computation {used.overlap_loss:.0%} is not hidden."
        )
    if cluster.nodes > 1:
        said.append(
            f"They reach as much of {cluster.node_bandwidth / 1e9:,.0f} GB/s between nodes; "
            f"every further node makes a collective {used.node_seconds * 1e6:.0f} microseconds longer."
        )
    if work.offload != "none":
        said.append(
            f"Host memory gives the ranks of a node {cluster.host_bandwidth / 1e9:,.0f} GB/s together, "
            f"PCIe {gpu.host_link_bandwidth / 1e9:,.0f} GB/s a GPU."
        )
    said.append(
        f"Checkpoints are written at {cluster.filesystem_bandwidth / 1e9:,.1f} GB/s by all nodes together."
    )
    said.append("Data is read ahead; no node fails, nothing waits in a queue. Nothing here was measured.")
    return said


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it: bytes, seconds, FLOP/s."""
    return {
        "recipe": plain(plan.recipe),
        "parameters": plan.work.shape.parameters,
        "cluster": asdict(plan.cluster),
        "corpus": asdict(plan.corpus),
        "memory": {
            **asdict(plan.memory),
            "total": plan.memory.total,
            "device": plan.cluster.gpu.memory_bytes,
        },
        "fits": plan.fits,
        "largest_micro_size": plan.largest_micro_size,
        "changes": [
            {
                "settings": list(change.settings),
                "nodes": change.nodes,
                "memory": change.memory.total,
                "step_seconds": change.step_seconds,
            }
            for change in plan.changes
        ],
        "step_seconds": {**asdict(plan.step), "total": plan.step.total},
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "mfu": plan.mfu,
        "duration": asdict(plan.duration),
        "assumptions": assumptions(plan),
    }


def batch_data(batch: Batch) -> dict[str, Any]:
    """What `--find-batch` found for one kind of activation checkpointing, as JSON holds it."""
    return {
        "activation_checkpointing": batch.checkpointing,
        "micro_size": batch.micro_size,
        "memory": batch.memory.total if batch.memory else None,
        "tokens_per_second_per_gpu": batch.tokens_per_second,
    }


def gib(size: float) -> str:
    """Bytes in words: GiB with one digit, or two below 10."""
    value = size / GIB
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"
