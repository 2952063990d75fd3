"""What a run tells: a console line a step, `metrics.jsonl`, TensorBoard, Weights & Biases; all by rank 0.

`metrics.jsonl` and TensorBoard read as those of one run that was never interrupted: steps that an interrupted
run made after the checkpoint it is resumed from are removed when the run is opened again.
"""

import json
import os
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from data_tools.errors import UserError
from data_tools.files import write_published
from pmc_llama.console import ConsoleLines
from pmc_llama.provenance import Start, append_start
from pmc_llama.records import StepRecord
from pmc_llama.tensorboard import TensorBoard
from pmc_llama.weights_and_biases import WeightsAndBiases

__all__ = ["Metrics", "StepRecord", "peak_memory", "read_metrics"]


class _Sink(Protocol):
    """A place that gets every step."""

    def record(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """The records of a run; on ranks other than 0 every method does nothing.

    Args:
        output_dir: the run's directory: gets `recipe.yaml`, `run.json`, `metrics.jsonl` and `tensorboard/`;
            made if missing.
        rank: of this process.
        resume_step: the step of the checkpoint that the run goes on from; 0 when it starts afresh.
        recipe_text: the recipe as YAML, for its file and the trackers.
        every_steps: steps between console lines, see `ConsoleLines`. The files have every step.
        start: this start of the run, for `run.json` and the trackers.
        wandb_project: a project of Weights & Biases that gets every step as well.

    Raises:
        UserError: `output_dir` cannot be written to, its `metrics.jsonl` or `run.json` is damaged, or Weights
            & Biases is asked for and cannot be had.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        resume_step: int,
        recipe_text: str,
        every_steps: int,
        start: Start | None = None,
        wandb_project: str | None = None,
    ) -> None:
        self._speaks = rank == 0
        if not self._speaks:
            return
        self._console = ConsoleLines(resume_step, every_steps)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_published(output_dir / "recipe.yaml", recipe_text.encode())
            if start:
                append_start(output_dir / "run.json", start)
            self._json_lines = _JsonLines(output_dir / "metrics.jsonl", resume_step)
            self._sinks: list[_Sink] = [
                self._json_lines,
                TensorBoard(output_dir / "tensorboard", resume_step, recipe_text, start),
            ]
            if wandb_project:
                self._sinks.append(
                    WeightsAndBiases(output_dir, wandb_project, resume_step, recipe_text, start)
                )
        except OSError as error:
            raise UserError(f"output: cannot write the run's records to {output_dir}: {error}") from error

    def record(self, record: StepRecord) -> None:
        """Tell a step; once it returns, a kill of the process loses nothing of it.

        Raises:
            UserError: the disk refuses.
        """
        if self._speaks:
            try:
                for sink in self._sinks:
                    sink.record(record)
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
            for sink in self._sinks:
                sink.close()


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


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: allocated on its GPU, or resident when it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
