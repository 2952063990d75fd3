"""The model is transformers' LLaMA, and the loss is the cross-entropy, whatever it is cut into."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

import pmc_llama.model
from data_tools.errors import UserError
from pmc_llama.config import ModelConfig
from pmc_llama.model import LlamaForPretraining, llama_config, rebuild_rotary, summed_cross_entropy
from tests.pmc_llama.small import odd_config


def test_7b_has_the_published_number_of_parameters() -> None:
    config = llama_config(ModelConfig(size="7b"), vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForPretraining(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616  # as Meta's LLaMA-7B


def test_the_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmc_llama.model, "LOSS_CHUNK", 7)  # several chunks, the last one shorter
    torch.manual_seed(0)
    config = odd_config()
    config.pad_token_id = None
    reference = LlamaForCausalLM(config)
    model = LlamaForPretraining(config)
    model.load_state_dict(reference.state_dict())
    tokens = torch.randint(0, 131, (3, 11))
    summed = model(tokens[:, :-1], tokens[:, 1:])
    summed.backward()
    mean = reference(tokens, labels=tokens).loss
    (mean * 30).backward()
    assert torch.allclose(summed, mean * 30)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


def test_masked_positions_carry_no_loss_and_no_gradient() -> None:
    logits = torch.randn(2, 5, 9, requires_grad=True)
    labels = torch.tensor([[1, -100, 3, -100, 0], [-100] * 5])
    loss = summed_cross_entropy(logits.clone(), labels)
    loss.backward()
    expected = sum(functional.cross_entropy(logits[0, i], labels[0, i]) for i in (0, 2, 4))
    assert torch.allclose(loss, expected)
    assert logits.grad is not None
    assert not logits.grad[labels == -100].any()


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)
def test_the_gradient_is_that_of_the_scaled_loss_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rounding: float
) -> None:
    monkeypatch.setattr(pmc_llama.model, "LOSS_CHUNK", 16)
    draw = torch.Generator().manual_seed(0)
    ours = (3 * torch.randn(2, 25, 131, generator=draw)).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    labels = torch.randint(0, 131, (2, 25), generator=draw)
    loss = summed_cross_entropy(ours.clone(), labels, scale=1 / 37)
    loss.backward()
    expected = functional.cross_entropy(theirs.float().flatten(0, 1), labels.flatten(), reduction="sum")
    (expected / 37).backward()
    assert torch.allclose(loss, expected)
    assert ours.grad is not None
    assert theirs.grad is not None
    # Relative to each element: small probabilities are as exact as large ones.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rounding, atol=1e-9)


def test_the_loss_alone_leaves_the_logits_as_they_are() -> None:
    logits, labels = torch.randn(1, 5, 9, requires_grad=True), torch.tensor([[1, 2, 3, 4, 5]])
    before = logits.detach().clone()
    with torch.no_grad():
        summed_cross_entropy(logits, labels)
    assert torch.equal(logits, before)


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    logits = torch.randn(1, 5, 9, requires_grad=True)
    loss = summed_cross_entropy(logits.clone(), torch.tensor([[1, 2, 3, 4, 5]]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_the_token_that_others_pad_with_is_trained_like_any_other() -> None:
    config = odd_config()
    assert config.pad_token_id == 2
    model = LlamaForPretraining(config)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    assert model.model.embed_tokens.weight.grad[2].any()
    assert config.pad_token_id == 2, "what is exported says it still"


def test_rotary_frequencies_survive_a_cast_of_the_model() -> None:
    config = odd_config()
    expected = LlamaForPretraining(config).model.rotary_emb.inv_freq.clone()
    model = LlamaForPretraining(config).bfloat16()
    rebuild_rotary(model, config, torch.device("cpu"))
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert expected.dtype == torch.float32


def test_a_config_file_is_a_size_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    odd_config().to_json_file(path)
    config = llama_config(ModelConfig(size=str(path)), vocab_size=131)
    assert (config.hidden_size, config.intermediate_size) == (39, 101)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "neither a known size"),
        ("{not json", "not a readable model configuration"),
        (json.dumps({"model_type": "gpt2"}), "gpt2"),
        (json.dumps({"model_type": "llama", "hidden_size": "abc"}), "not a readable|can be built"),
        (json.dumps({"model_type": "llama", "num_attention_heads": 0}), "not a readable|can be built"),
        (json.dumps({"model_type": "llama", "hidden_act": "unheard-of"}), "can be built"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": -1}), "num_hidden_layers -1"),
        (json.dumps({"model_type": "llama", "num_key_value_heads": 3}), "num_key_value_heads 3"),
    ],
)
def test_what_is_not_a_llama_is_refused_by_name(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=expected):
        llama_config(ModelConfig(size=str(path)), vocab_size=10)
