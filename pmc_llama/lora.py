"""LoRA: low-rank adapters beside frozen matrices, made by PEFT (Hu et al. 2021, arXiv 2106.09685).

PEFT puts an adapter in a module's place and calls the module `base_layer`; the adapter's matrices are
`lora_A.default.weight` [rank, in] and `lora_B.default.weight` [out, rank]. What such names stand for is known
here alone.
"""

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from data_tools.errors import UserError
from pmc_llama.config import LoraConfig
from pmc_llama.initialize import RandomWeights

_BASE, _ADAPTER = ".base_layer", ".default"
_IN_PEFT_FILES = "base_model.model."


def peft_version() -> str:
    """The version of PEFT, asked for before anything else is done with it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version("peft")
    except PackageNotFoundError as error:
        raise UserError(
            "The recipe has lora, whose adapters are made by the package peft, which is not installed; "
            "pip install 'pmc-llama[lora]', or set lora to null."
        ) from error


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Put adapters on a model in place; all other parameters are frozen.

    The adapters' weights mean nothing until they are loaded. They are made on the device on which new
    parameters are at the call, and in their dtype.

    Args:
        model: transformers' LLaMA.
        lora: of the recipe.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(peft_config(lora), model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_pre_hook(_take_apart)


def _take_apart(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Have the gradients of matrix and adapter summed before those of the other readers of the same input.

    ZeRO-3's hooks do so in any case; in another order bf16 sums have other bits.
    """
    inputs, *others = arguments
    return inputs.view_as(inputs), *others


def peft_config(lora: LoraConfig, base: str | None = None) -> Any:
    """PEFT's own description of the adapters.

    Args:
        lora: of the recipe.
        base: where the weights are that the adapters belong to.
    """
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        # Drawn through `AdapterWeights`; PEFT cannot fill the shards of ZeRO-3.
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def base_name(name: str) -> str:
    """What a frozen parameter is called in the model without adapters."""
    return name.replace(_BASE, "")


def peft_name(name: str) -> str:
    """What a parameter of an adapter is called in PEFT's files."""
    return _IN_PEFT_FILES + name.replace(_ADAPTER, "")


def adapter_names(weight: str) -> tuple[str, str]:
    """The parameters A and B of the adapter of a matrix, which may have none.

    Args:
        weight: of the matrix, in the model without adapters.
    """
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A{_ADAPTER}.weight", f"{module}.lora_B{_ADAPTER}.weight"


class AdapterWeights(RandomWeights):
    """First weights of adapters by PEFT's own rule: A as `nn.Linear` has it, B zero, so nothing is added yet.

    Drawn from the seed and each tensor's name, like random weights of a model.
    """

    def draw(self, name: str) -> Tensor:
        """The whole fp32 tensor called `name`."""
        if ".lora_B." in name:
            return torch.zeros(self.shapes[name])
        weights = torch.empty(self.shapes[name])
        return nn.init.kaiming_uniform_(weights, a=math.sqrt(5), generator=self.generator(name))


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    """Trained parameters: `rank` x (in + out) of every matrix that has an adapter."""
    hidden, wide = config.hidden_size, config.intermediate_size
    attention = config.num_attention_heads * config.head_dim
    key_and_value = config.num_key_value_heads * config.head_dim
    in_and_out = {
        "q_proj": hidden + attention,
        "k_proj": hidden + key_and_value,
        "v_proj": hidden + key_and_value,
        "o_proj": attention + hidden,
        "gate_proj": hidden + wide,
        "up_proj": hidden + wide,
        "down_proj": wide + hidden,
    }
    total: int = config.num_hidden_layers * lora.rank * sum(in_and_out[target] for target in lora.targets)
    return total
