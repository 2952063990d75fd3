"""Runs of `pmc-llama train` on this CPU: a small LLaMA on the sample papers."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

WARM_UP = 5
"""Steps at the start of a run that are not counted."""
SEQUENCE, GLOBAL, MICRO = 256, 8, 2
"""Tokens of a sequence, sequences of a global batch and of a micro-batch."""

_SIZE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
_BIN = Path(sys.executable).parent
_SAMPLE = Path(__file__).parents[1] / "sample"


def prepare(directory: Path) -> None:
    """Make a corpus of the sample papers, and the model's configuration."""
    build: list[str | Path] = [_BIN / "pmc-data", "build", "--input", _SAMPLE / "s2orc", _SAMPLE / "jats"]
    build += ["--max_bad", "0.1", "--tokenizer", _SAMPLE / "tokenizer.model"]
    build += ["--output", directory / "corpus"]
    subprocess.run(build, check=True, capture_output=True)
    vocab_size = json.loads((directory / "corpus" / "corpus.json").read_text())["tokenizer"]["vocab_size"]
    LlamaConfig(vocab_size=vocab_size, **_SIZE).to_json_file(directory / "config.json")


def train(
    directory: Path, backend: str, precision: str, ranks: int, more: dict[str, Any]
) -> list[dict[str, Any]]:
    """The records of a run, which leaves its directory at `run`.

    Args:
        directory: that `prepare` filled.
        backend: `fsdp` or `deepspeed`.
        precision: to compute in.
        ranks: processes, which share the cores.
        more: other keys of the recipe.
    """
    recipe, run = directory / "recipe.yaml", directory / "run"
    recipe.write_text("seed: 1\n")
    options = {
        "output": run,
        "backend": backend,
        "model.size": directory / "config.json",
        "data.corpus": directory / "corpus",
        "data.mode": "packed",
        "data.sequence_length": SEQUENCE,
        "batch.global_size": GLOBAL,
        "batch.micro_size": MICRO,
        "precision.compute": precision,
        "evaluation.max_sequences": 2,
        **more,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    shutil.rmtree(run, ignore_errors=True)
    launch(ranks, ["--module", "pmc_llama.cli", "train", recipe, *words])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def step_ends(records: Sequence[dict[str, Any]]) -> list[float]:
    """When each step of a run ended, in seconds."""
    return [record["seconds_since_start"] for record in records]


def speed(ends: Sequence[float]) -> float:
    """Tokens/s, from when each step ended; the last one is followed by what ends a run and left out."""
    seconds = [end - begin for begin, end in pairwise(ends)]
    return GLOBAL * SEQUENCE / statistics.median(seconds[WARM_UP:-1])


def launch(ranks: int, arguments: Sequence[Any]) -> str:
    """Run torchrun; what it printed."""
    command = [_BIN / "torchrun", "--standalone", "--nproc-per-node", str(ranks), *map(str, arguments)]
    return run_command(command, ranks)


def run_command(command: Sequence[Any], ranks: int) -> str:
    """Run a command of `ranks` processes, which share the cores; what it printed."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout
