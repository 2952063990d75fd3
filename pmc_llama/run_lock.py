"""One run at a time writes to a run's directory."""

import fcntl
import os
from pathlib import Path

from data_tools.errors import UserError


def lock(output: Path) -> int:
    """Take a run's directory for this process, until it ends however that comes; rank 0 calls it.

    Where the filesystem has no locks (some Lustre mounts) nothing is locked.

    Returns:
        The open file that holds the lock.

    Raises:
        UserError: another process holds it, or the directory cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"output: {output} cannot be written to: {error.strerror}; name another.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"output: another run is writing to {output} now; wait for it, or choose another --output."
        ) from error
    except OSError:
        pass
    return descriptor
