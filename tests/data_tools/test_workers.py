"""Tasks on processes: results in order, errors at once, nothing left behind."""

import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import psutil
import pytest

from data_tools.errors import UserError
from data_tools.files import locked
from data_tools.workers import run

Report = Callable[[int, int], None]


def _square(task: int, report: Report) -> tuple[int, int]:
    report(task, 10 * task)
    return task * task, os.getpid()


def _die_at_three(task: int, report: Report) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def _refuse(task: int, report: Report) -> int:
    raise UserError(f"no {task}")


def _fail(task: int, report: Report) -> int:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_results_and_final_reports_come_for_every_task_in_order(workers: int) -> None:
    reports: dict[int, tuple[int, int]] = {}
    found = run(_square, list(range(9)), workers, lambda task, *state: reports.update({task: state}))
    assert [square for square, _ in found] == [task * task for task in range(9)]
    assert reports == {task: (task, 10 * task) for task in range(9)}
    assert (os.getpid() in {process for _, process in found}) == (workers == 1)


def test_a_killed_worker_is_one_sentence_and_no_hang() -> None:
    with pytest.raises(UserError, match=r"exit code -9.*fewer --workers"):
        run(_die_at_three, list(range(9)), 2, lambda *_: None)


def test_more_workers_than_the_system_allows_are_one_sentence_and_leave_none_behind() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = {process.pid for process in psutil.Process().children()}
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, most[1]))
    try:
        with pytest.raises(UserError, match=r"Only \d+ of 40 worker processes could be started.*fewer"):
            run(_square, list(range(40)), 40, lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    left = [process for process in psutil.Process().children() if process.pid not in before]
    assert not [process for process in left if "resource_tracker" not in " ".join(process.cmdline())]


def test_an_error_of_a_task_is_the_error_of_the_run() -> None:
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"^no [01]$"):
            run(_refuse, [0, 1], workers, lambda *_: None)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"_fail[\s\S]*ZeroDivisionError: a bug"):
        run(_fail, [0, 1], 2, lambda *_: None)


def _note_and_wait(task: Path, report: Report) -> None:
    (task / str(os.getpid())).touch()
    signal.pause()


def _run_for_ever(directory: Path) -> None:
    run(_note_and_wait, [directory, directory], 2, lambda *_: None)


def _run_for_ever_locked(directory: Path) -> None:
    with locked(directory, fcntl.LOCK_EX):
        _run_for_ever(directory)


def _run_for_ever_beside_a_thread(directory: Path) -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    _run_for_ever(directory)


def _started(target: Callable[[Path], None], directory: Path) -> tuple[SpawnProcess, list[psutil.Process]]:
    """A process with two workers, each in the midst of a task."""
    parent = multiprocessing.get_context("spawn").Process(target=target, args=(directory,))
    parent.start()
    while len(list(directory.iterdir())) < 2:
        assert parent.is_alive(), "the run ended before it could be killed"
        time.sleep(0.01)
    return parent, [psutil.Process(int(path.name)) for path in directory.iterdir()]


def _are_forked(workers: list[psutil.Process], parent: SpawnProcess) -> bool:
    """Whether the workers have the command line of their parent; spawned ones have their own."""
    assert parent.pid is not None
    command = psutil.Process(parent.pid).cmdline()
    return all(worker.cmdline() == command for worker in workers)


def test_a_lock_of_the_parent_goes_with_it_though_forked_workers_are_still_there(tmp_path: Path) -> None:
    parent, workers = _started(_run_for_ever_locked, tmp_path)
    forked = _are_forked(workers, parent)
    for worker in workers:
        worker.suspend()
    parent.kill()
    parent.join()
    try:
        with locked(tmp_path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            pass
    finally:
        for worker in workers:
            worker.resume()
    assert forked
    assert not psutil.wait_procs(workers, timeout=30)[1]


@pytest.mark.parametrize("target", [_run_for_ever, _run_for_ever_beside_a_thread])
def test_workers_in_the_midst_of_a_task_end_when_their_parent_is_killed(
    target: Callable[[Path], None], tmp_path: Path
) -> None:
    parent, workers = _started(target, tmp_path)
    forked = _are_forked(workers, parent)
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert not alive
    assert forked == (target is _run_for_ever), "forked beside a thread, or not forked without one"
