"""What decisions rest on: a few numbers of each document, read from the tables column by column."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.columns import column, given, numbers
from data_tools.documents import read_table
from data_tools.licenses import GROUPS, license_group
from data_tools.words import Hashes, bytes_hashes, mix

COLUMNS = ["pmc_id", "doi", "corpus_id", "text_hash", "retracted", "license", "tokens", "overlaps"]
NONE = np.uint64(0)
"""Stands for an identifier that a document has not."""


@dataclass(frozen=True)
class Facts:
    """The documents of all parts, in order; every array but the last two is `[documents]`.

    Identifiers are hashes of 64 bits, uint64, and `NONE` where there is none: among 5 million documents any
    two different ones fall together with a probability below one in a million.

    Attributes:
        pmc_id: hash.
        doi: hash, of the DOI in lower case.
        corpus_id: hash.
        text: the first 8 bytes of `text_hash`.
        retracted: as the papers say themselves.
        license: place in `licenses.GROUPS`, uint8.
        tokens: EOD included, int64.
        overlap_documents: the document of each overlap with a test question, int64 `[overlaps]`.
        overlap_questions: its question, int32 `[overlaps]`.
    """

    pmc_id: Hashes
    doi: Hashes
    corpus_id: Hashes
    text: Hashes
    retracted: NDArray[np.bool_]
    license: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    overlap_documents: NDArray[np.int64]
    overlap_questions: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def read_facts(paths: Iterable[Path], check: Callable[[Facts], None] = lambda _: None) -> Facts:
    """The facts of the documents in the tables at `paths`, one table in memory at a time.

    Args:
        paths: of the tables of all parts, at least one.
        check: given the facts of each table as it is read.

    Raises:
        UserError: a table cannot be read.
    """
    found: list[Facts] = []
    before = 0
    for path in paths:
        facts = facts_of(read_table(path, COLUMNS))
        check(facts)
        facts.overlap_documents[:] += before
        before += len(facts)
        found.append(facts)
    return Facts(*(np.concatenate(arrays) for arrays in zip(*map(_arrays, found), strict=True)))


def facts_of(table: Any) -> Facts:
    """The facts of the documents of one table with the columns `COLUMNS`."""
    overlaps = table["overlaps"].combine_chunks()
    return Facts(
        pmc_id=_string_hashes(table["pmc_id"]),
        doi=_string_hashes(pc.utf8_lower(table["doi"])),
        corpus_id=_corpus_ids(table["corpus_id"]),
        text=_first_bytes(table["text_hash"]),
        retracted=numbers(table["retracted"].combine_chunks()),
        license=_licenses(table["license"]),
        tokens=numbers(table["tokens"].combine_chunks()).astype(np.int64),
        overlap_documents=numbers(pc.list_parent_indices(overlaps)),
        overlap_questions=numbers(pc.list_flatten(overlaps)),
    )


def named(facts: Facts, identifiers: Sequence[str]) -> NDArray[np.bool_]:
    """Which documents have one of the given PMC ids or DOIs: `[documents]`."""
    wanted = pa.chunked_array([column([one for one in identifiers if one], pa.string())])
    found: NDArray[np.bool_] = np.isin(facts.pmc_id, _string_hashes(wanted))
    return found | np.isin(facts.doi, _string_hashes(pc.utf8_lower(wanted)))


def _arrays(facts: Facts) -> list[NDArray[Any]]:
    return list(vars(facts).values())


def _corpus_ids(column: Any) -> Hashes:
    """The ids, from 0, mixed; `NONE` where there is none."""
    array = column.combine_chunks()
    return np.where(given(array), mix(numbers(array).astype(np.uint64) + np.uint64(1)), NONE)


def _string_hashes(column: Any) -> Hashes:
    """A hash of each string, `NONE` for null: `[rows]`."""
    if not len(column):
        return np.empty(0, np.uint64)
    array = column.cast(pa.large_string()).combine_chunks()
    _, offsets, content = array.buffers()
    if content is None:
        return np.zeros(len(array), np.uint64)
    places = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    hashes = bytes_hashes(np.frombuffer(content, np.uint8), places)
    return np.where(given(array) & (places[1:] > places[:-1]), hashes, NONE)


def _first_bytes(column: Any) -> Hashes:
    """The first 8 bytes of 16-byte values: `[rows]`."""
    array = column.combine_chunks()
    if not len(array):
        return np.empty(0, np.uint64)
    content = np.frombuffer(array.buffers()[1], "<u8")
    return content[2 * array.offset : 2 * (array.offset + len(array)) : 2].copy()


def _licenses(column: Any) -> NDArray[np.uint8]:
    """The group of each statement. There are few distinct ones."""
    encoded = column.combine_chunks().dictionary_encode()
    groups = [GROUPS.index(license_group(statement)) for statement in encoded.dictionary.to_pylist()]
    codes = numbers(encoded.indices, null=len(groups))
    found: NDArray[np.uint8] = np.array([*groups, GROUPS.index(license_group(None))], np.uint8)[codes]
    return found
