"""One recipe under every backend, one report: do they compute the same, and at what price?"""

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from data_tools.errors import UserError
from pmc_llama.config import Recipe, plain
from pmc_llama.metrics import read_metrics

Row = Mapping[str, Any]

WARM_UP_STEPS = 5  # left out of speeds: the first steps allocate, compile and fill caches
TABLE_STEPS = 30
PADDING = "Tokens/s and model FLOPs count the padding of papers shorter than a sequence."
GIB = 1 << 30


@dataclass(frozen=True)
class Run:
    """One backend's part of a comparison.

    Args:
        backend: its name.
        rows: the records of `metrics.jsonl`, one a step in order.
    """

    backend: str
    rows: list[Row]

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

    def most(self, key: str) -> float | None:
        """Largest value of a quantity that not every record has; None where none has."""
        return max((row[key] for row in self.rows if row.get(key) is not None), default=None)


def compare(recipe: Recipe, backends: Sequence[str], ranks: int) -> Path:
    """Train `recipe` under each backend, one after another on this machine, and write the report.

    Everything goes into `recipe.output`: `recipe.yaml`, a run's directory and console log for each backend,
    `report.md` and `losses.png`. A run that has finished is not repeated, and one that was interrupted goes
    on.

    Args:
        recipe: what to train; its seed decides the first weights, the same under each backend.
        backends: names of backends; differences are from the first.
        ranks: processes of each run.

    Returns:
        The report.

    Raises:
        UserError: `recipe.output` holds the comparison of another recipe, or of other ranks or versions, or
            a run failed.
    """
    if find_spec("matplotlib") is None:
        raise UserError("compare draws with matplotlib, which is missing; pip install 'pmc-llama[compare]'")
    output = recipe.output
    recipe_file = _keep_recipe(recipe, f"{ranks} ranks, {versions()}")
    commands = [_command(recipe_file, backend, ranks, output) for backend in backends]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))  # or torchrun gives each rank one, and says so
    for backend, command in zip(backends, commands, strict=True):
        _train(backend, command, {"OMP_NUM_THREADS": threads, **os.environ}, output / f"{backend}.log")
    runs = [read_run(backend, output / backend) for backend in backends]
    draw(runs, output / "losses.png")
    shown = [shlex.join(["python", *command[1:]]) for command in commands]
    report = output / "report.md"
    facts = [f"{ranks} ranks on {machine()}", versions()]
    _write(report, describe(runs, facts, shown, padded=recipe.data.mode == "window"))
    return report


# --- training ----------------------------------------------------------------------------------------------


def _keep_recipe(recipe: Recipe, conditions: str) -> Path:
    """Write the recipe as resolved, headed by what it ran on, or check that what is there is the same."""
    path = recipe.output / "recipe.yaml"
    head, body = f"# {conditions}\n", yaml.safe_dump(plain(recipe), sort_keys=False)
    try:
        kept = path.read_text(errors="replace") if path.exists() else head + body
        before = kept.removesuffix(body).removeprefix("# ").strip() or "unknown conditions"
        if not kept.endswith(body):
            raise UserError(
                f"{recipe.output} holds the comparison of another recipe ({path}); choose another --output"
            )
        if not kept.startswith(head):
            raise UserError(
                f"{recipe.output} holds the comparison under {before}, expected {conditions}; "
                "choose another --output"
            )
        recipe.output.mkdir(parents=True, exist_ok=True)
        _write(path, head + body)
    except OSError as error:
        raise UserError(
            f"{recipe.output} cannot be written: {error.strerror}; choose another --output"
        ) from error
    return path


