"""DeepSpeed ZeRO-3: the engine owns backward and step; its fp32 partitions are the state."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():  # DeepSpeed reads it on import, and warns when it has to guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor
from transformers import LlamaConfig

from pmc_llama.backends.base import build_optimizer, clip_gradients, model_arguments
from pmc_llama.backends.flat_shard import FlatShard
from pmc_llama.config import Recipe
from pmc_llama.data import MicroBatch
from pmc_llama.model import LlamaForPretraining, rebuild_rotary


def build(recipe: Recipe, config: LlamaConfig, device: torch.device) -> "DeepSpeedBackend":
    """Shard the model of `config` over all ranks; its weights mean nothing until they are loaded."""
    _quiet_start()
    settings = engine_settings(recipe, device)
    # Each parameter is cut as soon as its module is made. transformers' own initialization then finds empty
    # tensors and does nothing, which is well: the weights come through `state`, like a checkpoint's.
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = LlamaForPretraining(config)
    if recipe.sharding.activation_checkpointing == "full":
        # Only the reentrant kind runs ZeRO-3's hooks again when it computes a layer again.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    optimizer = build_optimizer(model, recipe.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    rebuild_rotary(engine.module, config, device)
    return DeepSpeedBackend(engine, device)


def engine_settings(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe.

    Loss scaling by accumulation and gradient clipping are left to this module, so that they are the same
    under every backend. Gradients accumulate in fp32 whatever they are reduced in, as under FSDP2; without
    `grad_accum_dtype` they would accumulate in bf16 even when reduced in fp32.
    """
    micro_size, ranks = recipe.batch.micro_size, dist.get_world_size()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": recipe.batch.global_size // (micro_size * ranks),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": recipe.precision.reduce,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
        },
    }
    if recipe.precision.compute == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings


def _quiet_start() -> None:
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, at every layer of every step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    # On CPU DeepSpeed would spend a minute compiling a shared-memory all-reduce that only inference calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedBackend:
    """See `pmc_llama.backends.base.Backend`."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine = engine
        self.device = device
        self.zero = engine.optimizer  # the ZeRO-3 optimizer around torch.optim.AdamW
        self.steps = torch.zeros((), dtype=torch.int64)
        # AdamW makes its moments at the first update; a checkpoint may be read before that.
        for flat in self.zero.fp32_partitioned_groups_flat:
            self.zero.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }

    def forward_backward(self, micro_batches: Sequence[MicroBatch], targets: int) -> Tensor:
        """See `Backend.forward_backward`."""
        self.engine.train()
        # ZeRO-3 averages over the ranks; this makes the average the sum over all targets.
        scale = dist.get_world_size() / targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = self.engine(*model_arguments(batch, self.device))
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        return total

    def clip(self, max_norm: float) -> float:
        """See `Backend.clip`."""
        return clip_gradients(self._gradient_shards(), max_norm, self.device)

    def step(self, learning_rate: float) -> None:
        """See `Backend.step`."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed refused an update for gradients that are not finite; discard those")
        self.steps += 1

    def discard(self) -> None:
        """See `Backend.discard`."""
        # What DeepSpeed's own step does with gradients that are not finite, less its counting.
        self.zero._pre_step()
        self.zero._partition_all_parameters()
        self.zero._overflow_clean_up(self.zero.loss_scale)

    def step_bytes(self) -> int:
        """See `Backend.step_bytes`: the fp32 gradients of one group of parameters are laid end to end."""
        return max(4 * int(flat.numel()) for flat in self.zero.fp32_partitioned_groups_flat)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor:
        """See `Backend.evaluate`."""
        self.engine.eval()
        loss: Tensor = self.engine(*model_arguments(batch, self.device))
        return loss.double()

    def state(self) -> dict[str, Tensor]:
        """See `Backend.state`."""
        state: dict[str, Tensor] = {"optim.step": self.steps}
        for name, parameter in self.engine.module.named_parameters():
            state[f"model.{name}"] = _shard(parameter, safe_get_local_fp32_param(parameter))
            for moment in ("exp_avg", "exp_avg_sq"):
                local = safe_get_local_optimizer_state(parameter, moment)
                state[f"optim.{moment}.{name}"] = _shard(parameter, local)
        return state

    def state_loaded(self) -> None:
        """See `Backend.state_loaded`: the compute-dtype copies follow the masters, as after an update."""
        self.zero._partition_all_parameters()
        for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.optimizer.state[flat]["step"].fill_(self.steps.item())
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        persistent = self.zero.persistent_parameters
        if persistent:  # small parameters that every rank keeps whole
            persistent[0].all_gather(persistent)
        self.zero.invalidate_secondary_tensor()

    def close(self) -> None:
        """See `Backend.close`."""
        self.engine.destroy()
        del self.engine, self.zero

    def _gradient_shards(self) -> Iterator[Tensor]:
        for number, group in enumerate(self.zero.fp16_groups):
            for parameter, gradient in zip(group, self.zero.averaged_gradients[number], strict=True):
                start, stop = _owned(parameter)
                yield gradient.view(-1)[: stop - start]


# A ZeRO-3 parameter is a torch parameter with attributes of DeepSpeed's, which no type describes: Any.


def _owned(parameter: Any) -> tuple[int, int]:
    """The elements [start, stop) of a ZeRO-3 parameter that this rank owns, without the padding."""
    per_rank = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank() * per_rank, parameter.ds_numel)
    return start, min(start + per_rank, parameter.ds_numel)


def _shard(parameter: Any, local: Tensor) -> FlatShard:
    start, stop = _owned(parameter)
    return FlatShard(local.detach()[: stop - start], start, parameter.ds_shape)
