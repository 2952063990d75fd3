"""Room on the disk that papers are fetched to."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UserError


def gigabytes(size: float) -> str:
    """Bytes in words: MB below a GB, GB from there on."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def free(directory: Path) -> int:
    """Bytes free on the disk of an existing directory."""
    return shutil.disk_usage(directory).free


def require(directory: Path, size: int) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        UserError: fewer than `size` bytes are free.
    """
    left = free(directory)
    if left < size:
        raise UserError(
            f"{gigabytes(size)} are still to come to {directory}, but its disk has {gigabytes(left)} free; "
            "free some room or choose another --output."
        )


@contextmanager
def full_disk_told(directory: Path) -> Iterator[None]:
    """Turn a full disk, wherever it is met, into one sentence.

    Raises:
        UserError: there is no room left, or a quota is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The disk of {directory} is full; what is finished is kept. "
            "Free some room and run the same command again to go on."
        ) from error
