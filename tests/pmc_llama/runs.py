"""Whole runs by the command line, on two real ranks, as tests start, stop and read them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
# What must not change by a bit when a run is interrupted or its backend switched.
NUMBERS = ("step", "samples", "tokens", "loss", "learning_rate", "heldout_loss")


def command_line(recipe: Path, options: Mapping[str, str], *more: str) -> list[str]:
    """The arguments of `pmc-llama train` for a recipe and its overrides."""
    return [str(recipe), *(word for pair in options.items() for word in pair), *more]


def start(arguments: list[str], **popen: Any) -> subprocess.Popen[str]:
    """Start `pmc-llama train` on two ranks under torchrun; its output goes to a pipe."""
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--module", "pmc_llama.cli"]
    return subprocess.Popen(
        [*command, "train", *arguments],
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **popen,
    )


def finish(arguments: list[str]) -> str:
    """Run to the end, which has to be a good one; the output."""
    process = start(arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and every rank, at one moment."""
    try:
        launcher = psutil.Process(process.pid)
        family = [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=60)


def numbers(run: Path) -> list[dict[str, Any]]:
    """Of each step of a run's `metrics.jsonl` what an interruption must not change."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: record[key] for key in NUMBERS} for record in map(json.loads, lines)]
