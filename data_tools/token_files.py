"""Token files: Megatron's indexed dataset, a `.bin` of token ids and an `.idx` that says where each lies.

Layout of the `.idx`, little-endian, N sequences and D = documents + 1 (source: `_IndexWriter` in
megatron/core/datasets/indexed_dataset.py, version 1):

    0          9 bytes  magic `MMIDIDX\\0\\0`
    9          uint64   version, 1
    17         uint8    dtype code
    18         uint64   N
    26         uint64   D
    34         int32 [N]  tokens of each sequence
    34 + 4N    int64 [N]  byte offset of each sequence in the `.bin`
    34 + 12N   int64 [D]  sequence at which each document begins; the last is N

A multimodal dataset has an int8 [N] of modes after that; such files are refused. The codes of dtypes are
those of `DType` in the same module. The `.bin` holds the ids back to back, little-endian, and nothing else.
"""

import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.files import aside, publish
from data_tools.tokenizer import Tokens

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOAT_CODES = {6: "float64", 7: "float32"}
_WRITE_BLOCK = 1 << 20
_VERIFY_BLOCK = 1 << 22


def bin_path(prefix: Path) -> Path:
    """Path of the token ids of the token file named `prefix`."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Path of the index of the token file named `prefix`."""
    return prefix.with_name(prefix.name + ".idx")


class TokenFileWriter:
    """Writes a token file, one document a sequence, in constant memory but for 4 bytes a document.

    A context manager: the pair is written aside and published when the block ends, the `.idx` last;
    an exception in the block leaves neither. `bin_checksum` and `idx_checksum` (XXH3-128, hex) are there
    after the block.

    Args:
        prefix: path without `.bin` and `.idx`.
        dtype: uint16 or int32.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self._bin = bin_path(prefix)
        self._idx = idx_path(prefix)
        self._dtype = dtype
        self._lengths = array("i")
        self._digest = xxhash.xxh3_128()
        self.tokens = 0
        self.bin_checksum = ""
        self.idx_checksum = ""

    def __enter__(self) -> Self:
        self._file = aside(self._bin).open("wb", buffering=_WRITE_BLOCK)
        return self

    def add(self, tokens: Tokens) -> None:
        """Append a document: `[tokens]`, of the file's dtype."""
        if tokens.dtype != self._dtype:
            raise TypeError(f"document of {tokens.dtype} in a token file of {self._dtype}")
        content = np.ascontiguousarray(tokens).view(np.uint8).data
        self._file.write(content)
        self._digest.update(content)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                self._publish()
        finally:
            aside(self._bin).unlink(missing_ok=True)
            aside(self._idx).unlink(missing_ok=True)

    def _publish(self) -> None:
        index = index_file(self._dtype, np.frombuffer(self._lengths, dtype=np.int32))
        aside(self._idx).write_bytes(index)
        self.bin_checksum = self._digest.hexdigest()
        self.idx_checksum = xxhash.xxh3_128_hexdigest(index)
        # An index must never stand beside the ids of another build.
        self._idx.unlink(missing_ok=True)
        publish(self._bin)
        publish(self._idx)


def index_file(dtype: np.dtype[Any], lengths: NDArray[np.int32]) -> bytes:
    """The bytes of the `.idx` of documents of the given lengths, `[documents]`, one a sequence."""
    lengths = lengths.astype("<i4", copy=False)
    documents = len(lengths)
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    offsets = np.concatenate([np.zeros(1, "<i8"), ends])[:documents]
    boundaries = np.arange(documents + 1, dtype="<i8")
    code = next(code for code, known in _CODES.items() if known == dtype)
    header = _HEADER.pack(_MAGIC, _VERSION, code, documents, documents + 1)
    return header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes()


