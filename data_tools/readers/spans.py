"""Texts with annotations, as in the Semantic Scholar Datasets API: which stretches are abstract and body.

Only stretches annotated as title, abstract, section header or paragraph are read, so author block and
bibliography never enter.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import msgspec

from data_tools.papers import Block
from data_tools.readers.citations import MARK, close_gaps, is_numeric
from data_tools.readers.fields import WrongStructure

Annotation = tuple[int, int, int]
"""Start, end, and the depth of a heading or 0."""
Hole = tuple[int, int, str]
"""Start and end of what is cut out, and what stands for it."""
_What = TypeVar("_What", int, str)

_RUNNING_HEAD = re.compile(r".{0,120}\bPage \d+ of \d+|Page \d+ of \d+\b.{0,120}")  # beside a short title
_NOT_TEXT = ("author", "authoraffiliation", "bibentry", "figure", "table")
_LONGEST_MARKER = 1_000  # characters of a numeric citation; a longer one is none
_USED = frozenset({"title", "abstract", "sectionheader", "paragraph", "bibref", *_NOT_TEXT})


class _Span(msgspec.Struct, gc=False):
    """As the files have it: offsets as numbers or strings. Attributes are decoded where they are used."""

    depth: ClassVar[int] = 0
    start: int
    end: int


class _Heading(_Span):
    attributes: Any = None

    @property
    def depth(self) -> int:  # type: ignore[override]
        """From its number: 2.1 is at depth 2; one without number at depth 1."""
        number = self.attributes.get("n") if isinstance(self.attributes, dict) else None
        return len(str(number).strip(".").split(".")) if number else 1


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
        """Abstract and body, with title, figures, tables, author block and bibliography cut out of them."""
        text = self.text
        holes = [(start, stop, " ") for start, stop, _ in self._of("title")[:1]]
        holes += [(start, stop, " ") for kind in _NOT_TEXT for start, stop, _ in self._of(kind)]
        holes += [
            (start, stop, MARK)
            for start, stop, _ in self._of("bibref")
            if stop - start <= _LONGEST_MARKER and is_numeric(text[start:stop])
        ]
        abstracts = _disjoint(self._of("abstract"))
        body = _disjoint(self._of("sectionheader") + self._of("paragraph"))
        outside_body = holes + [(start, stop, " ") for start, stop, _ in abstracts]
        return (
            tuple(block.text for block in _cut(text, abstracts, _disjoint(holes))),
            tuple(_cut(text, body, _disjoint(outside_body))),
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
        [(span.start, span.end, span.depth) for span in spans or () if 0 <= span.start < span.end <= length]
    )


def _cut(text: str, wanted: list[Annotation], holes: list[Hole]) -> Iterator[Block]:
    """The wanted stretches of a text without the holes; both are disjoint and in order."""
    first = 0
    for start, stop, depth in wanted:
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        last = first
        while last < len(holes) and holes[last][0] < stop:
            last += 1
        remaining = _without(text, start, stop, holes[first:last]) if last > first else text[start:stop]
        if not _is_running_head(remaining):
            yield Block(remaining, depth)


def _is_running_head(text: str) -> bool:
    """Whether a text is empty, a bare number, or a page's head or foot that was taken for a paragraph."""
    words = text.strip()
    if not words or words.isdecimal():
        return True
    # What no prose has at its ends, which is sooner seen than the whole.
    might_be = words[-1].isdecimal() or words.startswith("Page")
    return might_be and _RUNNING_HEAD.fullmatch(" ".join(words.split())) is not None


def _without(text: str, start: int, stop: int, holes: list[Hole]) -> str:
    pieces, place = [], start
    for first, end, substitute in holes:
        pieces += [text[place : max(first, place)], substitute]
        place = max(place, end)
    pieces.append(text[place:stop])
    return close_gaps("".join(pieces))


def _disjoint(spans: list[tuple[int, int, _What]]) -> list[tuple[int, int, _What]]:
    """Spans in order, each from where the one before ended, so that nothing is said or cut out twice."""
    found: list[tuple[int, int, _What]] = []
    place = 0
    for start, stop, what in sorted(spans):
        if stop > place:
            found.append((start if start > place else place, stop, what))
            place = stop
    return found
