"""Paper to training text: title, abstract, headings and paragraphs, in plain Markdown-like lines."""

from data_tools.papers import Block, Paper

_DEEPEST = 6


def training_text(paper: Paper) -> str:
    """The text a paper is trained on, or "" when it has neither abstract nor paragraphs.

    One block a line, blocks apart by an empty line: `# title`, `## Abstract` and its paragraphs, then the
    body with a `##` to `######` line for each heading. Nothing else is changed, so a document that came as
    plain text and without a title is that very text.
    """
    if not paper.sections and not paper.abstract:
        return ""
    lines = [f"# {paper.title}"] if paper.title else []
    if paper.abstract:
        lines += ["## Abstract", *paper.abstract]
    lines += [_line(block) for block in paper.sections]
    return "\n\n".join(lines)


def _line(block: Block) -> str:
    if not block.depth:
        return block.text
    return "#" * min(block.depth + 1, _DEEPEST) + " " + block.text
