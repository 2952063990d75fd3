"""A tokenizer as files that transformers' `AutoTokenizer` opens and that give the same ids.

transformers converts SentencePiece models by itself, but ranks merges by piece id. SentencePiece ranks them
by the score of the merged piece, leftmost first among equals, and LLaMA's pieces for runs of spaces all have
the same score, so that conversion changes the ids of every text with a double space. Here the merges are
ranked by score, and the result is compared with SentencePiece before anything is written.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from data_tools.errors import UserError
from data_tools.json_tokenizer import JsonTokenizer

SPACE = "\u2581"  # SentencePiece's visible space

# What distinguishes SentencePiece settings that tokenizer.json cannot express: Unicode normalization,
# collapsed spaces, symbols outside the vocabulary, control tokens in the text.
_PROBES = (
    "",
    " ",
    "a  b   c    d",
    "  leading and trailing  ",
    "line\n\n  indented\tby a tab\r\n",
    "\ufb01ne \u00b2. \u212b \uff21 \u00bd cafe\u0301",
    "\U0001f9ec\u200d\u4e2d\u6587 \u03b2\x00\u2581x",
    "<s> </s> <unk> <0x41>",
)
_PROBED_PIECES = 64


@dataclass(frozen=True)
class SpecialTokens:
    """Id and text of a tokenizer's special tokens; None where there is none."""

    bos: tuple[int, str] | None
    eos: tuple[int, str] | None
    unk: tuple[int, str] | None


def write_tokenizer(source: Path, directory: Path, max_length: int) -> SpecialTokens:
    """Write `tokenizer.json`, `tokenizer_config.json` and a copy of the SentencePiece model, if it is one.

    As with LLaMA's own tokenizer, BOS is added in front when special tokens are asked for, and a text gets
    one space in front unless it is empty; a `tokenizer.json` stays as it is. `split_special_tokens` is on:
    the characters `</s>` in a paper are text, as they were in training, and become the control token only
    when the call says `split_special_tokens=False`.

    Args:
        source: a tokenizer that `check_tokenizer` accepts.
        directory: where the files go; it must exist.
        max_length: positions of the model.

    Returns:
        What the model's configuration has to name.

    Raises:
        UserError: of `check_tokenizer`.
    """
    if source.suffix == ".json":
        shutil.copyfile(source, directory / "tokenizer.json")
        special, added = _json_special_tokens(source), {}
    else:
        exact_tokenizer(source).save(str(directory / "tokenizer.json"))
        shutil.copyfile(source, directory / "tokenizer.model")
        special = _sentencepiece_special_tokens(source)
        added = {"add_bos_token": special.bos is not None, "add_eos_token": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token and token[1] for name, token in vars(special).items()},
        **added,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "split_special_tokens": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return special


def check_tokenizer(source: Path) -> None:
    """Whether an export could be given this tokenizer: what could not be exported is not trained.

    Raises:
        UserError: it is a SentencePiece model without a `tokenizer.json` of the same ids, or is damaged.
    """
    if source.suffix == ".json":
        _json_special_tokens(source)
    else:
        exact_tokenizer(source)


def _json_special_tokens(source: Path) -> SpecialTokens:
    try:
        content = source.read_bytes()
        library, names = JsonTokenizer(content), Tokenizer.from_str(content.decode())
    except Exception as error:  # the library has no class of its own for a file that is none
        raise UserError(
            f"{source} is not a readable tokenizer.json ({' '.join(str(error).split())}); copy it again"
        ) from error
    return _special_tokens(names.id_to_token, library.bos, library.eos, library.unk)


def _sentencepiece_special_tokens(source: Path) -> SpecialTokens:
    model = SentencePieceProcessor(model_file=str(source))
    return _special_tokens(model.id_to_piece, model.bos_id(), model.eos_id(), model.unk_id())


def _special_tokens(text: Callable[[int], str | None], *ids: int) -> SpecialTokens:
    return SpecialTokens(*((number, str(text(number))) if number >= 0 else None for number in ids))


def exact_tokenizer(model: Path) -> Tokenizer:
    """The same tokenizer in the `tokenizers` library: the same ids for every text.

    Args:
        model: a SentencePiece BPE model without normalization, such as LLaMA's.

    Raises:
        UserError: the file is missing or damaged, or is of a kind whose ids that library cannot reproduce,
            found by trying.
    """
    try:
        sentencepiece = SentencePieceProcessor(model_file=str(model))
        tokenizer = _convert(sentencepiece)
        text = _first_difference(tokenizer, sentencepiece)
    except Exception as error:  # either library raises what it likes for a damaged file
        raise UserError(
            f"{model} is not a readable SentencePiece model ({' '.join(str(error).split())}); copy it again"
        ) from error
    if text is not None:
        raise UserError(
            f"{model}: its ids for {text[:40]!r} cannot be reproduced by a Hugging Face tokenizer; expected "
            "a SentencePiece BPE model without normalization or user-defined symbols"
        )
    return tokenizer


def _bos(sentencepiece: SentencePieceProcessor) -> str | None:
    """The piece that begins a sequence; None for a model that was trained without one."""
    return sentencepiece.id_to_piece(sentencepiece.bos_id()) if sentencepiece.bos_id() >= 0 else None


def _convert(sentencepiece: SentencePieceProcessor) -> Tokenizer:
    pieces = [sentencepiece.id_to_piece(i) for i in range(sentencepiece.get_piece_size())]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=_merges(sentencepiece, pieces),
            unk_token=pieces[sentencepiece.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # No pre-tokenizer: SentencePiece merges across the whole text, and words are not what it cuts at.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [p for i, p in enumerate(pieces) if sentencepiece.is_control(i) or sentencepiece.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if bos := _bos(sentencepiece):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, sentencepiece.bos_id())],
        )
    return tokenizer


def _merges(sentencepiece: SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a piece, first to merge first.

    SentencePiece merges the pair whose result has the highest score, the leftmost among equals. Ranks cannot
    be equal here. Among equal scores the longest left half goes first, which is what leftmost comes to for
    runs of one symbol, LLaMA's only pieces with equal scores: the run on the left grows until it is full.
    """
    scores = {
        piece: sentencepiece.get_score(i)
        for i, piece in enumerate(pieces)
        if not (sentencepiece.is_control(i) or sentencepiece.is_unknown(i) or sentencepiece.is_byte(i))
    }
    found = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _first_difference(tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor) -> str | None:
    """The first probe that the two encode differently; probes hold every piece of the vocabulary."""
    tokenizer.encode_special_tokens = True

    def same(text: str) -> bool:
        ids: list[int] = sentencepiece.encode(text)
        return ids == tokenizer.encode(text, add_special_tokens=False).ids

    size = sentencepiece.get_piece_size()
    pieces = [sentencepiece.id_to_piece(i).replace(SPACE, " ") for i in range(size)]
    parts = [pieces[i : i + _PROBED_PIECES] for i in range(0, size, _PROBED_PIECES)]
    texts = (*_PROBES, *map("".join, parts), *map(" ".join, parts))
    return next((text for text in texts if not same(text)), None)
