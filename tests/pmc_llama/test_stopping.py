"""Requests to stop are noted and agreed on, and a second signal obeyed at once, in real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from pmc_llama.stopping import REQUEUE, StopRequests
from tests.pmc_llama.forked import end, start_ranks

BIN = Path(sys.executable).parent


def train(rank: int, directory: Path) -> None:
    """A loop with the shape of training: a step, an agreement, and at the end a status."""
    with StopRequests(directory / "stop", rank) as stop:
        (directory / f"ready-{rank}").touch()
        step, asked = 0, torch.tensor(0)
        while not asked and step < 2000:
            step += 1
            time.sleep(0.02)
            asked = torch.tensor(stop.asked)
            dist.all_reduce(asked)
        stop.obeyed()
    (directory / f"stopped-{rank}").write_text(f"{step} {stop.reason}")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(REQUEUE if asked else 0)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def train_until(ask: Callable[[list[int]], object], directory: Path) -> list[tuple[str, str]]:
    """Two ranks, asked to stop by `ask(their process ids)`; by rank the last step and the reason."""
    processes = start_ranks(2, train, directory)
    wait_for(directory / "ready-0", directory / "ready-1")
    ask([process.pid or 0 for process in processes])
    assert end(processes, 60) == [REQUEUE, REQUEUE]
    return [told(directory / f"stopped-{rank}") for rank in range(2)]


def told(path: Path) -> tuple[str, str]:
    step, _, reason = path.read_text().partition(" ")
    return step, reason


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_ends_all_after_the_same_step_with_the_status_for_requeueing(
    tmp_path: Path, number: signal.Signals
) -> None:
    stops = train_until(lambda pids: os.kill(pids[1], number), tmp_path)
    assert stops[0][0] == stops[1][0]
    assert [reason for _, reason in stops] == ["another rank", number.name]


def test_a_stop_file_ends_all_ranks_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    stops = train_until(lambda _: path.touch(), tmp_path)
    assert [reason for _, reason in stops] == [f"the file {path}", "another rank"]
    assert not path.exists()


def test_the_status_for_requeueing_is_that_of_a_temporary_failure() -> None:
    assert REQUEUE == 75


UNDER_TORCHRUN = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from tests.pmc_llama.test_stopping import train
dist.init_process_group("gloo")
train(dist.get_rank(), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_under_torchrun_a_signal_that_slurm_and_torchrun_both_pass_on_is_one_request(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UNDER_TORCHRUN)
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", tmp_path / "program.py", tmp_path]
    launcher = psutil.Popen(
        [str(word) for word in command],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    for process in [*launcher.children(), launcher]:  # as SLURM does, to every process of the step
        process.send_signal(signal.SIGTERM)
    launcher.wait(60)
    stops = [told(tmp_path / f"stopped-{rank}") for rank in range(2)]
    assert stops[0] == stops[1]
    assert stops[0][1] == "SIGTERM"


# --- one process ---


def wait_for_ever(rank: int, directory: Path) -> None:
    with StopRequests(directory / "stop", rank):
        (directory / "ready").touch()
        threading.Semaphore(0).acquire()  # where no handler of Python's runs


def test_a_second_signal_ends_a_process_at_once_even_one_whose_main_thread_waits(tmp_path: Path) -> None:
    processes = start_ranks(1, wait_for_ever, tmp_path)
    wait_for(tmp_path / "ready")
    pid = processes[0].pid or 0
    os.kill(pid, signal.SIGUSR1)
    time.sleep(2.5)
    assert processes[0].is_alive()
    os.kill(pid, signal.SIGTERM)
    assert end(processes, 30) == [128 + signal.SIGTERM]
    said = (tmp_path / "said-0").read_text()
    assert said == "rank 0: a second signal, SIGTERM: ending at once, without a checkpoint\n"


def test_the_handlers_from_before_are_back_afterwards(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequests(tmp_path / "stop", rank=0) as stop:
        assert signal.getsignal(signal.SIGINT) is before[2]
        os.kill(os.getpid(), signal.SIGUSR1)
        while not stop.asked:
            time.sleep(0.01)
        assert stop.reason == "SIGUSR1"
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_child_is_ended_by_its_signals_and_its_parent_is_not_asked(tmp_path: Path) -> None:
    with StopRequests(tmp_path / "stop", rank=0) as stop:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.2)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert stop.asked == 0


def test_only_rank_0_looks_for_the_stop_file(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert StopRequests(tmp_path / "stop", rank=0).asked == 1
    assert StopRequests(tmp_path / "stop", rank=1).asked == 0
