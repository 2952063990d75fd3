"""A paper as every reader gives it: identifiers, title, text blocks, licence, and where it came from."""

import re
from dataclasses import dataclass

import msgspec

BAD_RECORDS = frozenset(
    {
        "broken_json",
        "broken_xml",
        "wrong_structure",
        "missing_pair",
        "broken_archive",
        "too_large",
        "unsafe_name",
    }
)
"""Reasons that only readers give: the record is damaged or not of the documented form. Beyond a stated share
of these a build fails; records that selection or a rule leaves out are not among them."""


@dataclass(frozen=True)
class Source:
    """Where a record was read.

    `file` is the path relative to (and starting with the name of) the input given, `position` the line
    of a JSON Lines file or the article of an XML file, both from 1.
    """

    file: str
    position: int

    def __str__(self) -> str:
        return f"{self.file}:{self.position}"


class Block(msgspec.Struct, frozen=True, gc=False):
    """A paragraph (depth 0) or a section heading (depth 1 for top-level sections, 2 below, ...)."""

    text: str
    depth: int = 0


class Paper(msgspec.Struct, frozen=True):
    """One paper, book or other document. Texts are as the source has them, less markup and numeric citations.

    Attributes:
        pmc_id: normalized (`normalize_pmc_id`).
        retracted: also holds for the notice of a retraction.
        retracts: PMC ids and DOIs (normalized) of the papers that this one, a notice, retracts.
        plain: the text came as text: one block, whose line breaks mean something.
    """

    source: Source
    pmc_id: str | None
    corpus_id: int | None
    doi: str | None
    pubmed_id: str | None
    title: str
    abstract: tuple[str, ...]
    sections: tuple[Block, ...]
    license: str | None
    retracted: bool
    year: int | None = None
    journal: str | None = None
    retracts: tuple[str, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class Rejected:
    """A record that is no usable paper: the counted reason, where it stands, and what was found there."""

    reason: str
    source: Source
    detail: str = ""


_PMC_ID = re.compile(r"(?:PMC)?0*([1-9][0-9]*)(?:\.[0-9]+)?", re.IGNORECASE)
_DOI = re.compile(r"(?:https?://(?:dx\.)?doi\.org/|doi:\s*)?(10\.\S+)", re.IGNORECASE)


def normalize_pmc_id(value: object) -> str | None:
    """Return a PubMed Central id as `PMC9925312`, or None when the value is not one.

    Sources write it bare (`9925312`, text or number), with the prefix, and with a version
    (`PMC9925312.1`).
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers in which some are missing
    if not isinstance(value, str | int):
        return None
    match = _PMC_ID.fullmatch(str(value).strip())
    return f"PMC{match[1]}" if match else None


def normalize_doi(value: object) -> str | None:
    """Return a DOI without resolver or `doi:` prefix, its case kept, or None when the value is not one."""
    match = _DOI.fullmatch(value.strip()) if isinstance(value, str) else None
    return match[1] if match else None


# 'RETRACTED' in capitals always marks the paper; in other spelling only before a colon or bracket, because
# 'Retracted science and the retraction index' is the title of a sound paper.
_RETRACTED_TITLE = re.compile(
    r"\W*(?:RETRACTED\b"
    r"|(?i:retracted(?:\s+(?:article|paper|chapter))?\s*[:\])])"
    r"|(?i:retraction(?:\s+(?:note|notice)(?:\s+to)?)?\s*:))"
)


def title_says_retracted(title: str) -> bool:
    """Whether a title opens with a publisher's mark of retraction, such as `RETRACTED: ...`."""
    return _RETRACTED_TITLE.match(title) is not None
