"""What a directory was begun with: the same command goes on, another one is refused."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UserError
from data_tools.files import locked, write_published

_NAME = ".fetch.json"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make the directory, and be the only fetch that writes to it.

    Raises:
        UserError: it cannot be made, or another fetch is at work there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output {directory} cannot be made: {error.strerror}.") from error
    try:
        with locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield
    except BlockingIOError as error:
        raise UserError(f"Another fetch is writing to {directory}; wait for it or stop it.") from error


def recorded(directory: Path) -> dict[str, str]:
    """What the directory was begun with; empty for a new one.

    Raises:
        UserError: the record is damaged.
    """
    path = directory / _NAME
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}, which says what {directory} holds, is damaged; choose another --output."
        ) from error
    return {str(key): str(value) for key, value in record.items()}


def require_same(directory: Path, wanted: dict[str, str]) -> None:
    """Record what a new directory is begun with, or check that an old one was begun with the same.

    Raises:
        UserError: it was begun with something else.
    """
    record = recorded(directory)
    for key, value in wanted.items():
        if record and record.get(key) != value:
            raise UserError(
                f"{directory} was begun with {key} {record.get(key)}, not {value}; "
                "give the same again to go on, or choose another --output."
            )
    if not record:
        write_published(directory / _NAME, json.dumps(wanted, indent=1).encode())
