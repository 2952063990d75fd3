"""Files of questions taken apart: each record with the line on which it begins.

Known are JSON Lines, one JSON object of records by their ids (PubMedQA), one JSON array, an object whose
`questions` are an array (BioASQ), and CSV. A record that cannot be read stands in the row as its error.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.questions.question import BadQuestion

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """A record of a file.

    Attributes:
        line: of its first character, from 1; of a table's row its number.
        id: that the file gives it, else its line, or of CSV its row.
        value: an object, or a list of fields of CSV, or what is wrong with it.
    """

    line: int
    id: str
    value: dict[str, Any] | list[str] | BadQuestion


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON or CSV file, in its order.

    Raises:
        UserError: the file cannot be read, is no UTF-8, or is one JSON value that is cut short or damaged.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The questions {path} cannot be read: {error}.") from error
    if path.suffix == ".csv":
        yield from _rows(content)
        return
    try:
        yield from _lines(content) if _is_lines(content) else _whole(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The questions {path} are cut short or damaged: {error}; expected JSON Lines, or one JSON "
            "object or array; copy the file again."
        ) from error


def _rows(content: str) -> Iterator[Record]:
    reader = csv.reader(StringIO(content, newline=""), strict=True)
    number = 0
    while True:
        line, number = reader.line_num + 1, number + 1
        try:
            row: list[str] | BadQuestion | None = next(reader, None)
        except csv.Error as error:
            row = BadQuestion("wrong_structure", f"no CSV: {error}")
        if row is None:
            return
        if row:
            yield Record(line, str(number), row)


def _is_lines(content: str) -> bool:
    """Whether one of the first two lines is a JSON object and not the only one: the other may be damaged."""
    lines = [line for line in islice(StringIO(content), 100) if line.strip()]
    return len(lines) > 1 and any(isinstance(_parsed(line), dict) for line in lines[:2])


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(content: str) -> Iterator[Record]:
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines cuts at U+2028, too
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(number, str(number), BadQuestion("not_json", str(error)))
        else:
            yield Record(number, str(number), _object(value))


def _whole(content: str) -> Iterator[Record]:
    """Records of one JSON value, each decoded by itself, so that its line is known."""
    start = _after_space(content, 0)
    if start == len(content):
        return
    if content[start] == "[":
        yield from _elements(content, start)
        return
    if content[start] != "{":
        raise ValueError(f"line 1 begins with {content[start : start + 20]!r}")
    members = list(_members(content, start))
    if all(isinstance(value, dict) for _, _, value in members):
        lines = _LineCounter(content)
        yield from (Record(lines.at(place), key, value) for place, key, value in members)
        return
    for place, key, value in members:
        if key == "questions" and isinstance(value, list):
            yield from _elements(content, place)
            return
    yield Record(1, "1", {key: value for _, key, value in members})


def _elements(content: str, start: int) -> Iterator[Record]:
    lines = _LineCounter(content)
    for number, (place, value) in enumerate(_items(content, start, "]"), start=1):
        yield Record(lines.at(place), str(number), _object(value))


def _members(content: str, start: int) -> Iterator[tuple[int, str, Any]]:
    """Place of its value, key and value of each member of an object."""
    key: str | None = None
    for place, value in _items(content, start, "}"):
        if key is None:
            if not isinstance(value, str):
                raise ValueError(f"a key that is no string at character {place}")
            key = value
        else:
            yield place, key, value
            key = None


def _items(content: str, start: int, end: str) -> Iterator[tuple[int, Any]]:
    """Place and value of all that stands between the bracket at `start` and its end; keys count as values."""
    place = _after_space(content, start + 1)
    expected = "," if end == "]" else ":"
    while content[place : place + 1] != end:
        value, stop = _DECODER.raw_decode(content, place)
        yield place, value
        place = _after_space(content, stop)
        separator = content[place : place + 1]
        if separator == end and expected == ",":
            break
        if separator != expected:
            raise ValueError(f"expected {expected!r} or {end!r} at character {place}, found {separator!r}")
        place = _after_space(content, place + 1)
        if end == "}":
            expected = "," if expected == ":" else ":"
    if content[place + 1 :].strip() and end == "}":
        raise ValueError(f"more text after the object, at character {place + 1}")


def _after_space(content: str, place: int) -> int:
    found = _SPACE.match(content, place)
    return found.end() if found else place


def _object(value: Any) -> dict[str, Any] | BadQuestion:
    if isinstance(value, dict):
        return value
    return BadQuestion("wrong_structure", f"expected an object, found {type(value).__name__}")


class _LineCounter:
    """Numbers of lines of places that are asked for in ascending order."""

    def __init__(self, content: str) -> None:
        self._content, self._place, self._line = content, 0, 1

    def at(self, place: int) -> int:
        self._line += self._content.count("\n", self._place, place)
        self._place = place
        return self._line