@dataclass(frozen=True)
class Header:
    """What the first 34 bytes of an `.idx` say, agreed with the sizes of both files."""

    dtype: np.dtype[Any]
    sequences: int
    documents: int
    bin_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens in the `.bin`."""
        return self.bin_bytes // self.dtype.itemsize


def read_header(prefix: Path) -> Header:
    """Read the header of an `.idx` and check it against the sizes of the two files.

    Raises:
        UserError: a file is missing, is no token file of text, or is cut short or too long.
    """
    index, data = idx_path(prefix), bin_path(prefix)
    try:
        with index.open("rb") as file:
            raw = file.read(_HEADER.size)
        idx_bytes, bin_bytes = index.stat().st_size, data.stat().st_size
    except OSError as error:
        raise UserError(f"The token file {error.filename} cannot be read: {error.strerror}.") from error
    if len(raw) < _HEADER.size:
        raise UserError(
            f"{index} is cut short: found {len(raw)} bytes, expected a header of {_HEADER.size}; "
            "build it again."
        )
    magic, version, code, sequences, boundaries = _HEADER.unpack(raw)
    if magic != _MAGIC or version != _VERSION:
        raise UserError(
            f"{index} is not a Megatron index: found magic {magic!r} and version {version}, "
            f"expected {_MAGIC!r} and {_VERSION}."
        )
    dtype = _ids_dtype(index, code)
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if 0 < sequences == idx_bytes - expected:
        raise UserError(
            f"{index} is of a multimodal dataset, with a mode for each of {sequences} sequences: found "
            f"{idx_bytes} bytes, expected {expected}; only text is read here."
        )
    if boundaries < 1 or idx_bytes != expected:
        raise UserError(
            f"{index} is damaged: found {idx_bytes} bytes, expected {expected} for {sequences} sequences; "
            "build it again."
        )
    if bin_bytes % dtype.itemsize:
        raise UserError(
            f"{data} is damaged: found {bin_bytes} bytes, expected a multiple of {dtype.itemsize}; "
            "build it again."
        )
    return Header(dtype, sequences, boundaries - 1, bin_bytes)


def _ids_dtype(index: Path, code: int) -> np.dtype[Any]:
    if code in _FLOAT_CODES:
        raise UserError(
            f"{index} is of {_FLOAT_CODES[code]} numbers (dtype code {code}), which are no token ids; "
            "tokenize into integers."
        )
    if code not in _CODES:
        raise UserError(f"{index} has dtype code {code}; expected one of 1 to 5 or 8, an integer dtype.")
    return _CODES[code]


class TokenFile:
    """A token file, ours or Megatron's, opened for reading: the index mapped, the ids read where asked for.

    Opening costs the same however long the file is. The positions used here are of tokens, from 0.

    Args:
        prefix: path without `.bin` and `.idx`.

    Attributes:
        header: sizes and dtype.
        lengths: int32 `[sequences]`, tokens of each.
        offsets: int64 `[sequences]`, byte offset of each in the `.bin`.
        boundaries: int64 `[documents + 1]`, the sequence at which each document begins.

    Raises:
        UserError: as `read_header`, or the index does not agree with the size of the `.bin`.
    """

    def __init__(self, prefix: Path) -> None:
        self.header = header = read_header(prefix)
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        count = header.sequences
        start = _HEADER.size
        self.lengths: NDArray[np.int32] = self._map("<i4", start, count)
        self.offsets: NDArray[np.int64] = self._map("<i8", start + 4 * count, count)
        self.boundaries: NDArray[np.int64] = self._map("<i8", start + 12 * count, header.documents + 1)
        self._check_ends()
        self._descriptor = os.open(self._bin, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the `.bin`."""
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the file, `[stop - start]`, of the file's dtype."""
        return read_tokens(self._descriptor, self._bin, self.header.dtype, start, stop)

    def document(self, number: int) -> Tokens:
        """The tokens of a document, `[tokens]`, of the file's dtype."""
        start, stop = self.span(number)
        return self.read(start, stop)

    def span(self, number: int) -> tuple[int, int]:
        """Where a document's tokens start and stop."""
        first, end = (int(value) for value in self.boundaries[number : number + 2])
        itemsize = self.header.dtype.itemsize
        start = int(self.offsets[first]) // itemsize if first < end else 0
        return start, start + int(self.lengths[first:end].sum())

    def verify(self) -> None:
        """Check the whole index: lengths, offsets and boundaries agree with each other and the `.bin`.

        Raises:
            UserError: naming the file and what does not hold.
        """
        self._require(bool((self.lengths >= 0).all()), "a length is negative")
        expected = 0
        for first in range(0, self.header.sequences, _VERIFY_BLOCK):
            lengths = self.lengths[first : first + _VERIFY_BLOCK].astype(np.int64)
            ends = expected + np.cumsum(lengths) * self.header.dtype.itemsize
            starts = ends - lengths * self.header.dtype.itemsize
            same = bool((self.offsets[first : first + _VERIFY_BLOCK] == starts).all())
            self._require(same, "the offsets are not the running sum of the lengths")
            expected = int(ends[-1])
        self._require(expected == self.header.bin_bytes, "the lengths do not add up to the size of the .bin")
        self._require(bool((np.diff(self.boundaries) >= 0).all()), "the documents are not in order")

    def _check_ends(self) -> None:
        edges_agree = self.boundaries[0] == 0 and self.boundaries[-1] == self.header.sequences
        self._require(bool(edges_agree), "its documents do not run from the first sequence to the last")
        expected = 0
        if self.header.sequences:
            expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.header.dtype.itemsize
        if self.header.bin_bytes != expected:
            raise UserError(
                f"{self._bin} does not fit its index: found {self.header.bin_bytes} bytes, "
                f"expected {expected}; build it again."
            )

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise UserError(f"{self._idx} is damaged: {otherwise}; build it again.")

    def _map(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self._idx, dtype=dtype, mode="r", offset=offset, shape=(count,))


def read_tokens(descriptor: int, path: Path, dtype: np.dtype[Any], start: int, stop: int) -> Tokens:
    """Read token positions `start` to `stop` of an open `.bin`.

    Positional reads share nothing, so any number of processes may use one descriptor.

    Args:
        descriptor: of the open file.
        path: named in errors.
        dtype: of the tokens.
        start: first position.
        stop: position after the last.

    Returns:
        `[stop - start]` of `dtype`.

    Raises:
        UserError: the file ends before the range does, or cannot be read.
    """
    tokens = np.empty(stop - start, dtype)
    view, done = tokens.view(np.uint8).data, 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], start * dtype.itemsize + done)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        if count == 0:
            found = start * dtype.itemsize + done
            raise UserError(
                f"{path} is cut short: it ends at byte {found}, "
                f"expected at least {stop * dtype.itemsize}; build it again."
            )
        done += count
    return tokens
