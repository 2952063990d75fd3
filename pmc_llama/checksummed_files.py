"""Files of a checkpoint, checksummed while they are written and synced before they count."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

_WRITE_BACK = 8 << 20  # bytes

FileTable = dict[str, dict[str, Any]]
"""File name to `bytes` and `xxh3_128` (32 hex digits)."""


class ChecksummedFiles(FileSystem):
    """What `torch.distributed.checkpoint.FileSystemWriter` writes through.

    torch syncs `.metadata` before the last of it has left Python's buffer, so files are synced here. The
    checksum is of the bytes that were to be written: nothing is read again.

    Args:
        count: told the number of bytes of every write, for progress.

    Attributes:
        table: the files finished so far.
    """

    def __init__(self, count: Callable[[int], None]) -> None:
        self.table: FileTable = {}
        self._count = count

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file for writing; once closed it is on disk and in `table`.

        Raises:
            OSError: the disk refuses. It is the first error: torch, which closes its archive after a failed
                write, would end with "unexpected pos" instead.
        """
        stream = _ChecksummedStream(Path(path), self._count)
        try:
            with stream:
                yield cast(io.IOBase, stream)
        except Exception as error:
            raise stream.trouble or error from None
        self.table[Path(path).name] = stream.entry()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a finished file."""
        super().rename(path, new_path)
        self.table[Path(new_path).name] = self.table.pop(Path(path).name)


class _ChecksummedStream(io.BufferedWriter):
    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._digest = xxhash.xxh3_128()
        self._bytes = self._handed_over = 0
        self._count = count
        self.trouble: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.trouble = self.trouble or error
            raise
        self._digest.update(data)
        self._bytes += written
        self._count(written)
        self._write_back()
        return written

    def _write_back(self) -> None:
        """Have the kernel begin to write to disk, so that the sync at the end has little left to wait for.

        It also keeps the cache free of what nobody is going to read.
        """
        ready = self._bytes - self._handed_over
        if ready >= _WRITE_BACK:
            os.posix_fadvise(self.fileno(), self._handed_over, ready, os.POSIX_FADV_DONTNEED)
            self._handed_over = self._bytes

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "xxh3_128": self._digest.hexdigest()}
