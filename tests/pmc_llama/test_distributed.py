"""Ranks are told from the environment alone, and meet under real launchers, as separate processes."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from pmc_llama.ranks import Ranks, as_ranges, discover

BIN = Path(sys.executable).parent
LAUNCHER_VARIABLES = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_.*|OMP_NUM_THREADS|(OMPI|PMI|PMIX|MPI|SLURM|TORCHELASTIC)_.*)$"
)
CLEAN = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.match(name)}

SBATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
SRUN = {**SBATCH_SHELL, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "PMIX_RANK": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, Ranks(0, 1, 0, "alone"), id="alone"),
        pytest.param(TORCHRUN, Ranks(5, 8, 1, "torchrun"), id="torchrun"),
        pytest.param(OPENMPI, Ranks(2, 4, 0, "openmpi"), id="openmpi"),
        pytest.param(MPICH, Ranks(1, 4, 1, "mpich"), id="mpich"),
        pytest.param(SRUN, Ranks(3, 4, 1, "slurm"), id="srun"),
        pytest.param(
            SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Ranks(3, 4, 1, "slurm"), id="srun --mpi=pmi2"
        ),
        pytest.param(SRUN | {"PMIX_RANK": "3"}, Ranks(3, 4, 1, "slurm"), id="srun --mpi=pmix"),
        pytest.param(
            SBATCH_SHELL | {"SLURM_NTASKS": "1"}, Ranks(0, 1, 0, "alone"), id="batch script of one task"
        ),
        pytest.param({"WORLD_SIZE": "1", "PMI_SIZE": "1"}, Ranks(0, 1, 0, "alone"), id="sizes of one"),
        pytest.param(SRUN | TORCHRUN, Ranks(5, 8, 1, "torchrun"), id="torchrun under srun"),
        pytest.param(SRUN | OPENMPI, Ranks(2, 4, 0, "openmpi"), id="Open MPI inside sbatch"),
        pytest.param(SRUN | MPICH, Ranks(1, 4, 1, "mpich"), id="MPICH inside sbatch"),
    ],
)
def test_ranks_are_read_from_what_the_launcher_sets(environment: dict[str, str], expected: Ranks) -> None:
    assert discover(environment) == expected


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        pytest.param(
            SBATCH_SHELL, "job 7, which is for 4 tasks.*start all of them, by `srun", id="batch script"
        ),
        pytest.param(
            SRUN | {"SLURM_STEP_ID": "4294967290"}, "which is for 4 tasks", id="shell of an interactive step"
        ),
        pytest.param({"PMI_RANK": "2", "PMI_SIZE": "4"}, "PMI_SIZE=4 says", id="PMI without local ranks"),
        pytest.param({"PMIX_RANK": "0"}, "PMIX_RANK=0 says", id="PMIx without Open MPI"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2"},
            "WORLD_SIZE=2 says",
            id="ranks of nodes, as Kubernetes sets them",
        ),
        pytest.param(
            {"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is not set", id="half of the variables"
        ),
        pytest.param(
            TORCHRUN | {"WORLD_SIZE": "5"}, "RANK is 5, expected less than WORLD_SIZE", id="too large"
        ),
        pytest.param(TORCHRUN | {"RANK": "x"}, "RANK is x, expected a whole number", id="no number"),
    ],
)
def test_one_of_several_processes_never_takes_itself_for_the_only_one(
    environment: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        discover(environment)


def test_ranks_are_named_by_ranges() -> None:
    assert as_ranges([3]) == "rank 3"
    assert as_ranges([7, 0, 1, 2, 5, 6]) == "ranks 0-2, 5-7"


PROGRAM = """
import json, os, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from data_tools.errors import UserError
from pmc_llama.distributed import connect, disconnect, discover, first_to_fail

