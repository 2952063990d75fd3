"""What a sharding backend offers the trainer, and the arithmetic that both must do alike.

A backend owns parameters, gradients and optimizer state. Its state has the same names, shapes and dtypes
whatever the backend and the world size, so it can be written by one and read by another.
"""

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

    def forward_backward(self, micro_batches: Sequence[MicroBatch], targets: int, step: int = 0) -> Tensor:
        """Accumulate the gradient of (loss summed over all ranks' micro-batches) / `targets`.

        Args:
            micro_batches: this rank's part of the global batch, the same number on every rank.
            targets: targets of the whole global batch.
            step: number of the step, of which dropout draws its random numbers.

        Returns:
            fp64 scalar on the device: this rank's summed loss.
        """

    def clip(self, max_norm: float) -> Tensor:
        """Have the next update scale the accumulated gradients down to a global norm of `max_norm`.

        Returns:
            fp64 scalar on the device: the global gradient norm before scaling, the same bits on every rank;
            not finite when a gradient is not, and no update must then be made.
        """

    def step(self, learning_rate: float, refused: Tensor | None = None) -> None:
        """Update the weights by the accumulated gradients, and clear those.

        Args:
            learning_rate: of this update.
            refused: fp32 scalar on the device: where it is 1, weights, moments and the count of updates stay
                as they are. None: the update is made.
        """

    def discard(self) -> None:
        """Clear the accumulated gradients, finite or not, without an update.

        Everything is then as before `forward_backward`, and the next step gives the same bits as without it.
        A step that is refused leaves the same behind.
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
    # From pinned memory the copy is the device's affair, and the host goes on.
    return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)


def seeded(
    micro_batches: Sequence[MicroBatch], recipe: Recipe, step: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Each micro-batch in turn, with dropout's random numbers set for it; afterwards all is as it was before.

    The numbers are a function of seed, step, rank and place in the step: a resumed run draws those that it
    would have drawn, a step that is taken back leaves no trace, and both backends draw the same.

    Args:
        micro_batches: of this rank's step.
        recipe: of the run; without `lora` there is no dropout.
        step: its number.
        device: whose generator draws.
    """
    if recipe.lora is None:
        yield from micro_batches
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for place, batch in enumerate(micro_batches):
            torch.manual_seed(int(random_bits(recipe.seed, DROPOUT, step, dist.get_rank(), place)))
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


def tell_update(
    optimizer: torch.optim.AdamW, learning_rate: float, refused: Tensor | None, device: torch.device
) -> None:
    """Set the rate of the next update, and on the device whether it is made: `refused`, see `Backend.step`.

    Args:
        optimizer: fused, which takes `found_inf` for that, as it takes `grad_scale`.
        learning_rate: of every group.
        refused: None makes the update.
        device: of the masters; for host memory the host waits here until it is known.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.found_inf = None if refused is None else refused.to(device)  # type: ignore[attr-defined]


def gradient_norm(shards: Iterable[Tensor], device: torch.device, counted: bool = True) -> Tensor:
    """The global norm of gradients that are cut into shards, with no word to the host.

    Squares are summed in fp64, so the norm does not depend on how the gradient is cut into shards beyond
    the last bits of an fp64, and one backend clips by the very factor that another does. A sum of squares
    beyond fp32 gives inf: AdamW's second moment could not hold it, and DeepSpeed refuses such a gradient.

    Args:
        shards: this rank's part of every gradient, without padding, on whatever device.
        device: of the reduction.
        counted: whether this rank's shards are part of the norm. Of ranks that hold the same shards one is
            counted; the others add zero to the one sum over all ranks, so that all get the same bits.

    Returns:
        fp64 scalar on `device`, the same bits on every rank.
    """
    norms = [
        torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards if counted and shard.numel()
    ]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        total += torch.stack(norms).square().sum().to(device)
    dist.all_reduce(total)
    return torch.where(total > torch.finfo(torch.float32).max, torch.inf, total.sqrt())


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """What AdamW divides gradients by so that their norm is at most `max_norm`: fp32 scalar, at least 1.

    The inverse of torch.nn.utils.clip_grad_norm_'s factor, max_norm / (norm + 1e-6), at most 1. The fused
    AdamW takes it as `grad_scale`, and reads each gradient once for both.

    Args:
        norm: fp64 scalar.
        max_norm: above 0.
    """
    return ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
