"""Parsed PDFs as doc2json writes them and the static releases of S2ORC have them: lists of paragraphs.

A paragraph has its text, the name of its section, and the places of the citations in it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.papers import Block
from data_tools.readers.citations import MARK, close_gaps, is_numeric
from data_tools.readers.fields import WrongStructure, json_object, text_of

_BREAK = ":::"
"""Stands between the sections of a structured abstract in the metadata."""


def abstract_of(parse: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The paragraphs of the abstract: the parse's, or the metadata's where the parse has none.

    Raises:
        WrongStructure: it is neither paragraphs nor a text.
    """
    value = parse.get("abstract")
    found = (value,) if isinstance(value, str) else tuple(text for _, text in _paragraphs(value, "abstract"))
    if any(text.strip() for text in found):
        return found
    stated = text_of(metadata.get("abstract"), "metadata.abstract").split(_BREAK)
    return tuple(text.strip() for text in stated if text.strip())


def body_of(parse: Mapping[str, Any]) -> tuple[Block, ...]:
    """Paragraphs of the body, under a heading wherever the section changes.

    Raises:
        WrongStructure: the body is not a list of paragraphs.
    """
    blocks, before = [], ""
    for section, text in _paragraphs(parse.get("body_text"), "body_text"):
        if section and section != before:
            blocks.append(Block(section, 1))
        before = section
        blocks.append(Block(text))
    return tuple(blocks)


def _paragraphs(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Section and text of each paragraph."""
    if value is None:
        return
    if not isinstance(value, list):
        raise WrongStructure(f"{name} is {type(value).__name__}, not a list of paragraphs")
    for paragraph in value:
        fields = json_object(paragraph, f"a paragraph of {name}")
        text = text_of(fields.get("text"), f"the text of a paragraph of {name}").replace(MARK, " ")
        yield (
            text_of(fields.get("section"), "section").strip(),
            _without_markers(text, fields.get("cite_spans")),
        )


def _without_markers(text: str, spans: object) -> str:
    """A text without its numeric citation markers; of markers that overlap the last one counts."""
    kept, end = [], len(text)
    for start, stop in sorted(_places(spans), reverse=True):
        if 0 <= start < stop <= end and is_numeric(text[start:stop]):
            kept += [text[stop:end], MARK]
            end = start
    return close_gaps(text[:end] + "".join(reversed(kept)))


def _places(spans: object) -> Iterator[tuple[int, int]]:
    try:
        for span in spans or ():  # type: ignore[attr-defined]
            yield int(span["start"]), int(span["end"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise WrongStructure(f"cite_spans is not a list of spans: {error}") from error
