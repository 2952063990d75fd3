"""Model FLOPs: how many a token takes, and what part of a device's peak a run reaches."""

import torch
from transformers import LlamaConfig

from pmc_llama.config import LoraConfig
from pmc_llama.lora import adapter_parameters

# Dense bf16 FLOP/s of a device by the name that torch gives it. From the makers' data sheets: NVIDIA A100
# (nvidia.com/en-us/data-center/a100), H100 (.../h100: SXM 1,979, NVL 1,671; the PCIe card 1,513 in its own
# sheet), H200 (.../h200: SXM 1,979, NVL 1,671), GH200 (1,979), HGX B200 (36 PFLOP/s of eight) and L40S (733
# TFLOP/s), halved, since those figures are with sparsity; L40S has 362.05 dense. AMD Instinct MI250X (383
# TFLOP/s for the package, of which torch sees each half as a device), MI300X and MI325X (1,307.4, dense).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200 120GB": 989.5e12,
    "NVIDIA GH200 480GB": 989.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362.05e12,
    "AMD Instinct MI250X": 191.5e12,
    "AMD Instinct MI300X": 1307.4e12,
    "AMD Instinct MI325X": 1307.4e12,
}


def model_flops_per_token(config: LlamaConfig, sequence_length: int, lora: LoraConfig | None = None) -> int:
    """Floating-point operations that training a token takes, forward and backward: 6 N + 12 L H Q T.

    Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B. N counts every weight but the input
    embedding's, whose lookup multiplies nothing: attention, feed-forward, norms and the output head, tied
    or not. L layers, H heads of Q dimensions, T inputs of a sequence. A multiplication with its addition
    counts as two, backward as twice the forward. Recomputed activations and the optimizer are not counted;
    attention is counted as if every token attended to all T, as in the paper, so neither causality nor
    document isolation lowers the count, and padding counts as tokens do.

    With adapters it is 4 N + 6 A + 12 L H Q T, of A weights in adapters: a frozen weight takes 2 forward and
    2 for the gradient of its input, and none for a gradient of its own.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads, head_dim = config.num_attention_heads, config.head_dim
    query_and_output = 2 * hidden * heads * head_dim
    key_and_value = 2 * hidden * config.num_key_value_heads * head_dim
    feed_forward = 3 * hidden * config.intermediate_size
    norms = 2 * hidden
    weights = layers * (query_and_output + key_and_value + feed_forward + norms)
    weights += hidden + config.vocab_size * hidden  # the last norm and the output head
    per_weight = 4 if lora else 6
    adapters = adapter_parameters(config, lora) if lora else 0
    flops: int = per_weight * weights + 6 * adapters + 12 * layers * heads * head_dim * sequence_length
    return flops


def model_flops_utilization(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOPs utilization (Chowdhery et al., section 4.1): what a device reaches of its dense bf16 peak.

    Args:
        flops_per_second: tokens a second of one device times `model_flops_per_token`.
        device: whose peak.

    Returns:
        A fraction; None for a device that is not in `PEAK_FLOPS`, since a guess would be worse than nothing.
    """
    if device.type != "cuda":
        return None
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device))
    return flops_per_second / peak if peak else None
