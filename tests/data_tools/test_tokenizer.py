"""Ids equal sentencepiece's, and no text can forge the end of a document."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.tokenizer import Tokenizer, token_dtype


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_ids_are_those_of_sentencepiece_and_decode_to_the_text(text: str, tiny_tokenizer: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(tiny_tokenizer))
    tokenizer = Tokenizer(tiny_tokenizer)
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference.encode(text)
    assert tokenizer.encode_document(text).tolist() == [*reference.encode(text), reference.eos_id()]
    assert tokenizer.decode(ids) == reference.decode(reference.encode(text))


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "<s> </s> <unk> <pad>", "</s></s>"])
def test_a_literal_control_piece_is_ordinary_text(text: str, tiny_tokenizer: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer)
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.unk} & set(ids.tolist())
    assert tokenizer.decode(ids) == text


@pytest.mark.shared
def test_the_llama_tokenizer_does_not_take_a_literal_for_the_eod(shared: Path) -> None:
    tokenizer = Tokenizer(shared / "tokenizers" / "llama_tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (32_000, 1, 2, 0)
    assert not {0, 1, 2} & set(tokenizer.encode("One</s> two<s><unk>").tolist())
    # Double spaces are where re-implementations differ: the reference gives these.
    assert tokenizer.encode("a  b").tolist() == [263, 29871, 289]


@pytest.mark.parametrize(
    ("size", "dtype"), [(32_000, "uint16"), (65_499, "uint16"), (65_500, "int32"), (128_256, "int32")]
)
def test_the_dtype_is_the_one_megatron_chooses(size: int, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(size) == np.dtype(dtype) == np.dtype(DType.optimal_dtype(size))


@pytest.mark.parametrize("content", [b"", b"not a model", b"{}", bytes(range(256)) * 20])
def test_what_is_no_model_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(path)


def test_a_missing_model_and_a_directory_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            Tokenizer(path)


def test_a_model_without_eos_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on"] * 9),
        model_prefix=str(tmp_path / "no-eos"),
        vocab_size=30,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="end-of-sentence"):
        Tokenizer(tmp_path / "no-eos.model")
