"""Sections of names, references and declarations."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from data_tools.papers import Block, Paper

_REFERENCES = {"references", "reference list", "bibliography", "literature cited", "works cited"}
_THANKS = {"acknowledgements", "acknowledgments", "acknowledgement", "acknowledgment"}
_AUTHORS = {"author contributions", "authors contributions", "authors' contributions", "author contribution"}
_AUTHOR_BLOCK = {"author information", "author affiliations", "authors' affiliations"}
_INTERESTS = {"conflict of interest", "conflicts of interest", "competing interest", "competing interests"}
_STATEMENTS = {"funding", "data availability"}
_SUPPLEMENT = {f"supplementary {what}" for what in ("data", "material", "materials", "information")}
_DROPPED = _REFERENCES | _THANKS | _AUTHORS | _AUTHOR_BLOCK | _INTERESTS | _STATEMENTS | _SUPPLEMENT
_NUMBERING = re.compile(r"^(?:(?:\d+|[ivx]+)(?:\.\d+)*[.)]?\s+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Sections:
    """Drops the sections named above, when that is their whole heading, and headings that nothing follows."""

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
    name = _NUMBERING.sub("", heading).rstrip(".:").replace("\u2019", "'")
    return name.casefold() in _DROPPED


def _without_closing_headings(blocks: Iterable[Block]) -> tuple[Block, ...]:
    kept = list(blocks)
    while kept and kept[-1].depth:
        kept.pop()
    return tuple(kept)
