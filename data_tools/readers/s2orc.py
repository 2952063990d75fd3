"""Semantic Scholar Datasets API `s2orc`: JSON Lines, one paper a line, plain or gzip.

The text of a paper is `content.text`; `content.annotations` says what each stretch of it is, as lists of
spans that are themselves JSON strings (source: the dataset's README.txt). Only stretches annotated as title,
abstract, section header or paragraph are read, so author block and bibliography never enter.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_tools.errors import UserError
from data_tools.papers import (
    Block,
    Paper,
    Rejected,
    Source,
    normalize_doi,
    normalize_pmc_id,
    title_says_retracted,
)
from data_tools.readers.citations import MARK, close_gaps, is_numeric

Span = tuple[int, int]

# A page's head or foot that was taken for a paragraph: a short title beside `Page 2 of 6`, or a bare number.
_RUNNING_HEAD = re.compile(r".{0,120}\bPage \d+ of \d+|Page \d+ of \d+\b.{0,120}|\d*")
_LONGEST_ID = 18  # digits that surely fit int64
_NOT_TEXT = ("author", "authoraffiliation", "bibentry", "figure", "table")


class _WrongStructure(ValueError):
    """A record whose fields are not of the documented types."""


def read(stream: BinaryIO, name: str) -> Iterator[Paper | Rejected]:
    """Papers and rejected lines of a file, in order; blank lines are no records.

    Args:
        stream: the file, decompressed here when `name` ends in `.gz`.
        name: recorded as the source.

    Raises:
        UserError: the gzip is damaged or cut short.
    """
    for number, line in enumerate(_lines(stream, name), start=1):
        if line.strip():
            yield _record(line, Source(name, number))


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    if not name.lower().endswith(".gz"):
        yield from stream
        return
    try:
        with gzip.GzipFile(fileobj=stream, mode="rb") as file:
            yield from file
        if stream.tell() == 0:
            raise EOFError("it is empty")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a readable gzip file ({error}); download it again.") from error


def _record(line: bytes, source: Source) -> Paper | Rejected:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Rejected("broken_json", source, str(error))
    try:
        return _paper(record, source)
    except _WrongStructure as error:
        return Rejected("wrong_structure", source, str(error))


def _paper(record: object, source: Source) -> Paper:
    if record is None:
        raise _WrongStructure("the record is null")
    fields = _object(record, "the record")
    ids = _object(fields.get("externalids"), "externalids")
    if "content" not in fields:
        raise _WrongStructure("the record has no content: not the Datasets API's s2orc layout")
    content = _object(fields["content"], "content")
    text = _text(content.get("text"))
    spans = _annotations(_object(content.get("annotations"), "annotations"), len(text))
    titles = spans.get("title", [])[:1]  # later ones are journal names and running titles
    title = " ".join(text[start:stop] for start, stop, _ in titles)
    abstract, sections = _body(text, spans)
    return Paper(
        source=source,
        pmc_id=normalize_pmc_id(ids.get("pubmedcentral")),
        corpus_id=_corpus_id(fields.get("corpusid")),
        doi=normalize_doi(ids.get("doi")),
        pubmed_id=_pubmed_id(ids.get("pubmed")),
        title=title,
        abstract=abstract,
        sections=sections,
        license=_license(content),
        retracted=title_says_retracted(title),
    )


def _object(value: object, name: str) -> dict[str, Any]:
    """A JSON object, empty for null, with its keys in lower case: they differ in that (`PubMedCentral`)."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _WrongStructure(f"{name} is {type(value).__name__}, not an object")
    return {key.lower(): item for key, item in value.items()}


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _WrongStructure(f"content.text is {type(value).__name__}, not a string")
    return value.replace(MARK, " ")  # the offsets stay


def _corpus_id(value: object) -> int | None:
    digits = str(value)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= _LONGEST_ID else None


def _pubmed_id(value: object) -> str | None:
    return str(value) if isinstance(value, str | int) and value else None


