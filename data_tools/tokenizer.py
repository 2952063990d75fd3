"""A tokenizer as an exact encoder from text to token ids: a SentencePiece model, or a `tokenizer.json`."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.fast_bpe import fast_bpe
from data_tools.json_tokenizer import JsonTokenizer

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


class _Library(Protocol):
    """What tells the ids that must come out."""

    vocab_size: int
    bos: int
    eos: int
    unk: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Tokenizer:
    """An exact encoder: its ids are those of the library that the tokenizer belongs to.

    That is `sentencepiece`, or `tokenizers` for a `tokenizer.json`. A SentencePiece vocabulary that allows
    it is encoded some twenty times faster than that library does (`fast_bpe.py`). Text that spells a control
    piece, such as `</s>`, is encoded as ordinary characters, so the end of a document (EOD, the model's EOS)
    can only come from `encode_document`.

    Attributes:
        path: of the tokenizer.
        model: its bytes.
        file_name: under which a corpus and a checkpoint keep it: one of `manifest.TOKENIZER_FILES`.
        sha256: of the bytes, hex.
        vocab_size: pieces.
        bos: id of the piece, or -1 without one.
        eos: id of the EOD.
        unk: id of the piece, or -1 without one.
        dtype: of the ids (`token_dtype`).

    Raises:
        UserError: the file cannot be read, is no tokenizer, or has no token that ends a document.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = _read(path)
        self._is_json = path.suffix == ".json"
        self.file_name = "tokenizer.json" if self._is_json else "tokenizer.model"
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._library = (_json if self._is_json else _sentencepiece)(path, self.model)
        self.vocab_size = self._library.vocab_size
        self.bos, self.eos, self.unk = self._library.bos, self._library.eos, self._library.unk
        self.dtype = token_dtype(self.vocab_size)

    @property
    def why_slow(self) -> str | None:
        """Why the library itself has to encode, or None when the fast way gives its ids.

        The first process to ask makes the fast encoder, which takes a fifth of a second.
        """
        if self._is_json:
            return "it is a tokenizer.json"
        fast = fast_bpe(self.model)
        return fast if isinstance(fast, str) else None

    @cached_property
    def _encode(self) -> Callable[[str], NDArray[np.integer[Any]]]:
        fast = None if self._is_json else fast_bpe(self.model)
        if fast is None or isinstance(fast, str):
            return lambda text: np.array(self._library.encode(text), np.int32)
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
        """Compare the ids of a document with those of the library; of a long one, of its beginning.

        Args:
            text: the document, of which about a megabyte is compared.
            tokens: `[tokens + 1]`, as `encode_document` gave them.
            document: named in the error.

        Raises:
            UserError: they differ.
        """
        if self.why_slow is not None:
            return  # it is the library that made them
        place, compared = 0, 0
        for piece in _independent_pieces(text):
            compared += len(piece)
            if compared > _CHECKED:
                return
            wanted = self._library.encode(piece)
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
        return self._library.decode(tokens.tolist())


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


class _SentencePiece:
    """A SentencePiece model by its own library."""

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        if not self._processor.load_from_serialized_proto(model) or self._processor.get_piece_size() < 1:
            raise ValueError("no pieces")
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.unk: int = self._processor.unk_id()
        if self.eos >= 0 and not self._processor.is_control(self.eos):
            self.eos = -1  # text could spell it

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._processor.decode(tokens)
        return text


def _sentencepiece(path: Path, model: bytes) -> _Library:
    try:
        library = _SentencePiece(model)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a SentencePiece model; give the `tokenizer.model` of a LLaMA checkpoint, or a "
            "`tokenizer.json`."
        ) from error
    if library.eos < 0:
        raise UserError(
            f"The tokenizer {path} has no end-of-sentence piece, which closes every document; train it with "
            "--eos_id."
        )
    return library


def _json(path: Path, content: bytes) -> _Library:
    try:
        library = JsonTokenizer(content)
    except Exception as error:  # the library has no class of its own for a file that is none
        raise UserError(
            f"{path} is not a tokenizer.json ({' '.join(str(error).split())}); copy it again."
        ) from error
    if library.eos < 0:
        raise UserError(
            f"The tokenizer {path} has no token, or several, that could end a document; expected one of "
            "<|endoftext|>, <|end_of_text|>, </s> and <eos> among its added tokens."
        )
    return library