fails, failing_ranks, timeout = sys.argv[1], sys.argv[2], int(sys.argv[3])
ranks = discover()
try:
    if fails == "before":
        raise UserError("no such recipe")
    device = connect(ranks, timedelta(seconds=timeout))
    if fails == "after" and str(ranks.rank) in failing_ranks:
        raise UserError("no such corpus")
    total = torch.tensor([ranks.rank + 1])
    dist.all_reduce(total)
    report = {"launcher": ranks.launcher, "rank": dist.get_rank(), "total": total.item(),
              "device": str(device), "threads": torch.get_num_threads(),
              "exported": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]}
    print(json.dumps(report) + "\\n", end="", flush=True)
    disconnect()
except Exception as error:
    if first_to_fail(error):
        time.sleep(1)  # slow to speak: the others' end must not cut it short
        print(f"SAID {type(error).__name__}: {error}\\n", end="", flush=True)
    sys.exit(2)
"""

ALONE: list[str] = []
TORCHRUN_2 = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
MPIEXEC_2 = [str(BIN / "mpiexec"), "-n", "2"]


def start(
    tmp_path: Path,
    launcher: list[str],
    fails: str = "never",
    failing_ranks: str = "",
    timeout: int = 60,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    python = [] if "torchrun" in " ".join(launcher) else [sys.executable]
    return subprocess.Popen(
        [*launcher, *python, str(program), fails, failing_ranks, str(timeout)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**CLEAN, "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def reports(output: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in re.findall(r"^\{.*\}$", output, re.MULTILINE)]
    return sorted(found, key=lambda report: int(report["rank"]))


def said(output: str) -> list[str]:
    return re.findall(r"SAID (.*)", output)


def test_alone_is_a_world_of_one_without_network(tmp_path: Path) -> None:
    process = start(tmp_path, ALONE)
    output = finish(process)
    assert process.returncode == 0, output
    [report] = reports(output)
    assert (report["launcher"], report["total"], report["device"]) == ("alone", 1, "cpu")
    assert report["exported"] == ["0", "1", "0"]


@pytest.mark.parametrize(("launcher", "name"), [(TORCHRUN_2, "torchrun"), (MPIEXEC_2, "mpich")])
def test_ranks_meet_under_a_real_launcher(tmp_path: Path, launcher: list[str], name: str) -> None:
    process = start(tmp_path, launcher)
    output = finish(process)
    assert process.returncode == 0, output
    assert [report["launcher"] for report in reports(output)] == [name] * 2
    assert [report["total"] for report in reports(output)] == [3, 3]
    assert [report["exported"] for report in reports(output)] == [["0", "2", "0"], ["1", "2", "1"]]


def stub_scontrol(tmp_path: Path, script: str) -> str:
    """A directory for the front of PATH whose scontrol is this script."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "scontrol").chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def job_whose_port_is_free() -> str:
    for job in range(10_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", 20_000 + job))
            return str(job)
    raise AssertionError("every port from 20000 to 29999 is taken")


def srun_environment(rank: int, path: str, job: str = "7") -> dict[str, str]:
    return {
        "PATH": path,
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
    }


def run_as_slurm_step(tmp_path: Path) -> list[dict[str, object]]:
    """Two ranks as srun starts them on the two hosts of a step, the first of which is this machine."""
    path = stub_scontrol(tmp_path, 'test "$*" = "show hostnames node[1-2]" && echo localhost && echo node2')
    job = job_whose_port_is_free()
    environments = [srun_environment(rank, path, job) for rank in range(2)]
    processes = [start(tmp_path, ALONE, environment=environment) for environment in environments]
    return reports("\n".join([finish(process) for process in processes]))


def test_ranks_meet_at_the_first_host_of_a_slurm_step(tmp_path: Path) -> None:
    found = run_as_slurm_step(tmp_path)
    assert [(report["launcher"], report["total"]) for report in found] == [("slurm", 3)] * 2


def test_ranks_of_one_machine_share_its_cores(tmp_path: Path) -> None:
    # Not under mpiexec, since MKL knows its variables and shares the cores by itself.
    threads = [report["threads"] for report in run_as_slurm_step(tmp_path)]
    assert threads == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


def test_a_failing_scontrol_is_named(tmp_path: Path) -> None:
    path = stub_scontrol(tmp_path, "exit 1")
    process = start(tmp_path, ALONE, environment=srun_environment(0, path))
    [sentence] = said(finish(process))
    assert process.returncode == 2
    assert re.match(
        r"UserError: `scontrol show hostnames node\[1-2\]`.*set MASTER_ADDR and MASTER_PORT", sentence
    )


def test_mpi4py_of_another_mpi_than_mpiruns_is_refused_by_name(tmp_path: Path) -> None:
    # The environment has PyPI's mpich.
    environment = {**OPENMPI, "OMPI_COMM_WORLD_RANK": "0"}
    [sentence] = said(finish(start(tmp_path, ALONE, environment=environment)))
    assert "mpirun is of Open MPI, but mpi4py loads MPICH" in sentence


@pytest.mark.slow
@pytest.mark.parametrize("place", [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_variables_of_an_mpirun_that_mpi_knows_nothing_of_are_refused_with_both_sizes(
    tmp_path: Path, place: dict[str, str]
) -> None:
    # As a shell that mpirun started hands them on; MPICH makes a world of one there.
    [sentence] = said(finish(start(tmp_path, ALONE, environment={**MPICH, "PMI_RANK": "0", **place})))
    assert "rank 0 of 4, but mpi4py says rank 0 of 1" in sentence


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    [sentence] = said(finish(start(tmp_path, ALONE, environment=environment)))
    assert "MASTER_PORT is not" in sentence
    environment["MASTER_PORT"] = "0"
    [sentence] = said(finish(start(tmp_path, ALONE, timeout=2, environment=environment)))
    assert sentence.startswith("NoMeeting: ranks 1-3 of 4 did not come to localhost:0")
    assert f"rank 0 came, from {socket.gethostname()}" in sentence


@pytest.mark.slow
def test_the_nodes_of_ranks_that_do_not_come_are_named_under_slurm(tmp_path: Path) -> None:
    path = stub_scontrol(tmp_path, f"echo {socket.gethostname()} && echo node2")
    environment = srun_environment(0, path, job_whose_port_is_free())
    [sentence] = said(finish(start(tmp_path, ALONE, timeout=2, environment=environment)))
    assert "rank 1 of 2 did not come" in sentence
    assert sentence.endswith("nobody came from node2.")


@pytest.mark.slow
def test_ranks_whose_rank_0_does_not_come_say_so(tmp_path: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(1)}
    [sentence] = said(finish(start(tmp_path, ALONE, timeout=2, environment={**environment, **place})))
    assert sentence.startswith("NoMeeting: Rank 1 of 2, on ")
    assert "did not meet the others at localhost:1" in sentence


@pytest.mark.parametrize(
    ("launcher", "fails", "failing_ranks", "sentence"),
    [
        pytest.param(TORCHRUN_2, "before", "01", "no such recipe", id="all, before connecting"),
        pytest.param(TORCHRUN_2, "after", "01", "no such corpus", id="all, under torchrun"),
        pytest.param(MPIEXEC_2, "after", "01", "no such corpus", id="all, under mpiexec"),
        pytest.param(TORCHRUN_2, "after", "0", "no such corpus", id="rank 0, under torchrun"),
        pytest.param(MPIEXEC_2, "after", "1", "no such corpus", id="rank 1, under mpiexec"),
    ],
)
def test_only_the_first_rank_that_fails_speaks(
    tmp_path: Path, launcher: list[str], fails: str, failing_ranks: str, sentence: str
) -> None:
    process = start(tmp_path, launcher, fails, failing_ranks)
    assert said(finish(process)) == [f"UserError: {sentence}"]
    assert process.returncode != 0
