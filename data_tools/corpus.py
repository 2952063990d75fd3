"""A corpus opened for reading: the stream of tokens of each split, wherever its documents lie."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.manifest import PART_FILES, FileInfo, Manifest, manifest_from_json
from data_tools.storage import Pieces, Storage, storage
from data_tools.tokenizer import Tokens

Positions = NDArray[np.int64]

_MANIFEST, _LOSS_STARTS = "corpus.json", "loss_starts.npy"


class Corpus:
    """A finished corpus. Safe in any number of processes at once; one object serves one thread.

    Attributes:
        storage: its files.
        manifest: its corpus.json.
        fingerprint: hex; changes with any token, document decision or the tokenizer.
        vocab_size: pieces of the tokenizer.
        eod: id of the token that ends every document.
        dtype: of the token ids, uint16 or int32.
        part_starts: int64 `[parts + 1]`, where each part begins in the concatenation of all parts.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.tokenizer.vocab_size
        self.eod = manifest.tokenizer.eos
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype).newbyteorder("<")
        self.part_starts = np.cumsum([0, *(part.tokens for part in manifest.parts)], dtype=np.int64)
        self._bins = [f"parts/{part.name}.bin" for part in manifest.parts]

    @classmethod
    def open(cls, location: str | os.PathLike[str]) -> Self:
        """Open a corpus in a directory or at an fsspec URL such as `s3://bucket/corpus`.

        Reads corpus.json, the size of each file and the tokenizer (less than a megabyte), nothing else.

        Raises:
            UserError: there is no corpus, a file is missing or not of the recorded size, or the tokenizer
                is not the one that made the ids.
        """
        files = storage(location)
        try:
            manifest = files.read(_MANIFEST)
        except UserError as error:
            raise UserError(
                f"{files.location} is not a corpus, `pmc-data build` makes one: {error}"
            ) from error
        corpus = cls(files, manifest_from_json(manifest, f"{files.location}/{_MANIFEST}"))
        corpus._check_sizes()
        corpus._check_tokenizer()
        return corpus

    @property
    def location(self) -> str:
        """Where it is, directory or URL, for people."""
        return self.storage.location

    @property
    def directory(self) -> Path:
        """Where it is on this machine.

        Raises:
            UserError: it is at a URL.
        """
        return self.storage.directory

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer inside the corpus; of one at a URL, a copy that goes with this object."""
        return self.storage.path(self.manifest.tokenizer.file)

    def split(self, name: str) -> "Split":
        """The counted documents of `train` or `heldout`.

        Raises:
            UserError: no such split, or its file is damaged.
        """
        if name not in self.manifest.splits:
            known = " or ".join(sorted(self.manifest.splits))
            raise UserError(f"The corpus {self.location} has no split {name!r}; ask for {known}.")
        return Split(self, name)

    def part_prefix(self, number: int) -> Path:
        """Path of a part without its suffixes.

        Raises:
            UserError: the corpus is at a URL.
        """
        return self.directory / "parts" / self.manifest.parts[number].name

    def read(self, starts: Positions, lengths: Positions) -> Tokens:
        """Read pieces of the concatenation of all parts, each inside one part, in one go.

        Args:
            starts: int64 `[pieces]`, token positions.
            lengths: int64 `[pieces]`, tokens, each at least 1.

        Returns:
            `[sum of lengths]` of `dtype`: the pieces in their order.

        Raises:
            UserError: a file cannot be read or is cut short.
        """
        size, ends = self.dtype.itemsize, np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, self.dtype)
        order = np.argsort(starts, kind="stable")  # a part after another, and front to back in each
        starts, ends, lengths = starts[order], ends[order], lengths[order]
        parts = np.searchsorted(self.part_starts, starts, side="right") - 1
        pieces = Pieces(
            [self._bins[part] for part in parts.tolist()],
            ((starts - self.part_starts[parts]) * size).tolist(),
            ((ends - lengths) * size).tolist(),
            (ends * size).tolist(),
        )
        self.storage.fill(tokens.view(np.uint8).data, pieces)
        return tokens

    def close(self) -> None:
        """Close the open files; reading opens them again."""
        self.storage.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.storage, self.manifest)

    def _files(self) -> Iterator[tuple[str, FileInfo]]:
        """Every file of the corpus that corpus.json describes."""
        here = Path()
        for part in self.manifest.parts:
            yield from ((f"parts/{part.name}.{suffix}", part.files[suffix]) for suffix in PART_FILES)
        for name, split in self.manifest.splits.items():
            yield str(self.manifest.path(here, f"{name}.npy")), split.file
        for name, file in self.manifest.files.items():
            yield str(self.manifest.path(here, name)), file

    def _check_sizes(self) -> None:
        for part in self.manifest.parts:
            if part.files["bin"].bytes != part.tokens * self.dtype.itemsize:
                raise UserError(
                    f"{self.location}/{_MANIFEST} is damaged: {part.name} has {part.tokens} tokens of "
                    f"{self.dtype.name} in {part.files['bin'].bytes} bytes; build the corpus again."
                )
        expected = dict(self._files())
        found = self.storage.sizes(expected)
        for name, file in expected.items():
            if name not in found:
                raise UserError(f"{self.location}/{name} of the corpus is missing; build the corpus again.")
            if found[name] != file.bytes:
                raise UserError(
                    f"{self.location}/{name} is damaged: found {found[name]} bytes, corpus.json says "
                    f"{file.bytes}; build the corpus again."
                )

    def _check_tokenizer(self) -> None:
        tokenizer = self.manifest.tokenizer
        if hashlib.sha256(self.storage.read(tokenizer.file)).hexdigest() != tokenizer.sha256:
            raise UserError(
                f"{self.location}/{tokenizer.file} is damaged: it is not the one that made the ids."
            )


class Split:
    """The counted documents of a split, one after another: its stream.

    Attributes:
        name: `train` or `heldout`.
        file: name of its file in the corpus, which `splits.split_file` describes.
        documents: how many.
        tokens: in all of them, EODs included.
        starts: int64 `[documents + 1]`, memory-mapped, or in memory when the corpus is at a URL: where each
            document begins in the stream; the last is `tokens`.
    """

    def __init__(self, corpus: Corpus, name: str, only: Positions | None = None) -> None:
        info = corpus.manifest.splits[name]
        self.corpus = corpus
        self.name = name
        self.documents = info.documents
        self.tokens = info.tokens
        self.file = str(corpus.manifest.path(Path(), f"{name}.npy"))
        self.starts, self._runs = self._load()
        self._only = only
        if only is not None:
            self._keep(only)

    def only(self, documents: Positions) -> "Split":
        """The stream of some of the documents; its `starts` and 8 bytes a document more are in memory.

        Args:
            documents: their numbers in the split's file, int64, ascending.
        """
        return Split(self.corpus, self.name, documents)

    @property
    def positions(self) -> Positions:
        """Where each document begins in the concatenation of all parts, closed by the length of that.

        Computed when asked for: int64 `[documents + 1]`.
        """
        begins, places = self._runs[:, 0], self._runs[:, 1]
        run = np.searchsorted(begins[:-1], self.starts[:-1], side="right") - 1
        return np.append(self.starts[:-1] + (places - begins)[run], places[-1])

    @property
    def has_prompts(self) -> bool:
        """Documents begin with a prompt, and the loss is on what follows it."""
        return _LOSS_STARTS in self.corpus.manifest.files

    def loss_starts(self, begins: Positions) -> Positions:
        """Where the loss begins in documents that are trained on whole.

        Args:
            begins: where each begins in the stream, int64 `[n]`.

        Returns:
            int64 `[n]`: the place in the stream of the first token that is a target with loss: the one after
            the prompt, or after the document's first token when there are no prompts.

        Raises:
            UserError: the file that says so is damaged.
        """
        if not self.has_prompts:
            return begins + 1
        run = np.searchsorted(self._runs[:-1, 0], begins, side="right") - 1
        places = begins + (self._runs[:, 1] - self._runs[:, 0])[run]
        # In ascending order, one in each document and behind its first token: the next one is its own.
        found = self._all_loss_starts[np.searchsorted(self._all_loss_starts, places, side="right")]
        return begins + (found - places)

    @property
    def path(self) -> Path:
        """Of its file.

        Raises:
            UserError: the corpus is at a URL.
        """
        return self.corpus.directory / self.file

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[Tokens]:
        """Read ranges of the stream, across documents and parts, with one read-ahead for all of them.

        Args:
            ranges: (start, stop) positions in the stream, 0 <= start <= stop <= `tokens`.

        Returns:
            An array `[stop - start]` of the corpus' dtype for each range: views of one buffer.

        Raises:
            IndexError: a range reaches outside the stream.
            UserError: a file cannot be read or is cut short.
        """
        try:
            bounds = np.array(ranges, dtype=np.int64).reshape(-1, 2)
        except OverflowError as error:
            raise IndexError(f"a range reaches outside a stream of {self.tokens} tokens") from error
        starts, stops = bounds[:, 0], bounds[:, 1]
        outside = (starts < 0) | (stops < starts) | (stops > self.tokens)
        if outside.any():
            start, stop = bounds[outside][0].tolist()
            raise IndexError(f"range {start}:{stop} outside a stream of {self.tokens} tokens")
        tokens = self.corpus.read(*self._pieces(starts, stops))
        ends = np.cumsum(stops - starts)
        places = zip((ends - (stops - starts)).tolist(), ends.tolist(), strict=True)
        return [tokens[begin:end] for begin, end in places]

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would be pickled as a copy of the whole file.
        return Split, (self.corpus, self.name, self._only)

    @cached_property
    def _all_loss_starts(self) -> Positions:
        """Of the documents of all parts, in the concatenation of those: int64 `[documents]`."""
        where = f"{self.corpus.location}/{_LOSS_STARTS}"
        try:
            found: Positions = self.corpus.storage.array(_LOSS_STARTS)
        except UserError:
            raise
        except Exception as error:  # a garbled header raises almost anything, it is parsed as Python
            raise UserError(f"{where} cannot be read ({error}); make the prompts again.") from error
        documents = sum(part.documents for part in self.corpus.manifest.parts)
        if found.dtype != np.int64 or found.shape != (documents,):
            raise UserError(
                f"{where} does not fit corpus.json: found {found.dtype} {list(found.shape)}, expected int64 "
                f"{[documents]}; make the prompts again."
            )
        return found

    def _keep(self, only: Positions) -> None:
        """Narrow the stream that `_load` found; a run ends where a document or a part is left."""
        places, lengths = self.positions[:-1][only], np.diff(self.starts)[only]
        self.starts = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
        self.documents, self.tokens = len(only), int(self.starts[-1])
        parts = np.searchsorted(self.corpus.part_starts, places, side="right")
        begins = np.ones(len(only), np.bool_)
        begins[1:] = (places[1:] != (places + lengths)[:-1]) | (np.diff(parts) > 0)
        runs = np.stack([self.starts[:-1][begins], places[begins]], axis=1)
        self._runs = np.concatenate([runs, [[self.tokens, self._runs[-1, 1]]]])

    def _pieces(self, starts: Positions, stops: Positions) -> tuple[Positions, Positions]:
        """The ranges as starts and lengths in the concatenation of all parts, in their order."""
        begins = self._runs[:, 0]
        first = np.searchsorted(begins[:-1], starts, side="right") - 1
        counts = np.searchsorted(begins[:-1], stops, side="left") - first  # runs that each range touches
        counts[starts == stops] = 0
        owner = np.repeat(np.arange(len(counts)), counts)
        run = (first - (np.cumsum(counts) - counts))[owner] + np.arange(len(owner))
        rows = self._runs[run]
        heads = np.maximum(rows[:, 0], starts[owner])
        tails = np.minimum(begins[run + 1], stops[owner])
        return rows[:, 1] + (heads - rows[:, 0]), tails - heads

    def _load(self) -> tuple[Positions, Positions]:
        """The two arrays of the split's file."""
        where = f"{self.corpus.location}/{self.file}"
        try:
            content: Positions = self.corpus.storage.array(self.file)
        except UserError:
            raise
        except Exception as error:  # a garbled header raises almost anything, it is parsed as Python
            raise UserError(f"{where} cannot be read ({error}); build the corpus again.") from error
        rows = content.size - (self.documents + 1)
        if content.dtype != np.int64 or content.ndim != 1 or rows < 2 or rows % 2:
            raise UserError(
                f"{where} does not fit corpus.json: found {content.dtype} {list(content.shape)}, expected "
                f"int64, {self.documents + 1} numbers and pairs after them; build the corpus again."
            )
        starts, runs = content[: self.documents + 1], content[self.documents + 1 :].reshape(-1, 2)
        found = [int(starts[-1]), *runs[-1].tolist()]
        expected = [self.tokens, self.tokens, int(self.corpus.part_starts[-1])]
        if found != expected:
            raise UserError(
                f"{where} does not fit corpus.json: found lengths of {found} tokens, expected {expected}; "
                "build the corpus again."
            )
        lengths, places = np.diff(runs[:, 0]), runs[:, 1]
        if runs[0, 0] != 0 or places[0] < 0 or (lengths <= 0).any() or (np.diff(places) < lengths).any():
            raise UserError(f"{where} is damaged: its runs of documents overlap; build the corpus again.")
        return starts, runs
