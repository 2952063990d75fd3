"""MinHash signatures: the Jaccard similarity of two documents' word 5-grams, from 224 bytes of each.

One-permutation hashing (Li, Owen & Zhang 2012): the range of the 5-grams' hashes is cut into 112 bins, and
the smallest hash in each stands for it. An empty bin takes the value of a filled one, drawn by the empty
one's number alone and so alike in every document, which keeps the estimate unbiased (Shrivastava 2017). Of
each value 16 bits are kept; they agree by chance once in 65,536 (b-bit minwise hashing, Li & König 2010).

The share of equal values estimates the similarity J with a standard error of sqrt(J (1 - J) / 112), 0.038 at
0.8. Candidates are documents with a band of 8 equal values among 14 (the bands of datatrove's default), which
finds a pair of similarity J with a probability of 1 - (1 - J^8)^14: 0.92 at 0.8, 0.56 at 0.7, 0.05 at 0.5.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_tools.words import Hashes, mix, ngrams

BANDS = 14
ROWS = 8
VALUES = BANDS * ROWS
SIGNATURE_BYTES = VALUES * 2
WORDS = 5
"""Words of a shingle."""

_DRAWS = 4096  # bins to look into for an empty one; one filled bin in 112 is missed with exp(-36)
# Bin i has the hashes h with floor(h / 2^32) * 112 / 2^32 in [i, i + 1).
_BIN_EDGES = np.array([-(-(i << 32) // VALUES) << 32 for i in range(VALUES)], np.uint64)
_FEW = 10  # hashes a bin, on average, that are looked at first; a bin without any is missed with exp(-10)

Signatures = NDArray[np.uint16]


def signature(words: Hashes) -> bytes | None:
    """The signature of a document from the hashes of its words: 112 little-endian uint16, 224 bytes.

    A document of fewer than 5 words has one shingle, all of its words; one of no word has no signature.
    """
    if not len(words):
        return None
    shingles = ngrams(words, min(WORDS, len(words)))
    values, filled = _smallest(_low_in_their_bins(shingles))
    if not filled.all() and len(shingles) > VALUES * _FEW:
        values, filled = _smallest(shingles)
    empty = np.flatnonzero(~filled)
    if len(empty):
        donors = _donors()[empty]
        first = np.argmax(filled[donors], axis=1)
        values[empty] = values[donors[np.arange(len(empty)), first]]
    return values.tobytes()


def _low_in_their_bins(shingles: Hashes) -> Hashes:
    """The shingles that lie so low in their bins that about `_FEW` a bin are left; all of a short document.

    The smallest of a bin is among them wherever one of the bin is.
    """
    if len(shingles) <= VALUES * _FEW:
        return shingles
    heights = (shingles >> np.uint64(32)).astype(np.uint32) * np.uint32(VALUES)  # modulo 2^32
    low = heights < np.uint32(VALUES * _FEW * 2**32 // len(shingles))
    return shingles[np.flatnonzero(low)]  # half the time of `shingles[low]`


def _smallest(shingles: Hashes) -> tuple[Signatures, NDArray[np.bool_]]:
    """16 bits of the smallest hash of each bin, and which bins have one: `[112]` both."""
    if not len(shingles):
        return np.zeros(VALUES, "<u2"), np.zeros(VALUES, np.bool_)
    ordered = np.sort(shingles)
    places = np.searchsorted(ordered, _BIN_EDGES)
    filled = places < np.append(places[1:], len(ordered))
    values = ordered[np.minimum(places, len(ordered) - 1)] & np.uint64(0xFFFF)
    return values.astype("<u2"), filled


@cache
def _donors() -> NDArray[np.uint8]:
    """The bins that each bin looks into when it is empty, in that order: `[112, 4096]`."""
    numbers = np.arange(VALUES * _DRAWS, dtype=np.uint64).reshape(VALUES, _DRAWS)
    return ((mix(numbers) >> np.uint64(32)) * np.uint64(VALUES) >> np.uint64(32)).astype(np.uint8)


def band_keys(signatures: Signatures) -> Hashes:
    """A hash of each band of each signature: `[documents, 112]` to uint64 `[14, documents]`."""
    halves = np.ascontiguousarray(signatures).view("<u8").reshape(-1, BANDS, 2)
    return np.ascontiguousarray(mix(mix(halves[:, :, 0]) + halves[:, :, 1]).T)


def similarities(first: Signatures, second: Signatures) -> NDArray[np.float64]:
    """The estimated similarity of each pair of signatures, `[pairs, 112]` both: `[pairs]`."""
    shares: NDArray[np.float64] = np.mean(first == second, axis=1)
    return shares
