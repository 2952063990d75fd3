"""One full-size step on made-up tokens, undone: what a run needs at most is found before it begins."""

import time
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pmc_llama.backends.base import Backend
from pmc_llama.config import Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.metrics import peak_memory
from pmc_llama.plan.batch_sizes import micro_sizes


def dry_run(backend: Backend, recipe: Recipe, vocab_size: int, device: torch.device) -> str:
    """Take one step of the recipe's shapes through forward, backward and clipping, and discard it.

    Micro-batches have the recipe's size, every position a target. There are as many as in a step, but no more
    than two: from the second on gradients accumulate, and every further one needs what the second does. The
    update itself is not made, since it could not be undone; the memory that it takes for a moment is taken
    instead. Weights, moments and random number generators are afterwards as they were. So are the peak-memory
    statistics of a GPU, from zero; that of a process without one cannot be reset. Collective.

    Args:
        backend: with its weights loaded.
        recipe: the run's.
        vocab_size: of the model; token ids are drawn below it.
        device: of this rank.

    Returns:
        One line for the user: peak memory on the fullest rank, of how much, and the seconds it took.

    Raises:
        UserError: on a rank whose memory does not suffice.
    """
    batch = recipe.batch
    # In `whole` mode the most that there can be: a row for each document.
    accumulation = -(-batch.global_size // (batch.micro_size * dist.get_world_size()))
    micro_batches = _micro_batches(recipe, min(accumulation, 2), vocab_size)
    targets = sum(micro_batch.labels.numel() for micro_batch in micro_batches) * dist.get_world_size()
    begin = time.perf_counter()
    _forget_peak(device)
    try:
        backend.forward_backward(micro_batches, targets)
        backend.clip(recipe.optimizer.max_grad_norm)
        torch.ones(backend.step_bytes(), dtype=torch.uint8, device=device)
        backend.discard()
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            raise UserError(_too_much(recipe, device)) from error
        raise
    fullest = _fullest(device)
    _forget_peak(device)
    shape = f"{len(micro_batches)} micro-batches of {batch.micro_size} x {recipe.data.sequence_length} tokens"
    return f"dry run of {shape}: {fullest}; {time.perf_counter() - begin:.1f} s"


def _micro_batches(recipe: Recipe, count: int, vocab_size: int) -> list[MicroBatch]:
    """Random tokens from a generator of their own: the run's random numbers are not touched."""
    data, rows = recipe.data, recipe.batch.micro_size
    shape = (rows, data.sequence_length)
    draw = torch.Generator().manual_seed(recipe.seed)
    positions = None
    if data.mode == "whole" or (data.isolate_documents and data.mode == "packed"):
        # Two documents a sequence: for one alone no mask would be made.
        positions = (torch.arange(data.sequence_length) % -(-data.sequence_length // 2)).expand(shape)

    def tokens() -> torch.Tensor:
        return torch.randint(vocab_size, shape, generator=draw)

    return [MicroBatch(tokens(), tokens(), positions) for _ in range(count)]


# --- memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Peak:
    """The most that one rank held, in bytes."""

    rank: int
    used: int  # see `metrics.peak_memory`
    reserved: int  # from the GPU by the allocator: what is used, and what it could not fill
    total: int

    def __str__(self) -> str:
        reserved = f" ({_gib(self.reserved)} reserved)" if self.reserved else ""
        return f"{_gib(self.used)}{reserved} of {_gib(self.total)} on the fullest rank, {self.rank}"


def _fullest(device: torch.device) -> _Peak:
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    mine = _Peak(dist.get_rank(), peak_memory(device), reserved, _total_memory(device))
    peaks = [mine] * dist.get_world_size()
    dist.all_gather_object(peaks, mine)
    return max(peaks, key=lambda peak: max(peak.used, peak.reserved) / peak.total)


def _total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine, which its ranks share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().total)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# --- when it does not suffice ------------------------------------------------------------------------------


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch's own exception, NCCL's and cuBLAS' RuntimeError, and the sentence of torch's CPU allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "can't allocate memory", "not enough memory"))


def _too_much(recipe: Recipe, device: torch.device) -> str:
    batch, checkpointing = recipe.batch, recipe.sharding.activation_checkpointing
    changes = _remedies(recipe)
    place = "GPU" if device.type == "cuda" else "machine"
    return (
        f"The memory of rank {dist.get_rank()} does not suffice for a step: with batch.micro_size "
        f"{batch.micro_size}, data.sequence_length {recipe.data.sequence_length} and "
        f"sharding.activation_checkpointing {checkpointing} it ran out at {_gib(peak_memory(device))}, of "
        f"{_gib(_total_memory(device))} of its {place}; {', '.join(changes[:-1])}, or {changes[-1]}."
    )


def _remedies(recipe: Recipe) -> list[str]:
    """What lowers the memory, what costs least first; none but the sequence length changes a loss."""
    sharding, micro = recipe.sharding, recipe.batch.micro_size
    changes = []
    smaller = [size for size in micro_sizes(recipe, dist.get_world_size()) if size < micro]
    if smaller:
        changes.append(f"set --batch.micro_size {smaller[-1]}, the next smaller one")
    stronger = {"none": "selective, then full", "selective": "full"}.get(sharding.activation_checkpointing)
    if stronger:
        changes.append(f"set --sharding.activation_checkpointing {stronger}")
    offloads = ["none", "optimizer", "all"] if recipe.backend == "deepspeed" else ["none", "all"]
    further = offloads[offloads.index(sharding.offload) + 1 :]
    if further:
        changes.append(f"set --sharding.offload {further[0]}")
    return [*changes, "lower data.sequence_length", "train on more ranks"]
