"""A Hugging Face `tokenizer.json`, which models without a SentencePiece model come with, by its library."""

import json
from collections.abc import Sequence
from typing import Any

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>")
_UNKNOWN = ("<unk>",)


class JsonTokenizer:
    """What `tokenizer.Tokenizer` needs of a library, for a `tokenizer.json`.

    The file does not say which of its special tokens ends a document; the one with a name that models use for
    it does.

    Attributes:
        vocab_size: ids, added tokens included.
        bos: id of the token that begins a text, or -1 without one.
        eos: id of the token that ends a document, or -1 when none, or more than one, has such a name.
        unk: id of the token for what has none, or -1.

    Raises:
        Exception: what the library raises for a file that is none.
    """

    def __init__(self, content: bytes) -> None:
        from tokenizers import (
            Tokenizer,
        )  # half a tenth of a second, which SentencePiece's users need not wait

        self._tokenizer: Any = Tokenizer.from_str(content.decode())
        self._tokenizer.encode_special_tokens = True  # the characters of a special token in a text are text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = {token["content"]: token["id"] for token in json.loads(content).get("added_tokens", [])}
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        self.bos = _only(special, _BEGINNINGS)
        self.eos = _only(special, _ENDS)
        self.unk = _only(special, _UNKNOWN)

    def encode(self, text: str) -> list[int]:
        """Token ids, without any that the file adds around a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens are dropped."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _only(special: dict[str, int], names: Sequence[str]) -> int:
    found = [special[name] for name in names if name in special]
    return found[0] if len(found) == 1 else -1
