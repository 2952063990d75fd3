"""Records set aside: a line of JSON for each, with file, position, reason and what was found."""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from data_tools.files import aside, publish
from data_tools.papers import Rejected

NOT_LISTED = frozenset({"no_pmc_id"})
"""Counted only: of the 81.1 million papers of S2ORC 76 million would be listed for this."""
_LONGEST_DETAIL = 200  # characters


class RejectedFile:
    """Writes `NAME.rejected.jsonl` of a part. A context manager, published like a token file.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = xxhash.xxh3_128()
        self.bytes = 0

    @property
    def checksum(self) -> str:
        """XXH3-128 of what was written, as 32 hex digits."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        self._file = aside(self._path).open("wb")
        return self

    def add(self, rejected: Rejected) -> None:
        """Append a record that is set aside."""
        if rejected.reason not in NOT_LISTED:
            line = json.dumps(as_json(rejected)).encode() + b"\n"
            self._file.write(line)
            self._digest.update(line)
            self.bytes += len(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                publish(self._path)
        finally:
            aside(self._path).unlink(missing_ok=True)


def as_json(rejected: Rejected) -> dict[str, object]:
    """A rejected record as it is listed."""
    return {
        "file": rejected.source.file,
        "position": rejected.source.position,
        "reason": rejected.reason,
        "detail": rejected.detail[:_LONGEST_DETAIL],
    }
