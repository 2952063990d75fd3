"""Texts with annotations, as in the Semantic Scholar Datasets API: which stretches are abstract and body.

Only stretches annotated as title, abstract, section header or paragraph are read, so author block and
bibliography never enter.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from data_tools.papers import Block
from data_tools.readers.citations import MARK, close_gaps, is_numeric
from data_tools.readers.fields import WrongStructure

Span = tuple[int, int]
Hole = tuple[int, int, str]
Annotation = tuple[int, int, int]
"""Start, end, and the depth of a heading or 0."""

_RUNNING_HEAD = re.compile(r".{0,120}\bPage \d+ of \d+|Page \d+ of \d+\b.{0,120}")  # beside a short title
_NOT_TEXT = ("author", "authoraffiliation", "bibentry", "figure", "table")
_USED = frozenset({"title", "abstract", "sectionheader", "paragraph", "bibref", *_NOT_TEXT})


class _Span(msgspec.Struct, gc=False):
    """As the files have it: offsets as numbers or strings. Attributes are decoded where they are used."""

    start: int
    end: int


class _Heading(_Span):
    attributes: Any = None


_SPANS: dict[str, Any] = {"sectionheader": list[_Heading] | None}
_DECODERS = {kind: msgspec.json.Decoder(_SPANS.get(kind, list[_Span] | None), strict=False) for kind in _USED}


class AnnotatedText:
    """A text and its annotations.

    Args:
        text: what the offsets count in, in characters.
        annotations: by kind (`section_header` and `sectionheader` are one), each null, a list of spans, or
            such a list as a JSON string. Spans that are empty or reach outside the text are left out.

    Raises:
        WrongStructure: annotations that are used are not lists of spans.
    """

    def __init__(self, text: str, annotations: dict[str, Any]) -> None:
        self.text = text.replace(MARK, " ")  # the offsets stay
        self._spans = {
            kind: _spans(kind, value, len(text))
            for key, value in annotations.items()
            if value is not None and (kind := key.replace("_", "")) in _USED
        }

    def title(self) -> str:
        """The first title; later ones are journal names and running titles."""
        return " ".join(self.text[start:stop] for start, stop, _ in self._of("title")[:1])

    def body(self) -> tuple[tuple[str, ...], tuple[Block, ...]]:
        """Abstract and body, with whatever lies in figures, tables, author block and bibliography cut out."""
        text = self.text
        removed = sorted((start, stop) for kind in _NOT_TEXT for start, stop, _ in self._of(kind))
        markers = [(start, stop) for start, stop, _ in self._of("bibref") if is_numeric(text[start:stop])]
        abstracts = _disjoint(self._of("abstract"))
        outside_body = sorted(removed + [(start, stop) for start, stop, _ in abstracts])
        return (
            tuple(block.text for block in _cut(text, abstracts, removed, markers)),
            tuple(
                _cut(
                    text, _disjoint(self._of("sectionheader") + self._of("paragraph")), outside_body, markers
                )
            ),
        )

    def _of(self, kind: str) -> list[Annotation]:
        return self._spans.get(kind, [])


def _spans(kind: str, value: object, length: int) -> list[Annotation]:
    try:
        spans = (
            _DECODERS[kind].decode(value)
            if isinstance(value, str)
            else msgspec.convert(value, _DECODERS[kind].type, strict=False)
        )
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WrongStructure(f"the annotation {kind} is not a list of spans: {error}") from error
    return sorted(
        (
            (span.start, span.end, _depth(span.attributes) if isinstance(span, _Heading) else 0)
            for span in spans or ()
            if 0 <= span.start < span.end <= length
        ),
    )


def _cut(text: str, wanted: list[Annotation], removed: list[Span], markers: list[Span]) -> Iterator[Block]:
    """The wanted stretches (start, stop, depth) without removed stretches and numeric citation markers."""
    holes_in = _Holes(
        [(first, end, " ") for first, end in removed] + [(first, end, MARK) for first, end in markers]
    )
    for start, stop, depth in wanted:
        holes = holes_in.overlapping(start, stop)
        remaining = text[start:stop] if not holes else _without(text, start, stop, holes)
        if not _is_running_head(remaining):
            yield Block(remaining, depth)


def _is_running_head(text: str) -> bool:
    """Whether a text is empty, a bare number, or a page's head or foot that was taken for a paragraph."""
    words = text.strip()
    if not words or words.isdecimal():
        return True
    return "Page" in words and _RUNNING_HEAD.fullmatch(" ".join(words.split())) is not None


def _without(text: str, start: int, stop: int, holes: list[Hole]) -> str:
    pieces, place = [], start
    for first, end, substitute in holes:
        pieces += [text[place : max(first, place)], substitute]
        place = max(place, end)
    pieces.append(text[place:stop])
    return close_gaps("".join(pieces))


def _disjoint(spans: list[Annotation]) -> list[Annotation]:
    """Spans in order, each from where the one before ended, so that nothing is said twice."""
    found, place = [], 0
    for start, stop, depth in sorted(spans):
        if stop > place:
            found.append((max(start, place), stop, depth))
            place = stop
    return found


def _depth(attributes: Any) -> int:
    """Depth of a heading from its number: 2.1 is at depth 2; one without number at depth 1."""
    number = attributes.get("n") if isinstance(attributes, dict) else None
    return len(str(number).strip(".").split(".")) if number else 1


class _Holes:
    """Stretches to cut out, each with what stands for it, asked for in order of start."""

    def __init__(self, holes: list[Hole]) -> None:
        self._holes = sorted(holes)
        self._first = 0

    def overlapping(self, start: int, stop: int) -> list[Hole]:
        """Those that reach into a stretch."""
        holes, first = self._holes, self._first
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        self._first = last = first
        while last < len(holes) and holes[last][0] < stop:
            last += 1
        return [hole for hole in holes[first:last] if hole[1] > start] if last > first else []
