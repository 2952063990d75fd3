"""White space, control characters and lone surrogates."""

import re
from dataclasses import dataclass, replace

from data_tools.papers import Block, Paper

# C0 and C1 controls but for those that are white space, and lone surrogates, which are not Unicode text.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Normalize:
    """Runs of white space in a block become one space, control characters go, lone surrogates U+FFFD."""

    def __call__(self, paper: Paper) -> Paper:
        """The paper with every text in one line; blocks that are empty then go."""
        abstract = (normalize_text(text) for text in paper.abstract)
        sections = (Block(normalize_text(block.text), block.depth) for block in paper.sections)
        return replace(
            paper,
            title=normalize_text(paper.title),
            abstract=tuple(text for text in abstract if text),
            sections=tuple(block for block in sections if block.text),
        )


def normalize_text(text: str) -> str:
    """One line of text: white space collapsed, controls removed, lone surrogates replaced by U+FFFD."""
    text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))
    return _SPACE.sub(" ", text).strip()
