"""Parts to corpus: which documents count, decided from the tables alone."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from data_tools.documents import read_documents
from data_tools.errors import UserError
from data_tools.files import write_published
from data_tools.manifest import (
    Counts,
    FileInfo,
    Manifest,
    SplitInfo,
    TokenizerInfo,
    write_manifest,
)
from data_tools.papers import Source
from data_tools.parts import EXAMPLES, Part, add_counts
from data_tools.recipe import Recipe
from data_tools.rules import RULES_VERSION
from data_tools.tokenizer import Tokenizer

Mask = NDArray[np.bool_]

_COLUMNS = ["pmc_id", "doi", "text_hash", "retracted", "tokens", "source_file", "source_position"]
_REASONS: tuple[str, ...] = ("retracted", "duplicate_pmc_id", "duplicate_doi", "duplicate_text")


def finalize(directory: Path, parts: Sequence[Part], tokenizer: Tokenizer, recipe: Recipe) -> Manifest:
    """Decide which documents count, and write the split files, the tokenizer and last corpus.json.

    Raises:
        UserError: no document counts.
    """
    table = read_documents((table_path(directory, part.info.name) for part in parts), _COLUMNS)
    reasons = decide(table)
    counts = _counts([part.counts for part in parts], table, reasons)
    require_papers(counts)
    splits = divide(table, reasons == 0, recipe.decisions.heldout)
    tokens = table["tokens"].to_numpy().astype(np.int64)
    contents = {name: split_file(tokens, chosen) for name, chosen in splits.items()}
    for name, content in contents.items():
        write_published(directory / f"{name}.npy", content)
    write_published(directory / "tokenizer.model", tokenizer.model)
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.unk
        ),
        dtype=tokenizer.dtype.name,
        rules_version=RULES_VERSION,
        recipe=recipe,
        counts=counts,
        splits={name: _split_info(tokens, splits[name], content) for name, content in contents.items()},
        parts=[part.info for part in parts],
    )
    write_manifest(directory, manifest)
    return manifest


def require_papers(counts: Counts) -> None:
    """Refuse to make a corpus of nothing.

    Raises:
        UserError: no document is kept.
    """
    if counts.kept == 0:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.left_out.items()))
        left_out = f", left out {reasons}" if reasons else ""
        raise UserError(f"No paper is left for a corpus: {counts.read} records read{left_out}.")


def table_path(directory: Path, part: str) -> Path:
    """Path of the table of a part of the corpus in `directory`."""
    return directory / "parts" / f"{part}.documents.parquet"


def decide(table: Any) -> NDArray[np.uint8]:
    """Why each document does not count: 0 when it does, else 1 + its place in `retracted`,
    `duplicate_pmc_id`, `duplicate_doi`, `duplicate_text`.

    A document that shares PMC id or DOI with a retracted one is retracted too. Of the others the first with
    each PMC id, each DOI (in any case) and each text counts.

    Args:
        table: the columns pmc_id, doi, text_hash and retracted of all documents, in order.

    Returns:
        uint8 `[documents]`.
    """
    keys = [_codes(table["pmc_id"]), _codes(pc.utf8_lower(table["doi"])), _codes(table["text_hash"])]
    retracted = table["retracted"].to_numpy().astype(bool)
    for codes in keys[:2]:
        retracted = retracted | _shared(codes, retracted)
    reasons = np.zeros(len(retracted), np.uint8)
    reasons[retracted] = 1
    for number, codes in enumerate(keys, start=2):
        reasons[_repeated(codes, ~retracted) & (reasons == 0)] = number
    return reasons


def divide(table: Any, counted: Mask, heldout: float) -> dict[str, Mask]:
    """The counted documents of each split, chosen by a hash of the paper's identity.

    So a paper falls on the same side in every build. With at least two documents, neither split is empty
    when `heldout` is above 0.
    """
    chosen = np.zeros(len(counted), np.bool_)
    documents = np.flatnonzero(counted)
    places = _places(table.take(pa.array(documents)))
    is_heldout = places < heldout
    if heldout > 0 and len(documents) >= 2:
        is_heldout[np.argmin(places)] = True
        is_heldout[np.argmax(places)] = False
    chosen[documents] = is_heldout
    return {"train": counted & ~chosen, "heldout": chosen}


def split_file(tokens: NDArray[np.int64], chosen: Mask) -> bytes:
    """The bytes of a split file: `.npy`, int64 `[n + 1, 2]`.

    Row i is (tokens of the chosen documents before document i, position of its first token in the
    concatenation of all parts); the closing row holds the totals of both.

    Args:
        tokens: of every document, `[documents]`.
        chosen: which count, `[documents]`.
    """
    ends = np.cumsum(tokens)
    rows = np.zeros((int(chosen.sum()) + 1, 2), np.int64)
    rows[1:, 0] = np.cumsum(tokens[chosen])
    rows[:-1, 1] = (ends - tokens)[chosen]
    rows[-1, 1] = ends[-1] if len(ends) else 0
    buffer = BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def _codes(column: Any) -> NDArray[np.int64]:
    """A number for each distinct value, -1 for null: `[documents]`."""
    codes = column.combine_chunks().dictionary_encode().indices
    return np.asarray(codes.fill_null(-1)).astype(np.int64)


def _shared(codes: NDArray[np.int64], marked: Mask) -> Mask:
    """Which documents have a value that some marked document has."""
    return np.isin(codes, codes[marked & (codes >= 0)])


def _repeated(codes: NDArray[np.int64], among: Mask) -> Mask:
    """Which of the documents in `among` have a value that an earlier one of them has."""
    rows = np.flatnonzero(among & (codes >= 0))
    _, first = np.unique(codes[rows], return_index=True)
    repeated = np.zeros(len(codes), np.bool_)
    repeated[rows] = True
    repeated[rows[first]] = False
    return repeated


def _places(table: Any) -> NDArray[np.float64]:
    """A number in [0, 1) for each document, from its PMC id, else its DOI, else its text."""
    columns = zip(*(table[name].to_pylist() for name in ("pmc_id", "doi", "text_hash")), strict=True)
    identities = ((pmc_id or (doi or "").lower()).encode() or text for pmc_id, doi, text in columns)
    hashes = (xxhash.xxh3_64_intdigest(identity) for identity in identities)
    # 53 bits are what a float64 holds exactly.
    return np.fromiter((value >> 11 for value in hashes), np.float64, len(table)) / 2.0**53


def _counts(counts: list[Counts], table: Any, reasons: NDArray[np.uint8]) -> Counts:
    total = add_counts(counts)
    for number, reason in enumerate(_REASONS, start=1):
        rows = np.flatnonzero(reasons == number)
        if len(rows):
            first = table.select(["source_file", "source_position"]).take(pa.array(rows[:EXAMPLES]))
            total.left_out[reason] = len(rows)
            total.examples[reason] = [str(Source(*row.values())) for row in first.to_pylist()]
    return replace(total, kept=int((reasons == 0).sum()))


def _split_info(tokens: NDArray[np.int64], chosen: Mask, content: bytes) -> SplitInfo:
    file = FileInfo(len(content), xxhash.xxh3_128_hexdigest(content))
    return SplitInfo(int(chosen.sum()), int(tokens[chosen].sum()), file)