def _license(content: dict[str, Any]) -> str | None:
    source = content.get("source")
    access = source.get("oainfo") if isinstance(source, dict) else None
    value = access.get("license") if isinstance(access, dict) else None
    return value if isinstance(value, str) else None


_Annotation = tuple[int, int, dict[str, Any]]


def _annotations(annotations: dict[str, Any], length: int) -> dict[str, list[_Annotation]]:
    """Spans by kind, in order; those that are empty or reach outside the text are left out."""
    return {kind: _spans(kind, value, length) for kind, value in annotations.items() if value is not None}


def _spans(kind: str, value: object, length: int) -> list[_Annotation]:
    try:
        spans: Any = json.loads(value) if isinstance(value, str) else value
        found = [(int(span["start"]), int(span["end"]), span.get("attributes") or {}) for span in spans or []]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise _WrongStructure(f"the annotation {kind} is not a list of spans: {error}") from error
    return sorted(
        (span for span in found if 0 <= span[0] < span[1] <= length), key=lambda span: (span[0], span[1])
    )


def _body(text: str, spans: dict[str, list[_Annotation]]) -> tuple[tuple[str, ...], tuple[Block, ...]]:
    """Abstract and body, with whatever lies in figures, tables, author block and bibliography cut out."""
    removed = sorted((start, stop) for kind in _NOT_TEXT for start, stop, _ in spans.get(kind, []))
    markers = [(start, stop) for start, stop, _ in spans.get("bibref", []) if is_numeric(text[start:stop])]
    abstracts = _disjoint([(start, stop, 0) for start, stop, _ in spans.get("abstract", [])])
    headings = [(start, stop, _depth(extra)) for start, stop, extra in spans.get("sectionheader", [])]
    paragraphs = [(start, stop, 0) for start, stop, _ in spans.get("paragraph", [])]
    outside_body = sorted(removed + [(start, stop) for start, stop, _ in abstracts])
    return (
        tuple(block.text for block in _cut(text, abstracts, removed, markers)),
        tuple(_cut(text, _disjoint(headings + paragraphs), outside_body, markers)),
    )


def _cut(
    text: str, wanted: list[tuple[int, int, int]], removed: list[Span], markers: list[Span]
) -> Iterator[Block]:
    """The wanted stretches (start, stop, depth) without removed stretches and numeric citation markers."""
    holes_in, markers_in = _Cursor(removed), _Cursor(markers)
    for start, stop, depth in wanted:
        holes = [(first, end, " ") for first, end in holes_in.overlapping(start, stop)]
        holes += [(first, end, MARK) for first, end in markers_in.overlapping(start, stop)]
        pieces, place = [], start
        for first, end, substitute in sorted(holes):
            pieces += [text[place : max(first, place)], substitute]
            place = max(place, end)
        pieces.append(text[place:stop])
        remaining = close_gaps("".join(pieces))
        if not _RUNNING_HEAD.fullmatch(" ".join(remaining.split())):
            yield Block(remaining, depth)


def _disjoint(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Spans in order, each from where the one before ended, so that nothing is said twice."""
    found, place = [], 0
    for start, stop, depth in sorted(spans):
        if stop > place:
            found.append((max(start, place), stop, depth))
            place = stop
    return found


def _depth(attributes: dict[str, Any]) -> int:
    """Depth of a heading from its number: 2.1 is at depth 2; one without number at depth 1."""
    number = attributes.get("n") if isinstance(attributes, dict) else None
    return len(str(number).strip(".").split(".")) if number else 1


class _Cursor:
    """Spans sorted by start, asked for in order of start."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._first = 0

    def overlapping(self, start: int, stop: int) -> Iterator[Span]:
        while self._first < len(self._spans) and self._spans[self._first][1] <= start:
            self._first += 1
        for first, end in self._spans[self._first :]:
            if first >= stop:
                return
            if end > start:
                yield first, end
