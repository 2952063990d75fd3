"""Commands typed one after another, as a user would: shown, run, and the end when one fails."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

RANKS = min(2, torch.cuda.device_count()) or 2  # NCCL wants a GPU for each rank

console = Console(highlight=False, soft_wrap=True)


def stage(title: str) -> None:
    """Head the next part of the log."""
    console.rule(f"[bold]{title}")


def run(program: str, *arguments: str) -> None:
    """Run a command of this interpreter's environment; a failure ends this program with its status."""
    command = shown(program, *arguments)
    status = subprocess.run(command, check=False, env=environment()).returncode
    if status:
        console.print(f"[red]the demo stops: the command above ended with status {status}")
        sys.exit(status)


def shown(program: str, *arguments: str) -> list[str]:
    """A command line of this interpreter's environment, once it is shown."""
    console.print(f"[bold green]$[/] {shlex.join([program, *arguments])}")
    return [str(Path(sys.executable).parent / program), *arguments]


def on_ranks(*arguments: str) -> tuple[str, ...]:
    """The words that run `pmc-llama` with these arguments on `RANKS` ranks."""
    launcher = ("torchrun", "--standalone", "--nproc-per-node", str(RANKS))
    return (*launcher, "--module", "pmc_llama.cli", *arguments)


def options(values: Mapping[str, object]) -> tuple[str, ...]:
    """Recipe keys as the words of a command line."""
    return tuple(str(word) for key, value in values.items() for word in (f"--{key}", value))


def environment() -> dict[str, str]:
    """A core for each rank; torchrun warns without it."""
    return {"OMP_NUM_THREADS": "1", **os.environ}
