"""Paper to training text: title, abstract, headings and paragraphs, in plain Markdown-like lines."""

import re
from collections.abc import Iterable, Iterator

from data_tools.papers import Block, Paper

TEXT_RULES = 2
"""Version of everything that decides a paper's text (here and in the readers). Raise it with any change:
parts made under other rules are not continued."""

_DEEPEST = 6
# Sections of names, references and declarations, dropped when this is their whole heading.
_REFERENCES = {"references", "reference list", "bibliography", "literature cited", "works cited"}
_THANKS = {"acknowledgements", "acknowledgments", "acknowledgement", "acknowledgment"}
_AUTHORS = {"author contributions", "authors contributions", "authors' contributions", "author contribution"}
_AUTHOR_BLOCK = {"author information", "author affiliations", "authors' affiliations"}
_INTERESTS = {"conflict of interest", "conflicts of interest", "competing interest", "competing interests"}
_STATEMENTS = {"funding", "data availability"}
_SUPPLEMENT = {f"supplementary {what}" for what in ("data", "material", "materials", "information")}
_DROPPED = _REFERENCES | _THANKS | _AUTHORS | _AUTHOR_BLOCK | _INTERESTS | _STATEMENTS | _SUPPLEMENT
_NUMBERING = re.compile(r"^(?:(?:\d+|[ivx]+)(?:\.\d+)*[.)]?\s+)?", re.IGNORECASE)
# C0 and C1 controls but for those that are white space, and lone surrogates, which are not Unicode text.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


def training_text(paper: Paper) -> str:
    """The text a paper is trained on, or "" when it has neither abstract nor paragraphs.

    One block a line, blocks apart by an empty line: `# title`, `## Abstract` and its paragraphs, then
    the body with a `##` to `######` line for each heading. Runs of white space in a block become one space,
    control characters go, lone surrogates become U+FFFD; every other character is left as it is.
    Sections of names, references and declarations are dropped, and so are headings that nothing follows.
    """
    body = _without_closing_headings(_kept(_normalized(paper.sections)))
    abstract = list(_normalized(Block(text) for text in paper.abstract))
    if not body and not abstract:
        return ""
    title = list(_normalized([Block(paper.title)]))
    lines = [f"# {block.text}" for block in title]
    if abstract:
        lines += ["## Abstract", *(block.text for block in abstract)]
    lines += [_line(block) for block in body]
    return "\n\n".join(lines)


def normalize_text(text: str) -> str:
    """One line of text: white space collapsed, controls removed, lone surrogates replaced by U+FFFD."""
    text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))
    return _SPACE.sub(" ", text).strip()


def _normalized(blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        text = normalize_text(block.text)
        if text:
            yield Block(text, block.depth)


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


def _without_closing_headings(blocks: Iterable[Block]) -> list[Block]:
    kept = list(blocks)
    while kept and kept[-1].depth:
        kept.pop()
    return kept


def _line(block: Block) -> str:
    if not block.depth:
        return block.text
    return "#" * min(block.depth + 1, _DEEPEST) + " " + block.text
