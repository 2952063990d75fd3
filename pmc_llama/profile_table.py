"""From the events of a trace to where a step goes: seconds by kind of work, of the step and of its phases."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pmc_llama.intervals import Interval, intersect, length, subtract, union
from pmc_llama.profile_kinds import (
    ATTENTION,
    COMMUNICATION,
    DATA,
    DATA_PHASE,
    ELEMENTWISE,
    LOSS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    SHARDING,
    Event,
    HostEvents,
    kernel_kind,
)

STEP_RANGE, PHASE_RANGE = "pmc_llama step ", "pmc_llama phase "
"""What the names of the recorded ranges of steps and phases begin with."""

EXPOSED, GAPS = "exposed communication", "host gaps"
_WORK = (ATTENTION, PRODUCTS, ELEMENTWISE, LOSS, OPTIMIZER, SHARDING, DATA, OTHER)
KINDS = (ATTENTION, PRODUCTS, ELEMENTWISE, LOSS, OPTIMIZER, SHARDING, EXPOSED, DATA, GAPS, OTHER)
"""Where a step goes. Every moment of it is of one kind, so they add up to the step."""

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Profile:
    """Where a step of one rank goes.

    Attributes:
        device: `cpu` or `cuda`: where the work was looked at.
        ranks: of the run.
        steps: numbers of the profiled steps.
        step_seconds: of a profiled step, on average.
        seconds: of a step, by kind. Those of `KINDS` add up to `step_seconds`; `communication` is all of it,
            the exposed part and what is hidden behind other work.
        phases: the same, for each phase.
    """

    device: str
    ranks: int
    steps: list[int]
    step_seconds: float
    seconds: dict[str, float]
    phases: dict[str, dict[str, float]]


def profile_of(trace: Mapping[str, Any]) -> Profile:
    """Where the steps of a trace go.

    On a GPU the time is that of its kernels, on a CPU that of the operators of the thread that trains and of
    gloo's threads. A kernel belongs to the phase in which it was launched, and on a GPU a phase begins when
    the host has begun it and the kernels of the phases before are done.

    Args:
        trace: what torch.profiler exports, parsed, with the ranges that `StepProfiler` records.
    """
    events = _events(trace)
    ranges = [event for event in events if event.category == "user_annotation"]
    steps = sorted((r for r in ranges if r.name.startswith(STEP_RANGE)), key=lambda step: step.begin)
    phases = sorted((r for r in ranges if r.name.startswith(PHASE_RANGE)), key=lambda phase: phase.begin)
    host_windows = [_windows(step, [p for p in phases if _within(p, step)]) for step in steps]
    phase = _PhaseAt(host_windows)
    on_host = [event for event in events if event.category in _ON_HOST]
    host = HostEvents(on_host, steps[0].thread, phase)
    kernels = [event for event in events if event.category in _ON_GPU]
    work: dict[str, list[Interval]] = defaultdict(list)
    if kernels:
        for kernel in kernels:
            launch = host.launch(kernel)
            work[kernel_kind(kernel, launch, phase(launch.moment))].append((kernel.begin, kernel.end))
        done = [(host.launch(kernel).moment, kernel.end) for kernel in kernels]
        windows = [_behind_kernels(each, done) for each in host_windows]
    else:
        for piece in host.pieces:
            if piece.kind:
                work[piece.kind].append(piece.interval)
        work[COMMUNICATION] += [(r.begin, r.end) for r in ranges if r.name.startswith("gloo:")]
        windows = host_windows
    whole = union((step.begin, step.end) for step in steps)
    in_phase: dict[str, list[Interval]] = defaultdict(list)
    for name, interval in (window for step in windows for window in step):
        in_phase[name].append(interval)
    sets = _exclusive(work, whole, in_phase[DATA_PHASE])
    return Profile(
        device="cuda" if kernels else "cpu",
        ranks=trace.get("distributedInfo", {}).get("world_size", 1),
        steps=[int(step.name.removeprefix(STEP_RANGE)) for step in steps],
        step_seconds=length(whole) / len(steps),
        seconds=_seconds(sets, whole, len(steps)),
        phases={name: _seconds(sets, within, len(steps)) for name, within in in_phase.items() if within},
    )


_Window = tuple[str, Interval]  # a phase of a step, by name


class _PhaseAt:
    """The name of the phase at a time of the host."""

    def __init__(self, steps: Sequence[Sequence[_Window]]) -> None:
        self._windows = [window for step in steps for window in step]
        self._begins = [begin for _, (begin, _) in self._windows]

    def __call__(self, moment: float) -> str | None:
        at = bisect_right(self._begins, moment) - 1
        if at < 0 or moment >= self._windows[at][1][1]:
            return None
        return self._windows[at][0]


def _events(trace: Mapping[str, Any]) -> list[Event]:
    complete = [entry for entry in trace["traceEvents"] if entry.get("ph") == "X" and "cat" in entry]
    start = min((entry["ts"] for entry in complete), default=0.0)
    return [_event(entry, start) for entry in complete]


def _event(entry: Mapping[str, Any], start: float) -> Event:
    arguments, begin = entry.get("args", {}), (entry["ts"] - start) * 1e-6  # the format has microseconds
    return Event(
        entry["name"],
        entry["cat"],
        entry["tid"],
        begin,
        begin + entry["dur"] * 1e-6,
        arguments.get("Sequence number"),
        arguments.get("Fwd thread id", 0),
        arguments.get("correlation"),
    )


def _within(phase: Event, step: Event) -> bool:
    return step.begin <= phase.begin < step.end


def _windows(step: Event, phases: Sequence[Event]) -> list[_Window]:
    """Each phase of a step lasts until the next one, the last until the step's end."""
    borders = [*(phase.begin for phase in phases), step.end]
    names = [phase.name.removeprefix(PHASE_RANGE) for phase in phases]
    return list(zip(names, pairwise(borders), strict=True))


