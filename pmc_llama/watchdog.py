"""Hangs become clear failures: who is late, every rank's stacks on disk, and a quick end of all ranks.

Each rank has a thread that looks at how long the trainer has been in one phase, and another that posts what
the rank does in the c10d store, through a connection of its own, so that both go on while the main thread
waits in a collective. When a phase passes its deadline on one rank, that rank raises an alarm in the store.
Then every rank that lives writes the Python stacks of its threads to its log and gives a last sign of life,
one of them says on standard error who is late, and all exit with status 1.

Nothing that ends the process depends on anything that may hang: what talks to the store or to the file system
does so in a thread that is waited for only so long. When the store does not answer, the process that holds it
is the late one. A main thread that holds the interpreter lock is ended by faulthandler's own thread, which
needs no lock.
"""

import contextlib
import faulthandler
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from pmc_llama.config import HangConfig
from pmc_llama.distributed import FIRST_TO_FAIL, Ranks, bound_collectives
from pmc_llama.hang_report import Sign, doing, explain

# A rank posts a sign of life this often, or ten times within the deadline when that is sooner.
_BEAT_SECONDS = 2.0
# Longest time for writing stacks, hearing from the others and telling; then the process ends in any case.
_GRACE_SECONDS = 20.0
# A collective's own timeout comes later than the watchdog, which knows more.
_COLLECTIVE_MARGIN = timedelta(seconds=60)

_POLL_SECONDS = 0.2  # between two looks at what other ranks have posted

_ALARM, _SPEAKER, _TOLD, _LEAVING = (
    f"pmc_llama/hang/{name}" for name in ("alarm", "speaker", "told", "leaving")
)


def collective_timeout(seconds: float) -> timedelta:
    """Timeout of a process group whose ranks the watchdog gives `seconds`."""
    return timedelta(seconds=seconds) + _COLLECTIVE_MARGIN


