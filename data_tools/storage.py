"""Where the files of a finished corpus lie: in a directory, or at a URL that fsspec knows."""

import io
import os
import tempfile
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.streams import filesystem, is_url

_OPEN_FILES = 512
"""Half of the 1,024 that most systems allow a process."""


class Pieces(NamedTuple):
    """What to read, to lie one after another in a buffer; four lists of equal length.

    `names` are of files, `offsets` where to begin in them, `begins` and `ends` where in the buffer the bytes
    go. Files that come in groups are opened once for each group.
    """

    names: list[str]
    offsets: list[int]
    begins: list[int]
    ends: list[int]


class Storage(Protocol):
    """The files of a corpus by name, such as `parts/part-00000.bin`. Goes to other processes by pickle."""

    @property
    def location(self) -> str:
        """The directory or URL, for people."""
        ...

    @property
    def directory(self) -> Path:
        """The directory.

        Raises:
            UserError: the corpus is at a URL.
        """
        ...

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of the files that are there."""
        ...

    def read(self, name: str) -> bytes:
        """All of a small file.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def path(self, name: str) -> Path:
        """Where a small file can be opened on this machine.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def array(self, name: str) -> NDArray[Any]:
        """The array in a `.npy` file.

        Raises:
            Exception: almost any, when the file is damaged; its header is parsed as Python.
        """
        ...

    def fill(self, buffer: memoryview, pieces: Pieces) -> None:
        """Read the pieces, as many at once as the storage can.

        Args:
            buffer: of bytes.
            pieces: where they come from and go to.

        Raises:
            UserError: a file cannot be read or is cut short.
        """
        ...

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        ...


def storage(location: str | os.PathLike[str]) -> Storage:
    """The storage of a corpus in a directory or at a URL, such as `s3://bucket/corpus`.

    A `file://` URL is the directory.

    Raises:
        UserError: the protocol of the URL is unknown, its package is not installed, or it holds a password.
    """
    text = os.fspath(location)
    if text.startswith("file://"):
        text = str(filesystem(text)[1])
    return UrlStorage(text) if is_url(text) else DirectoryStorage(Path(text))


class DirectoryStorage:
    """Files in a directory, read by positional reads that the kernel was told of before the first.

    With all of a batch announced, the disk or the file server has it in hand at once; a memory map would
    fault in one place after another, and at each the kernel's whole read-ahead, hundreds of times what a
    sample has. Positional reads share nothing, so a fork may go on with the descriptors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptors: dict[str, int] = {}
        self._reading = threading.Lock()  # one thread closes no file that another is about to read

    @property
    def location(self) -> str:
        """See `Storage`."""
        return str(self.directory)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """See `Storage`."""
        found, base = {}, os.path.join(self.directory, "")
        for name in names:
            try:
                found[name] = os.stat(base + name).st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                self._refuse(name, error)
        return found

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        try:
            return self.path(name).read_bytes()
        except OSError as error:
            self._refuse(name, error)

    def path(self, name: str) -> Path:
        """See `Storage`."""
        return self.directory / name

    def array(self, name: str) -> NDArray[Any]:
        """See `Storage`; memory-mapped, so opening reads nothing and processes share the memory."""
        array: NDArray[Any] = np.load(self.path(name), mmap_mode="r", allow_pickle=False)
        return np.asarray(array)  # indexing a np.memmap costs microseconds more

    def fill(self, buffer: memoryview, pieces: Pieces) -> None:
        """See `Storage`."""
        with self._reading:
            self._fill(buffer, pieces)

    def _fill(self, buffer: memoryview, pieces: Pieces) -> None:
        advise, read, open_file = os.posix_fadvise, os.preadv, self._descriptor
        for name, offset, begin, end in zip(*pieces, strict=True):
            advise(open_file(name), offset, end - begin, os.POSIX_FADV_WILLNEED)
        for name, offset, begin, end in zip(*pieces, strict=True):
            try:
                count = read(open_file(name), [buffer[begin:end]], offset)
                if count < end - begin:
                    self._read_on(name, buffer[begin:end], offset, count)
            except OSError as error:
                self._refuse(name, error)

    def close(self) -> None:
        """See `Storage`."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # Open descriptors mean nothing in another process.
        return DirectoryStorage, (self.directory,)

    def _read_on(self, name: str, buffer: memoryview, offset: int, done: int) -> None:
        """Read what a read that was interrupted left out."""
        while done < len(buffer):
            count = os.preadv(self._descriptor(name), [buffer[done:]], offset + done)
            if count == 0:
                _refuse_cut(str(self.path(name)), offset + done, offset + len(buffer))
            done += count

    def _descriptor(self, name: str) -> int:
        found = self._descriptors.get(name)
        if found is not None:
            return found
        if len(self._descriptors) >= _OPEN_FILES:
            os.close(self._descriptors.pop(next(iter(self._descriptors))))
        try:
            opened = os.open(self.path(name), os.O_RDONLY)
        except OSError as error:
            self._refuse(name, error)
        self._descriptors[name] = opened
        return opened

    def _refuse(self, name: str, error: OSError) -> NoReturn:
        raise UserError(f"{self.path(name)} cannot be read: {error.strerror}.") from error


class UrlStorage:
    """Files at an fsspec URL: token files by ranges, a batch of them in one request where the server can.

    The files of the splits, 8 bytes a document and 16 a run of documents, are read into memory once: a search
    in them by ranges would take several round trips for each batch.
    """

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self._root = filesystem(self.location)[1]

    @property
    def directory(self) -> Path:
        """See `Storage`."""
        raise UserError(f"The corpus {self.location} is not on this machine; copy it here for this command.")

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """See `Storage`; from one listing."""
        try:
            files = self._files
            files.invalidate_cache(self._root)  # what was listed before may have changed
            listed = files.find(self._root, detail=True)
        except Exception as error:  # each protocol has exceptions of its own
            self._refuse("", error)
        return {
            name: int(listed[path]["size"])
            for name, path in ((name, self._inside(name)) for name in names)
            if path in listed
        }

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        try:
            return bytes(self._files.cat_file(self._inside(name)))
        except Exception as error:
            self._refuse(name, error)

    def path(self, name: str) -> Path:
        """See `Storage`; a copy that goes with this object."""
        copy = Path(self._copies.name) / name
        if not copy.exists():
            copy.write_bytes(self.read(name))
        return copy

    def array(self, name: str) -> NDArray[Any]:
        """See `Storage`; read into memory."""
        array: NDArray[Any] = np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        return array

    def fill(self, buffer: memoryview, pieces: Pieces) -> None:
        """See `Storage`."""
        names, offsets, begins, ends = pieces
        stops = [offset + end - begin for offset, begin, end in zip(offsets, begins, ends, strict=True)]
        try:
            found = self._files.cat_ranges([self._inside(name) for name in names], offsets, stops)
        except Exception as error:
            self._refuse("", error)
        for name, stop, begin, end, content in zip(names, stops, begins, ends, found, strict=True):
            if isinstance(content, Exception):
                self._refuse(name, content)
            if len(content) < end - begin:
                _refuse_cut(f"{self.location}/{name}", stop - (end - begin) + len(content), stop)
            buffer[begin:end] = content

    def close(self) -> None:
        """See `Storage`; nothing is kept open."""

    def __reduce__(self) -> tuple[Any, ...]:
        return UrlStorage, (self.location,)

    @property
    def _files(self) -> Any:
        # Asked for anew each time: fsspec keeps one for each process, and one from before a fork fails.
        return filesystem(self.location)[0]

    @cached_property
    def _copies(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="pmc-data-")

    def _inside(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _refuse(self, name: str, error: Exception) -> NoReturn:
        raise UserError(
            f"{self.location}/{name} cannot be read ({type(error).__name__}: {error})."
        ) from error


def _refuse_cut(file: str, found: int, expected: int) -> NoReturn:
    raise UserError(
        f"{file} is cut short: it ends at byte {found}, expected at least {expected}; build it again."
    )