def _behind_kernels(windows: Sequence[_Window], done: Sequence[tuple[float, float]]) -> list[_Window]:
    """Move the borders of a step's phases behind the kernels launched before them.

    Args:
        windows: of the phases on the host.
        done: when each kernel was launched, and when it ended.
    """
    if not windows:
        return []
    first, last = windows[0][1][0], windows[-1][1][1]
    borders = [first]
    for _, (begin, _) in windows[1:]:
        latest = max((end for launched, end in done if first <= launched < begin), default=begin)
        borders.append(min(max(begin, latest, borders[-1]), last))
    return list(zip((name for name, _ in windows), pairwise([*borders, last]), strict=True))


def _exclusive(
    work: Mapping[str, list[Interval]], whole: list[Interval], reading: list[Interval]
) -> dict[str, list[Interval]]:
    """Sets of moments by kind, of which those of `KINDS` do not overlap and make up the steps.

    Args:
        work: when each kind of work was done, on whatever stream or thread.
        whole: the steps.
        reading: the phases in which batches are read; what is not recorded there is data as well.
    """
    sets: dict[str, list[Interval]] = {}
    busy: list[Interval] = []
    for kind in _WORK:  # what runs on two streams at once counts as the first of this list
        sets[kind] = subtract(intersect(union(work.get(kind, [])), whole), busy)
        busy = union([*busy, *sets[kind]])
    sets[COMMUNICATION] = intersect(union(work.get(COMMUNICATION, [])), whole)
    sets[EXPOSED] = subtract(sets[COMMUNICATION], busy)
    idle = subtract(whole, union([*busy, *sets[EXPOSED]]))
    sets[DATA] = union([*sets[DATA], *intersect(idle, union(reading))])
    sets[GAPS] = subtract(idle, union(reading))
    return sets


def _seconds(sets: Mapping[str, list[Interval]], windows: list[Interval], steps: int) -> dict[str, float]:
    """Seconds of a step by kind within windows."""
    return {kind: length(intersect(sets[kind], union(windows))) / steps for kind in (*KINDS, COMMUNICATION)}
