"""A step that the host has sent to the device, and what the device tells of it when it is made.

A GPU works behind the host. To ask it for a number is to wait for it, and then it waits in turn until the
host has sent more. So the numbers of a step are copied to the host as they come, and read when a later step
has been sent; and the turns of a step are timed by the device's own clock.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pmc_llama.records import StepTimes


class Numbers:
    """Scalars on their way to the host.

    Args:
        scalars: on one device; taken as fp64.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        together = torch.stack([scalar.double() for scalar in scalars])
        self._arrived: torch.cuda.Event | None = None
        if together.is_cuda:
            # Only a copy to pinned memory goes on behind the host.
            self._host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
            self._host.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._host = together

    def read(self) -> list[float]:
        """The numbers, in order, once they are there."""
        if self._arrived:
            self._arrived.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


@dataclass
class StepClock:
    """The turns of a step by the clock of the device; by the host's own where there is no other.

    Args:
        device: that makes the step.
    """

    device: torch.device
    _seconds: list[float] = field(default_factory=list)
    _events: list[torch.cuda.Event] = field(default_factory=list)

    def turn(self) -> None:
        """The step is at one of the four turns of `StepTimes`."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def times(self) -> StepTimes:
        """The four turns, in seconds from some moment, once the device has passed them all."""
        if self._events:
            self._events[-1].synchronize()
            return StepTimes(*(self._events[0].elapsed_time(event) / 1000 for event in self._events))
        return StepTimes(*self._seconds)
