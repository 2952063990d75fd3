"""The table of a part's documents: which paper each is, one row a document, as Parquet."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools.columns import column
from data_tools.errors import UserError
from data_tools.files import aside, publish
from data_tools.measures import Measured
from data_tools.minhash import SIGNATURE_BYTES
from data_tools.papers import Paper
from data_tools.rules.normalize import normalize_text

SCHEMA = pa.schema(
    [
        ("pmc_id", pa.string()),
        ("corpus_id", pa.int64()),
        ("doi", pa.string()),
        ("pubmed_id", pa.string()),
        ("license", pa.string()),
        ("retracted", pa.bool_()),
        ("year", pa.int16()),
        ("journal", pa.string()),
        ("source_file", pa.string()),
        ("source_position", pa.int64()),
        ("tokens", pa.int32()),
        ("text_bytes", pa.int64()),
        ("text_hash", pa.binary(16)),
        ("signature", pa.binary(SIGNATURE_BYTES)),
        ("overlaps", pa.list_(pa.int32())),
    ]
)
"""`tokens` counts the EOD; `text_hash` is XXH3-128 of the training text in UTF-8, big-endian; `signature` is
that of `minhash.py`; `overlaps` has numbers of test questions."""

_ROWS_A_GROUP = 16_384
_RANDOM = ("text_hash", "signature")
"""Columns of random bytes, which neither a dictionary nor compression makes smaller."""


@dataclass(frozen=True)
class Row:
    """One document: the columns of `SCHEMA`."""

    pmc_id: str | None
    corpus_id: int | None
    doi: str | None
    pubmed_id: str | None
    license: str | None
    retracted: bool
    year: int | None
    journal: str | None
    source_file: str
    source_position: int
    tokens: int
    text_bytes: int
    text_hash: bytes
    signature: bytes | None
    overlaps: tuple[int, ...]


def row(paper: Paper, text: str, tokens: int, measured: Measured) -> Row:
    """The row of a paper, its training text, its length in tokens (EOD included) and its measures."""
    content = text.encode()
    return Row(
        pmc_id=paper.pmc_id,
        corpus_id=paper.corpus_id,
        doi=_plain(paper.doi),
        pubmed_id=_plain(paper.pubmed_id),
        license=_plain(paper.license),
        retracted=paper.retracted,
        year=paper.year,
        journal=_plain(paper.journal),
        source_file=paper.source.file,
        source_position=paper.source.position,
        tokens=tokens,
        text_bytes=len(content),
        text_hash=xxhash.xxh3_128_digest(content),
        signature=measured.signature,
        overlaps=measured.overlaps,
    )


def text_hash(text: str) -> bytes:
    """XXH3-128 of a text in UTF-8, 16 bytes."""
    return xxhash.xxh3_128_digest(text.encode())


def table_writer(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetWriter` of a table of documents."""
    return pq.ParquetWriter(
        path,
        SCHEMA,
        use_dictionary=[name for name in SCHEMA.names if name not in _RANDOM],
        compression={name: "none" if name in _RANDOM else "snappy" for name in SCHEMA.names},
    )


class DocumentTable:
    """Writes a part's table, a row group at a time. A context manager, published like a token file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        self._writer = table_writer(aside(self._path))
        return self

    def add(self, document: Row) -> None:
        """Append a document."""
        self._rows.append(document)
        if len(self._rows) == _ROWS_A_GROUP:
            self._write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write()
            self._writer.close()
            if kind is None:
                publish(self._path)
        finally:
            aside(self._path).unlink(missing_ok=True)

    def _write(self) -> None:
        if self._rows:
            columns = [column([getattr(row, of.name) for row in self._rows], of.type) for of in SCHEMA]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
            self._rows.clear()


def read_documents(paths: Iterable[Path], columns: list[str]) -> Any:
    """Columns of the tables of several parts, one after another, as a `pyarrow.Table`.

    Raises:
        UserError: a table cannot be read.
    """
    tables = [SCHEMA.empty_table().select(columns)]
    return pa.concat_tables([*tables, *(read_table(path, columns) for path in paths)])


def read_table(path: Path, columns: list[str]) -> Any:
    """Columns of the table of a part, as a `pyarrow.Table`.

    Raises:
        UserError: the table cannot be read.
    """
    try:
        # Not memory-mapped and without read-ahead: what is read is what is kept. And not by `pq.read_table`,
        # which imports pandas.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            schema = pa.schema([SCHEMA.field(name) for name in columns])
            return file.read(columns).select(columns).cast(schema)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a table of documents ({error}).") from error


def table_path(directory: Path, part: str) -> Path:
    """Path of the table of a part of the corpus in `directory`."""
    return directory / "parts" / f"{part}.documents.parquet"


def _plain(value: str | None) -> str | None:
    return None if value is None else normalize_text(value)
