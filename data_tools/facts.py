"""What decisions rest on: a few numbers of each document, read from the tables column by column."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.documents import SCHEMA, read_table
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
        paths: of the tables of all parts.
        check: given the facts of each table as it is read.

    Raises:
        UserError: a table cannot be read.
    """
    found, before = [facts_of(SCHEMA.empty_table().select(COLUMNS))], 0
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
        retracted=table["retracted"].to_numpy().astype(np.bool_),
        license=_licenses(table["license"]),
        tokens=table["tokens"].to_numpy().astype(np.int64),
        overlap_documents=pc.list_parent_indices(overlaps).to_numpy().astype(np.int64),
        overlap_questions=pc.list_flatten(overlaps).to_numpy().astype(np.int32),
    )


def named(facts: Facts, identifiers: Sequence[str]) -> NDArray[np.bool_]:
    """Which documents have one of the given PMC ids or DOIs: `[documents]`."""
    given = pa.chunked_array([pa.array([one for one in identifiers if one], pa.string())])
    found: NDArray[np.bool_] = np.isin(facts.pmc_id, _string_hashes(given))
    return found | np.isin(facts.doi, _string_hashes(pc.utf8_lower(given)))


def _arrays(facts: Facts) -> list[NDArray[Any]]:
    return list(vars(facts).values())


def _corpus_ids(column: Any) -> Hashes:
    """The ids, from 0, mixed; `NONE` where there is none."""
    given = pc.is_valid(column).to_numpy()
    values = pc.fill_null(column, 0).to_numpy().astype(np.uint64) + np.uint64(1)
    return np.where(given, mix(values), NONE)


def _string_hashes(column: Any) -> Hashes:
    """A hash of each string, `NONE` for null: `[rows]`."""
    array = pc.fill_null(column, "").cast(pa.large_string()).combine_chunks()
    _, offsets, content = array.buffers()
    if not len(array) or content is None:
        return np.zeros(len(array), np.uint64)
    places = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    hashes = bytes_hashes(np.frombuffer(content, np.uint8), places)
    return np.where(places[1:] > places[:-1], hashes, NONE)


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
    codes = pc.fill_null(encoded.indices, len(groups)).to_numpy()
    found: NDArray[np.uint8] = np.array([*groups, GROUPS.index(license_group(None))], np.uint8)[codes]
    return found
