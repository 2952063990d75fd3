"""The tokenizer files of an export give SentencePiece's ids, whatever the text."""

import io
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, LlamaConfig

from data_tools.errors import UserError
from pmc_llama.huggingface_tokenizer import exact_tokenizer, write_tokenizer

SHARED = Path(__file__).parents[3] / "shared/data"
SHARED_MODELS = sorted(SHARED.glob("tokenizers/*.model"))

ALPHABETS = (
    "ab ",
    "  \n\t a",
    "\u2581 a",
    "the cells of an",
    "\u03b2\u4e2d\U0001f9ec\u00bd\u00b2.x",
    "</s><s>unk0x41",
)
TEXTS = st.one_of(st.text(max_size=60), *(st.text(alphabet, max_size=60) for alphabet in ALPHABETS))
KNOWN_TRAPS = (
    "",
    " ",
    "a  b",
    "   three in front",
    "behind   ",
    "\n\n  \t",
    "\u2581",
    "a\u2581 \u2581b",
    "x" + " " * 40 + "y",
    "</s> in <s> a <unk> paper",
    "<0x41>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \x00 \ufb01 e\u0301",
)


def train(directory: Path, **options: object) -> Path:
    """A tiny SentencePiece model with LLaMA's settings, or others."""
    draw = random.Random(0)
    words = ["cell", "cells", "protein", "the", "of", "in", "ab", "aba", "abab", "12.5", "-", "(p", "<"]
    lines = [
        "".join(draw.choice(words) + " " * draw.choice((0, 1, 1, 2, 5)) for _ in range(12))
        for _ in range(300)
    ]
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_by_whitespace": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    written = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **(settings | options))
    path = directory / "source.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(SentencePiece, AutoTokenizer of the files written from it)."""
    directory = tmp_path_factory.mktemp("trained")
    return opened(train(directory), directory)


@cache
def opened(model: Path, directory: Path):
    write_tokenizer(model, directory, max_length=64)
    LlamaConfig().save_pretrained(directory)  # AutoTokenizer looks at the model's type, too
    return SentencePieceProcessor(model_file=str(model)), AutoTokenizer.from_pretrained(directory)


@given(text=TEXTS)
@settings(max_examples=1000, deadline=None)
def test_ids_and_decoded_text_are_those_of_sentencepiece(trained, text):
    sentencepiece, tokenizer = trained
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == sentencepiece.encode(text)
    assert tokenizer.decode(ids) == sentencepiece.decode(ids)


@pytest.mark.parametrize("text", KNOWN_TRAPS)
def test_known_traps_have_the_ids_of_sentencepiece(trained, text):
    sentencepiece, tokenizer = trained
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == sentencepiece.encode(text)


def test_special_tokens_are_llamas(trained):
    sentencepiece, tokenizer = trained
    bos, eos = sentencepiece.bos_id(), sentencepiece.eos_id()
    ids = sentencepiece.encode("the cells")
    assert tokenizer("the cells")["input_ids"] == [bos, *ids]
    assert tokenizer("the cells", "the cells")["input_ids"] == [bos, *ids, bos, *ids]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, eos)
    assert tokenizer.decode([bos, *ids, eos], skip_special_tokens=True) == "the cells"
    assert set(tokenizer("the cells")) == {"input_ids", "attention_mask"}  # what LlamaForCausalLM takes
    assert tokenizer.model_max_length == 64


def test_a_literal_control_token_is_text_unless_asked_for(trained):
    sentencepiece, tokenizer = trained
    eos = sentencepiece.eos_id()
    assert eos not in tokenizer("cells</s>")["input_ids"]
    assert tokenizer("cells</s>", split_special_tokens=False)["input_ids"][-1] == eos


def test_ids_survive_saving_by_transformers(trained, tmp_path):
    sentencepiece, tokenizer = trained
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in KNOWN_TRAPS:
        assert again(text, add_special_tokens=False)["input_ids"] == sentencepiece.encode(text)


def test_a_model_without_byte_fallback_keeps_its_unknown_piece(tmp_path):
    sentencepiece, tokenizer = opened(train(tmp_path, byte_fallback=False), tmp_path)
    for text in KNOWN_TRAPS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == sentencepiece.encode(text)


def test_a_model_without_bos_gets_none(tmp_path):
    sentencepiece, tokenizer = opened(train(tmp_path, bos_id=-1), tmp_path)
    assert tokenizer("the cells")["input_ids"] == sentencepiece.encode("the cells")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["[GENE]"]},
    ],
)
def test_a_model_that_cannot_be_expressed_exactly_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="cannot be reproduced by a Hugging Face tokenizer"):
        exact_tokenizer(train(tmp_path, **options))


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "not one"])
def test_a_model_that_cannot_be_read_is_named(tmp_path, damage):
    model = train(tmp_path)
    content = {"empty": b"", "truncated": model.read_bytes()[:1000], "not one": b"tokens"}
    model.unlink()
    if damage in content:
        model.write_bytes(content[damage])
    with pytest.raises(UserError, match="is not a readable SentencePiece model") as raised:
        exact_tokenizer(model)
    assert str(model) in str(raised.value)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED_MODELS, reason="needs the real tokenizers")
@pytest.mark.parametrize("model", SHARED_MODELS, ids=lambda path: path.stem)
def test_real_llama_tokenizers_have_the_ids_of_sentencepiece(model, tmp_path_factory):
    sentencepiece, tokenizer = opened(model, tmp_path_factory.mktemp(model.stem))
    paper = (SHARED / "s2orc/api_s2orc-sample.jsonl").read_text()[:100_000]
    pieces = st.lists(
        st.integers(0, sentencepiece.get_piece_size() - 1).map(sentencepiece.id_to_piece), max_size=12
    )

    @given(text=st.one_of(TEXTS, pieces.map("".join), st.sampled_from((*KNOWN_TRAPS, paper))))
    @settings(max_examples=500, deadline=None)
    def same(text: str) -> None:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == sentencepiece.encode(text)

    same()
