"""Ranks as real processes that start at once: forked from a server that has torch imported already."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "torch",
    "torch.distributed",
    "pmc_llama.watchdog",
    "pmc_llama.stopping",
    "pmc_llama.preflight.run",
]


def start_ranks(
    world_size: int, function: Callable[..., None], directory: Path, *args: Any
) -> list[ForkServerProcess]:
    """Start `function(rank, directory, *args)` on every rank of a gloo world whose store is held by rank 0.

    `function` must be importable. What rank r says goes to `directory / "said-r"`, standard error included.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, directory, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[ForkServerProcess], seconds: float, stopped: int | None = None) -> list[int | None]:
    """The exit statuses, None for a rank that is not waited for or lives too long; none lives afterwards."""
    for rank, process in enumerate(processes):
        if rank != stopped:
            process.join(seconds)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def _rank(
    rank: int, world_size: int, port: int, function: Callable[..., None], directory: Path, args: Any
) -> None:
    with (directory / f"said-{rank}").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(rank, directory, *args)
    dist.barrier()
    dist.destroy_process_group()
