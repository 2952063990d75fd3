"""Files that appear whole or not at all, and their checksums."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

_BLOCK = 1 << 20
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
"""What `flock` says on a file system that keeps no locks; ENOSYS is Lustre's, mounted without them."""


def aside(path: Path) -> Path:
    """Where a file is written before it is published: hidden, beside it, the same name every time.

    The name is fixed so that a rerun after a crash overwrites what the crash left behind.
    """
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Give the finished file at `aside(path)` its name, durably: sync it, rename it, sync the directory."""
    sync(aside(path))
    os.replace(aside(path), path)
    sync(path.parent)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success the file gets its name, on any exception it is removed."""
    try:
        yield aside(path)
        publish(path)
    finally:
        aside(path).unlink(missing_ok=True)


def write_published(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with published(path) as partial:
        partial.write_bytes(content)


def checksum(path: Path, count: Callable[[int], None] = lambda _: None) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits: against damage, not against forgery.

    Args:
        path: the file.
        count: told the bytes of each block read, for progress.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()


@contextmanager
def locked(directory: Path, how: int, required: bool = True) -> Iterator[None]:
    """Hold a lock on a directory; it goes with the process, however that ends.

    Args:
        directory: exists.
        how: `fcntl.LOCK_SH` or `LOCK_EX`, with `LOCK_NB` to raise BlockingIOError instead of waiting.
        required: otherwise it goes without, where the file system keeps no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            if required or error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
