"""The fast encoder gives the ids of sentencepiece: on texts made to break it, and on every real paper."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from data_tools import fast_bpe
from data_tools.errors import UserError
from data_tools.inputs import find_inputs
from data_tools.papers import Paper
from data_tools.render import training_text
from data_tools.shards import ShardReader
from data_tools.tokenizer import Tokenizer
from tests.data_tools.sources import prose

LITERALS = ["<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0x00>", "</s", "s>"]
SPACES = [
    " ",
    "  ",
    "   ",
    " " * 17,
    "\u2581",
    "\u2581\u2581",
    "\u00a0",
    "\u3000",
    "\t",
    "\n",
    "\n  ",
    "\r\n",
]
ODD = ["\x00", "\x7f", "\ufeff", "\u200d", "\u0301", "e\u0301", "\ufffd", "\u202e", "\ue000", "\U0010ffff"]
SIGNS = [
    "🙂",
    "👩\u200d🔬",
    "µ",
    "β",
    "²",
    "x².",
    "漢",
    "한",
    "\u0627",
    "ﬁ",
    "½",
    "∑",
    "\U0001d6fc",
    "𐍈",
    "0",
    "10",
    "3.14",
    "%",
]
WORDS = ["a", "aa", "the", "The", "cells", "cells,", "proteinprotein", ".", "...", "---", "(", ")", "=="]
NASTY = st.lists(st.sampled_from(LITERALS + SPACES + ODD + SIGNS + WORDS), max_size=40).map("".join)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)


def hard_texts() -> Iterator[str]:
    """Texts that have broken re-implementations of SentencePiece, and each plane of Unicode."""
    parts = LITERALS + SPACES + ODD + SIGNS + WORDS
    yield from ["", *parts, *(first + second for first, second in itertools.product(parts, repeat=2))]
    yield from (
        before + " " * count + after for count in range(70) for before in ("", "a") for after in ("", "b")
    )
    yield from (
        character * count for character in "aA0=-.*#_\u2581\n" for count in (*range(2, 70), 129, 1000)
    )
    yield from (chr(code) for code in range(0x300))
    for start in range(0, sys.maxunicode + 1, 0x400):
        characters = map(chr, range(start, start + 0x400, 7))
        yield "".join(character for character in characters if not "\ud800" <= character <= "\udfff")
    yield "".join(LITERALS) * 50
    yield " ".join(f"{number} {number / 7}" for number in range(500))


def long_texts() -> Iterator[str]:
    """Texts of a megabyte, words of that length among them."""
    size = 1_000_000
    yield (prose(1, 20_000) + " </s>\n  ") * (size // 140_000)
    yield "a" * size
    yield " " * size
    yield "ACGT" * (size // 4)
    yield "".join(map(chr, np.random.default_rng(1).integers(0x4E00, 0x9FFF, size // 3)))


SHARED_MODELS = [pytest.param(name, marks=pytest.mark.shared) for name in ("llama", "mistral_v1")]


@pytest.fixture(scope="module", params=["trained here", *SHARED_MODELS])
def model(request: pytest.FixtureRequest, tiny_tokenizer: Path) -> Path:
    """A tokenizer trained with LLaMA's settings, and the two that are beside the checkout."""
    if request.param == "trained here":
        return tiny_tokenizer
    directory = request.getfixturevalue("shared") / "tokenizers"
    return Path(directory / f"{request.param}_tokenizer.model")


@pytest.fixture(scope="module")
def reference(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(model))


@pytest.fixture(scope="module")
def fast(model: Path) -> Tokenizer:
    """The tokenizer, which has to take the fast way: else these tests compare sentencepiece with itself."""
    tokenizer = Tokenizer(model)
    assert tokenizer.why_slow is None
    return tokenizer


