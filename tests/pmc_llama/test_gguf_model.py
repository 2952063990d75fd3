"""A GGUF file becomes a Hugging Face directory with the same function and tokenizer."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_tools.errors import UserError
from data_tools.tokenizer import Tokenizer
from pmc_llama.gguf_model import convert

HEADS, KEY_VALUE_HEADS, WIDTH, LAYERS = 4, 2, 32, 2


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces()),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def pieces() -> list[str]:
    """Special tokens, then bytes as GPT-2 writes them, then a merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", *sorted(ByteLevel.alphabet()), "he"]


def interleaved(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF's rotary embedding, halves taken in turns."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()


def write_gguf(path: Path, source: LlamaForCausalLM) -> None:
    """The model as llama.cpp's converter writes one."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(source.config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(pieces()))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces())
    writer.add_token_types([3, 3, *[1] * (len(pieces()) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    weights = source.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(LAYERS):
        for name, there in names.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}.get(there)
            tensor = interleaved(weight, heads) if heads else weight.numpy()
            writer.add_tensor(f"blk.{layer}.{there}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_directory_has_the_function_and_the_tokenizer_of_the_file(tmp_path: Path) -> None:
    source = model()
    write_gguf(tmp_path / "model.gguf", source)
    convert(tmp_path / "model.gguf", tmp_path / "model")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.randint(0, len(pieces()), (2, 40))
    assert torch.allclose(found(tokens).logits, source(tokens).logits, atol=1e-5)
    text = "the heat<|endoftext|>"
    tokenizer = Tokenizer(tmp_path / "model" / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos == 0
    opened = AutoTokenizer.from_pretrained(tmp_path / "model", split_special_tokens=True)
    assert opened(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_what_is_no_gguf_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.gguf cannot be read as a GGUF model"):
        convert(tmp_path / "model.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_are_not_written_among_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        convert(tmp_path / "model.gguf", tmp_path.parent)
