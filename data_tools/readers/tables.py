"""Tables of texts: Parquet files, and Arrow files as streams (those of `datasets`) or with an index.

Each row is a record of one of the layouts of `layouts.py`, such as plain text in a column `text`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import UserError
from data_tools.papers import Paper, Rejected, Source
from data_tools.readers.layouts import read_record
from data_tools.streams import InputStream, compression, filesystem, is_url

_ROWS = 64  # at a time: a row may be a book
_INDEXED = b"ARROW1"  # begins and ends an Arrow IPC file; a stream has neither
# Damage, two columns of one name, and times that Python does not have.
_UNREADABLE = (pa.ArrowException, ValueError, OverflowError)


def read_parquet(
    stream: InputStream, name: str, companion: InputStream | None = None
) -> Iterator[Paper | Rejected]:
    """The papers of a Parquet file. It is read from its end, so its checksum takes a pass of its own.

    Raises:
        UserError: it is not a Parquet file, or damaged.
    """
    with _readable(name, "Parquet"), _seekable(stream.path) as file:
        yield from _papers(pq.ParquetFile(file).iter_batches(_ROWS), name)


def read_arrow(
    stream: InputStream, name: str, companion: InputStream | None = None
) -> Iterator[Paper | Rejected]:
    """The papers of an Arrow IPC stream, or of an IPC file, which is read as a Parquet file is.

    Raises:
        UserError: it is neither, or damaged, or an IPC file that is compressed as a whole.
    """
    if not stream.peek().startswith(_INDEXED):
        with _readable(name, "Arrow"), pa.ipc.open_stream(stream) as batches:
            yield from _papers(batches, name)
        return
    if compression(stream.path):
        raise UserError(f"{name} is an Arrow file with an index, which is read from its end; decompress it.")
    with _readable(name, "Arrow"), _seekable(stream.path) as file, pa.ipc.open_file(file) as table:
        yield from _papers(map(table.get_batch, range(table.num_record_batches)), name)


def _papers(batches: Iterable[Any], name: str) -> Iterator[Paper | Rejected]:
    number = 0
    for batch in batches:
        for first in range(0, batch.num_rows, _ROWS):
            for record in _rows(batch.slice(first, _ROWS)):
                number += 1
                source = Source(name, number)
                if isinstance(record, Exception):
                    yield Rejected("wrong_structure", source, f"the row cannot be read: {record}")
                else:
                    yield read_record(record, source)


def _rows(batch: Any) -> Iterator[object]:
    """The rows, the error in place of one that cannot be read.

    Nothing checks before that offsets lie in their buffers and that texts are UTF-8: without it a damaged
    file is read from foreign memory.
    """
    try:
        yield from _checked(batch)
    except _UNREADABLE:
        for row in range(batch.num_rows):
            try:
                yield from _checked(batch.slice(row, 1))
            except _UNREADABLE as error:
                yield error


def _checked(batch: Any) -> list[dict[str, Any]]:
    batch.validate(full=True)
    return cast(list[dict[str, Any]], batch.to_pylist())


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, MemoryError) as error:  # a damaged size may ask for any amount
        raise UserError(f"{name} is not a readable {kind} file ({error}); make it again.") from error


def _seekable(path: str) -> BinaryIO:
    if not is_url(path):
        return open(path, "rb")
    files, inside = filesystem(path)
    return cast(BinaryIO, files.open(inside, "rb"))