def _command(recipe: Path, backend: str, ranks: int, output: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = ["-m", "pmc_llama.cli", "train", str(recipe)]
    options = ["--backend", backend, "--output", str(output / backend), "--resume"]
    return [sys.executable, *launcher, *program, *options]


def _train(backend: str, command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run one backend, its lines on the console and in `log` alike.

    What torchrun prints after a rank's complaint is about processes, not about the mistake: for the log only.
    """
    complaint = ""
    with log.open("a") as kept, _started(command, environment) as process:
        for line in process.stdout or ():
            kept.write(line)
            kept.flush()
            if line.startswith("error: ") and not complaint:
                complaint = line.removeprefix("error: ").strip()
            if not complaint:
                print(f"{backend:>9} | {line}", end="", flush=True)
    if process.returncode:
        reason = complaint or f"exit status {process.returncode}"
        raise UserError(f"training under {backend} failed: {reason} (its whole log is in {log})")


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment | {"PYTHONUNBUFFERED": "1"},
    )


def read_run(backend: str, directory: Path) -> Run:
    """Read `metrics.jsonl` of a run.

    Raises:
        UserError: the file is missing, empty or damaged.
    """
    path = directory / "metrics.jsonl"
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path} is empty; remove {directory} and compare again")
    return Run(backend, list(rows))


# --- the report --------------------------------------------------------------------------------------------


def differences(run: Run, reference: Run) -> dict[int, float]:
    """Training loss minus that of the reference, at the steps that both made."""
    return {
        step: loss - reference.losses[step] for step, loss in run.losses.items() if step in reference.losses
    }


def verdict(run: Run, reference: Run) -> str:
    """One sentence on how the losses of two runs differ."""
    found = differences(run, reference)
    names = f"{run.backend} and {reference.backend}"
    if not found:
        return f"{names} have no step in common."
    step, worst = max(found.items(), key=lambda item: abs(item[1]))
    if worst == 0:
        return f"The losses of {names} are bitwise equal at all {len(found)} steps."
    return (
        f"The losses of {names} differ by at most {abs(worst):.3g} (step {step} of {len(found)}), "
        f"{abs(worst / reference.losses[step]):.2g} of the loss."
    )


def describe(runs: Sequence[Run], facts: Sequence[str], commands: Sequence[str], padded: bool = False) -> str:
    """The report as Markdown.

    Args:
        runs: of each backend; differences are from the first.
        facts: lines about the machine and the software.
        commands: one a run, as they can be repeated.
        padded: sequences are filled up where a paper is shorter.
    """
    reference, *others = runs
    names = [run.backend for run in runs]
    changes = [differences(run, reference) for run in others]
    steps = _spread(list(reference.losses), TABLE_STEPS)
    lines = [
        f"# {' and '.join(names)}, one recipe",
        "",
        *[verdict(run, reference) for run in others],
        "",
        "![training and held-out loss of each backend, and their difference](losses.png)",
        "",
        *_table(["", *names], [[label, *map(show, runs)] for label, show in _QUANTITIES.items()]),
        "",
        f"Speeds are medians without the first {WARM_UP_STEPS} steps. Time to the first step counts from the "
        "start of the process.",
        "",
        *([PADDING, ""] if padded else []),
        "## Losses, nats a token",
        "",
        *_table(
            ["step", *names, *[f"{run.backend} - {reference.backend}" for run in others]],
            [
                [str(step), *[_number(run.losses.get(step), ".7f") for run in runs]]
                + [_number(change.get(step), ".2e", zero="0") for change in changes]
                for step in steps
            ],
        ),
        "",
        "## Held-out losses, nats a token",
        "",
        *_table(
            ["step", *names],
            [
                [str(step), *[_number(run.heldout.get(step), ".7f") for run in runs]]
                for step in _spread(list(reference.heldout), TABLE_STEPS)
            ],
        ),
        "",
        "## Made with",
        "",
        *[f"- {fact}" for fact in facts],
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "",
        *[f"    {command}" for command in commands],
        "",
    ]
    return "\n".join(lines)


def _first_and_last(values: Mapping[int, float]) -> str:
    if not values:
        return "none"
    return f"{values[min(values)]:.4f} to {values[max(values)]:.4f}"


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


def _number(value: float | None, form: str, zero: str | None = None) -> str:
    if value is None:
        return "-"
    return zero if zero is not None and value == 0 else format(value, form)


_QUANTITIES: dict[str, Callable[[Run], str]] = {
    "steps": lambda run: f"{len(run.rows):,}",
    "training loss": lambda run: _first_and_last(run.losses),
    "held-out loss": lambda run: _first_and_last(run.heldout),
    "tokens/s": lambda run: _number(run.median("tokens_per_second"), ",.0f"),
    "tokens/s a device": lambda run: _number(run.median("tokens_per_second_per_device"), ",.0f"),
    "model FLOPs utilization": lambda run: _number(run.median("mfu"), ".1%"),
    "peak memory of a rank, GiB": lambda run: _number(_gib(run.most("peak_memory_bytes")), ".2f"),
    "time to first step, s": lambda run: _number(run.rows[0].get("seconds_since_start"), ".1f"),
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def machine() -> str:
    """Processors, memory and GPUs of this machine."""
    parts = [f"{psutil.cpu_count()} x {_processor()}", f"{psutil.virtual_memory().total / GIB:.0f} GiB"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    parts += [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> str:
    """What ran."""
    packages = ("pmc-llama", "torch", "deepspeed", "transformers")
    return ", ".join(
        [f"Python {platform.python_version()}", *[f"{name} {version(name)}" for name in packages]]
    )


# --- the picture -------------------------------------------------------------------------------------------

# Blue, orange, green and purple of Okabe and Ito's palette: told apart by everyone. The first line is broad
# and pale, so that one that lies exactly on it is seen on top of it.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linewidth": 4, "alpha": 0.45, "markersize": 11},
    {"color": "#D55E00", "linewidth": 1.4, "linestyle": (0, (5, 2)), "markersize": 6},
    {"color": "#009E73", "linewidth": 1.4, "linestyle": (0, (1, 1)), "markersize": 4},
    {"color": "#CC79A7", "linewidth": 1.4, "linestyle": "-.", "markersize": 2},
)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the losses of every run, and below them their differences from the first, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    reference, equal = runs[0], True
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for run, style in zip(runs, _STYLES, strict=False):
        points = style | {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "alpha": 1}
        above.plot(list(run.losses), list(run.losses.values()), label=f"{run.backend}, training",
                   **style | {"marker": "none"})  # fmt: skip
        above.plot(list(run.heldout), list(run.heldout.values()), label=f"{run.backend}, held out", **points)
        if run is not reference:
            change = differences(run, reference)
            equal = equal and not any(change.values())
            label = f"{run.backend} \u2212 {reference.backend}"
            below.plot(list(change), list(change.values()), color=style["color"], linewidth=1.4, label=label)
    above.set_title("\n".join(verdict(run, reference) for run in runs[1:]), fontsize=10, loc="left")
    above.set_ylabel("loss, nats a token")
    above.legend(frameon=False, ncols=len(runs))
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.legend(frameon=False)
    if equal:
        below.set_yticks([0])  # no scale to read off a line that is zero everywhere
    else:
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (above, below):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", dpi=150)
    aside.replace(path)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.replace(path)