def test_hard_texts_get_the_ids_of_sentencepiece(
    fast: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    differing = [text for text in hard_texts() if fast.encode(text).tolist() != reference.encode(text)]
    assert differing == []


def test_runs_of_every_repeatable_piece_get_the_ids_of_sentencepiece(
    fast: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    """Where a piece is made of one twice, which of two overlapping pairs is joined first matters."""
    pieces = {reference.id_to_piece(number) for number in range(reference.get_piece_size())}
    halves = {piece[: len(piece) // 2] for piece in pieces if piece[: len(piece) // 2] * 2 == piece}
    assert halves
    for half in halves:
        text = half.replace("\u2581", " ")
        for repeated in (text * count for count in range(1, 68)):
            assert fast.encode(repeated).tolist() == reference.encode(repeated), repeated


def test_megabyte_documents_get_the_ids_of_sentencepiece(
    fast: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    for text in long_texts():
        assert fast.encode(text).tolist() == reference.encode(text), text[:30]


@settings(max_examples=400)
@given(text=NASTY | ANY)
def test_generated_texts_get_the_ids_of_sentencepiece(
    fast: Tokenizer, reference: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert fast.encode(text).tolist() == reference.encode(text)


def _unigram(model: proto.ModelProto) -> None:
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM


def _user_defined(model: proto.ModelProto) -> None:
    model.pieces[-1].type = proto.ModelProto.SentencePiece.USER_DEFINED


def _crossing_words(model: proto.ModelProto) -> None:
    model.pieces.add(piece="s\u2581t", score=5.0)


def _equal_scores(model: proto.ModelProto) -> None:
    merged = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1]
    merged[0].score = merged[1].score


def _unequal_runs_of_spaces(model: proto.ModelProto) -> None:
    model.pieces.add(piece="\u2581\u2581", score=-2000.0)
    model.pieces.add(piece="\u2581\u2581\u2581", score=-1999.0)


def _runs_of_spaces_before_words(model: proto.ModelProto) -> None:
    model.pieces.add(piece="\u2581\u2581", score=5.0)


def _score_that_is_no_number(model: proto.ModelProto) -> None:
    next(piece for piece in model.pieces if piece.piece == "\u2581t").score = float("nan")


def _character_that_is_no_piece(model: proto.ModelProto) -> None:
    model.pieces.add(piece="e\u0416", score=5.0)


def _collapsing_spaces(model: proto.ModelProto) -> None:
    model.normalizer_spec.remove_extra_whitespaces = True


def _no_space_before(model: proto.ModelProto) -> None:
    model.normalizer_spec.add_dummy_prefix = False


@pytest.mark.parametrize(
    "change",
    [
        _unigram,
        _user_defined,
        _crossing_words,
        _equal_scores,
        _unequal_runs_of_spaces,
        _runs_of_spaces_before_words,
        _score_that_is_no_number,
        _character_that_is_no_piece,
        _collapsing_spaces,
        _no_space_before,
    ],
)
def test_a_vocabulary_that_does_not_allow_the_fast_way_takes_the_slow_one_and_says_why(
    change: Callable[[proto.ModelProto], None], tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model = proto.ModelProto.FromString(tiny_tokenizer.read_bytes())
    change(model)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(path)
    reference = sentencepiece.SentencePieceProcessor(str(path))
    assert tokenizer.why_slow
    for text in ("", "patients the  tumour\n e\u0416 </s>", prose(3, 50)):
        assert tokenizer.encode_document(text).tolist() == [*reference.encode(text), reference.eos_id()]


def test_an_encoder_that_is_made_anew_gives_the_same_ids(
    fast: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [fast.encode(prose(seed, 300)).tolist() for seed in range(5)]
    monkeypatch.setattr(fast_bpe, "_CHARACTERS_BETWEEN_LOOKS", 1)
    monkeypatch.setattr(fast_bpe, "_MOST_MEMORY", -(1 << 40))
    assert [fast.encode(prose(seed, 300)).tolist() for seed in range(5)] == before


LONG = "word  of text \n and 3.14 </s> " * 2000


@pytest.mark.parametrize("text", ["", " ", "two words", "ends in spaces   ", LONG])
def test_the_check_of_a_build_passes_what_sentencepiece_gives(fast: Tokenizer, text: str) -> None:
    fast.check(text, fast.encode_document(text), "this document")


@pytest.mark.parametrize("text", ["two words", LONG])
@pytest.mark.parametrize("place", [0, -1, -2])
def test_the_check_of_a_build_names_the_first_token_that_differs(
    fast: Tokenizer, text: str, place: int
) -> None:
    tokens = fast.encode_document(text)
    wrong = tokens.copy()
    wrong[place] += 1
    where = place % len(tokens)
    with pytest.raises(UserError, match=rf"this document other ids .* first at token {where}:"):
        fast.check(text, wrong, "this document")
    with pytest.raises(UserError, match="this document"):
        fast.check(text, tokens[:-1], "this document")
    with pytest.raises(UserError, match="this document"):
        fast.check(text, np.append(tokens, tokens[-1:]), "this document")


@pytest.mark.shared
@pytest.mark.slow
def test_every_real_paper_gets_the_ids_of_sentencepiece(shared: Path) -> None:
    tokenizer = Tokenizer(shared / "tokenizers" / "llama_tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
    papers = 0
    for paper in ShardReader(find_inputs([shared / "jats" / "pmc_cc_by_1033.tar.gz"])):
        assert isinstance(paper, Paper)
        text = training_text(paper)
        assert tokenizer.encode(text).tolist() == reference.encode(text), paper.source
        papers += 1
    assert papers == 1033
