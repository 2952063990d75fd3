"""Words of a text as 64-bit hashes, and hashes of their n-grams: what duplicates are recognized by.

A word is a run of letters and digits. ASCII capitals count as small letters; every non-ASCII character is a
letter but for those of U+0080 to U+00BF and U+2000 to U+207F (no-break space, dashes, quotation marks), which
separate words as ASCII punctuation and white space do.

A word is hashed eight bytes at a time, all words of a block at once, by the finalizer of SplitMix64 (Steele,
Lea & Flood 2014); a word of more than 32 bytes by XXH3. Other byte strings are hashed as polynomials modulo
2^64 (Rabin & Karp 1987), which running sums give for all of them.
"""

from functools import cache

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_BLOCK = 1 << 16  # bytes; what is computed of a block stays in a core's cache
_LONG = 32  # bytes of a word, beyond which it is hashed by itself
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_GRAM_MULTIPLIER = 0xD1342543DE82EF95
_WORD_BYTES = bytes(
    byte + 32 if 65 <= byte <= 90 else byte if byte >= 128 or chr(byte).isalnum() else 0
    for byte in range(256)
)


def _powers(base: int) -> Hashes:
    """`base` to the power of 0 to `_BLOCK`, modulo 2^64."""
    powers = np.full(_BLOCK + 1, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
"""Masks of the first 0 to 8 bytes of a little-endian number; `take` with "clip" gives the last for more."""
_POWERS = _powers(_MULTIPLIER)
_INVERSES = _powers(pow(_MULTIPLIER, -1, 1 << 64))


def word_hashes(text: str) -> Hashes:
    """The words of a text in order, hashed: uint64 `[words]`.

    Works through blocks of 64 KiB; a word longer than that counts as several.
    """
    whole = bytearray(text.encode(errors="replace").translate(_WORD_BYTES))
    _clear_separators(np.frombuffer(whole, np.uint8))
    length = len(whole)
    whole += bytes(8)  # so that eight bytes can be read wherever a word begins
    content = np.frombuffer(whole, np.uint8)
    found, start = [], 0
    while start < length:
        stop = start + _BLOCK
        if stop < length:
            stop = (whole.rfind(0, start, stop) + 1) or stop
        found.append(_block_hashes(content[start : min(stop, length) + 8]))
        start = stop
    return np.concatenate(found) if found else np.empty(0, np.uint64)


class _LastWords:
    """The words of the text that was asked for last: rules and measures ask for the same."""

    def __init__(self) -> None:
        self._text, self._words = "", np.empty(0, np.uint64)

    def __call__(self, text: str) -> Hashes:
        if text != self._text:
            self._text, self._words = text, word_hashes(text)
            self._words.setflags(write=False)
        return self._words


hashed_words = _LastWords()
"""`word_hashes` of a text, read-only. To compare a text with the last one takes less than to hash it."""


class _LastNgrams:
    """The n-grams of the words that were asked for last, of which several rules and measures ask."""

    def __init__(self) -> None:
        self._words = np.empty(0, np.uint64)
        self._known: dict[int, Hashes] = {}

    def __call__(self, words: Hashes, n: int) -> Hashes:
        if words is not self._words:
            self._words, self._known = words, {1: words}
        if n not in self._known:
            self._known[n] = self._made(n)
            self._known[n].setflags(write=False)
        return self._known[n]

    def _made(self, n: int) -> Hashes:
        if len(self._words) < n:
            return np.empty(0, np.uint64)
        if n % 2:
            return self(self._words, n - 1)[:-1] * _gram_power(1) + self._words[n - 1 :]
        half = n // 2
        halves = self(self._words, half)
        return halves[:-half] * _gram_power(half) + halves[half:]


ngrams = _LastNgrams()
"""The hashes of every n consecutive words: uint64 `[words - n + 1]`, read-only, empty for fewer words.

Built from halves, so an n-gram costs about log2(n) steps.
"""


def ngrams_at(words: Hashes, places: NDArray[np.int64], n: int) -> Hashes:
    """The hashes that `ngrams` has at the given places: uint64 `[places]`."""
    total = np.zeros(len(places), np.uint64)
    for offset in range(n):
        total = total * _gram_power(1) + words[places + offset]
    return total


def bytes_hashes(content: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Hashes:
    """The hashes of byte strings that stand one after another: uint64 `[strings]`.

    Args:
        content: the bytes of all, uint8.
        offsets: where each begins in `content`, ascending, and where the last ends, `[strings + 1]`.
    """
    hashes = np.empty(len(offsets) - 1, np.uint64)
    first = 0
    while first < len(hashes):
        end = int(np.searchsorted(offsets, offsets[first] + _BLOCK, side="right")) - 1
        if end <= first:  # a string longer than a block
            end = first + 1
            hashes[first] = _long_hash(content[offsets[first] : offsets[end]])
        else:
            base = offsets[first]
            places = offsets[first : end + 1] - base
            hashes[first:end] = _hash_spans(content[base : offsets[end]], places[:-1], places[1:])
        first = end
    return hashes


def mix(values: Hashes) -> Hashes:
    """SplitMix64's finalizer: a bijection of 64 bits in which every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _gram_power(exponent: int) -> np.uint64:
    return np.uint64(pow(_GRAM_MULTIPLIER, exponent, 1 << 64))


def _clear_separators(content: NDArray[np.uint8]) -> None:
    """Zero the UTF-8 bytes of U+0080 to U+00BF (C2 xx) and U+2000 to U+207F (E2 80 xx, E2 81 xx)."""
    leads = np.flatnonzero(content >= 0xC0)
    first, second = content[leads], content[leads + 1]
    pairs = leads[first == 0xC2]
    content[pairs] = content[pairs + 1] = 0
    triples = leads[(first == 0xE2) & ((second & 0xFE) == 0x80)]
    for offset in range(3):
        content[triples + offset] = 0


def _block_hashes(content: NDArray[np.uint8]) -> Hashes:
    """The hashes of the words of a block, runs of bytes other than 0; its last eight bytes are not of it."""
    inside = np.zeros(len(content) - 6, np.bool_)
    np.not_equal(content[:-8], 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    eights: Hashes = np.ndarray((len(content) - 7,), "<u8", content, strides=(1,))
    # A word has no zero byte, so eight bytes at most, filled up with zeros, are no other word's.
    hashes = mix(eights[starts] & _FIRST_BYTES.take(lengths, mode="clip"))
    longer = np.flatnonzero(lengths > 8)
    for offset in range(8, _LONG, 8):
        rest = eights[starts[longer] + offset] & _FIRST_BYTES.take(lengths[longer] - offset, mode="clip")
        hashes[longer] = mix(hashes[longer] + rest)
        longer = longer[lengths[longer] > offset + 8]
    for place in longer.tolist():
        hashes[place] = xxhash.xxh3_64_intdigest(content[starts[place] : ends[place]].tobytes())
    return hashes


def _hash_spans(content: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Hashes:
    sums = np.zeros(len(content) + 1, np.uint64)
    sums[1:] = content
    sums[1:] *= _POWERS[: len(content)]
    np.cumsum(sums, out=sums)
    # The length keeps strings apart that differ in zero bytes at their end.
    lengths = (ends - starts).astype(np.uint64)
    return mix((sums[ends] - sums[starts]) * _INVERSES[starts] + lengths)


def _long_hash(content: NDArray[np.uint8]) -> np.uint64:
    total = np.zeros(1, np.uint64)
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        ends = np.array([len(block)])
        total = mix(total * np.uint64(_GRAM_MULTIPLIER) + _hash_spans(block, np.zeros(1, np.int64), ends))
    return np.uint64(total[0])
