"""DeepSpeed ZeRO-3: the engine owns backward and step; its fp32 partitions are the state."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

if not torch.cuda.is_available():  # DeepSpeed reads it on import, and warns when it has to guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

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
from pmc_llama.backends.flat_shard import FlatShard
from pmc_llama.backends.recomputation import checkpoint_activations
from pmc_llama.config import Recipe, ShardingConfig
from pmc_llama.data import MicroBatch
from pmc_llama.lora import add_adapters
from pmc_llama.model import LlamaForPretraining, rebuild_rotary


def build(recipe: Recipe, config: LlamaConfig, device: torch.device) -> "DeepSpeedBackend":
    """Shard the model of `config` over all ranks; its weights mean nothing until they are loaded."""
    _quiet_start()
    settings = engine_settings(recipe, config, device)
    # Each parameter is cut as soon as its module is made. transformers' own initialization then finds empty
    # tensors and does nothing, which is well: the weights come through `state`, like a checkpoint's.
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = LlamaForPretraining(config)
        if recipe.lora:
            add_adapters(model, recipe.lora)
    compiled = compiles(recipe, device)
    checkpoint_activations(model, recipe.sharding, reentrant=True, compiled=compiled)
    if recipe.lora is None:
        # A layer is gathered and freed as a whole, as under FSDP2: the hooks of the modules in it would cost
        # more than they free, and break the graph of a compiled layer. Adapters would be freed too early.
        set_z3_leaf_modules(model, [LlamaDecoderLayer])
    if compiled:
        compile_layers(model)
    optimizer = build_optimizer(model, recipe.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    rebuild_rotary(engine.module, config, device)
    return DeepSpeedBackend(engine, recipe, device)


def check_sharding(sharding: ShardingConfig) -> None:
    """Refuse what ZeRO-3 cannot do; there is nothing of that in `sharding`."""


def engine_settings(recipe: Recipe, config: LlamaConfig, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe.

    Loss scaling by accumulation and gradient clipping are left to this module, so that they are the same
    under every backend. Gradients accumulate in fp32 whatever they are reduced in, as under FSDP2; without
    `grad_accum_dtype` they would accumulate in bf16 even when reduced in fp32.
    """
    micro_size, ranks = recipe.batch.micro_size, dist.get_world_size()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_size,
        # It counts samples by this, nothing else: each step says itself which micro-batch is its last.
        "gradient_accumulation_steps": -(-recipe.batch.global_size // (micro_size * ranks)),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # The update is torch's AdamW wherever it is made: DeepSpeed's own for the CPU rounds differently.
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": recipe.precision.reduce,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
            **_gathering(recipe.sharding, config),
            "reduce_bucket_size": _reduce_bucket(recipe, config),
            **_offloading(recipe.sharding, device),
        },
    }
    if recipe.precision.compute == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings


def _gathering(sharding: ShardingConfig, config: LlamaConfig) -> dict[str, int]:
    """How long parameters stay gathered, and how far ahead; DeepSpeed counts in parameters."""
    layer = _layer_parameters(config)
    settings = {"stage3_prefetch_bucket_size": sharding.prefetch_layers * layer}
    if sharding.reshard_after_forward:
        # From a layer's recomputation to the end of its backward it is passed twice: gathered once for both.
        settings["stage3_max_reuse_distance"] = 2 * layer
        # What is gathered ahead must not be held up by what is in use: a layer, embedding and output.
        outside = 2 * config.vocab_size * config.hidden_size
        settings["stage3_max_live_parameters"] = (sharding.prefetch_layers + 2) * layer + outside
    else:
        settings["stage3_max_reuse_distance"] = settings["stage3_max_live_parameters"] = sys.maxsize
    if sharding.shard_group is not None:
        settings["zero_hpz_partition_size"] = sharding.shard_group
    return settings


def _reduce_bucket(recipe: Recipe, config: LlamaConfig) -> int:
    """Gradients summed over the ranks at once, in elements."""
    if recipe.sharding.reduce_bucket_mb is None:
        return _layer_parameters(config)
    return recipe.sharding.reduce_bucket_mb * 10**6 // {"fp32": 4, "bf16": 2}[recipe.precision.reduce]


def _offloading(sharding: ShardingConfig, device: torch.device) -> dict[str, Any]:
    """What lives in host memory, which is pinned for the copies of a GPU."""
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    parts = {"none": [], "optimizer": ["offload_optimizer"], "all": ["offload_optimizer", "offload_param"]}
    return dict.fromkeys(parts[sharding.offload], host)


def _layer_parameters(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlamaDecoderLayer(config, 0).parameters())


