"""One run at a time writes to a run's directory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UserError


@contextlib.contextmanager
def only_writer(output: Path, rank: int) -> Iterator[None]:
    """Hold a run's directory, made if missing, for rank 0; the hold ends with the process, however that ends.

    Where the filesystem has no locks (some Lustre mounts) nothing is held.

    Raises:
        UserError: another process holds it, or the directory cannot be written to.
    """
    if rank != 0:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written to: {error.strerror}; name another.") from error
    try:
        _hold(descriptor, output)
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"output: another run is writing to {output} now; wait for it, or choose another --output."
        ) from error
    except OSError:
        return
