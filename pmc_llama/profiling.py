"""A profile of a few steady steps: a Chrome trace of every rank, and a table of where a step goes."""

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from data_tools.errors import UserError
from data_tools.files import published, write_published
from pmc_llama.profile_kinds import COMMUNICATION
from pmc_llama.profile_table import EXPOSED, KINDS, PHASE_RANGE, STEP_RANGE, Profile, profile_of

__all__ = ["Profile", "StepProfiler", "markdown", "read_profile"]

_SILENT = "99"  # above every level: Kineto tells standard error that it starts and stops, whatever the level


class StepProfiler:
    """Profiles some steps of this rank and writes what it saw to `OUTPUT/profile/`.

    The step before the first serves as a warm-up, in which CUDA's tracing is started and nothing is kept.
    In a profiled step the rank waits for its GPU at the begin and at the end, so that what the step launched
    is all inside it. At other steps every method returns at once.

    Every rank writes `rank-NNNNN.trace.json.gz`, for https://ui.perfetto.dev; rank 0 also `profile.json` and
    `profile.md`, from its own events.

    Args:
        output: the run's directory.
        steps: numbers of the steps to profile; empty, none.
        rank: of this process.
        device: that trains.
    """

    def __init__(self, output: Path, steps: range, rank: int, device: torch.device) -> None:
        self._directory, self._steps, self._rank, self._device = output / "profile", steps, rank, device
        self._profile: profile | None = None
        self._recorded = 0  # steps in the trace so far
        self._ended = not steps
        self._step_range: ExitStack | None = None
        self._phase_range = ExitStack()

    def step_begins(self, step: int) -> None:
        """A step begins: call it before its batch is read.

        Raises:
            UserError: as `close`, when the steps to profile are over.
        """
        if self._ended or step < self._steps.start - 1:
            return
        if step >= self._steps.stop:  # the last of them were passed over, or this process starts after them
            self.close()
            return
        if self._profile is None:
            self._profile = self._prepare()
        if step in self._steps:
            if not self._recorded:
                self._profile.start_trace()
            self._synchronize()
            self._step_range = _enter(f"{STEP_RANGE}{step}")
            self._recorded += 1

    def phase(self, name: str) -> None:
        """A phase of the step begins, and the one before it ends.

        Args:
            name: one of `pmc_llama.profile_kinds`: the trainer's own names of its phases.
        """
        if self._step_range:
            self._phase_range.close()
            self._phase_range = _enter(f"{PHASE_RANGE}{name}")

    def step_ends(self, step: int) -> None:
        """A step is made; the last of the steps to profile also writes the profile.

        Raises:
            UserError: as `close`.
        """
        if not self._step_range:
            return
        self._synchronize()
        self._phase_range.close()
        self._step_range.close()
        self._step_range = None
        if step == self._steps.stop - 1:
            self.close()

    def ended(self) -> bool:
        """Whether there is nothing left to profile."""
        return self._ended

    def close(self) -> None:
        """Write the profile of what was recorded so far, if anything was: also of a run that ends early.

        Raises:
            UserError: the directory cannot be written to.
        """
        recorded, self._profile, self._ended = self._profile, None, True
        if recorded is None or not self._recorded:
            return
        recorded.stop_trace()
        try:
            self._write(recorded)
        except (OSError, json.JSONDecodeError) as error:  # a full disk cuts the trace, and torch is silent
            raise UserError(
                f"The profile cannot be written to {self._directory}: {error}; make room there, or train "
                "without logging.profile_steps."
            ) from error

    def _prepare(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        prepared = profile(activities=activities)
        prepared.prepare_trace()
        return prepared

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, recorded: profile) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank-{self._rank:05d}.trace.json.gz"
        plain = path.with_name(f".{path.stem}")
        try:
            recorded.export_chrome_trace(str(plain))
            with (
                published(path) as partial,
                plain.open("rb") as source,
                gzip.open(partial, "wb", compresslevel=1) as compressed,
            ):
                shutil.copyfileobj(source, compressed)
            if self._rank == 0:
                found = profile_of(json.loads(plain.read_bytes()))
                text = json.dumps(asdict(found), indent=1) + "\n"
                write_published(self._directory / "profile.json", text.encode())
                write_published(self._directory / "profile.md", markdown(found).encode())
        finally:
            plain.unlink(missing_ok=True)


def read_profile(path: Path) -> Profile:
    """Read a `profile.json`.

    Raises:
        UserError: it cannot be read, or is not a profile.
    """
    try:
        return Profile(**json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a profile that `pmc-llama train` wrote; remove it.") from error


def markdown(found: Profile) -> str:
    """A profile as a table for people: a row a kind of work, with its seconds of a step and of each phase."""
    steps = f"step {found.steps[0]}"
    if len(found.steps) > 1:
        steps = f"steps {found.steps[0]} to {found.steps[-1]}"
    where = "GPU" if found.device == "cuda" else "CPU"
    phases = list(found.phases)
    rows: list[Sequence[str]] = [
        ("", "seconds a step", "share", *phases),
        ("---", *["---:"] * (2 + len(phases))),
    ]
    for kind in KINDS:
        rows.append((kind, *_row(found, kind, phases)))
    totals = [f"{sum(found.phases[phase][kind] for kind in KINDS):.4f}" for phase in phases]
    rows.append(("**all**", f"{found.step_seconds:.4f}", "100.0%", *totals))
    communication, exposed = found.seconds[COMMUNICATION], found.seconds[EXPOSED]
    hidden = communication - exposed
    return "\n".join(
        [
            f"# Where a step goes: rank 0 of {found.ranks} on {where}, {steps}",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Communication took {communication:.4f} seconds a step: {hidden:.4f} hidden behind other work, "
            f"{exposed:.4f} exposed. Waiting for slower ranks is part of it. Recording slows a step down: "
            "`metrics.jsonl` has the speed of steps that are not profiled.",
            "",
        ]
    )


def _row(found: Profile, kind: str, phases: Sequence[str]) -> list[str]:
    seconds = found.seconds[kind]
    cells = [f"{found.phases[phase][kind]:.4f}" for phase in phases]
    return [f"{seconds:.4f}", f"{seconds / found.step_seconds:.1%}", *cells]


def _enter(name: str) -> ExitStack:
    """A range of the trace that is open until this is closed."""
    entered = ExitStack()
    entered.enter_context(record_function(name))
    return entered
