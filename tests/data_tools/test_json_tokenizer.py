"""A `tokenizer.json` makes a corpus with its library's ids, and goes with it to the exported model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_tools.build import build
from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.recipe import Recipe
from data_tools.tokenizer import Tokenizer
from data_tools.verify import verify
from pmc_llama.huggingface_tokenizer import write_tokenizer
from tests.data_tools.sources import simple_record, write_jsonl


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of a few hundred pieces, in the layout of SmolLM2's and LLaMA-3's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the trial of the treatment that the patients had"] * 9, trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_ids_are_those_of_the_library_and_decode_to_the_text(text: str, byte_level: Path) -> None:
    reference: Any = tokenizers.Tokenizer.from_file(str(byte_level))
    reference.encode_special_tokens = True
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference.encode(text).ids
    assert tokenizer.encode_document(text).tolist() == [*ids.tolist(), tokenizer.eos]
    assert tokenizer.decode(ids) == text


def test_a_literal_special_token_is_ordinary_text(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk) == (-1, 0, -1)
    text = "a<|endoftext|>b <|im_start|>"
    assert not {0, 1} & set(tokenizer.encode(text).tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_corpus_keeps_it_and_is_verified_with_it(
    byte_level: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "papers.jsonl", [simple_record(number) for number in range(12)])
    build([tmp_path / "papers.jsonl"], byte_level, tmp_path / "corpus", Recipe(), workers=2)
    assert "its own library has to encode" in capsys.readouterr().err
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.tokenizer_path.name == "tokenizer.json"
    assert corpus.tokenizer_path.read_bytes() == byte_level.read_bytes()
    library = tokenizers.Tokenizer.from_file(str(byte_level))
    assert (corpus.vocab_size, corpus.eod) == (library.get_vocab_size(), 0)
    verify(tmp_path / "corpus")


def test_an_export_gets_it_as_it_is(byte_level: Path, tmp_path: Path) -> None:
    special = write_tokenizer(byte_level, tmp_path, max_length=64)
    assert (special.bos, special.eos, special.unk) == (None, (0, "<|endoftext|>"), None)
    assert (tmp_path / "tokenizer.json").read_bytes() == byte_level.read_bytes()
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "the patients<|endoftext|> had"
    assert opened(text)["input_ids"] == Tokenizer(byte_level).encode(text).tolist()
    assert opened.eos_token_id == 0


@pytest.mark.parametrize("content", ["", "[]", "not JSON", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_one_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer(path)


def test_one_without_an_end_of_document_is_refused(byte_level: Path, tmp_path: Path) -> None:
    content = json.loads(byte_level.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|endoftext|>"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="could end a document"):
        Tokenizer(path)
