"""Paragraphs that speak of the article and not of its subject."""

import re
from collections import Counter
from dataclasses import dataclass

from msgspec.structs import replace

from data_tools.papers import Block, Paper

_OPENINGS = re.compile(
    r"""\W*(?:
        copyright\b | \(c\)\s+\d{4} | \u00a9
      | this\s+(?:is\s+an|article\s+is\s+an|work\s+is|article\s+is|is\s+a)\s+open[\s-]access
      | (?:this|the)\s+(?:article|work|paper)\s+is\s+(?:published|licensed|distributed)\s+under
      | correspondence(?:\s+(?:to|should)\b|\s*:) | (?:\*\s*)?corresponding\s+author
      | e-?mail(?:\s+address(?:es)?)?\s*:
      | received\s*:?\s.{4,60}?\b(?:accepted|revised|published)\b
      | (?:accepted|published(?:\s+online)?)\s*:?\s+\d
      | (?:doi\s*:\s*|https?://(?:dx\.)?doi\.org/)10\.\d{4,}\S*\s*$
      | (?:the\s+authors?\s+)?declares?\s+(?:that\s+)?(?:they\s+have\s+)?no\s+(?:competing|conflicts?)
      | page\s+\d+\s+of\s+\d+
    )""",
    re.IGNORECASE | re.VERBOSE,
)

_RUNNING_HEAD = re.compile(
    r"\b(?:19|20)\d\d\b\W{0,3}\d+\s?[:(]\s?\w|\bet al\.?\W*\d*$"  # `2011, 11:174`, `Lovelace et al.`
)


@dataclass(frozen=True)
class Boilerplate:
    """Drops short paragraphs of publishing matter, and the running heads that text from PDF keeps.

    Licences, correspondence, dates and addresses go by how they begin; a running head is a short paragraph
    that comes again and is the title, ends in "et al." or has year, volume and page: all but the first go.
    Other lines that come again are of catalogues and protocols, and stay. Leaving out headers and author
    blocks is Meditron's practice (Chen et al. 2023); the patterns are ours. Plain documents are left alone.

    Attributes:
        longest: characters of a paragraph that may go.
        repeats: how often a running head stands in a paper, at least.
    """

    longest: int = 400
    repeats: int = 3

    def __call__(self, paper: Paper) -> Paper:
        """The paper without them."""
        if paper.plain:
            return paper
        texts = Counter(
            block.text for block in paper.sections if not block.depth and len(block.text) <= self.longest
        )
        heads = {
            text
            for text, times in texts.items()
            if times >= self.repeats and (text == paper.title or _RUNNING_HEAD.search(text))
        }
        seen: set[str] = set()
        kept: list[Block] = []
        for block in paper.sections:
            if not block.depth and len(block.text) <= self.longest:
                if block.text in seen or _OPENINGS.match(block.text):
                    continue
                if block.text in heads:
                    seen.add(block.text)
            kept.append(block)
        return replace(paper, sections=tuple(kept))
