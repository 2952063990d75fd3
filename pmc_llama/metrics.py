"""What a run tells: a console line a step, `metrics.jsonl`, TensorBoard; all by rank 0.

Both files read as those of one run that was never interrupted: steps that an interrupted run made after the
checkpoint it is resumed from are removed when the run is opened again.
"""

import json
import os
import resource
from collections import deque
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_tools.errors import UserError
from data_tools.files import write_published


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Losses are in nats a target."""

    step: int  # from 1
    steps: int  # of the whole run
    samples: int  # sequences consumed so far, this step's included
    tokens: int  # inputs consumed so far, padding included
    epoch: float  # passes over the corpus so far
    loss: float  # of the global batch, before the step
    grad_norm: float  # global, before clipping
    learning_rate: float
    step_seconds: float
    data_seconds: float  # of those, waiting for the batch
    seconds_since_start: float  # of the process
    tokens_per_second: float  # all ranks
    tokens_per_second_per_device: float
    peak_memory_bytes: int  # of this rank, see `peak_memory`
    mfu: float | None = None  # see `flops.model_flops_utilization`
    heldout_loss: float | None = None  # at steps that evaluate, after the step


# --- the run's records --------------------------------------------------------------------------------------


class Metrics:
    """The records of a run; on ranks other than 0 every method does nothing.

    Args:
        output_dir: the run's directory: gets `recipe.yaml`, `metrics.jsonl` and `tensorboard/`; made if
            missing.
        rank: of this process.
        resume_step: the step of the checkpoint that the run goes on from; 0 when it starts afresh.
        recipe_text: the recipe as YAML, for its file and TensorBoard's text tab.
        every_steps: steps between console lines; the first, the last, and steps with a held-out loss always
            have one. The files have every step.

    Raises:
        UserError: `output_dir` cannot be written to, or its `metrics.jsonl` is damaged.
    """

    def __init__(
        self, output_dir: Path, rank: int, resume_step: int, recipe_text: str, every_steps: int
    ) -> None:
        self._speaks = rank == 0
        if not self._speaks:
            return
        self._console = _ConsoleLines(resume_step, every_steps)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_published(output_dir / "recipe.yaml", recipe_text.encode())
            self._json_lines = _JsonLines(output_dir / "metrics.jsonl", resume_step)
            self._tensorboard = _TensorBoard(output_dir / "tensorboard", resume_step, recipe_text)
        except OSError as error:
            raise UserError(f"output: cannot write the run's records to {output_dir}: {error}") from error

    def record(self, record: StepRecord) -> None:
        """Tell a step; once it returns, a kill of the process loses nothing of it.

        Raises:
            UserError: the disk refuses.
        """
        if self._speaks:
            try:
                self._json_lines.record(record)
                self._tensorboard.record(record)
            except OSError as error:
                raise UserError(
                    f"The run's records cannot be written: {error}; mend that, then go on with --resume."
                ) from error
            self._console.record(record)

    def synchronize(self) -> None:
        """Have `metrics.jsonl` on disk, so that no checkpoint outlives the lines before it."""
        if self._speaks:
            self._json_lines.synchronize()

    def say(self, text: str) -> None:
        """Print a line of text."""
        if self._speaks:
            self._console.say(text)

    def close(self) -> None:
        """Close the files."""
        if self._speaks:
            self._json_lines.close()
            self._tensorboard.close()


class _ConsoleLines:
    """One line a step: coloured on a terminal, plain in a log file, never wrapped."""

    def __init__(self, resume_step: int, every_steps: int) -> None:
        self._console = Console(markup=False, emoji=False, soft_wrap=True)
        self._first_step = resume_step + 1
        self._every_steps = every_steps
        self._recent_seconds: deque[float] = deque(maxlen=20)

    def record(self, record: StepRecord) -> None:
        self._recent_seconds.append(record.step_seconds)
        is_due = (
            record.step % self._every_steps == 0
            or record.step in (self._first_step, record.steps)
            or record.heldout_loss is not None
        )
        if is_due:
            self._console.print(console_line(record, sum(self._recent_seconds) / len(self._recent_seconds)))

    def say(self, text: str) -> None:
        self._console.print(text)


def console_line(record: StepRecord, seconds_per_step: float) -> str:
    """What the console says of a step.

    Args:
        record: the step.
        seconds_per_step: what the remaining steps are expected to take, for the ETA.
    """
    remaining = timedelta(seconds=round((record.steps - record.step) * seconds_per_step))
    parts = [
        f"step {record.step}/{record.steps}",
        f"{100 * record.step // record.steps}%",
        f"loss {record.loss:.4f}",
        f"grad-norm {record.grad_norm:.2f}",
        f"lr {record.learning_rate:.1e}",
        f"{record.tokens_per_second_per_device:,.0f} tok/s/dev",
        f"mem {record.peak_memory_bytes / 2**30:.1f} GiB",
        f"data {record.data_seconds / record.step_seconds:.1%}",
        f"ETA {remaining}",
    ]
    if record.mfu is not None:
        parts.insert(6, f"MFU {record.mfu:.1%}")
    if record.heldout_loss is not None:
        parts.insert(3, f"held-out {record.heldout_loss:.4f}")
    return "  ".join(parts)


class _JsonLines:
    """`metrics.jsonl`: a JSON object a step. Floats are written so that they read back bit for bit."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if path.exists() else []
        write_published(path, "".join(_json_line(row) for row in kept).encode())
        self._file = path.open("a")

    def record(self, record: StepRecord) -> None:
        self._file.write(_json_line(asdict(record)))
        self._file.flush()

    def synchronize(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a `metrics.jsonl`, in order, each with the fields of `StepRecord`.

    A last line without its end, torn by a kill, is not a record and is left out.

    Raises:
        UserError: the file cannot be read, or another line is not a record.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: line {number} is not the record of a step; move the file away to go on without it."
            ) from error
        rows.append(row)
    return rows


class _TensorBoard:
    """Scalars of every step and the recipe as a text."""

    def __init__(self, directory: Path, resume_step: int, recipe_text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        # On reading, TensorBoard drops what earlier runs wrote from `purge_step` on.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)
        self._writer.add_text("recipe", f"```yaml\n{recipe_text}\n```", resume_step)

    def record(self, record: StepRecord) -> None:
        scalars = {
            "loss/train": record.loss,
            "loss/held-out": record.heldout_loss,
            "optimizer/learning-rate": record.learning_rate,
            "optimizer/grad-norm": record.grad_norm,
            "speed/tokens-per-second": record.tokens_per_second,
            "speed/tokens-per-second-per-device": record.tokens_per_second_per_device,
            "speed/mfu": record.mfu,
            "speed/data-seconds": record.data_seconds,
            "memory/peak-bytes": record.peak_memory_bytes,
            "progress/epoch": record.epoch,
        }
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: allocated on its GPU, or resident when it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
