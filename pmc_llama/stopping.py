"""Being asked to stop: by SIGTERM, by SIGUSR1, or by a file named `stop` in the run's directory.

A request is noted, never obeyed in the middle of a step. The trainer sums `asked` over the ranks in each
step; when any rank was asked, all finish that step, publish a checkpoint and exit with `REQUEUE`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

REQUEUE = os.EX_TEMPFAIL
"""Exit status 75 of a run that was asked to stop and published a checkpoint: start the same command again.

The name and number are those of sysexits.h; SLURM requeues by itself on it where `RequeueExit=75` is set.
"""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# A launcher repeats what it was told: torchrun forwards SIGTERM to workers that SLURM has signalled too. What
# comes within this many seconds of the first signal is the same request.
_ONE_REQUEST_SECONDS = 2.0
_LOOK_EVERY_SECONDS = 1.0
_END = b"\0"  # no signal has the number 0

_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequests:
    """Notes requests to stop while it is entered; the handlers from before are back when it is left.

    A second signal, more than two seconds after the first, ends the process at once with 128 + its number,
    also while the main thread waits in a collective: the C level of Python's signal handling writes the
    number to a pipe, which a thread reads. SIGINT is left as it is. Enter it in the main thread, once a
    process.

    Args:
        path: the stop file; rank 0 alone looks for it, at most once a second.
        rank: of this process.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path = path if rank == 0 else None
        self._rank = rank
        self._next_look = 0.0
        self._reason: str | None = None
        self._noted_at = 0.0

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)  # what `set_wakeup_fd` asks for
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous: dict[signal.Signals, _Handler] = {
            number: signal.signal(number, _return_to_main_thread) for number in SIGNALS
        }
        os.register_at_fork(after_in_child=self._forget)
        self._reader = threading.Thread(target=self._read, name="stop requests", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._previous = {}
        os.write(self._write_end, _END)
        self._reader.join()
        os.close(self._read_end)
        os.close(self._write_end)

    @property
    def asked(self) -> int:
        """1 when this rank was asked to stop, else 0: a number to be summed over the ranks."""
        now = time.monotonic()
        if self._reason is None and self._path and now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_SECONDS
            if self._path.exists():
                self._reason = f"the file {self._path}"
        return int(self._reason is not None)

    @property
    def reason(self) -> str:
        """Who asked, as far as this rank knows: `SIGTERM`, `the file ...`, or `another rank`."""
        return self._reason or "another rank"

    def obeyed(self) -> None:
        """Remove the stop file, if there is one; to be called once the checkpoint is published."""
        if self._path:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _read(self) -> None:
        """Note the first signal; at a second, end the process."""
        while (received := os.read(self._read_end, 1)) != _END:
            if received[0] not in SIGNALS:
                continue  # SIGINT passes through the pipe as well
            name = signal.Signals(received[0]).name
            now = time.monotonic()
            if self._noted_at and now - self._noted_at > _ONE_REQUEST_SECONDS:
                message = (
                    f"rank {self._rank}: a second signal, {name}: ending at once, without a checkpoint\n"
                )
                os.write(2, message.encode())
                os._exit(128 + received[0])
            self._noted_at = self._noted_at or now
            self._reason = self._reason or name

    def _forget(self) -> None:
        """In a forked child, whose signals are its own: end by them, and leave the parent's pipe alone."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL)


def _return_to_main_thread(number: int, frame: FrameType | None) -> None:
    """Nothing: that there is a handler makes the C level write to the pipe and keeps the process alive."""
