"""What the console says of a step: one line, coloured on a terminal, plain in a log file, never wrapped."""

from collections import deque
from datetime import timedelta

from rich.console import Console

from pmc_llama.records import StepRecord


class ConsoleLines:
    """Prints one line a step, or fewer.

    Args:
        resume_step: the step of the checkpoint that the run goes on from.
        every_steps: steps between lines; the first, the last, and steps with a held-out loss or a skipped
            update always have one.
    """

    def __init__(self, resume_step: int, every_steps: int) -> None:
        self._console = Console(markup=False, emoji=False, soft_wrap=True)
        self._first_step = resume_step + 1
        self._every_steps = every_steps
        self._recent_seconds: deque[float] = deque(maxlen=20)

    def record(self, record: StepRecord) -> None:
        """Tell a step if its turn has come."""
        self._recent_seconds.append(record.step_seconds)
        is_due = (
            record.step % self._every_steps == 0
            or record.step in (self._first_step, record.steps)
            or record.heldout_loss is not None
            or record.skipped is not None
        )
        if is_due:
            self._console.print(console_line(record, sum(self._recent_seconds) / len(self._recent_seconds)))

    def say(self, text: str) -> None:
        """Print a line of text."""
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
        f"held-out {record.heldout_loss:.4f}" if record.heldout_loss is not None else None,
        f"grad-norm {record.grad_norm:.2f}",
        f"skipped: {record.skipped}" if record.skipped is not None else None,
        f"lr {record.learning_rate:.1e}",
        f"{record.tokens_per_second_per_device:,.0f} tok/s/dev",
        f"MFU {record.mfu:.1%}" if record.mfu is not None else None,
        f"mem {record.peak_memory_bytes / 2**30:.1f} GiB",
        f"data {record.data_seconds / record.step_seconds:.1%}",
        f"ETA {remaining}",
    ]
    return "  ".join(part for part in parts if part is not None)
