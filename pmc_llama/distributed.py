"""Ranks that met become a process group, on one device each, and leave together.

The rest of the program knows `Ranks`, a `torch.device` and the default process group.
"""

import os
import socket
import sys
import time
from collections.abc import Collection
from datetime import timedelta

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pmc_llama.meeting import NoMeeting, meet
from pmc_llama.ranks import Ranks as Ranks
from pmc_llama.ranks import discover as discover

FIRST_TO_FAIL = "pmc_llama/failed"
"""Counter in the default store of the ranks that failed, see `first_to_fail`."""

# A peer that lost a rank may end as soon as that one. The launcher shall hear first of the one that died: its
# status and its node are what counts.
_NEWS_SECONDS = 1.0


def connect(ranks: Ranks, timeout: timedelta) -> torch.device:
    """Make the default process group and say which device this rank computes on.

    NCCL and a GPU where there is one, else gloo and the CPU. Exports RANK, WORLD_SIZE and LOCAL_RANK, and
    MASTER_ADDR and MASTER_PORT where the start command did not, because DeepSpeed reads them. A world of
    one uses no network.

    Args:
        ranks: what `discover` found.
        timeout: longest wait for the other ranks, here and in every collective.

    Raises:
        UserError: no meeting place can be found, MPI counts other ranks than the environment, or there are
            more ranks on this machine than GPUs.
        NoMeeting: the ranks do not meet.
    """
    device = own_device(ranks)
    join(ranks, meet(ranks, timeout), device, timeout)
    return device


def join(ranks: Ranks, store: dist.Store, device: torch.device, timeout: timedelta) -> None:
    """Make the default process group of ranks that have met; see `connect`."""
    # DeepSpeed takes LOCAL_RANK for the number of the GPU.
    local_rank = device.index if device.type == "cuda" else ranks.local_rank
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(local_rank))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    if ranks.world_size > 1 and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        _share_cores()


def disconnect() -> None:
    """Leave together, at the end of a run that went well; a rank that fails just ends.

    The barrier comes first because gloo aborts a process whose peers are still busy. MPI, if it was asked
    for the meeting place, is finalized only now: to mpirun, a rank that ends before that has failed, and
    it stops the others.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if (mpi := sys.modules.get("mpi4py.MPI")) and mpi.Is_initialized():
        mpi.Finalize()


def bound_collectives(timeout: timedelta, groups: Collection[dist.ProcessGroup]) -> None:
    """Set the longest wait in any collective of these groups that begins from now on, NCCL's or gloo's."""
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def first_to_fail(error: BaseException | None = None, patience: timedelta = timedelta(seconds=10)) -> bool:
    """Whether this failing rank is the one that shall say why. To be asked once, by a rank that fails.

    Connected, it is the rank that asks first: the failures that follow are mostly peers that lost it. When
    the store cannot be reached, rank 0, which holds it, is gone, so this rank is not the first. Not yet
    connected, it is rank 0, or the first rank of each machine when rank 0 may be the one that did not come;
    connect before anything that one rank alone can fail at.

    Args:
        error: that it fails of.
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
        first = _speaks_unconnected(error)
    if not first:
        time.sleep(patience.total_seconds())
    elif dist.is_initialized() and not isinstance(error, UserError):
        time.sleep(_NEWS_SECONDS)
    return first


def own_device(ranks: Ranks) -> torch.device:
    """The GPU of this rank, made the current one, or the CPU where the machine has no GPU.

    Raises:
        UserError: there are more ranks on this machine than GPUs.
    """
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


def _speaks_unconnected(error: BaseException | None) -> bool:
    try:
        ranks = discover()
    except UserError:  # the same that this rank fails of; some variable may tell the ranks apart all the same
        return {"0"} >= {os.environ[name] for name in ("RANK", "PMIX_RANK", "PMI_RANK") if name in os.environ}
    return ranks.rank == 0 or (isinstance(error, NoMeeting) and ranks.local_rank == 0)


def _share_cores() -> None:
    """Give each rank its part of the cores it shares with others, instead of all of them to everyone.

    Ranks share cores when they may run on the same set of cores of the same machine; launchers that bind
    each rank to cores of its own leave nothing to share.
    """
    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    of_ranks: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    torch.set_num_threads(max(1, len(mine[1]) // of_ranks.count(mine)))
