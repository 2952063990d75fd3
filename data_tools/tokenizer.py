"""A SentencePiece model as an exact encoder from text to token ids."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_tools.errors import UserError

Tokens = NDArray[np.integer[Any]]
"""Token ids, uint16 or int32 (`token_dtype`)."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron gives token ids: uint16 below 65,500 pieces, else int32.

    Source: `DType.optimal_dtype` in megatron/core/datasets/indexed_dataset.py.
    """
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


class Tokenizer:
    """An exact encoder: its ids are those of the `sentencepiece` library.

    Text that spells a control piece, such as `</s>`, is encoded as ordinary characters, so the end of a
    document (EOD, the model's EOS) can only come from `encode_document`.

    Raises:
        UserError: the file cannot be read, is not a SentencePiece model, or has no end-of-sentence piece.
    """

    def __init__(self, path: Path) -> None:
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

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, `[tokens]` of `dtype`, without BOS or EOS."""
        return np.array(self._processor.encode(text), dtype=self.dtype)

    def encode_document(self, text: str) -> Tokens:
        """Token ids of a document, `[tokens + 1]` of `dtype`, closed by the EOD."""
        ids = self._processor.encode(text)
        ids.append(self.eos)
        return np.array(ids, dtype=self.dtype)

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
