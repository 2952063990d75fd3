"""The LLaMA model: its sizes, and transformers' own modules with the pre-training loss on top."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data_tools.errors import UserError
from pmc_llama.config import ModelConfig

# 7b to 65b: LLaMA, Touvron et al. 2023 (arXiv 2302.13971), table 2; 33b has 32.5 billion parameters, named
# 30B in the release. Its feed-forward width is two thirds of 4 x hidden, up to the next multiple of 256.
# 70b: Llama 2, Touvron et al. 2023 (arXiv 2307.09288), table 1 and appendix A.2.1: 8 key-value heads, and a
# feed-forward 1.3 times as wide, up to the next multiple of 4096, for what those save.
# Epsilons and positions as released (params.json): 1e-6 up to 33b, 1e-5 from 65b on.
SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 2000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "33b": {
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_hidden_layers": 60,
        "num_attention_heads": 52,
        "vocab_size": 32000,
    },
    "65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
}

_COMMON = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}

# Rows (positions of the micro-batch) whose logits are held in fp32 at a time: 128 MiB at 32,000 pieces.
LOSS_CHUNK = 1024

# transformers' SDPA under a name for which it makes no mask: causal where none is given, which flash
# attention can do. Under its own name it asks the device, in every micro-batch, whether documents are packed,
# and waits for the answer.
_ATTENTION = "pmc_llama_sdpa"
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)


def llama_config(model: ModelConfig, vocab_size: int) -> LlamaConfig:
    """The shape of the model that a recipe names.

    Args:
        model: the recipe's model section; `initialize_from` is not opened here.
        vocab_size: rows of the embedding unless the recipe itself says.

    Raises:
        UserError: `size` is neither a known size nor a LLaMA `config.json`.
    """
    if model.size in SIZES:
        config = LlamaConfig(**{**_COMMON, **SIZES[model.size]})
    else:
        config = _config_from_file(Path(model.size))
        check_buildable(config, model.size)
    config.vocab_size = model.vocab_size or vocab_size
    return config


def check_buildable(config: LlamaConfig, where: str | Path) -> None:
    """A configuration that a user gave makes a model; found out on meta, without memory.

    Args:
        config: to try.
        where: it came from; told to the user.

    Raises:
        UserError: it does not.
    """
    try:
        with torch.device("meta"):
            LlamaForPretraining(config)
    except Exception as error:  # whatever nonsense in a file leads to, deep in transformers
        reason = " ".join(str(error).split())
        raise UserError(f"{where} does not describe a model that can be built: {reason}") from error
    if config.num_hidden_layers < 1:
        raise UserError(f"{where} has num_hidden_layers {config.num_hidden_layers}; expected 1 or more.")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(f"{where} has num_key_value_heads {groups}, which do not divide its {heads} heads.")


def for_training(config: LlamaConfig) -> LlamaConfig:
    """The configuration as training needs it: no cache; no dropout, whose draws no resume could repeat."""
    config.use_cache = False
    config.attention_dropout = 0.0
    return config


def _config_from_file(path: Path) -> LlamaConfig:
    if not path.is_file():
        known = ", ".join(SIZES)
        raise UserError(
            f"model.size: {path} is neither a known size ({known}) nor a config.json file; "
            "name one of the sizes or give the path of a LLaMA config.json"
        )
    try:
        config = LlamaConfig.from_json_file(str(path))
    except Exception as error:  # whatever nonsense in a file leads to, deep in transformers
        reason = " ".join(str(error).split())
        raise UserError(f"model.size: {path} is not a readable model configuration: {reason}") from error
    if config.model_type != "llama":
        raise UserError(
            f"model.size: {path} describes a model of type {config.model_type}, expected llama; "
            "only LLaMA models are trained here"
        )
    return config


class LlamaForPretraining(LlamaForCausalLM):
    """transformers' LLaMA whose forward is the training loss; parameter names are those of the original."""

    def __init__(self, config: LlamaConfig) -> None:
        # torch gives the row of a padding token no gradient. Here nothing is padded with it, and in some
        # models it ends a document. transformers would write to that row, too, of which ZeRO-3 has a shard.
        unpadded = copy.deepcopy(config)
        unpadded.pad_token_id = None
        unpadded._attn_implementation = _ATTENTION
        super().__init__(unpadded)

    def forward(
        self, inputs: Tensor, labels: Tensor, positions: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Sum of the cross-entropy over the targets.

        Args:
            inputs: int64 [micro-batch, sequence], token ids.
            labels: int64 [micro-batch, sequence], the token to predict at each position; -100 where there is
                none.
            positions: int64 [micro-batch, sequence]; where it does not go up by one, another document begins,
                which sees nothing of those before it. None: each sequence is one document.
            scale: of the gradient, see `summed_cross_entropy`.

        Returns:
            fp32 scalar: the sum in nats (not the mean: only the caller knows the targets of the whole batch).
        """
        return summed_cross_entropy(self.lm_head(self.hidden(inputs, positions)), labels, scale)

    def hidden(self, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the output layer gets: [micro-batch, sequence, hidden] in the compute dtype; see `forward`."""
        mask = None if positions is None else isolating_mask(positions)
        found: Tensor = self.model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return found


def isolating_mask(positions: Tensor) -> Tensor:
    """Which tokens a token attends to: those of its own document up to itself.

    Args:
        positions: int64 [micro-batch, sequence]; where it does not go up by one, another document begins.

    Returns:
        bool [micro-batch, 1, sequence, sequence], the same for all heads.
    """
    begins = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    document = begins.cumsum(dim=-1)
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def rebuild_rotary(model: LlamaForPretraining, config: LlamaConfig, device: torch.device) -> None:
    """Compute the rotary frequencies anew, in fp32 on `device`.

    They are a buffer that no checkpoint holds: construction on meta leaves them empty, and ZeRO-3 rounds them
    to bf16, which turns positions far from the start by the wrong angle.
    """
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)


