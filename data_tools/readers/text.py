"""Plain text, as books and replay corpora come: the document under `text`, as it stands, in one block.

Other fields that are known: `pmc_id` (or an `id` that begins with `PMC`), `pmid`, `doi`, `license`, `year`,
`journal` or `source`.
"""

from typing import Any

from data_tools.papers import Block, Paper, Rejected, Source, normalize_doi, normalize_pmc_id
from data_tools.readers.fields import pubmed_id, words, year


def recognizes(record: dict[str, Any]) -> bool:
    """Whether a record is a document of plain text, sound or not."""
    return "text" in record


def paper(record: dict[str, Any], source: Source) -> Paper | Rejected:
    """The document of a record."""
    text = record.get("text")
    if not isinstance(text, str):
        return Rejected("wrong_structure", source, f"text is {type(text).__name__}, not a string")
    return Paper(
        source=source,
        pmc_id=_pmc_id(record),
        corpus_id=None,
        doi=normalize_doi(record.get("doi")),
        pubmed_id=pubmed_id(record.get("pmid")),
        title="",
        abstract=(),
        sections=(Block(text),),
        license=words(record.get("license")),
        retracted=False,
        year=year(record.get("year")),
        journal=words(record.get("journal")) or words(record.get("source")),
        plain=True,
    )


def _pmc_id(record: dict[str, Any]) -> str | None:
    """`pmc_id`, or an `id` with PMC's prefix: a bare number there may be anything."""
    value = record.get("pmc_id")
    if value is None:
        value = record.get("id")
        if not isinstance(value, str) or not value.startswith("PMC"):
            return None
    return normalize_pmc_id(value)
