"""The runs of a comparison: started one after another on this machine, and read from what they left."""

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from pmc_llama.metrics import read_metrics
from pmc_llama.profiling import read_profile
from pmc_llama.trainer import UNPROFILED_STEPS
from pmc_llama.variants import Variant

Row = Mapping[str, Any]

PROFILED_STEPS = 3
WARM_UP_STEPS = (
    UNPROFILED_STEPS + PROFILED_STEPS
)  # left out of speeds: the first allocate and fill caches, then a profile
GIB = 1 << 30


@dataclass(frozen=True)
class Spread:
    """A quantity over the repetitions: its median, the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Run:
    """One repetition of a variant.

    Args:
        rows: the records of `metrics.jsonl`, one a step in order.
        profile: seconds of a profiled step by kind of work (`profiling.Profile`), where there is a profile.
    """

    rows: list[Row]
    profile: Mapping[str, float]

    @cached_property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {row["step"]: row["loss"] for row in self.rows}

    @cached_property
    def heldout(self) -> dict[int, float]:
        """Held-out loss by step, where there is one."""
        return {row["step"]: row["heldout_loss"] for row in self.rows if row.get("heldout_loss") is not None}

    def median(self, key: str) -> float | None:
        """Median of a quantity after the warm-up steps; of all steps when there are no more."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return statistics.median(values[WARM_UP_STEPS:] or values) if values else None

    def mean(self, key: str) -> float | None:
        """Mean over all steps of a quantity that few steps have."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return statistics.fmean(values) if values else None

    def most(self, key: str) -> float | None:
        """Largest value of a quantity that not every record has; None where none has."""
        return max((row[key] for row in self.rows if row.get(key) is not None), default=None)

    def first(self, key: str) -> float | None:
        """A quantity at the first step."""
        value: float | None = self.rows[0].get(key)
        return value

    def profiled(self, kind: str) -> float | None:
        """Seconds that a profiled step spends on a kind of work."""
        return self.profile.get(kind)


@dataclass(frozen=True)
class Result:
    """A variant with all its repetitions, in order."""

    variant: Variant
    runs: list[Run]

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.variant.name

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step, of the first repetition."""
        return self.runs[0].losses

    @property
    def heldout(self) -> dict[int, float]:
        """Held-out loss by step, of the first repetition."""
        return self.runs[0].heldout

    def spread(self, values: Sequence[float | None]) -> Spread | None:
        """The spread of a value a repetition; None where one lacks it."""
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return Spread(statistics.median(known), min(known), max(known))

    @cached_property
    def repeat_difference(self) -> float:
        """Largest relative difference of a loss between a repetition and the first one."""
        return max(
            (abs(loss / self.losses[step] - 1) for run in self.runs[1:] for step, loss in run.losses.items()),
            default=0.0,
        )


def command(recipe: Path, variant: Variant, output: Path) -> list[str]:
    """What trains one repetition, with the interpreter first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(variant.ranks)]
    program = ["-m", "pmc_llama.cli", "train", str(recipe)]
    fixed = ["--output", str(output), "--logging.profile_steps", str(PROFILED_STEPS), "--resume"]
    return [sys.executable, *launcher, *program, *variant.options, *fixed]


def environment(ranks: int) -> dict[str, str]:
    """That of a run: each rank gets its part of the cores, where torchrun would give it one and say so."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}


def train(name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run one repetition, its lines on the console and in `log` alike.

    What torchrun prints after a rank's complaint is about processes, not about the mistake: for the log only.

    Raises:
        UserError: it failed.
    """
    complaint = ""
    with log.open("a") as kept, _started(command, environment) as process:
        for line in process.stdout or ():
            kept.write(line)
            kept.flush()
            if line.startswith("error: ") and not complaint:
                complaint = line.removeprefix("error: ").strip()
            if not complaint:
                print(f"{name:>9} | {line}", end="", flush=True)
    if process.returncode:
        reason = complaint or f"exit status {process.returncode}"
        raise UserError(f"training under {name} failed: {reason} (its whole log is in {log})")


def read_run(directory: Path) -> Run:
    """Read `metrics.jsonl` of a run, and its profile.

    Raises:
        UserError: the metrics are missing, empty or damaged.
    """
    path = directory / "metrics.jsonl"
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path} is empty; remove {directory} and compare again")
    profile = directory / "profile" / "profile.json"
    return Run(list(rows), read_profile(profile).seconds if profile.is_file() else {})


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
