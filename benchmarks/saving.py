"""How long a save stops training, and how fast checkpoints are written and read, under both backends.

Two gloo ranks share a model of 20 million parameters: with both moments, 245 MB of fp32. Every figure is the
median over the rounds, in each of which everything is measured once, one after another:

- synchronous and asynchronous saves by `pmc_llama.saving`: the time that training stands still, the time
  until the checkpoint is published, and the steps in between against undisturbed ones;
- `torch.distributed.checkpoint.save` and `load` of the same tensors, with its own fsync, without checksums
  and rename;
- the disk: each rank writes its half of the bytes to a file and syncs it, and reads it again.

The page cache is dropped, file by file, before everything that reads.

    python benchmarks/saving.py [--directory DIR] [--rounds 7]
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from transformers import LlamaConfig

from data_tools.files import checksum
from pmc_llama import checkpoint, starting
from pmc_llama.backends import build_backend
from pmc_llama.backends.base import Backend
from pmc_llama.config import BackendName, BatchConfig, CheckpointConfig, Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.saving import CheckpointSaver
from pmc_llama.snapshot import local_bytes

WORLD_SIZE = 2
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=6,
    max_position_embeddings=512,
)
SEQUENCE, MICRO = 128, 2
BLOCK = 1 << 22

Measurements = dict[str, list[float]]


def main() -> None:
    """Measure both backends and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        print(f"torch {version('torch')}, deepspeed {version('deepspeed')}; {WORLD_SIZE} gloo ranks")
        print(
            f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {options.rounds} rounds in {directory}"
        )
        for backend in ("deepspeed", "fsdp"):
            place = directory / backend
            place.mkdir()
            mp.start_processes(
                rank_main, (backend, place, options.rounds), nprocs=WORLD_SIZE, start_method="spawn"
            )
            print_table(backend, json.loads((place / "result.json").read_text()))


def rank_main(rank: int, name: BackendName, directory: Path, rounds: int) -> None:
    """One rank's part; rank 0 leaves `result.json`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    torch.set_num_threads(1)
    rendezvous = f"file://{directory / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD_SIZE)
    recipe = Recipe(backend=name, batch=BatchConfig(global_size=MICRO * WORLD_SIZE, micro_size=MICRO))
    backend = build_backend(recipe, CONFIG, torch.device("cpu"))
    starting.load_first_weights(recipe, CONFIG, backend, dist.group.WORLD)
    for _ in range(2):
        train_step(backend)
    measured: Measurements = defaultdict(list)
    savers = {
        kind: CheckpointSaver(
            directory / kind, CheckpointConfig(keep_last=1, asynchronous=kind == "async"), Path(__file__)
        )
        for kind in ("sync", "async")
    }
    for number in range(rounds + 1):  # the first is a warm-up, except for what it says of first saves
        measure(backend, savers, directory, measured, number)
    if rank == 0:
        sizes = [local_bytes(tensor) for tensor in backend.state().values()]
        measured["bytes"] = [float(sum(sizes) * WORLD_SIZE)]
        (directory / "result.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    backend: Backend,
    savers: dict[str, CheckpointSaver],
    directory: Path,
    measured: Measurements,
    number: int,
) -> None:
    """Everything once; `number` 0 is kept as the first save only."""

    def keep(name: str, seconds: float) -> None:
        if number:
            measured[name].append(seconds)

    savers["sync"].save(backend.state(), describe(number))
    (outcome,) = savers["sync"].wait()
    keep("sync save", outcome.seconds)

    dist.barrier()
    savers["async"].save(backend.state(), describe(number))
    stalled, steps = savers["async"], 0
    outcomes = stalled.poll()
    while not everywhere(bool(outcomes)):
        keep("step while saving", train_step(backend))
        outcomes = outcomes or stalled.poll()
        steps += 1
    stall = largest(outcomes[0].stall_seconds)
    if number:
        measured["async stall"].append(stall)
    else:
        measured["first async stall"].append(stall)
    keep("async save", outcomes[0].seconds)
    for _ in range(3):
        keep("step alone", train_step(backend))

    newest = checkpoint.list_checkpoints(directory / "async")[-1]
    plain, state = directory / "plain", backend.state()
    keep("checksums by reading again", timed(lambda: reread(newest)))
    keep("dcp.save", timed(lambda: dcp.save(dict(state), storage_writer=FileSystemWriter(plain))))
    keep("disk write", timed(lambda: write_raw(directory, sum(map(local_bytes, state.values())))))

    drop_cache(directory)
    keep("load", timed(lambda: checkpoint.load(state, newest, dist.group.WORLD)))
    drop_cache(directory)
    keep("dcp.load", timed(lambda: dcp.load(state, storage_reader=FileSystemReader(plain))))
    drop_cache(directory)
    keep("verify", timed(lambda: checkpoint.verify_together(newest, dist.group.WORLD)))
    drop_cache(directory)
    keep("disk read", timed(lambda: read_raw(directory)))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(plain)
    dist.barrier()


def train_step(backend: Backend) -> float:
    """A step on random tokens; seconds."""
    begin = time.perf_counter()
    tokens = torch.randint(0, CONFIG.vocab_size, (MICRO, SEQUENCE))
    backend.forward_backward([MicroBatch(tokens, tokens)], MICRO * SEQUENCE * WORLD_SIZE)
    backend.clip(1.0)
    backend.step(1e-4)
    return time.perf_counter() - begin


def describe(number: int) -> Callable[[checkpoint.FileTable], checkpoint.Manifest]:
    """A manifest of step `number`."""
    values = {field.name: {} for field in dataclasses.fields(checkpoint.Manifest)}
    return lambda files: checkpoint.Manifest(**{**values, "step": number, "files": files})


def timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    begin = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - begin


def largest(value: float) -> float:
    """Over the ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def everywhere(flag: bool) -> bool:
    """Whether it holds on all ranks."""
    return largest(float(not flag)) == 0


def reread(directory: Path) -> None:
    """What checksums would cost after writing: each rank reads its share, from the page cache."""
    for path in sorted(directory.iterdir())[dist.get_rank() :: WORLD_SIZE]:
        checksum(path)


def write_raw(directory: Path, size: int) -> None:
    """Plain writes of `size` bytes and an fsync."""
    block = os.urandom(BLOCK)
    with open(directory / f"raw-{dist.get_rank()}", "wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def read_raw(directory: Path) -> None:
    """Plain reads of what `write_raw` wrote."""
    with open(directory / f"raw-{dist.get_rank()}", "rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def drop_cache(directory: Path) -> None:
    """Have nothing of the files below `directory` in memory (all of them are synced)."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in directory.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
    dist.barrier()


def print_table(backend: str, measured: Measurements) -> None:
    """Medians, the range, and the rate."""
    size = measured.pop("bytes")[0]
    print(f"\n{backend}: {size / 1e6:.0f} MB of state")
    print(f"  {'':<28}{'median s':>10}{'from':>9}{'to':>9}{'MB/s':>8}")
    moves = ("sync save", "async save", "checksums", "dcp.", "disk", "load", "verify")
    for name, seconds in measured.items():
        median = statistics.median(seconds)
        rate = f"{size / median / 1e6:>8.0f}" if name.startswith(moves) else ""
        print(f"  {name:<28}{median:>10.3f}{min(seconds):>9.3f}{max(seconds):>9.3f}{rate}")
    stall, whole = (statistics.median(measured[name]) for name in ("async stall", "sync save"))
    print(f"  an asynchronous save stops training for {stall / whole:.1%} of a synchronous one's time")


if __name__ == "__main__":
    main()
