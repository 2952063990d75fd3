"""Model FLOPs: how many a token takes, and what part of a device's peak a run reaches."""

import torch
from transformers import LlamaConfig

# Dense bf16 FLOP/s by the name that the driver gives the device, from NVIDIA's data sheets, halved where
# those count with sparsity: A100 (2021), H100 (2022), H200 (2023).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.5e12,
}


def model_flops_per_token(config: LlamaConfig, sequence_length: int) -> int:
    """Floating-point operations that training a token takes, forward and backward: 6 N + 12 L H Q T.

    Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B. N counts every weight but the input
    embedding's, whose lookup multiplies nothing: attention, feed-forward, norms and the output head, tied
    or not. L layers, H heads of Q dimensions, T inputs of a sequence. Recomputed activations are not
    counted, and attention is counted as if it were not causal, as in the paper.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads, head_dim = config.num_attention_heads, config.head_dim
    query_and_output = 2 * hidden * heads * head_dim
    key_and_value = 2 * hidden * config.num_key_value_heads * head_dim
    feed_forward = 3 * hidden * config.intermediate_size
    norms = 2 * hidden
    weights = layers * (query_and_output + key_and_value + feed_forward + norms)
    weights += hidden + config.vocab_size * hidden  # the last norm and the output head
    flops: int = 6 * weights + 12 * layers * heads * head_dim * sequence_length
    return flops


def model_flops_utilization(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOP/s of one device as a part of its bf16 peak; None for a device not in `PEAK_FLOPS`."""
    if device.type != "cuda":
        return None
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device))
    return flops_per_second / peak if peak else None
