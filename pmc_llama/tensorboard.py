"""What TensorBoard gets: scalars of every step, and a text tab that says what was run."""

from dataclasses import asdict
from pathlib import Path

from pmc_llama.provenance import Start
from pmc_llama.records import StepRecord


def scalars(record: StepRecord) -> dict[str, float]:
    """A step's numbers by the names that trackers show; what a step has not is left out."""
    values = {
        "loss/train": record.loss,
        "loss/held-out": record.heldout_loss,
        "optimizer/learning-rate": record.learning_rate,
        "optimizer/grad-norm": record.grad_norm,
        "optimizer/updates": record.updates,
        "optimizer/skipped": float(record.skipped is not None),
        "speed/tokens-per-second": record.tokens_per_second,
        "speed/tokens-per-second-per-device": record.tokens_per_second_per_device,
        "speed/mfu": record.mfu,
        "speed/step-seconds": record.step_seconds,
        "speed/data-seconds": record.data_seconds,
        "speed/forward-backward-seconds": record.forward_backward_seconds,
        "speed/optimizer-seconds": record.optimizer_seconds,
        "speed/checkpoint-seconds": record.checkpoint_seconds,
        "memory/peak-bytes": record.peak_memory_bytes,
        "progress/epoch": record.epoch,
        "progress/tokens": record.tokens,
        **{f"coverage/{corpus}": part for corpus, part in record.coverage.items()},
    }
    return {name: value for name, value in values.items() if value is not None}


class TensorBoard:
    """Event files of a run.

    Args:
        directory: of the event files.
        resume_step: the step of the checkpoint that the run goes on from.
        recipe_text: the recipe as YAML.
        start: this start of the run.
    """

    def __init__(self, directory: Path, resume_step: int, recipe_text: str, start: Start | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        # On reading, TensorBoard drops what earlier runs wrote from `purge_step` on.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)
        self._writer.add_text("recipe", f"```yaml\n{recipe_text}\n```", resume_step)
        if start:
            self._writer.add_text("start", _markdown(start), resume_step)

    def record(self, record: StepRecord) -> None:
        """Write a step's scalars, to be read at once."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _markdown(start: Start) -> str:
    """A start as a table, since TensorBoard's text tab reads Markdown."""
    rows = {**asdict(start), "hosts": ", ".join(start.hosts)}
    for name in ("versions", "environment"):
        rows[name] = ", ".join(f"{key} {value}" for key, value in rows[name].items())
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows.items())])
