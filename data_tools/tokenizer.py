"""A SentencePiece model as an exact encoder from text to token ids."""

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.fast_bpe import fast_bpe

_CHECK_PIECE = 1 << 14
"""Characters of a text that are compared with SentencePiece at a time: it slows down with length."""
_CHECKED = 1 << 20
"""Characters of a document that are compared at most."""

_CUT = re.compile(r"[^ \u2581] (?=.)", re.DOTALL)

Tokens = NDArray[np.integer[Any]]
"""Token ids, uint16 or int32 (`token_dtype`)."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron gives token ids: uint16 below 65,500 pieces, else int32.

    Source: `DType.optimal_dtype` in megatron/core/datasets/indexed_dataset.py.
    """
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class Tokenizer:
    """An exact encoder: its ids are those of the `sentencepiece` library.

    A vocabulary that allows it is encoded some twenty times faster than that library does (`fast_bpe.py`).
    Text that spells a control piece, such as `</s>`, is encoded as ordinary characters, so the end of a
    document (EOD, the model's EOS) can only come from `encode_document`.

    Attributes:
        path: of the model.
        sha256: of the model, hex.
        vocab_size: pieces.
        bos: id of the piece, or -1 without one.
        eos: id of the EOD.
        unk: id of the piece.
        dtype: of the ids (`token_dtype`).

    Raises:
        UserError: the file cannot be read, is not a SentencePiece model, or has no end-of-sentence piece.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = _read(path)
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._processor = _processor(path, self.model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.unk: int = self._processor.unk_id()
        self.dtype = token_dtype(self.vocab_size)
        if self.eos < 0 or not self._processor.is_control(self.eos):
            raise UserError(
                f"The tokenizer {path} has no end-of-sentence piece, which closes every document; "
                "train it with --eos_id."
            )

    @property
    def why_slow(self) -> str | None:
        """Why `sentencepiece` itself has to encode, or None when the fast way gives its ids.

        The first process to ask makes the fast encoder, which takes a fifth of a second.
        """
        fast = fast_bpe(self.model)
        return fast if isinstance(fast, str) else None

    @cached_property
    def _encode(self) -> Callable[[str], NDArray[np.integer[Any]]]:
        fast = fast_bpe(self.model)
        if isinstance(fast, str):
            return lambda text: np.array(self._processor.encode(text), np.int32)
        return fast.encode

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, `[tokens]` of `dtype`, without BOS or EOS."""
        return self._encode(text).astype(self.dtype)

    def encode_document(self, text: str) -> Tokens:
        """Token ids of a document, `[tokens + 1]` of `dtype`, closed by the EOD."""
        ids = self._encode(text)
        tokens = np.empty(len(ids) + 1, self.dtype)
        tokens[:-1] = ids
        tokens[-1] = self.eos
        return tokens

    def check(self, text: str, tokens: Tokens, document: object) -> None:
        """Compare the ids of a document with those of `sentencepiece`; of a long one, of its beginning.

        Args:
            text: the document, of which about a megabyte is compared.
            tokens: `[tokens + 1]`, as `encode_document` gave them.
            document: named in the error.

        Raises:
            UserError: they differ.
        """
        if self.why_slow is not None:
            return  # it is sentencepiece that made them
        place, compared = 0, 0
        for piece in _independent_pieces(text):
            compared += len(piece)
            if compared > _CHECKED:
                return
            wanted = self._processor.encode(piece)
            self._require(wanted, tokens[place : place + len(wanted)], place, document)
            place += len(wanted)
        self._require([self.eos], tokens[place:], place, document)

    def _require(self, wanted: list[int], found: Tokens, place: int, document: object) -> None:
        if found.tolist() == wanted:
            return
        pairs = zip(found.tolist(), wanted, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise UserError(
            f"With the tokenizer {self.path} the fast encoder gives {document} other ids than sentencepiece, "
            f"first at token {place + same}: found {found[same : same + 3].tolist()}, expected "
            f"{wanted[same : same + 3]}; this is a bug in it or in its library, gigatoken: please report it."
        )

    def decode(self, tokens: Tokens) -> str:
        """The text of token ids; control pieces are dropped.

        Raises:
            UserError: an id is beyond the vocabulary.
        """
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UserError(
                f"Token ids from {tokens.min()} to {tokens.max()} were found, the tokenizer has 0 to "
                f"{self.vocab_size - 1}: the corpus is damaged, build it again."
            )
        text: str = self._processor.decode(tokens.tolist())
        return text


def _independent_pieces(text: str) -> Iterator[str]:
    """A text in pieces of about `_CHECK_PIECE` characters whose ids, one after another, are the text's.

    It is cut before the first space of a run that follows another character, and that space left out: the
    one that SentencePiece puts before every text stands for it. Only for vocabularies of independent words.
    """
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHECK_PIECE)
        stop = cut.start() + 1 if cut else len(text)
        yield text[start:stop]
        start = stop + 1


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The tokenizer {path} cannot be read: {error.strerror}.") from error


def _processor(path: Path, model: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        readable = processor.load_from_serialized_proto(model) and processor.get_piece_size() > 0
    except (RuntimeError, OSError, ValueError):
        readable = False
    if not readable:
        raise UserError(
            f"{path} is not a SentencePiece model; give the `tokenizer.model` of a LLaMA checkpoint."
        )
    return processor
