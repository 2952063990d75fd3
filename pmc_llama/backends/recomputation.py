"""Activation checkpointing: which decoder layers are computed again in backward, and what of them."""

import warnings
from collections import deque
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pmc_llama.config import ShardingConfig
from pmc_llama.model import LlamaForPretraining

_aten = torch.ops.aten
# Matrix products and attention are nearly all arithmetic of a layer. Each kernel of SDPA is an operator.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def checkpoint_activations(
    model: LlamaForPretraining, sharding: ShardingConfig, reentrant: bool, compiled: bool
) -> None:
    """Have the first `checkpointed_layers` decoder layers computed again in backward, as `sharding` says.

    To be called before the model is sharded. Parameter names do not change.

    Args:
        model: transformers' own checkpointing is switched on in it.
        sharding: `activation_checkpointing` and `checkpointed_layers` are read.
        reentrant: the kind of `torch.utils.checkpoint` for `full`; `selective` exists in the other kind only.
        compiled: the layers are; a compiled layer computes cheap operators again by itself, as `selective`
            does, and its matrix products are not operators of torch any more that could be kept.
    """
    mode = sharding.activation_checkpointing
    if mode == "none" or (mode == "selective" and compiled):
        return
    settings: dict[str, Any] = {"use_reentrant": reentrant}
    if mode == "selective":
        settings = {"use_reentrant": False, "context_fn": _keep_and_recall}
    with warnings.catch_warnings():  # its new name is not in all versions that we allow
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if reentrant and not model.get_input_embeddings().weight.requires_grad:
            # That kind gives no gradient to a layer whose input needs none, as the first one's above frozen
            # weights.
            model.enable_input_require_grads()
    layers = model.model.layers
    for layer in layers[
        len(layers) if sharding.checkpointed_layers is None else sharding.checkpointed_layers :
    ]:
        layer.gradient_checkpointing = False


def _keep_and_recall() -> tuple["_Results", "_Results"]:
    """What `torch.utils.checkpoint` runs a layer in: first in forward, then again in backward.

    torch's own `create_selective_checkpoint_contexts` counts every operator, and objects to those of
    ZeRO-3's hooks, which gather a parameter in one of the two and find it there in the other.
    """
    results: deque[Any] = deque()
    return _Results(results, recall=False), _Results(results, recall=True)


class _Results(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Keeps the results of the operators of `_KEPT`, or takes those kept before in their place."""

    def __init__(self, results: deque[Any], recall: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results, self._recall = results, recall

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _KEPT:
            return func(*args, **(kwargs or {}))
        if self._recall:
            return self._results.popleft()
        result = func(*args, **(kwargs or {}))
        # Detached, because autograd hangs the graph on the very tensor that is returned.
        self._results.append(tree_map_only(torch.Tensor, torch.Tensor.detach, result))
        return result
