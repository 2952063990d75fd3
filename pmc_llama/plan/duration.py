"""How long the whole run takes, what it costs, and what its checkpoints take."""

import math
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus import Corpus
from pmc_llama.config import Recipe
from pmc_llama.plan.cluster import Cluster
from pmc_llama.plan.throughput import StepTime, Workload

# PMC-LLaMA's corpus (arXiv 2304.14454): 4.8 million papers of S2ORC with a PMC id, over 75 billion tokens.
TOKENS, PAPERS = 75_000_000_000, 4_800_000
CHECKPOINT_BYTES = 12  # of a parameter: fp32 weight and both moments


@dataclass(frozen=True)
class CorpusSize:
    """What of a corpus decides how long a pass over it takes.

    Attributes:
        papers: to train on.
        tokens: of them.
        source: where that is known from.
    """

    papers: int
    tokens: int
    source: str


@dataclass(frozen=True)
class Duration:
    """A whole run.

    Attributes:
        steps: optimizer steps.
        tokens: inputs in all of them, padding included.
        wall_seconds: steps, evaluations, and what training stops for checkpoints.
        gpu_hours: of all GPUs.
        evaluation_seconds: of one evaluation.
        checkpoint_bytes: of one checkpoint.
        checkpoint_seconds: to write it.
        stall_seconds: that training stops for it.
        kept_bytes: of the checkpoints kept at the end.
    """

    steps: int
    tokens: int
    wall_seconds: float
    gpu_hours: float
    evaluation_seconds: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    stall_seconds: float
    kept_bytes: int


def corpus_here(recipe: Recipe) -> str | None:
    """Path of the recipe's (first) corpus, if it is on this machine."""
    path = recipe.data.corpora[0].path if recipe.data.corpora else recipe.data.corpus
    return path if Path(path).is_dir() else None


def corpus_size(recipe: Recipe, tokens: int | None, papers: int | None) -> CorpusSize:
    """What is given, else what the recipe's corpus has, if it is on this machine, else what PMC-LLaMA's had.

    Of a blend its first corpus, by which epochs count.

    Raises:
        UserError: the corpus is damaged.
    """
    path = corpus_here(recipe)
    if tokens is None and papers is None and path:
        split = Corpus.open(path).split("train")
        return CorpusSize(split.documents, split.tokens, f"corpus {path}")
    given = [name for name, value in (("--tokens", tokens), ("--papers", papers)) if value is not None]
    source = f"{' and '.join(given)}; " if given else "the corpus is not here; "
    if len(given) < 2:
        source += "PMC-LLaMA's corpus: 75 billion tokens, 4.8 million papers (arXiv 2304.14454)"
    return CorpusSize(papers or PAPERS, tokens or TOKENS, source.removesuffix("; "))


def count_steps(recipe: Recipe, corpus: CorpusSize) -> int:
    """Optimizer steps of a run: in `packed` mode an epoch is every token, else a sample of every paper."""
    if recipe.schedule.steps is not None:
        return recipe.schedule.steps
    windows = math.ceil(corpus.tokens / recipe.data.sequence_length)
    samples = recipe.schedule.epochs * (windows if recipe.data.mode == "packed" else corpus.papers)
    if (
        recipe.data.corpora
    ):  # an epoch is one of the first corpus, the others come in the ratio of the weights
        weights = [asked.weight for asked in recipe.data.corpora]
        samples *= sum(weights) / weights[0]
    return math.ceil(round(samples, 6) / recipe.batch.global_size)


def rows_of_step(recipe: Recipe, corpus: CorpusSize, ranks: int) -> int:
    """Rows of `data.sequence_length` inputs that a step takes, over all ranks.

    The sequences of the global batch; in `whole` mode what its documents fill, at the corpus' mean length, up
    to a multiple of micro-batch times ranks, as they are packed (`pmc_llama.whole`).
    """
    batch, length = recipe.batch, recipe.data.sequence_length
    if recipe.data.mode != "whole":
        return batch.global_size
    mean = min(corpus.tokens / corpus.papers, length)
    together = batch.micro_size * ranks
    return math.ceil(batch.global_size * mean / length / together) * together


def plan_duration(
    recipe: Recipe, work: Workload, step: StepTime, cluster: Cluster, corpus: CorpusSize
) -> Duration:
    """How long `recipe` takes.

    An evaluation is counted as forward alone, a third of a micro-batch's time, for each micro-batch of the
    held-out sequences. A checkpoint written behind training stops it for a copy over PCIe.
    """
    steps, saved = count_steps(recipe, corpus), recipe.checkpoint
    micro_batches = math.ceil(recipe.evaluation.max_sequences / (work.micro_size * cluster.ranks))
    evaluation = micro_batches * step.total / work.accumulation / 3
    size = CHECKPOINT_BYTES * work.shape.parameters
    write = size / cluster.filesystem_bandwidth
    stall = size / cluster.ranks / cluster.gpu.host_link_bandwidth if saved.asynchronous else write
    evaluations = steps // recipe.evaluation.every_steps + 2
    saves = math.ceil(steps / saved.every_steps)
    wall = steps * step.total + evaluations * evaluation + saves * stall
    kept = min(saves, saved.keep_last) + (steps // saved.keep_every if saved.keep_every else 0)
    return Duration(
        steps=steps,
        tokens=steps * rows_of_step(recipe, corpus, cluster.ranks) * recipe.data.sequence_length,
        wall_seconds=wall,
        gpu_hours=wall * cluster.ranks / 3600,
        evaluation_seconds=evaluation,
        checkpoint_bytes=size,
        checkpoint_seconds=write,
        stall_seconds=stall,
        kept_bytes=kept * size,
    )
