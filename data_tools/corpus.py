"""A corpus opened for reading: the stream of tokens of each split, wherever its documents lie."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.manifest import PART_FILES, FileInfo, Manifest, PartInfo, read_manifest
from data_tools.token_files import announce_tokens, bin_path, read_header, read_tokens
from data_tools.tokenizer import Tokens

_OPEN_FILES = 256


class Corpus:
    """A finished corpus. Safe in any number of processes at once; one object serves one thread.

    Attributes:
        directory: where it is.
        manifest: its corpus.json.
        fingerprint: hex; changes with any token, document decision or the tokenizer.
        vocab_size: pieces of the tokenizer.
        eod: id of the token that ends every document.
        dtype: of the token ids, uint16 or int32.
        tokenizer_path: the SentencePiece model inside the corpus.
        part_starts: int64 `[parts + 1]`, where each part begins in the concatenation of all parts.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.tokenizer.vocab_size
        self.eod = manifest.tokenizer.eos
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype)
        self.tokenizer_path = directory / "tokenizer.model"
        self.part_starts = np.cumsum([0, *(part.tokens for part in manifest.parts)], dtype=np.int64)
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Self:
        """Open a corpus, reading headers, sizes and the tokenizer (less than a megabyte) only.

        Raises:
            UserError: the directory holds no corpus, a file is missing or not of the recorded size, or the
                tokenizer is not the one that made the ids.
        """
        path = Path(directory)
        corpus = cls(path, read_manifest(path))
        corpus._check_sizes()
        corpus._check_tokenizer()
        return corpus

    def split(self, name: str) -> "Split":
        """The counted documents of `train` or `heldout`.

        Raises:
            UserError: no such split, or its file is damaged.
        """
        if name not in self.manifest.splits:
            known = " or ".join(sorted(self.manifest.splits))
            raise UserError(f"The corpus {self.directory} has no split {name!r}; ask for {known}.")
        return Split(self, name)

    def part_prefix(self, number: int) -> Path:
        """Path of a part without its suffixes."""
        return self.directory / "parts" / self.manifest.parts[number].name

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[Tokens]:
        """Read ranges of the concatenation of all parts, each inside one part.

        All of them are announced to the kernel before the first is read, in whichever part they lie.

        Args:
            ranges: (start, stop) token positions.

        Returns:
            An array `[stop - start]` of `dtype` for each range.

        Raises:
            UserError: a file cannot be read or is cut short.
        """
        starts = np.array([start for start, _ in ranges], dtype=np.int64)
        numbers = np.searchsorted(self.part_starts, starts, side="right") - 1
        bases = self.part_starts[numbers]
        order = np.argsort(numbers, kind="stable").tolist()  # each part is opened once
        places = [
            (int(numbers[i]), ranges[i][0] - int(bases[i]), ranges[i][1] - int(bases[i])) for i in order
        ]
        for number, start, stop in places:
            announce_tokens(self._descriptor(number), self.dtype, start, stop)
        pieces = {
            i: read_tokens(self._descriptor(place[0]), self._bin(place[0]), self.dtype, *place[1:])
            for i, place in zip(order, places, strict=True)
        }
        return [pieces[i] for i in range(len(ranges))]

    def close(self) -> None:
        """Close the open parts; reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # Open descriptors mean nothing in another process.
        return Corpus, (self.directory, self.manifest)

    def _bin(self, number: int) -> Path:
        return bin_path(self.part_prefix(number))

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            if len(self._descriptors) == _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            path = self._bin(number)
            try:
                self._descriptors[number] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        self._descriptors.move_to_end(number)
        return self._descriptors[number]

    def _check_sizes(self) -> None:
        for part in self.manifest.parts:
            for suffix in PART_FILES:
                check_size(self.directory / "parts" / f"{part.name}.{suffix}", part.files[suffix])
            self._check_header(part)
        for name, split in self.manifest.splits.items():
            check_size(self.directory / f"{name}.npy", split.file)

    def _check_tokenizer(self) -> None:
        try:
            found = hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{self.tokenizer_path} cannot be read: {error.strerror}.") from error
        if found != self.manifest.tokenizer.sha256:
            raise UserError(f"{self.tokenizer_path} is damaged: it is not the model that made the ids.")

    def _check_header(self, part: PartInfo) -> None:
        header = read_header(self.directory / "parts" / part.name)
        found = (header.dtype, header.documents, header.tokens)
        expected = (self.dtype, part.documents, part.tokens)
        if found != expected:
            raise UserError(
                f"{self.directory}/parts/{part.name}.idx does not fit corpus.json: found dtype, documents "
                f"and tokens {found}, expected {expected}; build the corpus again."
            )


class Split:
    """The counted documents of a split, one after another: its stream.

    Attributes:
        name: `train` or `heldout`.
        documents: how many.
        tokens: in all of them, EODs included.
        starts: int64 `[documents + 1]`, memory-mapped: where each document begins in the stream; the last
            is `tokens`.
        positions: int64 `[documents + 1]`, memory-mapped: where each begins in the concatenation of all
            parts; the last is the length of that.
    """

    def __init__(self, corpus: Corpus, name: str) -> None:
        info = corpus.manifest.splits[name]
        self.corpus = corpus
        self.name = name
        self.documents = info.documents
        self.tokens = info.tokens
        table = _load(corpus.directory / f"{name}.npy", info.documents, info.tokens)
        self.starts: NDArray[np.int64] = table[:, 0]
        self.positions: NDArray[np.int64] = table[:, 1]

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[Tokens]:
        """Read ranges of the stream, across documents and parts, with one read-ahead for all of them.

        Args:
            ranges: (start, stop) positions in the stream, 0 <= start <= stop <= `tokens`.

        Returns:
            An array `[stop - start]` of the corpus' dtype for each range.

        Raises:
            IndexError: a range reaches outside the stream.
            UserError: a file cannot be read or is cut short.
        """
        runs = [self._runs(start, stop) for start, stop in ranges]
        pieces = iter(self.corpus.read([run for group in runs for run in group]))
        return [self._join([next(pieces) for _ in group]) for group in runs]

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would be pickled as a copy of the whole file.
        return Split, (self.corpus, self.name)

    def _runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The range as runs in the concatenation of all parts, neighbours merged within each part."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"range {start}:{stop} outside a stream of {self.tokens} tokens")
        if start == stop:
            return []
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        end = int(np.searchsorted(self.starts, stop, side="left"))
        begins: NDArray[np.int64] = np.maximum(self.starts[first:end], start)
        lengths: NDArray[np.int64] = np.diff(np.append(begins, stop))
        places = self.positions[first:end] + (begins - self.starts[first:end])
        ends = places + lengths
        heads = self._breaks(places, ends)
        tails = np.append(heads[1:] - 1, len(ends) - 1)
        return list(zip(places[heads].tolist(), ends[tails].tolist(), strict=True))

    def _breaks(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.intp]:
        """Which pieces start a new run: those that do not continue the one before, in the same part."""
        parts = np.searchsorted(self.corpus.part_starts, begins, side="right")
        new = (begins[1:] != ends[:-1]) | (parts[1:] != parts[:-1])
        return np.flatnonzero(np.append(True, new))

    def _join(self, pieces: list[Tokens]) -> Tokens:
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.corpus.dtype)


def check_size(path: Path, expected: FileInfo) -> None:
    """Require a file to have its recorded size.

    Raises:
        UserError: it is missing or has another size.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} of the corpus cannot be read: {error.strerror}.") from error
    if found != expected.bytes:
        raise UserError(
            f"{path} is damaged: found {found} bytes, corpus.json says {expected.bytes}; "
            "build the corpus again."
        )


def _load(path: Path, documents: int, tokens: int) -> NDArray[np.int64]:
    try:
        table: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a garbled header raises almost anything, it is parsed as Python
        raise UserError(f"{path} cannot be read ({error}); build the corpus again.") from error
    if table.dtype != np.int64 or table.shape != (documents + 1, 2):
        raise UserError(f"{path} does not fit corpus.json: expected int64 [{documents + 1}, 2]; build again.")
    if table[-1, 0] != tokens:
        raise UserError(f"{path} does not fit corpus.json: found {table[-1, 0]} tokens, expected {tokens}.")
    return table
