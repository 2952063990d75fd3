"""Papers as doc2json writes them (S2ORC's own converter, 2021): metadata, abstract and body in one object."""

from collections.abc import Mapping
from typing import Any

from data_tools.papers import (
    Paper,
    Rejected,
    Source,
    normalize_doi,
    normalize_pmc_id,
    title_says_retracted,
)
from data_tools.readers.fields import corpus_id, json_object, pubmed_id, text_of, words, year
from data_tools.readers.parses import abstract_of, body_of


def recognizes(record: dict[str, Any]) -> bool:
    """Whether a record has paragraphs in `body_text`, itself or in the parse of a PDF or of LaTeX."""
    return any("body_text" in holder for holder in (record, *_parses(record)))


def paper(record: dict[str, Any], source: Source) -> Paper | Rejected:
    """The paper of a record, or a rejection of a parse of S2ORC 2020, whose metadata is in another file.

    Raises:
        WrongStructure: a field is not of the documented type.
    """
    if "_pdf_hash" in record and "metadata" not in record:
        return Rejected("missing_pair", source, "a parse of S2ORC 2020 outside a pdf_parses directory")
    parse = next((holder for holder in (record, *_parses(record)) if "body_text" in holder), record)
    metadata = json_object(record.get("metadata", record), "metadata")
    return parsed_paper(record, parse, metadata, source)


def parsed_paper(
    record: Mapping[str, Any], parse: Mapping[str, Any], metadata: Mapping[str, Any], source: Source
) -> Paper:
    """The paper of a parse and its metadata, as S2ORC's static releases and doc2json name their fields.

    Raises:
        WrongStructure: a field is not of the documented type.
    """
    title = text_of(metadata.get("title"), "metadata.title")
    return Paper(
        source=source,
        pmc_id=normalize_pmc_id(metadata.get("pmc_id")),
        corpus_id=corpus_id(record.get("paper_id")),
        doi=normalize_doi(metadata.get("doi")),
        pubmed_id=pubmed_id(metadata.get("pubmed_id")),
        title=title,
        abstract=abstract_of(parse, metadata),
        sections=body_of(parse),
        license=words(metadata.get("license")),
        retracted=title_says_retracted(title),
        year=year(metadata.get("year")),
        journal=words(metadata.get("journal")) or words(metadata.get("venue")),
    )


def _parses(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = (record.get("latex_parse"), record.get("pdf_parse"))
    return [parse for parse in found if isinstance(parse, dict)]
