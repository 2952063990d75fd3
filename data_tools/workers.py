"""Tasks on worker processes. A worker that dies is an error at once, and none outlives its parent."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

from data_tools.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, int], None]
"""Called by a task as it goes, with its records and bytes so far."""

_SECONDS_BETWEEN_REPORTS = 0.5


class Source(Protocol):
    """Hands out tasks, and takes their results.

    Attributes:
        pause: seconds after which to ask again when there was no task to hand out.
    """

    pause: float

    def take(self) -> tuple[int, Any] | None:
        """A task and its number, or None when there is none now."""

    def done(self, number: int, result: Any) -> None:
        """The result of the task of that number."""

    @property
    def over(self) -> bool:
        """Whether there will be no other task."""


def run(
    function: Callable[[Task, Report], Result],
    tasks: Sequence[Task],
    workers: int,
    on_report: Callable[[int, int, int], None],
) -> list[Result]:
    """Run `function` on every task and return the results in the order of the tasks.

    Args:
        function: importable by name; may raise UserError.
        tasks: handed out in order, each to whichever worker is free.
        workers: processes; with one the tasks run in this process.
        on_report: called with the number of the task, its records and its bytes.

    Raises:
        UserError: a task raised it, or a worker was killed.
        RuntimeError: a task raised anything else; the message is its traceback.
    """
    source = _Listed(tasks)
    run_from(function, source, min(workers, len(tasks)), on_report)
    return [source.results[number] for number in range(len(tasks))]


def run_from(
    function: Callable[[Any, Report], Any],
    source: Source,
    workers: int,
    on_report: Callable[[int, int, int], None],
) -> None:
    """Run `function` on the tasks of a source until it is over; otherwise as `run`."""
    if workers <= 1:
        _run_here(function, source, on_report)
        return
    pool: list[_Worker] = []
    try:
        with _interruptions_held_back():
            for number in range(workers):
                pool.append(_started(function, number, workers))
        _run_on(pool, source, on_report)
    finally:
        for worker in pool:
            worker.stop()


def _started(function: Callable[[Any, Report], Any], number: int, workers: int) -> "_Worker":
    try:
        return _Worker(function)
    except OSError as error:
        raise UserError(
            f"Only {number} of {workers} worker processes could be started ({error.strerror}); run the same "
            "command again with fewer --workers."
        ) from error


class _Listed:
    """Tasks that are all known, and their results."""

    pause = 0.0

    def __init__(self, tasks: Sequence[Any]) -> None:
        self.results: dict[int, Any] = {}
        self._waiting = iter(enumerate(tasks))
        self._number = len(tasks)

    def take(self) -> tuple[int, Any] | None:
        return next(self._waiting, None)

    def done(self, number: int, result: Any) -> None:
        self.results[number] = result

    @property
    def over(self) -> bool:
        return len(self.results) == self._number


def _run_here(
    function: Callable[[Any, Report], Any], source: Source, on_report: Callable[[int, int, int], None]
) -> None:
    while not source.over:
        taken = source.take()
        if taken is None:
            sleep(source.pause)
        else:
            number, task = taken
            source.done(number, function(task, partial(on_report, number)))


def _run_on(pool: list["_Worker"], source: Source, on_report: Callable[[int, int, int], None]) -> None:
    idle = list(pool)
    busy: dict[Any, _Worker] = {}
    while not source.over:
        while idle and (taken := source.take()) is not None:
            worker = idle.pop()
            worker.start(*taken)
            busy[worker.connection] = worker
        for connection in wait(list(busy), timeout=source.pause if idle and source.pause else None):
            worker = busy[connection]
            kind, content = worker.receive()
            if kind == "report":
                on_report(worker.task, *content)
                continue
            source.done(worker.task, content)
            idle.append(busy.pop(connection))


@contextmanager
def _interruptions_held_back() -> Iterator[None]:
    """Start workers that never see Ctrl-C, which the parent gets afterwards; it decides what that means.

    The workers inherit the blocked signal: a handler of their own would come only after their imports. In
    the parent any thread may receive the signal, and its handler cuts short whatever the main thread does,
    such as sending a worker its first data; so the handler has to wait too.
    """
    interrupted: list[int] = []
    resource_tracker.ensure_running()  # started later, it would unblock the signal
    handler = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, handler)
    if interrupted:
        raise KeyboardInterrupt


class _Worker:
    """The parent's end of a worker process: it holds the only other end of the worker's pipe."""

    def __init__(self, function: Callable[[Any, Report], Any]) -> None:
        context: Any = multiprocessing.get_context(_start_method())
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(function, theirs, context.get_start_method() == "fork"), daemon=True
        )
        self._process.start()
        theirs.close()
        self.task = -1

    def start(self, number: int, task: object) -> None:
        self.task = number
        self._talk(lambda: self.connection.send(task))

    def receive(self) -> tuple[str, Any]:
        kind, content = self._talk(self.connection.recv)
        if kind == "user error":
            raise UserError(content)
        if kind == "bug":
            raise RuntimeError(f"in a worker process:\n{content}")
        return kind, content

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def _talk(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except (EOFError, OSError) as error:
            self._process.join()
            raise UserError(
                f"A worker process died (exit code {self._process.exitcode}; -9 means killed, most often for "
                "want of memory); run the same command again with fewer --workers, finished parts are kept."
            ) from error


def _start_method() -> str:
    """`fork` where this process has one thread, counting those of libraries; otherwise `spawn`.

    A forked worker has the imports of its parent, which spares 0.4 s. It has only the thread that forked: had
    there been others, locks that they held, in a library or an allocator, would stay locked for ever.
    """
    threads = Path("/proc/self/task")
    return "fork" if threads.is_dir() and len(list(threads.iterdir())) == 1 else "spawn"


def _close_inherited(connection: Connection, sentinel: int) -> None:
    """Close the files that a forked worker has from its parent, but for its pipe and the parent's sentinel.

    Among them are the parent's locks, which have to go with the parent, and ends of other workers' pipes. The
    parent's objects that own them are never freed in a worker, which ends by `os._exit`.
    """
    kept = {0, 1, 2, connection.fileno(), sentinel}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in kept:
            with suppress(OSError):  # that of the listing itself is closed already
                os.close(descriptor)


def _serve(function: Callable[[Any, Report], Any], connection: Connection, forked: bool) -> None:
    parent = multiprocessing.parent_process()
    if forked and parent is not None:
        _close_inherited(connection, parent.sentinel)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        task = connection.recv()
        reporter = _Reporter(connection)
        try:
            message = ("result", function(task, reporter))
            reporter.send()
        except UserError as error:
            message = ("user error", str(error))
        except Exception:
            message = ("bug", traceback.format_exc())
        connection.send(message)


def _end_with_parent() -> None:
    """Exit as soon as the parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Reporter:
    """Sends a task's progress, now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = monotonic()
        self._state = (0, 0)

    def __call__(self, records: int, size: int) -> None:
        self._state = (records, size)
        if monotonic() - self._last >= _SECONDS_BETWEEN_REPORTS:
            self.send()

    def send(self) -> None:
        """Send the state now."""
        self._connection.send(("report", self._state))
        self._last = monotonic()
