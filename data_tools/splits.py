"""Train and held-out: which documents are in which, and the files that say so."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.facts import NONE, Facts
from data_tools.words import mix

Mask = NDArray[np.bool_]

_SALTS = {"pmc_id": 1, "doi": 2, "text": 3}


def divide(facts: Facts, counted: Mask, heldout: float) -> dict[str, Mask]:
    """The counted documents of each split, chosen by a hash of the paper's identity.

    A paper's identity is its PMC id, else its DOI, else its text; so it falls on the same side in every
    build. With at least two documents, neither split is empty when `heldout` is above 0; one alone is for
    training.

    Args:
        facts: of all documents.
        counted: which count, `[documents]`.
        heldout: the share to hold out.
    """
    documents = np.flatnonzero(counted)
    places = _places(facts)[documents]
    is_heldout = places < heldout
    if heldout > 0 and len(documents):
        is_heldout[np.argmin(places)] = True
        is_heldout[np.argmax(places)] = False  # the last word: of a single document, too
    chosen = np.zeros(len(counted), np.bool_)
    chosen[documents] = is_heldout
    return {"train": counted & ~chosen, "heldout": chosen}


def split_file(tokens: NDArray[np.int64], chosen: Mask, first_of_parts: NDArray[np.int64]) -> bytes:
    """The bytes of a split file: `.npy`, int64, one array after another in one dimension.

    First `[n + 1]`: where each of the n chosen documents begins in the stream, closed by the stream's length.
    Then `[r + 1, 2]`: the runs, which are chosen documents side by side in one part. A row is (where the run
    begins in the stream; where in the concatenation of all parts); the closing row has the lengths of both.
    So a place in the stream is found among the runs, which are few where few documents are left out.

    Args:
        tokens: of every document, `[documents]`.
        chosen: which count, `[documents]`.
        first_of_parts: the number of the first document of each part, `[parts]`.
    """
    documents, ends = np.flatnonzero(chosen), np.cumsum(tokens)
    starts = np.zeros(len(documents) + 1, np.int64)
    starts[1:] = np.cumsum(tokens[documents])
    parts = np.searchsorted(first_of_parts, documents, side="right")
    begins = np.ones(len(documents), np.bool_)
    begins[1:] = (np.diff(documents) > 1) | (np.diff(parts) > 0)
    runs = np.zeros((int(begins.sum()) + 1, 2), np.int64)
    runs[:-1, 0] = starts[:-1][begins]
    runs[:-1, 1] = (ends - tokens)[documents[begins]]
    runs[-1] = starts[-1], ends[-1] if len(ends) else 0
    return array_file(np.concatenate([starts, runs.ravel()]))


def array_file(array: NDArray[np.int64] | NDArray[np.uint8]) -> bytes:
    """The bytes of an array as `.npy`."""
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read_reasons(path: Path, documents: int) -> NDArray[np.uint8]:
    """The decision on each document, `reasons.npy`, memory-mapped: uint8 `[documents]`.

    Raises:
        UserError: the file is missing, damaged or of another corpus.
    """
    try:
        reasons: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a garbled header raises almost anything, it is parsed as Python
        raise UserError(f"{path} cannot be read ({error}); run `pmc-data finalize` again.") from error
    if reasons.dtype != np.uint8 or reasons.shape != (documents,):
        raise UserError(
            f"{path} does not fit corpus.json: expected uint8 [{documents}]; run `pmc-data finalize` again."
        )
    return reasons


def _places(facts: Facts) -> NDArray[np.float64]:
    """A number in [0, 1) for each document, from its identity: `[documents]`."""
    identities = np.zeros(len(facts), np.uint64)
    for name, salt in _SALTS.items():
        values = getattr(facts, name)
        missing = (identities == NONE) & (values != NONE)
        identities = np.where(missing, mix(values + mix(np.full(1, salt, np.uint64))), identities)
    # 53 bits are what a float64 holds exactly.
    return (identities >> np.uint64(11)).astype(np.float64) / 2.0**53
