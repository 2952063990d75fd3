"""Tasks on worker processes. A worker that dies is an error at once, and none outlives its parent."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, TypeVar

from data_tools.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, int], None]
"""Called by a task as it goes, with its records and bytes so far."""

_SECONDS_BETWEEN_REPORTS = 0.5


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
    if workers == 1 or len(tasks) == 1:
        return [function(task, partial(on_report, number)) for number, task in enumerate(tasks)]
    pool: list[_Worker] = []
    try:
        with _interruptions_held_back():
            pool += [_Worker(function) for _ in range(min(workers, len(tasks)))]
        return _run_on(pool, tasks, on_report)
    finally:
        for worker in pool:
            worker.stop()


def _run_on(
    pool: list["_Worker"], tasks: Sequence[Any], on_report: Callable[[int, int, int], None]
) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = iter(enumerate(tasks))
    for worker in pool:
        worker.start(*next(waiting))
    by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in pool}
    while len(results) < len(tasks):
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]
            kind, content = worker.receive()
            if kind == "report":
                on_report(worker.task, *content)
                continue
            results[worker.task] = content
            following = next(waiting, None)
            if following is None:
                del by_connection[connection]
            else:
                worker.start(*following)
    return [results[number] for number in range(len(tasks))]


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
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, theirs), daemon=True)
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


def _serve(function: Callable[[Any, Report], Any], connection: Connection) -> None:
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
