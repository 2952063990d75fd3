"""SentencePiece BPE at full speed: when a faster library gives the very same ids, and how it is told to.

The library is gigatoken: it encodes a text word by word, each word once, and joins merges in a fixed order of
pairs. SentencePiece joins, anywhere in a text, the two neighbours whose piece has the highest score, the
leftmost on a tie. `why_not` says when the two could differ; then SentencePiece itself has to do the work.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SPACE = "\u2581"
_BPE = 2  # TrainerSpec.ModelType in sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
_BYTES = 256

_CHARACTERS_BETWEEN_LOOKS = 1 << 22
_MOST_MEMORY = 96 << 20  # bytes
_STATM = "/proc/self/statm"
_PAGE = 4096  # bytes


@dataclass(frozen=True)
class Vocabulary:
    """What a serialized SentencePiece model says of itself, as far as it matters here.

    Attributes:
        texts: of the pieces, by id.
        scores: of the ordinary pieces, by text.
        kinds: of the others, by text.
        settings: each setting that the fast way needs, and whether it holds.
    """

    texts: list[str]
    scores: dict[str, float]
    kinds: dict[str, int]
    settings: dict[str, bool]


def read_vocabulary(model: bytes) -> Vocabulary:
    """The pieces and settings of a serialized SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2  # 20 ms that those who only read a corpus need not pay

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    settings = {
        "is BPE": trainer.model_type == _BPE,
        "falls back to bytes": trainer.byte_fallback,
        "has the space before a word": not trainer.treat_whitespace_as_suffix,
        "adds a space before the text": normalizer.add_dummy_prefix,
        "keeps runs of spaces": not normalizer.remove_extra_whitespaces,
        "marks spaces": normalizer.escape_whitespaces,
        "leaves characters as they are": not normalizer.precompiled_charsmap,
    }
    return Vocabulary(
        texts=[text for text, _, _ in pieces],
        scores={text: score for text, score, kind in pieces if kind == _NORMAL},
        kinds={text: kind for text, _, kind in pieces if kind != _NORMAL},
        settings=settings,
    )


def why_not(vocabulary: Vocabulary) -> str | None:
    """Why the fast way could give other ids than SentencePiece, or None when it cannot.

    - Words are independent: no piece has a space marker behind another character, so no merge crosses the
      place where a word begins.
    - The order of merges is the order of scores: no two pieces share one. Those of nothing but space markers
      may, below all others: a word has one run of them, which both ways make last and from its left end.
    - A merge is between two pieces: SentencePiece also joins characters that are no piece by themselves.
    - No piece is matched before the merges (user-defined) or taken apart after them (unused).
    """
    lacking = [name for name, holds in vocabulary.settings.items() if not holds]
    if lacking:
        return f"it is not a model that {lacking[0]}"
    kinds, scores = vocabulary.kinds, vocabulary.scores
    if not set(kinds.values()) <= {_UNKNOWN, _CONTROL, _BYTE}:
        return "it has user-defined or unused pieces"
    if list(kinds.values()).count(_BYTE) != _BYTES:
        return "it has no piece for some byte"
    if len(kinds) + len(scores) < len(vocabulary.texts) or any(len(text) < 2 for text in kinds):
        return "two pieces have the same text, or a control piece has one character"
    if any(_SPACE in text.lstrip(_SPACE) or " " in text for text in scores):
        return "a piece crosses the beginning of a word"
    if not set("".join(scores)) <= scores.keys():
        return "a piece has a character that is no piece by itself"
    runs = {score for text, score in scores.items() if len(text) > 1 and text[-1] == _SPACE}
    words = [score for text, score in scores.items() if len(text) > 1 and text[-1] != _SPACE]
    if len({*words, *runs}) < len(words) + len(runs) or len(runs) > 1:
        return "two pieces have the same score, or two runs of spaces different ones"
    if not all(map(math.isfinite, [*words, *runs])):
        return "the score of a piece is not finite"
    if runs and min(words, default=math.inf) < max(runs):
        return "a run of spaces has a higher score than a word"
    return None


def _merges(vocabulary: Vocabulary) -> list[str]:
    """Every pair of pieces that makes a piece, first the one that SentencePiece would join first.

    A piece of several pairs: in x y z with x + y = y + z SentencePiece takes the leftmost, so the pair whose
    right end is also a beginning of the piece comes first. Of spaces the longest run on the left comes first,
    so that a run grows from its left end.
    """
    scores = vocabulary.scores
    runs = sorted(text for text in scores if text[-1] == _SPACE)
    found: list[str] = []
    for text in sorted(scores.keys() - set(runs), key=scores.__getitem__, reverse=True):
        cuts = [cut for cut in range(len(text) - 1, 0, -1) if text[:cut] in scores and text[cut:] in scores]
        if len(cuts) > 1 and text[0] in text[1:]:
            cuts.sort(key=lambda cut: (-max(cut, len(text) - cut), not text.startswith(text[cut:]), -cut))
        found += [f"{text[:cut]} {text[cut:]}" for cut in cuts]
    return found + [
        f"{left} {right}" for left in reversed(runs) for right in reversed(runs) if left + right in scores
    ]


def tokenizer_json(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as a Hugging Face tokenizer.json, in LLaMA's first layout.

    Control pieces are not among its added tokens, and no merge makes one, so that a text cannot spell one.
    """
    import msgspec

    unknown = next(text for text, kind in vocabulary.kinds.items() if kind == _UNKNOWN)
    return msgspec.json.encode(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": _SPACE},
                    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "BPE",
                "unk_token": unknown,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {text: number for number, text in enumerate(vocabulary.texts)},
                "merges": _merges(vocabulary),
            },
        }
    )


class FastBpe:
    """Encodes texts with gigatoken, in bounded memory.

    The library keeps every word it has seen. When the process has grown by 96 MiB over that, the encoder is
    made anew, which takes a twentieth of a second and changes no id.

    Args:
        vocabulary: of which `why_not` says nothing.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._definition = tokenizer_json(vocabulary)
        self._encoder: Any = None
        self._characters = 0  # encoded since the last look at the memory
        self._resident = 0  # bytes, when the encoder was new
        self._renew()

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Token ids of a text, `[tokens]`."""
        self._characters += len(text)
        if self._characters > _CHARACTERS_BETWEEN_LOOKS:
            self._characters = 0
            if _resident() - self._resident > _MOST_MEMORY:
                self._renew()
        ids: NDArray[np.uint32] = self._encoder.encode(text)
        return ids

    def _renew(self) -> None:
        from gigatoken import Tokenizer as Gigatoken

        self._encoder = None  # gives back its memory first
        self._encoder = Gigatoken.from_json(self._definition)
        self._resident = _resident()


@lru_cache(maxsize=1)
def fast_bpe(model: bytes) -> FastBpe | str:
    """The encoder of a serialized SentencePiece model, or why there is none.

    A process that asks again gets the one it has; so does a process forked from it.
    """
    vocabulary = read_vocabulary(model)
    return why_not(vocabulary) or FastBpe(vocabulary)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    with open(_STATM, "rb") as file:
        return int(file.read().split()[1]) * _PAGE