def summed_cross_entropy(logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Cross-entropy summed over targets, with fp32 logits for a few rows at a time only.

    The gradient is computed along with the loss, in fp32, and takes the place of the logits: nothing is
    computed again in backward, and no second tensor of their size is ever held (the idea is Liger's, Hsu et
    al. 2024, arXiv 2410.10989).

    Args:
        logits: [micro-batch, sequence, vocabulary] in the compute dtype; where a gradient is asked for, they
            are overwritten.
        labels: int64 [micro-batch, sequence]; -100 carries no loss.
        scale: of the gradient, not of the loss: backward gives that of `scale` times the loss, rounded once.

    Returns:
        fp32 scalar, whose backward runs once.
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    apply: Callable[..., Tensor] = _SummedCrossEntropy.apply
    return apply(logits.flatten(0, 1), labels.flatten(), scale, wanted)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, scale: float, wanted: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        chunks = zip(torch.split(logits, LOSS_CHUNK), torch.split(labels, LOSS_CHUNK), strict=True)
        for rows, targets in chunks:
            log_softmax = functional.log_softmax(rows.float(), dim=-1)
            total += functional.nll_loss(log_softmax, targets, reduction="sum", ignore_index=-100)
            if wanted:
                rows.copy_(_scaled_gradient(log_softmax, targets, scale))
        if wanted:
            ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (of_logits,) = ctx.saved_tensors
        return of_logits.mul_(gradient), None, None, None


def _scaled_gradient(log_softmax: Tensor, targets: Tensor, scale: float) -> Tensor:
    """`scale` times (softmax - 1 at the target), 0 without one; takes the place of its first input."""
    counted = (targets >= 0)[:, None]
    gradient = log_softmax.exp_()
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], -counted.to(gradient.dtype))
    return gradient.mul_(scale * counted)
