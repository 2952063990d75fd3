"""Sections of names, references and declarations."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from data_tools.papers import Block, Paper

_REFERENCES = """
references|reference list|bibliography|literature cited|works cited|further reading
"""
_THANKS = """
acknowledgements|acknowledgement|acknowledgments|acknowledgment|notes and acknowledgements
"""
_AUTHORS = """
author contributions|author contribution|authors contributions|authors' contributions|authors' contribution
author's contribution|author's contributions|author contribution statement|author contributions statement
credit authorship contribution statement|credit author statement|contributors|contributorship
authors' information|author information|about the authors|author details|authors' details
author affiliations|authors' affiliations|affiliations|corresponding author|correspondence
orcid|orcid id|orcid ids
"""
_INTERESTS = """
conflict of interest|conflicts of interest|conflict of interests|conflicts of interests
conflict of interest statement|conflicts of interest statement|declaration of conflicting interests
declaration of conflict of interest|declaration of interest|declaration of interests|disclosure|disclosures
declaration of competing interest|declaration of competing interests|potential conflicts of interest
competing interest|competing interests|competing interests statement|competing financial interests
disclosure statement|financial disclosure|financial disclosures|statement of interest
"""
_STATEMENTS = """
funding|funding statement|funding sources|funding source|funding information|source of funding
sources of funding|role of the funding source|role of funding source|financial support|grant support
financial support and sponsorship
data availability|data availability statement|availability of data|availability of data and material
availability of data and materials|availability of supporting data|data accessibility
data accessibility statement|data access|data sharing|data sharing statement|code availability
data and code availability|declarations|consent for publication|publisher's note|open access
pre-publication history|peer review|peer review file|provenance and peer review|reviewer information
copyright|license|licence
"""
_SUPPLEMENT = """
supplementary data|supplementary material|supplementary materials|supplementary information
supporting information|supplemental data|supplemental material|supplemental materials|supplemental information
electronic supplementary material|additional file|additional files|additional information
"""
_DROPPED = frozenset(
    name
    for names in (_REFERENCES, _THANKS, _AUTHORS, _INTERESTS, _STATEMENTS, _SUPPLEMENT)
    for name in re.split(r"[|\n]", names.strip())
)
_NUMBERING = re.compile(r"^(?:(?:\d+|[ivx]+)(?:\.\d+)*[.)]?\s+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Sections:
    """Drops the sections named above, when that is their whole heading, and headings that nothing follows.

    Author blocks and references out are what Meditron does (Chen et al. 2023); the names are those of S2ORC
    and of articles in PubMed Central, where they stand in the body. A number before them, capitals and a
    closing stop make no difference. Ethics statements and abbreviations stay: they speak of the work.
    """

    def __call__(self, paper: Paper) -> Paper:
        """The paper without them."""
        return replace(paper, sections=_without_closing_headings(_kept(paper.sections)))


def _kept(blocks: Iterable[Block]) -> Iterator[Block]:
    """Leave out the sections named in `_DROPPED`, each up to the next heading at its depth or above."""
    dropped_at: int | None = None
    for block in blocks:
        if block.depth and (dropped_at is None or block.depth <= dropped_at):
            dropped_at = block.depth if _is_dropped(block.text) else None
        if dropped_at is None:
            yield block


def _is_dropped(heading: str) -> bool:
    name = _NUMBERING.sub("", heading).rstrip(".: ").replace("\u2019", "'")
    return name.casefold() in _DROPPED


def _without_closing_headings(blocks: Iterable[Block]) -> tuple[Block, ...]:
    kept = list(blocks)
    while kept and kept[-1].depth:
        kept.pop()
    return tuple(kept)
