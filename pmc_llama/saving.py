"""Checkpoints written behind training, which stops only for a copy of the state to host memory."""

import atexit
import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue

import torch.distributed as dist
from torch import Tensor

from data_tools.errors import UserError
from pmc_llama import checkpoint
from pmc_llama.checkpoint import FileTable, Manifest
from pmc_llama.config import CheckpointConfig
from pmc_llama.snapshot import Snapshot

# How long a process that ends by an exception, or without `wait`, stays for the save under way.
_PARTING = timedelta(seconds=60)


@dataclass(frozen=True)
class SaveOutcome:
    """What became of one save. `str()` of it is the line to tell.

    Args:
        step: of the checkpoint.
        path: the published checkpoint; None when the save failed.
        failure: why it failed; None when it did not.
        seconds: from the call of `save` to the end of the last removal.
        stall_seconds: of those, how long training stood still.
    """

    step: int
    path: Path | None
    failure: str | None
    seconds: float
    stall_seconds: float

    def __str__(self) -> str:
        if self.failure:
            return f"no checkpoint of step {self.step}: {self.failure}"
        return (
            f"checkpoint {self.path} in {self.seconds:.1f} s, training stopped for {self.stall_seconds:.2f} s"
        )


@dataclass(frozen=True)
class _Job:
    """A save under way, its manifest fixed."""

    state: Mapping[str, Tensor]
    manifest: Manifest
    begin: float  # time.perf_counter()
    stall_seconds: float | None  # None: until it is written


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time, and removes those that are not kept.

    The methods are called on every rank, in the same order. What the ranks say to one another while they
    write goes over a gloo group of its own, so it never meets the collectives of training. Making a saver is
    collective.

    Args:
        root: the run's `checkpoints` directory, on a filesystem that all ranks share.
        config: what to keep, whether to write behind training, how many saves may fail.
        tokenizer: the SentencePiece model, kept with each checkpoint.
        patience: longest wait for another rank's part of a checkpoint, above what one takes on a slow disk. A
            rank that is gone is noticed at once: its connections close.

    Attributes:
        failures: saves in a row that failed, as far as this rank has polled them. Ranks may see the end of a
            save at different steps: take the largest of all ranks before acting on it (`stop_if_failing`).
        group: that the ranks talk over while they write.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        tokenizer: Path,
        patience: timedelta = timedelta(hours=2),
    ) -> None:
        self.failures = 0
        self._root, self._config, self._tokenizer = root, config, tokenizer
        self.group = dist.new_group(backend="gloo", timeout=patience)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._finished: SimpleQueue[SaveOutcome | BaseException] = SimpleQueue()
        self._last_failure: str | None = None
        # Python aborts a process whose daemon threads still run Python code when it shuts down.
        atexit.register(self._join, _PARTING)

    def save(self, state: Mapping[str, Tensor], describe: Callable[[FileTable], Manifest]) -> None:
        """Begin to write a checkpoint; with `asynchronous: false`, write it.

        Waits for a save still under way, then copies the state to host memory and returns. Whether it was
        written is told by `poll`.

        Args:
            state: of a backend (`Backend.state`); may change as soon as this returns.
            describe: makes the manifest from the table of files; called at once, with none, so that what it
                says is said of this moment.

        Raises:
            UserError: host memory does not hold the copy.
        """
        begin = time.perf_counter()
        self._join()
        manifest = copy.deepcopy(describe({}))
        if not self._config.asynchronous:
            self._write(_Job(state, manifest, begin, stall_seconds=None))
            return
        snapshot = self._snapshot.take(state)
        job = _Job(snapshot, manifest, begin, stall_seconds=time.perf_counter() - begin)
        # A daemon: a process that must end does not wait for peers that may be gone.
        self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> list[SaveOutcome]:
        """What was finished since the last call, oldest first. Not collective; costs next to nothing."""
        outcomes = []
        while not self._finished.empty():
            outcome = self._finished.get()
            if isinstance(outcome, BaseException):
                raise outcome  # a bug in the thread, with the traceback that it had there
            self._last_failure = outcome.failure
            self.failures = self.failures + 1 if outcome.failure else 0
            outcomes.append(outcome)
        return outcomes

    def stop_if_failing(self, failures: int) -> None:
        """End the run when too many saves in a row have failed. To be called alike on all ranks.

        Args:
            failures: the largest `failures` of all ranks.

        Raises:
            UserError: there are more than `max_failed`.
        """
        if failures > self._config.max_failed:
            self._join()  # another rank has seen the end, so it is near
            self.poll()
            raise UserError(
                f"{failures} checkpoints in a row could not be written (checkpoint.max_failed is "
                f"{self._config.max_failed}); the last: {self._last_failure} Then go on with --resume."
            )

    def wait(self) -> list[SaveOutcome]:
        """Finish what is under way, as before the process ends.

        Returns:
            As `poll`.

        Raises:
            UserError: the last save failed.
        """
        self._join()
        outcomes = self.poll()
        if self._last_failure:
            untold = " ".join(str(outcome) for outcome in outcomes if outcome.failure)
            raise UserError(f"{untold or self._last_failure} Then go on with --resume.")
        return outcomes

    def _join(self, longest: timedelta | None = None) -> None:
        if self._thread:
            self._thread.join(longest.total_seconds() if longest else None)
            self._thread = None

    def _write(self, job: _Job) -> None:
        try:
            path, failure = self._publish(job), None
        except UserError as error:
            path, failure = None, str(error)
        except (OSError, RuntimeError) as error:  # of torch.distributed: a peer is gone, or too late
            path, failure = None, f"it broke off, as when a rank is lost ({str(error).splitlines()[0]})."
        except BaseException as error:
            self._finished.put(error)
            return
        seconds = time.perf_counter() - job.begin
        stall = seconds if job.stall_seconds is None else job.stall_seconds
        self._finished.put(SaveOutcome(job.manifest.step, path, failure, seconds, stall))

    def _publish(self, job: _Job) -> Path:
        def describe(files: FileTable) -> Manifest:
            return replace(job.manifest, files=files)

        keep = self._config
        path = checkpoint.save(job.state, self._root, describe, self._tokenizer, self.group)
        checkpoint.on_first_rank(
            self.group, lambda: checkpoint.prune(self._root, keep.keep_last, keep.keep_every)
        )
        return path
