"""Runs of `pmc-llama train` on this CPU: a small LLaMA on the sample papers."""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

WARM_UP = 5
"""Steps at the start of a run that are not counted."""
TURN_SECONDS = 5.0
"""For which one run computes while the others wait."""
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


def start_training(
    directory: Path, name: str, backend: str, precision: str, ranks: int, more: Mapping[str, Any]
) -> "Job":
    """Start a run of ours.

    Args:
        directory: that `prepare` filled.
        name: of the run's directory in it, which is made anew.
        backend: `fsdp` or `deepspeed`.
        precision: to compute in.
        ranks: processes, which share the cores.
        more: other keys of the recipe.
    """
    recipe, run = directory / "recipe.yaml", directory / name
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
    return start(directory / f"{name}.log", ranks, ["-m", "pmc_llama.cli", "train", recipe, *words])


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    """What a run of ours recorded, step by step."""
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


def step_ends(records: Sequence[dict[str, Any]]) -> list[float]:
    """When each step of a run ended, in seconds."""
    return [record["seconds_since_start"] for record in records]


def speed(ends: Sequence[float]) -> float:
    """Tokens/s, from when each step ended; the last one is followed by what ends a run and left out."""
    seconds = [end - begin for begin, end in pairwise(ends)]
    return GLOBAL * SEQUENCE / statistics.median(seconds[WARM_UP:-1])


class Job(NamedTuple):
    """A program on several ranks.

    Attributes:
        ranks: its processes.
        log: what they print.
    """

    ranks: list[subprocess.Popen[bytes]]
    log: Path


def start(log: Path, ranks: int, arguments: Sequence[Any], launched: bool = True) -> Job:
    """Start Python on several ranks, which share the cores.

    Args:
        log: file for what they print.
        ranks: processes.
        arguments: of Python.
        launched: with the variables that a launcher sets.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    with log.open("wb") as output:
        for rank in range(ranks):
            variables = {**common, "RANK": rank, "LOCAL_RANK": rank} if launched else {}
            told = {key: str(value) for key, value in {**variables, "OMP_NUM_THREADS": threads}.items()}
            command = [sys.executable, *map(str, arguments)]
            processes.append(
                subprocess.Popen(command, env={**os.environ, **told}, stdout=output, stderr=subprocess.STDOUT)
            )
    return Job(processes, log)


def take_turns(jobs: Sequence[Job]) -> None:
    """Let one job run for some seconds while the others are stopped, and so on until all have ended.

    A machine that others share is now faster, now slower, for seconds and for minutes: so each job has its
    part of both. A step that is cut by a turn takes long; medians do not see it.
    """
    try:
        _send(jobs, signal.SIGSTOP)
        while any(map(_lives, jobs)):
            for job in jobs:
                _send([job], signal.SIGCONT)
                until = time.monotonic() + TURN_SECONDS
                while _lives(job) and time.monotonic() < until:
                    time.sleep(0.05)
                _send([job], signal.SIGSTOP)
    finally:
        _send(jobs, signal.SIGKILL)


def _lives(job: Job) -> bool:
    """Whether a job runs on; ends this program when one of its ranks has failed."""
    codes = [process.poll() for process in job.ranks]
    if any(codes):
        sys.exit(job.log.read_text())
    return None in codes


def _send(jobs: Sequence[Job], what: signal.Signals) -> None:
    for job in jobs:
        for process in job.ranks:
            process.send_signal(what)
