"""Which updates are not made: for numbers that are not finite, for spikes, for steps that the recipe names.

A decision depends on the loss and the gradient norm of a step and of those before it alone. They have the
same bits on every rank, so all ranks decide alike without talking; and what is remembered of them is part of
a checkpoint, so a resumed run decides as one that was never interrupted.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from data_tools.errors import UserError
from pmc_llama.config import GuardConfig


class Guard:
    """Judges every step's loss and gradient norm, and remembers what it needs for the next.

    A step is a spike when its loss, or its gradient norm, is x with

        x > mean + spike_deviations * deviation

    where mean and (n - 1) standard deviation are of the last `spike_window` values before it. Nothing is
    a spike until `spike_window` / 2 values, and at least 2, are known. Window, deviation, one side and first
    steps are those of OLMo-core's `SkipStepOptimizer` (allenai/OLMo-core,
    `src/olmo_core/optim/skip_step_optimizer.py`).

    A spike enters the window like any other value, as it does there. So a lasting change of level is taken
    for a spike only until it makes up 1 / (spike_deviations^2 + 1) of the window: four steps of 128 at 6
    deviations. Kept out of it, a spike would leave a guard that refuses every step from then on. The price
    is a guard that a high spike makes less watchful until it has left the window. What is not finite does
    not enter, since no mean could be taken over it.

    Args:
        config: the recipe's `guards` section, checked.
        state: of the run that is resumed, from `state()`; None when nothing was judged before.

    Attributes:
        skipped: updates skipped in the whole run, for numbers that are not finite or for spikes.
        skipped_in_a_row: of those, since the last update that was made.
    """

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        self.config = config
        state = state or {"losses": [], "grad_norms": [], "skipped": 0, "skipped_in_a_row": 0}
        self.losses: deque[float] = deque(state["losses"], maxlen=config.spike_window)
        self.grad_norms: deque[float] = deque(state["grad_norms"], maxlen=config.spike_window)
        self.skipped: int = state["skipped"]
        self.skipped_in_a_row: int = state["skipped_in_a_row"]

    def passes_over(self, step: int) -> bool:
        """Whether the recipe names `step` (from 1) in `skip_steps`.

        The guard remembers nothing of such a step: it has neither loss nor norm, and is not counted.
        """
        return any(first <= step <= last for first, last in self.config.skip_steps)

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Judge a step before its update, and remember it.

        Args:
            loss: of the global batch, in nats a target.
            grad_norm: global, before clipping.

        Returns:
            Why the update must not be made, in words; None when it is to be made.
        """
        reason = _not_finite(loss, grad_norm) or self._spike(loss, grad_norm)
        if reason:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
        return reason

    @property
    def must_stop(self) -> bool:
        """Whether more updates in a row were skipped than the recipe allows."""
        return self.skipped_in_a_row > self.config.max_skipped

    def stop(self, updated: int, step: int, reason: str) -> UserError:
        """What to tell the user of a run that stops here, after a checkpoint was published.

        Args:
            updated: the last step whose update was made, which the checkpoint is of.
            step: the last step that was skipped.
            reason: the last objection.
        """
        return UserError(
            f"{self.skipped_in_a_row} updates in a row were skipped up to step {step}, more than "
            f"guards.max_skipped, {self.config.max_skipped}; the last for {reason}. The checkpoint of step "
            f"{updated} has the weights from before: go on from it with --resume and a lower "
            f"optimizer.learning_rate, or pass over these batches with "
            f"--guards.skip_steps='[[{updated + 1}, {step}]]'."
        )

    def state(self) -> dict[str, Any]:
        """All that the guard remembers, as plain JSON, which holds every finite float exactly."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def _spike(self, loss: float, grad_norm: float) -> str | None:
        deviations = self.config.spike_deviations
        if deviations is None:
            return None
        reason = self._above("loss", loss, self.losses, deviations) or self._above(
            "gradient norm", grad_norm, self.grad_norms, deviations
        )
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        return reason

    def _above(self, name: str, value: float, before: Sequence[float], deviations: float) -> str | None:
        if len(before) < max(2, self.config.spike_window // 2):
            return None
        # The module `statistics` sums exactly, so a decision hangs on no order of summation.
        limit = mean(before) + deviations * stdev(before)
        if value <= limit:
            return None
        return f"{name} {value:.6g} above {limit:.6g}, {deviations:g} deviations over the last {len(before)}"


def check_skip_steps(ranges: Sequence[tuple[int, int]]) -> None:
    """Check the recipe's `guards.skip_steps`.

    Raises:
        UserError: a range begins before step 1, ends before it begins, or overlaps another.
    """
    for first, last in ranges:
        if not 1 <= first <= last:
            raise UserError(
                f"guards.skip_steps has [{first}, {last}], expected [first, last] with 1 <= first <= last"
            )
    for (first, last), (following, end) in pairwise(sorted(ranges)):
        if following <= last:
            raise UserError(
                f"guards.skip_steps has [{first}, {last}] and [{following}, {end}], which overlap; "
                "write them as one range"
            )


def _not_finite(loss: float, grad_norm: float) -> str | None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    return f"loss {loss:.6g} and gradient norm {grad_norm:.6g}"
