"""FSDP2: `torch.distributed.fsdp.fully_shard` on every decoder layer and on what is left."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from pmc_llama.backends.base import build_optimizer, clip_gradients, model_arguments
from pmc_llama.config import Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.model import LlamaForPretraining, rebuild_rotary

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(recipe: Recipe, config: LlamaConfig, device: torch.device) -> "FsdpBackend":
    """Shard the model of `config` over all ranks; its weights hold nothing until they are loaded."""
    # In order: construction on meta, activation checkpointing, sharding, and only then memory for the shards.
    with torch.device("meta"):
        model = LlamaForPretraining(config)
    if recipe.sharding.activation_checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[recipe.precision.compute], reduce_dtype=_DTYPES[recipe.precision.reduce]
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    rebuild_rotary(model, config, device)
    if config.tie_word_embeddings:  # to_empty gave each of the two names a tensor of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    return FsdpBackend(model, recipe, device)


class FsdpBackend:
    """See `pmc_llama.backends.base.Backend`."""

    def __init__(self, model: LlamaForPretraining, recipe: Recipe, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.optimizer = build_optimizer(model, recipe.optimizer)
        self.steps = torch.zeros((), dtype=torch.int64)
        # Between forward and backward the module has whole parameters by these names; these are the shards.
        self.parameters = dict(model.named_parameters())
        # AdamW makes its moments at the first update; a checkpoint may be read before that.
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }

    def forward_backward(self, micro_batches: Sequence[MicroBatch], targets: int) -> Tensor:
        """See `Backend.forward_backward`."""
        self.model.train()
        # fully_shard averages over the ranks; this makes the average the sum over all targets.
        scale = dist.get_world_size() / targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            loss = self.model(*model_arguments(batch, self.device))
            (loss * scale).backward()
            total += loss.detach()
        return total

    def clip(self, max_norm: float) -> float:
        """See `Backend.clip`."""
        gradients = [_local(parameter.grad) for parameter in self.parameters.values()]
        return clip_gradients(gradients, max_norm, self.device)

    def step(self, learning_rate: float) -> None:
        """See `Backend.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def discard(self) -> None:
        """See `Backend.discard`."""
        self.optimizer.zero_grad()

    def step_bytes(self) -> int:
        """See `Backend.step_bytes`: the fused AdamW works in place."""
        return 0

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """See `Backend.evaluate`."""
        self.model.eval()
        loss: Tensor = self.model(*model_arguments(batch, self.device))
        self.model.reshard()  # without a backward the outermost part would stay whole, and go stale
        return loss.double()

    def state(self) -> dict[str, Tensor]:
        """See `Backend.state`."""
        state: dict[str, Tensor] = {"optim.step": self.steps}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.data
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"optim.{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return state

    def state_loaded(self) -> None:
        """See `Backend.state_loaded`."""
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"].fill_(self.steps.item())

    def close(self) -> None:
        """See `Backend.close`."""
        del self.model, self.optimizer, self.parameters


def _local(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor), "fully_shard leaves a sharded gradient on every parameter"
    return gradient.to_local()
