"""Which rank am I, and how do the ranks meet: the same answer under torchrun, srun, mpirun or alone.

Every start command leaves other variables behind. They are read here and nowhere else; the rest of the
program knows `Ranks`, a `torch.device` and the default process group.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from data_tools.errors import UserError

FIRST_TO_FAIL = "pmc_llama/failed"
"""Counter in the default store of the ranks that failed, see `first_to_fail`."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int  # 0 .. world_size - 1
    world_size: int
    local_rank: int  # among the processes of this machine, from 0
    launcher: Literal["torchrun", "openmpi", "mpich", "slurm", "alone"]


def discover(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read from the environment who started this process.

    The order matters, since launchers nest: torchrun runs under srun, and mpirun inside a SLURM job leaves
    SLURM_PROCID at a value that is right for no rank. `mpich` stands for Intel MPI as well. `srun
    --mpi=pmi2` sets PMI_RANK without MPI_LOCALRANKID and counts as SLURM. A SLURM batch script has
    SLURM_PROCID too, but only processes of a job step, started by srun, have SLURM_STEP_ID.
    """

    def found(launcher: Literal["torchrun", "openmpi", "mpich", "slurm"], *names: str) -> Ranks:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
        return Ranks(rank, world_size, local_rank, launcher)

    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        return found("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "OMPI_COMM_WORLD_RANK" in environment:
        return found("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    if {"PMI_RANK", "MPI_LOCALRANKID"} <= environment.keys():
        return found("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
    if "SLURM_STEP_ID" in environment:
        return found("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return Ranks(rank=0, world_size=1, local_rank=0, launcher="alone")


def connect(ranks: Ranks, timeout: timedelta) -> torch.device:
    """Make the default process group and say which device this rank computes on.

    NCCL and a GPU where there is one, else gloo and the CPU. Exports RANK, WORLD_SIZE and LOCAL_RANK, and
    MASTER_ADDR and MASTER_PORT where the start command did not, because DeepSpeed reads them. A world of
    one uses no network.

    Args:
        ranks: what `discover` found.
        timeout: longest wait for the other ranks, here and in every collective.

    Raises:
        UserError: no meeting place can be found, the ranks do not meet there, or there are more ranks on
            this machine than GPUs.
    """
    device = _device(ranks)
    # DeepSpeed takes LOCAL_RANK for the number of the GPU.
    local_rank = device.index if device.type == "cuda" else ranks.local_rank
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(local_rank))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return device
    _set_meeting_place(ranks)
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"Rank {ranks.rank} of {ranks.world_size} did not meet the others at {place} (MASTER_ADDR and "
            f"MASTER_PORT; timeout {timeout}): {str(error).splitlines()[0]}"
        ) from error
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _share_cores()
    return device


def disconnect() -> None:
    """Leave together, at the end of a run that went well; a rank that fails just ends.

    The barrier comes first because gloo aborts a process whose peers are still busy. MPI, if it was asked
    for the meeting place, is finalized only now: to mpirun, a rank that ends before that has failed, and
    it stops the others.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if mpi := sys.modules.get("mpi4py.MPI"):
        mpi.Finalize()


def bound_collectives(timeout: timedelta, groups: Collection[dist.ProcessGroup]) -> None:
    """Set the longest wait in any collective of these groups that begins from now on, NCCL's or gloo's."""
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def first_to_fail(patience: timedelta = timedelta(seconds=10)) -> bool:
    """Whether this failing rank is the one that shall say why. To be asked once, by a rank that fails.

    Connected, it is the rank that asks first: the failures that follow are mostly peers that lost it. When
    the store cannot be reached, rank 0, which holds it, is gone, so this rank is not the first. Not yet
    connected, it is rank 0; connect before anything that one rank alone can fail at.

    Args:
        patience: how long a rank that shall be silent waits here. Most launchers end all ranks when one
            exits, and must not end the one that speaks before it has.
    """
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(patience)
        try:
            first = store.add(FIRST_TO_FAIL, 1) == 1
        except RuntimeError:
            first = False
    else:
        first = discover().rank == 0
    if not first:
        time.sleep(patience.total_seconds())
    return first


def _device(ranks: Ranks) -> torch.device:
    """The GPU of this rank, or the CPU where there is none."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu")
    # srun --gpus-per-task=1 shows each rank its own GPU alone.
    index = 0 if gpus == 1 and ranks.launcher == "slurm" else ranks.local_rank
    if index >= gpus:
        raise UserError(
            f"Local rank {ranks.local_rank} has no GPU, {gpus} are visible on {socket.gethostname()}; "
            "start at most one rank a GPU."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _set_meeting_place(ranks: Ranks) -> None:
    """Set MASTER_ADDR and MASTER_PORT, alike on all ranks, unless the start command has set both."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if ranks.launcher == "torchrun":
        raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not; set both.")
    host, port = _slurm_meeting_place() if ranks.launcher == "slurm" else _mpi_meeting_place(ranks)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))


def _slurm_meeting_place() -> tuple[str, int]:
    """The first host of the job step, where rank 0 is, and a port of the job's own.

    Ports 20000 to 29999 are below those that Linux hands out itself; two jobs share one only when both run
    on that host and their numbers are equal modulo 10,000.
    """
    nodes = os.environ["SLURM_STEP_NODELIST"]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"`{' '.join(command)}`, which names the first host of this job step, failed ({error}); "
            "set MASTER_ADDR and MASTER_PORT."
        ) from error
    return hosts[0], 20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000


def _mpi_meeting_place(ranks: Ranks) -> tuple[str, int]:
    """Rank 0's host and a free port there, told to the others by an MPI broadcast."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # see `disconnect`
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        raise UserError(
            f"mpirun named no meeting place and mpi4py cannot be asked for one ({error}); "
            "install pmc-llama[mpi] or set MASTER_ADDR and MASTER_PORT."
        ) from error
    if MPI.COMM_WORLD.size != ranks.world_size:
        raise UserError(
            f"mpirun started {ranks.world_size} ranks but mpi4py sees {MPI.COMM_WORLD.size}: it uses another "
            "MPI than mpirun's; install mpi4py for that one, or set MASTER_ADDR and MASTER_PORT."
        )
    place = (socket.gethostname(), _free_port()) if ranks.rank == 0 else None
    host, port = MPI.COMM_WORLD.bcast(place, root=0)
    return host, port


def _free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _share_cores() -> None:
    """Give each rank its part of the cores it shares with others, instead of all of them to everyone.

    Ranks share cores when they may run on the same set of cores of the same machine; launchers that bind
    each rank to cores of its own leave nothing to share.
    """
    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    of_ranks: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    torch.set_num_threads(max(1, len(mine[1]) // of_ranks.count(mine)))
