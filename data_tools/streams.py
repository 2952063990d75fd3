"""Input files opened for one pass: local or at any fsspec URL, decompressed, counted and checksummed.

gzip and zstd are told by the suffix. What is damaged, cut short or followed by something else is an error, at
the latest when the end is reached; never a silent end.
"""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import xxhash
import zstandard
from isal import igzip, isal_zlib

from data_tools.errors import UserError

COMPRESSIONS = (".gz", ".zst")
"""Suffixes of the compressions that are known."""

_ISAL_ERROR = cast(type[Exception], isal_zlib.IsalError)  # its stub gives it another type
_BUFFER = 1 << 20
_PIECE = 1 << 18
# A block of zstd grows by 32,768 at most, so this much of a hostile file becomes 512 MB, not more.
_ZSTD_READ = 1 << 14
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes
_URL_BLOCK = 1 << 23
_WITH_PASSWORD = re.compile("//.*@", re.DOTALL)


class DamagedFile(UserError):
    """A compressed file that is damaged, cut short, empty or followed by something else."""


def is_url(path: str) -> bool:
    """Whether a path is one for fsspec, such as `s3://bucket/key`."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        UserError: the protocol is unknown, its package is not installed or lacks a setting, the URL holds a
            password, or it is a chain such as `zip://a.jsonl::b.zip`.
    """
    refuse_password(url)
    if "::" in url:
        raise UserError(f"The input {url} is a chain of URLs, which is not read; unpack the archive first.")
    try:
        # Only those who read from URLs need fsspec, and it takes 0.1 s to import.
        import fsspec

        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"The input {url} cannot be read: {error}.") from error


def refuse_password(url: str) -> None:
    """Refuse what would be shown in messages and written into records.

    Raises:
        UserError: the URL holds a password, or a web page's user; the sentence does not.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # it is no URL, as whoever opens it will say
        return
    if parts.password is not None or (parts.username and parts.scheme in ("http", "https")):
        raise UserError(
            f"The URL {_WITH_PASSWORD.sub('//', url)} was given with a password; give it without, and the "
            "password where the client of its protocol looks for one (~/.netrc, fsspec's configuration)."
        )


class Readable(Protocol):
    """What a stream reads from: an open file, local or of fsspec."""

    def readinto(self, buffer: Any, /) -> int | None:
        """Fill a buffer from the file; how many bytes were read, 0 at its end."""
        ...


class InputStream(io.BufferedReader):
    """A file's bytes, decompressed, read from front to back.

    Attributes:
        path: of the file, or its URL.
    """

    def __init__(self, stored: Readable, path: str, named: str) -> None:
        self.path = path
        self._stored = _Stored(stored)
        super().__init__(_decompressed(self._stored, named), _BUFFER)

    @property
    def position(self) -> int:
        """How many bytes of the file as stored have been read."""
        return self._stored.bytes

    def checksum(self) -> str:
        """XXH3-128 of the file as stored, as 32 hex digits; what is not read yet is read without decoding."""
        while self._stored.read(_BUFFER):
            pass
        return self._stored.digest.hexdigest()


@contextmanager
def opened(path: str, name: str = "") -> Iterator[InputStream]:
    """Open a file, local or at a URL, for one pass.

    Args:
        path: of the file, or its URL.
        name: for what is said of the file, with the same suffixes; the path when not given.

    Raises:
        DamagedFile: while it is read, or at its end.
        UserError: the URL cannot be read.
        OSError: the file cannot be read.
    """
    with _open(path) as stored:
        yield InputStream(stored, path, name or path)


def stored_checksum(path: str) -> str:
    """XXH3-128 of a file as stored, as 32 hex digits, without decompressing it."""
    with _open(path) as file:
        stored = _Stored(file)
        while stored.read(_BUFFER):
            pass
    return stored.digest.hexdigest()


def compression(name: str) -> str:
    """The suffix in `name` of a known compression, lower case, or ""."""
    lower = name.lower()
    return next((suffix for suffix in (*COMPRESSIONS, ".tgz") if lower.endswith(suffix)), "")


def _open(path: str) -> io.RawIOBase:
    if not is_url(path):
        return open(path, "rb", buffering=0)
    files, inside = filesystem(path)
    return _Remote(files, inside)


class _Raw(io.RawIOBase):
    """What is read from front to back in large pieces."""

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        """All that remains; without this it would be read 8 KiB at a time."""
        pieces = []
        while piece := self.read(_PIECE):
            pieces.append(piece)
        return b"".join(pieces)


class _Remote(_Raw):
    """A file of an fsspec file system; whatever exception that has of its own becomes an OSError."""

    def __init__(self, files: Any, path: str) -> None:
        with _as_os_error():
            self._file = files.open(path, "rb", block_size=_URL_BLOCK, cache_type="readahead")

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            return cast(int, self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each library of a protocol has others
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Stored(_Raw):
    """Counts and checksums the bytes of a file as they are read."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.bytes = 0
        self.digest = xxhash.xxh3_128()

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:size])
        self.bytes += size
        return size


def _decompressed(stored: _Stored, name: str) -> io.RawIOBase:
    match compression(name):
        case ".gz" | ".tgz":
            return _Gunzipped(stored, name)
        case ".zst":
            return _Unzstd(stored, name)
    return stored


class _Gunzipped(_Raw):
    """The content of a gzip file of one or more members."""

    def __init__(self, stored: _Stored, name: str) -> None:
        self._name = name
        self._stored = stored
        self._file = cast(Readable, igzip.open(stored, "rb"))

    def readinto(self, buffer: Any) -> int:
        try:
            size = self._file.readinto(buffer) or 0
        except (gzip.BadGzipFile, EOFError, zlib.error, _ISAL_ERROR) as error:
            raise _damaged(self._name, "gzip", str(error)) from error
        if not self._stored.bytes:
            raise _damaged(self._name, "gzip", "it is empty")
        return size


class _Unzstd(_Raw):
    """The content of a zstd file of one or more frames.

    The frames are told apart here: the library's own reader takes a file
    that is cut within a frame for whole.
    """

    def __init__(self, stored: _Stored, name: str) -> None:
        self._name = name
        self._stored = stored
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._within = False
        self._ready = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._stored.read(_ZSTD_READ)
            if not block:
                if self._within or not self._stored.bytes:
                    raise _damaged(self._name, "zstd", "it is cut short" if self._within else "it is empty")
                return 0
            self._ready = memoryview(self._decompress(block))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decompress(self, block: bytes) -> bytes:
        pieces = []
        try:
            while block:
                pieces.append(self._frame.decompress(block))
                self._within = not self._frame.eof
                block = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = self._decompressor.decompressobj()
        except zstandard.ZstdError as error:
            raise _damaged(self._name, "zstd", str(error)) from error
        return b"".join(pieces)


def _damaged(name: str, kind: str, error: str) -> DamagedFile:
    return DamagedFile(f"{name} is not a readable {kind} file ({error}); download it again.")
