"""FSDP2: `torch.distributed.fsdp.fully_shard` on every decoder layer and on what is left."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.backends.base import (
    build_optimizer,
    clip_divisor,
    frozen_parameters,
    gradient_norm,
    model_arguments,
    seeded,
    tell_update,
    trained_parameters,
)
from pmc_llama.backends.compilation import compile_layers, compiles
from pmc_llama.backends.recomputation import checkpoint_activations
from pmc_llama.config import Recipe, ShardingConfig
from pmc_llama.data import MicroBatch
from pmc_llama.lora import add_adapters
from pmc_llama.model import LlamaForPretraining, rebuild_rotary

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(recipe: Recipe, config: LlamaConfig, device: torch.device) -> "FsdpBackend":
    """Shard the model of `config` over all ranks; its weights hold nothing until they are loaded."""
    sharding = recipe.sharding
    # In order: construction on meta, activation checkpointing, sharding, and only then memory for the shards.
    with torch.device("meta"):
        model = LlamaForPretraining(config)
        if recipe.lora:
            # Frozen weights have no masters. A group of FSDP2 may hold them beside fp32 masters: only what is
            # trained has to be of one dtype.
            model.to(_DTYPES[recipe.precision.compute])
            add_adapters(model, recipe.lora)
    compiled = compiles(recipe, device)
    checkpoint_activations(model, sharding, reentrant=False, compiled=compiled)
    if compiled:
        compile_layers(model)
    shard(model, recipe, build_mesh(sharding, device), device)
    model.to_empty(device=torch.device("cpu") if sharding.offload == "all" else device)
    rebuild_rotary(model, config, device)
    if config.tie_word_embeddings:  # to_empty gave each of the two names a tensor of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    return FsdpBackend(model, recipe, device)


def check_sharding(sharding: ShardingConfig) -> None:
    """Refuse what FSDP2 cannot do.

    Raises:
        UserError: names the key.
    """
    if sharding.offload == "optimizer":
        raise UserError(
            "sharding.offload is optimizer, expected none or all with backend fsdp, whose fp32 masters are "
            "the parameters themselves; set it to all, or take backend deepspeed."
        )
    if sharding.prefetch_layers < 1:
        raise UserError(
            f"sharding.prefetch_layers is {sharding.prefetch_layers}, expected 1 or more with backend fsdp, "
            "which gathers the next layer ahead in any case; set it to 1, or take backend deepspeed."
        )
    if sharding.reduce_bucket_mb is not None:
        raise UserError(
            f"sharding.reduce_bucket_mb is {sharding.reduce_bucket_mb}, expected null with backend fsdp, "
            "which reduces one decoder layer at a time; remove it, or take backend deepspeed."
        )


def build_mesh(sharding: ShardingConfig, device: torch.device) -> DeviceMesh:
    """The ranks in one dimension; in two for hybrid sharding, (groups, ranks of a group)."""
    ranks = dist.get_world_size()
    if sharding.shard_group is None:
        return init_device_mesh(device.type, (ranks,))
    shape = (ranks // sharding.shard_group, sharding.shard_group)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: LlamaForPretraining, recipe: Recipe, mesh: DeviceMesh, device: torch.device) -> None:
    """Apply `fully_shard` to every decoder layer of `model`, then to what is left."""
    sharding = recipe.sharding
    precision = MixedPrecisionPolicy(
        param_dtype=_DTYPES[recipe.precision.compute], reduce_dtype=_DTYPES[recipe.precision.reduce]
    )
    offload = OffloadPolicy()
    if sharding.offload == "all":
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    last = model.model.layers[-1]
    layers: list[FSDPModule] = [
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            # Backward begins with the last layer: freed, it would be gathered again at once.
            reshard_after_forward=sharding.reshard_after_forward and layer is not last,
        )
        for layer in model.model.layers
    ]
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)
    ahead = sharding.prefetch_layers
    if ahead > 1:  # one layer ahead is what FSDP2 does by itself
        for place, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[place + 1 : place + 1 + ahead])
            layer.set_modules_to_backward_prefetch(layers[max(place - ahead, 0) : place][::-1])


class FsdpBackend:
    """See `pmc_llama.backends.base.Backend`."""

    def __init__(self, model: LlamaForPretraining, recipe: Recipe, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.optimizer = build_optimizer(model, recipe.optimizer)
        self.updates = torch.zeros((), dtype=torch.int64)
        # In hybrid sharding the groups hold the same shards, of which those of the first are counted.
        self.in_first_group = dist.get_rank() < (recipe.sharding.shard_group or dist.get_world_size())
        # Between forward and backward the module has whole parameters by these names; these are the shards.
        self.parameters = trained_parameters(model)
        self.frozen_parameters = frozen_parameters(model)
        # A forward begins with what the backward before it ended with: not freed between micro-batches.
        layers = model.model.layers
        kept = [model, *(layers[:1] if recipe.sharding.reshard_after_forward else layers)]
        self.kept_between = [cast(FSDPModule, module) for module in kept]
        self.recipe = recipe
        self.masters = next(iter(self.parameters.values())).device
        # AdamW makes its moments at the first update; a checkpoint may be read before that.
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }

    def forward_backward(self, micro_batches: Sequence[MicroBatch], targets: int, step: int = 0) -> Tensor:
        """See `Backend.forward_backward`."""
        self.model.train()
        # fully_shard averages over the ranks; this makes the average the sum over all targets.
        scale = dist.get_world_size() / targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        in_turn = seeded(micro_batches, self.recipe, step, self.device)
        for number, batch in enumerate(in_turn, start=1):
            for module in self.kept_between:
                module.set_reshard_after_backward(number == len(micro_batches), recurse=False)
            loss = self.model(*model_arguments(batch, self.device), scale)
            loss.backward()
            total += loss.detach()
        return total

    def clip(self, max_norm: float) -> Tensor:
        """See `Backend.clip`."""
        gradients = [_local(parameter.grad) for parameter in self.parameters.values()]
        norm = gradient_norm(gradients, self.device, counted=self.in_first_group)
        self.optimizer.grad_scale = clip_divisor(norm, max_norm).to(self.masters)  # type: ignore[attr-defined]
        return norm

    def step(self, learning_rate: float, refused: Tensor | None = None) -> None:
        """See `Backend.step`."""
        tell_update(self.optimizer, learning_rate, refused, self.masters)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """See `Backend.discard`."""
        self.optimizer.zero_grad()
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]  # what was clipped is gone

    def step_bytes(self) -> int:
        """See `Backend.step_bytes`: the fused AdamW works in place."""
        return 0

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """See `Backend.evaluate`."""
        self.model.eval()
        loss: Tensor = self.model(*model_arguments(batch, self.device))
        for module in self.model.modules():  # without a backward some would stay whole, and go stale
            if isinstance(module, FSDPModule):
                module.reshard()
        return loss.double()

    def state(self) -> dict[str, Tensor]:
        """See `Backend.state`."""
        # AdamW counts where it updates, and a refused update is not counted.
        first = next(iter(self.parameters.values()))
        self.updates.copy_(self.optimizer.state[first]["step"])
        state: dict[str, Tensor] = {"optim.step": self.updates}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.data
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"optim.{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return state

    def frozen(self) -> dict[str, Tensor]:
        """See `Backend.frozen`."""
        return {name: parameter.data for name, parameter in self.frozen_parameters.items()}

    def state_loaded(self) -> None:
        """See `Backend.state_loaded`."""
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"].fill_(self.updates.item())

    def close(self) -> None:
        """See `Backend.close`."""
        del self.model, self.optimizer, self.parameters, self.frozen_parameters, self.kept_between


def _local(gradient: Tensor | None) -> Tensor:
    assert isinstance(gradient, DTensor), "fully_shard leaves a sharded gradient on every parameter"
    return gradient.to_local()
