"""Which updates are not made: for numbers that are not finite, for spikes, for steps that the recipe names.

A decision depends on the loss and the gradient norm of a step and of those before it alone. They have the
same bits on every rank, so all ranks decide alike without talking; and what is remembered of them is part of
a checkpoint, so a resumed run decides as one that was never interrupted.

It is made where the two numbers are, on the device, before the update and without waiting for it. The host
learns of it later, and puts it into words.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from pmc_llama.config import GuardConfig


class Guard:
    """Judges every step's loss and gradient norm, and remembers what it needs for the next.

    `judge` and `learn` are called once a step each, in order; the host may be some steps behind the device.

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
        device: where loss and gradient norm are.

    Attributes:
        skipped: updates skipped in the whole run, for numbers that are not finite or for spikes, as far as
            the host has learned.
        skipped_in_a_row: of those, since the last update that was made.
    """

    def __init__(
        self,
        config: GuardConfig,
        state: Mapping[str, Any] | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    ) -> None:
        self.config = config
        state = state or {"losses": [], "grad_norms": [], "skipped": 0, "skipped_in_a_row": 0}
        self.losses: deque[float] = deque(state["losses"], maxlen=config.spike_window)
        self.grad_norms: deque[float] = deque(state["grad_norms"], maxlen=config.spike_window)
        self.skipped: int = state["skipped"]
        self.skipped_in_a_row: int = state["skipped_in_a_row"]
        self._in_a_row = torch.tensor(self.skipped_in_a_row, device=device)
        # fp64 [2, window], the newest value last; NaN where there is none yet.
        self._recent = torch.full((2, config.spike_window), torch.nan, dtype=torch.float64)
        for row, values in zip(self._recent, (self.losses, self.grad_norms), strict=True):
            row[config.spike_window - len(values) :] = torch.tensor(list(values), dtype=torch.float64)
        self._recent = self._recent.to(device)

    def passes_over(self, step: int) -> bool:
        """Whether the recipe names `step` (from 1) in `skip_steps`.

        The guard remembers nothing of such a step: it has neither loss nor norm, and is not counted.
        """
        return any(first <= step <= last for first, last in self.config.skip_steps)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Decide on the device whether a step's update is made, and remember the step there.

        Once more updates in a row were refused than the recipe allows, every further one is: what the host
        sends before it learns of that changes no weight.

        Args:
            loss: of the global batch, in nats a target; fp64 scalar.
            grad_norm: global, before clipping; fp64 scalar.

        Returns:
            fp32 scalar: 1 where the update must not be made, else 0.
        """
        now = torch.stack([loss, grad_norm])
        finite = now.isfinite().all()
        refused = ~finite | (self._in_a_row > self.config.max_skipped)
        if self.config.spike_deviations is not None:
            refused |= finite & self._spikes(now, self.config.spike_deviations)
            shifted = torch.cat([self._recent[:, 1:], now[:, None]], dim=1)
            self._recent = torch.where(finite, shifted, self._recent)
        self._in_a_row = (self._in_a_row + 1) * refused
        return refused.float()

    def learn(self, loss: float, grad_norm: float, refused: bool) -> str | None:
        """Learn on the host of a step that `judge` decided on.

        Returns:
            Why the update was not made, in words; None when it was.
        """
        reason = self._explain(loss, grad_norm) if refused else None
        if self.config.spike_deviations is not None and math.isfinite(loss) and math.isfinite(grad_norm):
            self.losses.append(loss)
            self.grad_norms.append(grad_norm)
        self.skipped += refused
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if refused else 0
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

    def _spikes(self, now: Tensor, deviations: float) -> Tensor:
        known = ~self._recent[0].isnan()
        count = known.sum()
        mean = self._recent.nansum(dim=1) / count
        variance = (self._recent - mean[:, None]).square().nansum(dim=1) / (count - 1)
        above = now > mean + deviations * variance.sqrt()
        return above.any() & (count >= self._enough)

    def _explain(self, loss: float, grad_norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:.6g} and gradient norm {grad_norm:.6g}"
        if self.must_stop:
            return f"following {self.skipped_in_a_row} updates that were skipped"
        deviations = self.config.spike_deviations or 0.0  # finite numbers are refused as spikes only
        pairs = (("loss", loss, self.losses), ("gradient norm", grad_norm, self.grad_norms))
        limits = [mean(before) + deviations * stdev(before) for _, _, before in pairs]
        spikes = [place for place, (_, value, _) in enumerate(pairs) if value > limits[place]]
        place = spikes[0] if spikes else 0  # none: the device, which sums in another order, found it above
        name, value, _ = pairs[place]
        return (
            f"{name} {value:.6g} above {limits[place]:.6g}, {deviations:g} deviations over the last "
            f"{len(self.losses)}"
        )

    @property
    def _enough(self) -> int:
        """Values from which on there are spikes."""
        return max(2, self.config.spike_window // 2)


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
