"""Does the group of all ranks work, how fast, and which node is slow."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pmc_llama.distributed import join
from pmc_llama.preflight.job import Job

_REPEATS = 5
_GPU_BYTES, _CPU_BYTES = (
    256 << 20,
    4 << 20,
)  # of the all-reduce; nccl-tests shows the full rate from 128 MB on
_GPU_SIDE, _CPU_SIDE = 8192, 512  # of the matrices that are multiplied


@dataclass(frozen=True)
class Speeds:
    """What one rank measured, in seconds for one time.

    Attributes:
        all_reduce: over all ranks; 0 in a world of one.
        product: of two square matrices on its device, in bf16 on a GPU.
        exchange: with the better of the two nodes beside it; 0 on ranks that are not the first of their node,
            and on all when there are fewer than three nodes, where it says nothing.
    """

    all_reduce: float
    product: float
    exchange: float


def message_bytes(device: torch.device) -> int:
    """Of the all-reduce that is measured."""
    return _GPU_BYTES if device.type == "cuda" else _CPU_BYTES


def bus_bandwidth(size: int, seconds: float, world_size: int) -> float:
    """Bytes a second that each rank's link carries in an all-reduce, whatever the number of ranks.

    As NVIDIA's nccl-tests define it (doc/PERFORMANCE.md): size / time x 2 (n - 1) / n.
    """
    return size / seconds * 2 * (world_size - 1) / world_size


def measure(job: Job, store: dist.Store, device: torch.device, timeout: timedelta) -> Speeds:
    """Make the process group of the run and measure it. Collective.

    Raises:
        UserError: a sum over the ranks is wrong, or the library tells what failed.
    """
    try:
        join(job.ranks, store, device, timeout)
        all_reduce = _all_reduce(job, device) if job.ranks.world_size > 1 else 0.0
        return Speeds(all_reduce, _product(device), _exchange(job, device))
    except RuntimeError as error:
        raise UserError(
            f"the all-reduce failed ({str(error).splitlines()[0]}); look at its network, with NCCL_DEBUG=INFO"
        ) from error


def _all_reduce(job: Job, device: torch.device) -> float:
    world_size = job.ranks.world_size
    values = torch.full((message_bytes(device) // 4,), float(job.ranks.rank + 1), device=device)
    dist.all_reduce(values)
    expected = world_size * (world_size + 1) / 2  # exact in fp32 below 2^24
    if not bool((values == expected).all()):
        raise UserError(
            "the sum over all ranks is wrong; the network or a GPU corrupts data, leave nodes out"
        )
    return _timed(lambda: dist.all_reduce(values), device)


def _product(device: torch.device) -> float:
    side, dtype = (_GPU_SIDE, torch.bfloat16) if device.type == "cuda" else (_CPU_SIDE, torch.float32)
    matrix = torch.zeros(side, side, dtype=dtype, device=device)
    return _timed(lambda: matrix @ matrix, device)


def _exchange(job: Job, device: torch.device) -> float:
    """Nodes in a ring; neighbours exchange in rounds, in each of which a node is in one pair at most."""
    firsts = [job.nodes.index(node) for node in dict.fromkeys(job.nodes)]
    if len(firsts) < 3:
        return 0.0
    taken = []
    last = len(firsts) - 1
    odd_end = [(firsts[last], firsts[0])]
    rounds = [
        list(zip(firsts[0::2], firsts[1::2], strict=False)),
        list(zip(firsts[1::2], firsts[2::2], strict=False)),
    ]
    if last % 2:  # an even number of nodes: the ring closes in the second round
        rounds[1] += odd_end
    else:
        rounds.append(odd_end)
    for pairs in rounds:
        dist.all_reduce(torch.zeros(1, device=device))  # so that none waits for one that is still in the last
        for pair in pairs:
            if job.ranks.rank in pair:
                other = pair[1 - pair.index(job.ranks.rank)]
                taken.append(_exchange_with(other, device))
    return min(taken, default=0.0)


def _exchange_with(other: int, device: torch.device) -> float:
    ours = torch.zeros(message_bytes(device) // 4, device=device)
    theirs = torch.empty_like(ours)

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, ours, other), dist.P2POp(dist.irecv, theirs, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return _timed(exchange, device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one time, after one that is not counted."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    synchronize()
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        work()
    synchronize()
    return (time.perf_counter() - begin) / _REPEATS
