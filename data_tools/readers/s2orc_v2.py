"""Semantic Scholar Datasets API `s2orc_v2`, one paper a record.

Title and ids stand in fields of their own, the text in `body.text`, annotated as in `s2orc` but with
underscores in the names; the bibliography is a text apart, which is not read (source: the dataset's README).
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
    """Whether a record has the text in `body`."""
    return "body" in record and "corpusid" in record


def paper(record: dict[str, Any], source: Source) -> Paper:
    """The paper of a record.

    Raises:
        WrongStructure: a field is not of the documented type.
    """
    access = json_object(record.get("openaccessinfo"), "openaccessinfo")
    ids = json_object(access.get("externalids", record.get("externalids")), "externalids")
    body = json_object(record["body"], "body")
    annotated = AnnotatedText(
        text_of(body.get("text"), "body.text"), json_object(body.get("annotations"), "body.annotations")
    )
    title = text_of(record.get("title"), "title") or annotated.title()
    abstract, sections = annotated.body()
    return Paper(
        source=source,
        pmc_id=normalize_pmc_id(ids.get("pubmedcentral")),
        corpus_id=corpus_id(record["corpusid"]),
        doi=normalize_doi(ids.get("doi")),
        pubmed_id=pubmed_id(ids.get("pubmed")),
        title=title,
        abstract=abstract,
        sections=sections,
        license=words(access.get("license")),
        retracted=title_says_retracted(title),
        year=year(record.get("year")),
        journal=words(record.get("journal")),
    )