class Watchdog:
    """Ends the run when the trainer stays in one phase for too long on any rank; watches while it is entered.

    Args:
        ranks: this process among all; the default process group is there when there are several.
        logs: the directory of the ranks' logs, made if missing; stacks go to `rank-NNNNN.log` in it.
        hangs: the deadlines of a phase.
        background: process groups whose collectives run behind training, as those of a checkpoint that is
            written meanwhile: their timeouts are left alone, and their counts prove nothing.
        console: file descriptor of what the launcher takes as this process' standard error.
        last_resort_seconds: how long after a deadline faulthandler ends a process whose threads cannot run.
    """

    def __init__(
        self,
        ranks: Ranks,
        logs: Path,
        hangs: HangConfig,
        background: Collection[dist.ProcessGroup] = (),
        console: int = 2,
        last_resort_seconds: float = 60.0,
    ) -> None:
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._logs, self._hangs, self._console = logs, hangs, console
        self._background = list(background)
        self._last_resort_seconds = last_resort_seconds
        self._starting, self._limit = True, "start_seconds"
        self._beat = min(_BEAT_SECONDS, hangs.start_seconds / 10, hangs.step_seconds / 10)
        self._phase = ("start", time.monotonic())  # one tuple, so that threads see both parts or neither
        self._step = 0
        self._alarm, self._closing = threading.Event(), threading.Event()
        self._store_answered = time.monotonic()
        self._rank_0: Sign | None = None

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._log = (self._logs / f"rank-{self._rank:05d}.log").open("a", buffering=1)
        self._report = self._logs / "hang.txt"
        if self._rank == 0:
            self._report.unlink(missing_ok=True)
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self._world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            self._threads.append(threading.Thread(target=self._post, name="signs of life", daemon=True))
        self.progress()  # the time before was nobody's
        self._put_off_last_resort()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(self._beat * 2)  # not for ever: the store may be gone
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    # --- what the trainer says ----------------------------------------------------------------------------

    def enter(self, phase: str, saving: bool = False) -> None:
        """The trainer begins something that may wait; its deadline counts from now.

        Args:
            phase: what it is, for the report.
            saving: it may wait for a checkpoint that is being written, so it is `hangs.save_seconds` that
                bounds it.
        """
        if saving:
            self._limit = "save_seconds"
        else:
            self._limit = "start_seconds" if self._starting else "step_seconds"
        self._phase = (phase, time.monotonic())

    def progress(self) -> None:
        """Something long is still going on well: its deadline counts from now."""
        self._phase = (self._phase[0], time.monotonic())

    def step_made(self, step: int) -> None:
        """An optimizer step is made. After the first, waiting is bounded by `hangs.step_seconds`."""
        self._step = step
        if self._starting:
            self._starting, self._limit = False, "step_seconds"
            bound_collectives(collective_timeout(self._hangs.step_seconds), self._groups().values())

    # --- the threads --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Look at the clock until the run is closed, or end it."""
        while not self._closing.wait(self._beat):
            self._put_off_last_resort()
            if self._alarm.is_set() or self._in_phase() > self._deadline:
                self._end()

    def _put_off_last_resort(self) -> None:
        """Have faulthandler end the process unless this is called again: by a thread that gets the lock."""
        latest = self._deadline + self._last_resort_seconds
        faulthandler.dump_traceback_later(latest, exit=True, file=self._log)

    def _post(self) -> None:
        """Give signs of life and hear the alarm until the run is closed; the store may block this thread."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and its process with it
            while not self._closing.is_set():
                self._store.set(_key(self._rank), self._sign())
                if self._store.check([_key(0)]):
                    self._rank_0 = _read(self._store.get(_key(0)))
                if self._store.check([_ALARM]):
                    self._alarm.set()
                self._store_answered = time.monotonic()
                self._closing.wait(self._beat)

    @property
    def _deadline(self) -> float:
        """Seconds that the phase may take."""
        seconds: float = getattr(self._hangs, self._limit)
        return seconds

    def _in_phase(self) -> float:
        return time.monotonic() - self._phase[1]

    def _sign(self) -> str:
        collectives = {}
        for label, group in self._groups().items():
            with contextlib.suppress(RuntimeError):  # a backend that does not count
                collectives[label] = _collectives(group)
        sign = Sign(
            host=socket.gethostname(),
            step=self._step,
            phase=self._phase[0],
            phase_seconds=self._in_phase(),
            collectives=collectives,
            posted=time.time(),
        )
        return json.dumps(asdict(sign))

    def _groups(self) -> dict[str, dist.ProcessGroup]:
        """Every process group of this rank that training waits in."""
        groups = list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []
        return {
            "default" if group is dist.group.WORLD else group.group_name: group
            for group in groups
            if group not in self._background
        }

    # --- the end ------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Write stacks, tell, and exit with status 1, whatever of that can be done."""
        self._closing.set()
        _within(5.0, self._write_stacks)
        if self._world_size == 1:
            _within(5.0, lambda: self._tell(self._alone()))
        elif not (self._store_is_well() and _within(_GRACE_SECONDS, self._confer)):
            _within(5.0, self._tell_of_lost_store)
        os._exit(1)

    def _write_stacks(self) -> None:
        self._log.write(f"{time.strftime('%F %T')} rank {self._rank} ends in {self._doing()}; its threads:\n")
        faulthandler.dump_traceback(self._log)

    def _confer(self) -> None:
        """Raise the alarm and answer it; tell, or wait until another rank has told; leave together."""
        store, everyone = self._store, range(self._world_size)
        store.set(_ALARM, "")
        store.add(FIRST_TO_FAIL, 1)  # so that main threads, which lose their peers now, keep silent
        store.set(_key(self._rank, "answer"), self._sign())
        if store.add(_SPEAKER, 1) == 1:
            answers = {rank: _key(rank, "answer") for rank in everyone}
            _until(lambda: store.check([*answers.values()]), 3 * self._beat + 2)
            answered = [rank for rank in everyone if store.check([answers[rank]])]
            latest = {rank: answers[rank] if rank in answered else _key(rank) for rank in everyone}
            signs = {rank: _read(store.get(key)) for rank, key in latest.items() if store.check([key])}
            self._tell(explain(signs, self._world_size, answered, time.time()))
            store.set(_TOLD, str(len(answered)))
        elif not _until(lambda: store.check([_TOLD]), _GRACE_SECONDS):
            return
        living = int(store.get(_TOLD))
        store.add(_LEAVING, 1)
        if self._rank == 0:  # it may hold the store, without which the others' last words are lost
            _until(lambda: store.add(_LEAVING, 0) >= living, 3.0)

    def _store_is_well(self) -> bool:
        return time.monotonic() - self._store_answered < 4 * self._beat + 0.5

    def _tell_of_lost_store(self) -> None:
        """Ranks cannot confer: one of those that see the run's directory tells what they all know."""
        seconds = time.monotonic() - self._store_answered
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            late = (
                f"torchrun at {where} is late: the store that it holds has not answered for {seconds:.0f} s"
            )
        else:
            seen = f", last seen in {doing(self._rank_0)}" if self._rank_0 else ""
            late = f"rank 0 is late: no sign of life for {seconds:.0f} s from its store at {where}{seen}"
        with contextlib.suppress(FileExistsError):
            self._report.touch(exist_ok=False)
            self._tell(f"{late}\nrank {self._rank} in {self._doing()}")

    def _alone(self) -> str:
        return f"rank 0 is late: in {self._doing()}"

    def _doing(self) -> str:
        return f"step {self._step + 1}, {self._phase[0]} for {self._in_phase():.0f} s"

    def _tell(self, explanation: str) -> None:
        text = (
            f"error: the run hangs, hangs.{self._limit} = {self._deadline:g} has passed: {explanation}\n"
            f"stacks of all threads are in {self._logs}/rank-*.log\n"
        )
        os.write(self._console, text.encode())
        self._report.write_text(text)


def _key(rank: int, kind: str = "sign") -> str:
    return f"pmc_llama/{kind}/{rank}"


def _collectives(group: dist.ProcessGroup) -> int:
    """How many collectives this rank has begun in a group."""
    count: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]  # torch's stubs lack it
    return count


def _read(posted: bytes) -> Sign:
    return Sign(**json.loads(posted))


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    """Wait until something has happened, but only so long; whether it has."""
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return done


def _within(seconds: float, work: Callable[[], None]) -> bool:
    """Whether work that may hang or fail was done in time."""
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
            done.put(True)
        except (OSError, RuntimeError):
            done.put(False)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.get(timeout=seconds)
    except queue.Empty:
        return False
