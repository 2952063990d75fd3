"""Model FLOPs are those of the formula, and utilization is never guessed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pmc_llama.flops import model_flops_per_token, model_flops_utilization


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_flops_count_all_weights_of_the_model_but_the_input_embedding(
    tied: bool, key_value_heads: int
) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=101,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        vocab_size=131,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not tied:
        weights -= model.get_input_embeddings().weight.numel()
    attention = 12 * 3 * 4 * 16 * 256
    assert model_flops_per_token(config, sequence_length=256) == 6 * weights + attention


def test_flops_of_llama_7b_are_those_of_its_published_shape() -> None:
    config = LlamaConfig(vocab_size=32000)  # transformers' defaults are LLaMA-7B's
    # 6,738,415,616 weights, of them 131,072,000 in the input embedding.
    expected = 6 * (6_738_415_616 - 131_072_000) + 12 * 32 * 4096 * 2048
    assert model_flops_per_token(config, sequence_length=2048) == expected


def test_mfu_of_a_cpu_is_not_guessed() -> None:
    assert model_flops_utilization(1e12, torch.device("cpu")) is None


def test_mfu_is_the_part_of_a_known_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H200 NVX"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert model_flops_utilization(494.75e12, torch.device("cuda", 0)) == pytest.approx(0.5)
    assert model_flops_utilization(417.75e12, torch.device("cuda", 0)) == pytest.approx(0.5)
    assert model_flops_utilization(494.75e12, torch.device("cuda", 0)) is None
