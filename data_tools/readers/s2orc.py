"""Semantic Scholar Datasets API `s2orc`, one paper a record.

The text of a paper is `content.text`; `content.annotations` says what each stretch of it is, as lists of
spans that are themselves JSON strings (source: the dataset's README.txt).
"""

from typing import Any

from data_tools.papers import (
    Paper,
    Source,
    normalize_doi,
    normalize_pmc_id,
    title_says_retracted,
)
from data_tools.readers.fields import corpus_id, json_object, pubmed_id, text_of, words, year
from data_tools.readers.spans import AnnotatedText


def recognizes(record: dict[str, Any]) -> bool:
    """Whether a record has the text in `content`."""
    return "content" in record and "text" not in record


def paper(record: dict[str, Any], source: Source) -> Paper:
    """The paper of a record.

    Raises:
        WrongStructure: a field is not of the documented type.
    """
    ids = json_object(record.get("externalids"), "externalids")
    content = json_object(record["content"], "content")
    annotated = AnnotatedText(
        text_of(content.get("text"), "content.text"),
        json_object(content.get("annotations"), "content.annotations"),
    )
    title = annotated.title()
    abstract, sections = annotated.body()
    return Paper(
        source=source,
        pmc_id=normalize_pmc_id(ids.get("pubmedcentral")),
        corpus_id=corpus_id(record.get("corpusid")),
        doi=normalize_doi(ids.get("doi")),
        pubmed_id=pubmed_id(ids.get("pubmed")),
        title=title,
        abstract=abstract,
        sections=sections,
        license=_license(content),
        retracted=title_says_retracted(title),
        year=year(record.get("year")),
        journal=words(record.get("journal")),
    )


def _license(content: dict[str, Any]) -> str | None:
    source = content.get("source")
    access = source.get("oainfo") if isinstance(source, dict) else None
    return words(access.get("license")) if isinstance(access, dict) else None
