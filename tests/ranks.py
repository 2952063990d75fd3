"""Run a function on several gloo ranks, each a process of its own."""

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` on every rank of a fresh gloo world; an exception on any fails the caller.

    `function` must be importable (defined at the top of a test module).
    """
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = Path(directory) / "rendezvous"
        mp.start_processes(
            _rank, (world_size, rendezvous, function, args), nprocs=world_size, start_method="spawn"
        )


def _rank(rank: int, world_size: int, rendezvous: Path, function: Callable[..., None], args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    function(*args)
    dist.barrier()  # gloo aborts when one rank leaves while another still talks
    dist.destroy_process_group()
