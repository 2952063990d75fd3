"""What a sharding backend offers the trainer, and the arithmetic that both must do alike.

A backend owns parameters, gradients and optimizer state. Its state has the same names, shapes and dtypes
whatever the backend and the world size, so it can be written by one and read by another.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pmc_llama.config import OptimizerConfig, Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.randomness import DROPOUT, random_bits


class Backend(Protocol):
    """A sharded LLaMA with its AdamW. Every method is collective: all ranks call it together."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], targets: int) -> Tensor:
        """Accumulate the gradient of (loss summed over all ranks' micro-batches) / `targets`.

        Args:
            micro_batches: this rank's part of the global batch, the same number on every rank.
            targets: targets of the whole global batch.

        Returns:
            fp64 scalar on the device: this rank's summed loss.
        """

    def clip(self, max_norm: float) -> float:
        """Scale the accumulated gradients down to a global norm of `max_norm`.

        Returns:
            The global gradient norm before scaling, the same bits on every rank; not finite when a gradient
            is not, which are then only good to be discarded.
        """

    def step(self, learning_rate: float) -> None:
        """Update the weights by the accumulated gradients, which are finite, and clear those."""

    def discard(self) -> None:
        """Clear the accumulated gradients, finite or not, without an update.

        Everything is then as before `forward_backward`, and the next step gives the same bits as without it.
        """

    def step_bytes(self) -> int:
        """Device memory that `step` takes for a moment on this rank, beyond what is held after `clip`."""

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """This rank's loss summed over the targets of `batch`, fp64 scalar on the device, no gradient."""

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, as tensors to read from and write into in place.

        `model.<name>`: fp32 master weights, `optim.exp_avg.<name>` and `optim.exp_avg_sq.<name>`: fp32
        moments, each of the parameter's natural shape and sharded over the ranks; `optim.step`: int64 scalar,
        the updates made so far, replicated.

        Of all that is trained: where `lora` freezes the model, of the adapters alone.
        """

    def frozen(self) -> dict[str, Tensor]:
        """The weights that are not trained, as tensors to write into in place; none without `lora`.

        In the compute dtype, each of the parameter's natural shape and sharded over the ranks.
        """

    def state_loaded(self) -> None:
        """Refresh whatever is derived from state and frozen weights after something was read into them."""

    def close(self) -> None:
        """Release the model; the process group stays."""


def model_arguments(batch: MicroBatch, device: torch.device) -> tuple[Tensor | None, ...]:
    """What `LlamaForPretraining.forward` takes of a micro-batch, on the device of the model."""
    tensors = (batch.inputs, batch.labels, batch.positions)
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


def seeded(
    micro_batches: Sequence[MicroBatch], recipe: Recipe, updates: Tensor, device: torch.device
) -> Iterator[MicroBatch]:
    """Each micro-batch in turn, with dropout's random numbers set for it; afterwards all is as it was before.

    The numbers are a function of seed, updates, rank and place in the step: a resumed run draws those that it
    would have drawn, a step that is taken back leaves no trace, and both backends draw the same.

    Args:
        micro_batches: of this rank's step.
        recipe: of the run; without `lora` there is no dropout.
        updates: made before this step, a whole number.
        device: whose generator draws.
    """
    if recipe.lora is None:
        yield from micro_batches
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for place, batch in enumerate(micro_batches):
            torch.manual_seed(int(random_bits(recipe.seed, DROPOUT, int(updates), dist.get_rank(), place)))
            yield batch


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, object]]:
    """AdamW parameter groups, the same under every backend: matrices decay, norm weights and biases do not.

    Only what is trained is in them. A matrix is told by its name, not by its dimensions, because ZeRO-3
    flattens parameters.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trained_parameters(model).items():
        undecayed = "norm" in name.rsplit(".", 2)[-2] or name.endswith(".bias")
        (plain if undecayed else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": optimizer.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def build_optimizer(model: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """`torch.optim.AdamW` over `parameter_groups`; the learning rate is set anew at every step.

    Fused: the other implementations hold temporaries of the size of the shard.
    """
    return torch.optim.AdamW(
        parameter_groups(model, optimizer),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )


def clip_gradients(
    shards: Iterable[Tensor], max_norm: float, device: torch.device, counted: bool = True
) -> float:
    """Scale gradient shards in place to a global norm of at most `max_norm`; return the norm before.

    Squares are summed in fp64, so the norm does not depend on how the gradient is cut into shards beyond
    the last bits of an fp64, and one backend clips by the very factor that another does. The factor is
    torch.nn.utils.clip_grad_norm_'s: max_norm / (norm + 1e-6), at most 1. A norm that is not finite scales
    nothing.

    Args:
        shards: this rank's part of every gradient, without padding, on whatever device.
        max_norm: above 0.
        device: of the reduction.
        counted: whether this rank's shards are part of the norm. Of ranks that hold the same shards one is
            counted; the others add zero to the one sum over all ranks, so that all get the same bits.
    """
    shards = [shard for shard in shards if shard.numel()]
    norms = [torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards if counted]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        total += torch.stack(norms).square().sum().to(device)
    dist.all_reduce(total)
    norm = float(total.sqrt())
    factor = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and factor < 1:
        torch._foreach_mul_(shards, factor)
    return norm