def _quiet_start() -> None:
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, at every layer of every step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # On CPU DeepSpeed would spend a minute compiling a shared-memory all-reduce that only inference calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedBackend:
    """See `pmc_llama.backends.base.Backend`."""

    def __init__(self, engine: Any, recipe: Recipe, device: torch.device) -> None:
        self.engine = engine
        self.recipe = recipe
        self.device = device
        self.zero = engine.optimizer  # the ZeRO-3 optimizer around torch.optim.AdamW
        self.updates = torch.zeros((), dtype=torch.int64)
        self.masters = self.zero.fp32_partitioned_groups_flat[0].device
        # AdamW makes its moments at the first update; a checkpoint may be read before that.
        for flat in self.zero.fp32_partitioned_groups_flat:
            self.zero.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        # DeepSpeed would compute a norm of its own in each step, and the host wait for it. The one that
        # counts is that of `clip`, and whether the update is made is for the caller to say.
        self.zero._get_norm_groups = lambda: [0.0]

    def forward_backward(self, micro_batches: Sequence[MicroBatch], targets: int, step: int = 0) -> Tensor:
        """See `Backend.forward_backward`."""
        self.engine.train()
        # ZeRO-3 averages over the ranks; this makes the average the sum over all targets.
        scale = dist.get_world_size() / targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        depth = len(FWD_MODULE_STACK)
        in_turn = seeded(micro_batches, self.recipe, step, self.device)
        for number, batch in enumerate(in_turn, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = self.engine(*model_arguments(batch, self.device), scale)
            self.engine.backward(loss, scale_wrt_gas=False)
            total += loss.detach()
            # Selective recomputation stops once it has all it needs, in the middle of modules' forward.
            del FWD_MODULE_STACK[depth:]
        return total

    def clip(self, max_norm: float) -> Tensor:
        """See `Backend.clip`."""
        norm = gradient_norm(self._gradient_shards(), self.device)
        self.zero.optimizer.grad_scale = clip_divisor(norm, max_norm).to(self.masters)
        return norm

    def step(self, learning_rate: float, refused: Tensor | None = None) -> None:
        """See `Backend.step`.

        The copies in the compute dtype follow the masters, which a refused update has not changed.
        """
        tell_update(self.zero.optimizer, learning_rate, refused, self.masters)
        self.engine.step()
        self.zero.optimizer.grad_scale = None

    def discard(self) -> None:
        """See `Backend.discard`."""
        # What DeepSpeed's own step does with gradients that are not finite, less its counting.
        self.zero._pre_step()
        self.zero._partition_all_parameters()
        self.zero._overflow_clean_up(self.zero.loss_scale)
        self.zero.optimizer.grad_scale = None  # what was clipped is gone

    def step_bytes(self) -> int:
        """See `Backend.step_bytes`: the fp32 gradients of one group of parameters are laid end to end.

        With an offloaded optimizer they lie so in host memory already.
        """
        if self.zero.offload_optimizer:
            return 0
        return max(4 * int(flat.numel()) for flat in self.zero.fp32_partitioned_groups_flat)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """See `Backend.evaluate`."""
        self.engine.eval()
        loss: Tensor = self.engine(*model_arguments(batch, self.device))
        return loss.double()

    def state(self) -> dict[str, Tensor]:
        """See `Backend.state`."""
        # AdamW counts where it updates, and a refused update is not counted.
        first = self.zero.fp32_partitioned_groups_flat[0]
        self.updates.copy_(self.zero.optimizer.state[first]["step"])
        state: dict[str, Tensor] = {"optim.step": self.updates}
        for name, parameter in trained_parameters(self.engine.module).items():
            flat, where = self._place(parameter)
            moments = self.zero.optimizer.state[flat]
            state[f"model.{name}"] = _shard(parameter, flat[where])
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"optim.{moment}.{name}"] = _shard(parameter, moments[moment][where])
        return state

    def frozen(self) -> dict[str, Tensor]:
        """See `Backend.frozen`: ZeRO-3's own shards, on whatever device they live."""
        frozen: dict[str, Tensor] = {}
        for name, parameter in frozen_parameters(self.engine.module).items():
            start, stop = _owned(parameter)
            frozen[name] = _shard(parameter, cast(Any, parameter).ds_tensor.data.view(-1)[: stop - start])
        return frozen

    def state_loaded(self) -> None:
        """See `Backend.state_loaded`: the compute-dtype copies follow the masters, as after an update."""
        self.zero._partition_all_parameters()
        for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.optimizer.state[flat]["step"].fill_(self.updates.item())
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        persistent = self.zero.persistent_parameters
        if persistent:  # small parameters that every rank keeps whole
            persistent[0].all_gather(persistent)
        self.zero.invalidate_secondary_tensor()
        for parameter in frozen_parameters(self.engine.module).values():  # of which that takes no notice
            cast(Any, parameter).ds_secondary_tensor = None

    def close(self) -> None:
        """See `Backend.close`."""
        self.engine.destroy()
        del self.engine, self.zero
        hybrid = groups._get_zero_param_intra_parallel_group()
        if hybrid is not None:  # a global of DeepSpeed's, which would refuse to make another
            deepspeed.comm.destroy_process_group(hybrid)

    def _gradient_shards(self) -> Iterator[Tensor]:
        for number, group in enumerate(self.zero.fp16_groups):
            for place, parameter in enumerate(group):
                if self.zero.offload_optimizer:
                    flat, where = self._place(parameter)
                    yield cast(Tensor, flat.grad)[where]
                else:
                    start, stop = _owned(parameter)
                    yield self.zero.averaged_gradients[number][place].view(-1)[: stop - start]

    def _place(self, parameter: Any) -> tuple[Tensor, slice]:
        """Where the fp32 masters of this rank's elements of a parameter are: a flat tensor and a part of it.

        The tensors of DeepSpeed's own `safe_get_local_...` are copies when the optimizer is offloaded.
        """
        number, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start, stop = _owned(parameter)
        return self.zero.fp32_partitioned_groups_flat[number], slice(offset, offset + stop - start)


# A ZeRO-3 parameter is a torch parameter with attributes of DeepSpeed's, which no type describes: Any.


def _owned(parameter: Any) -> tuple[int, int]:
    """The elements [start, stop) of a ZeRO-3 parameter that this rank owns, without the padding."""
    per_rank = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank() * per_rank, parameter.ds_numel)
    return start, min(start + per_rank, parameter.ds_numel)


def _shard(parameter: Any, local: Tensor) -> FlatShard:
    start, _ = _owned(parameter)
    return FlatShard(local.detach(), start, parameter.ds_shape)
