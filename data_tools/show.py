"""What the commands print: the result of a build, one document, the statistics of a corpus."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.corpus import Corpus
from data_tools.documents import SCHEMA, read_documents, table_path
from data_tools.errors import UserError
from data_tools.manifest import Counts, Manifest
from data_tools.splits import read_reasons
from data_tools.stats import Overlap, Share, Statistics, Step
from data_tools.token_files import TokenFile
from data_tools.tokenizer import Tokenizer
from data_tools.verify import Verified

_FIRST_IDS = 16
_BAR = 24  # characters
_BESIDE_NAMES = 60  # characters of a line: papers in millions, tokens in tens of billions, a bar, and borders


def result(manifest: Manifest, directory: Path, console: Console, records: str = "papers") -> None:
    """Print what a build made of its records, which are papers or questions."""
    console.print(_counts_table(manifest.counts, records))
    console.print(_splits_table({name: (s.documents, s.tokens) for name, s in manifest.splits.items()}))
    console.print(
        f"The corpus is in {directory}; look at it with: pmc-data inspect {directory}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def statistics(found: Statistics, console: Console) -> None:
    """Print the statistics of a corpus."""
    console.print(_splits_table({name: (s.papers, s.tokens) for name, s in found.splits.items()}))
    console.print(_waterfall_table(found.waterfall, sum(split.papers for split in found.splits.values())))
    console.print(_quantiles_table(found.quantiles))
    console.print(_histogram_table(found))
    for title, shares in (
        ("Licence groups", found.licenses),
        ("Years", found.years),
        ("Journals", found.journals),
    ):
        console.print(_shares_table(title, shares, console.width))
    if found.overlaps:
        console.print(_overlaps_table(found.overlaps))


def document(corpus: Corpus, number: int, console: Console) -> None:
    """Print a document of a corpus: its paper, its tokens, its text decoded from them.

    Raises:
        UserError: there is no document of that number.
    """
    part, local = _locate(corpus, number)
    row = read_documents([table_path(corpus.directory, part)], SCHEMA.names).slice(local, 1).to_pylist()[0]
    with TokenFile(corpus.directory / "parts" / part) as tokens:
        ids = tokens.document(local)
        start = tokens.span(local)[0] + _part_start(corpus, part)
    text = Tokenizer(corpus.tokenizer_path).decode(ids)
    console.print(_document_table(corpus, number, start, row, ids, text))
    console.print(Text(text), soft_wrap=True)


def verified(found: Verified, console: Console) -> None:
    """Print what `verify` checked."""
    console.print(
        f"Sound: {found.files} files, {found.bytes:,} bytes, every checksum right; "
        f"{found.documents:,} documents, {found.tokens:,} tokens, every index right; "
        f"{found.samples} sampled documents encode to the same ids again, "
        f"{found.same_text} of them decode to the very text that was read.",
        soft_wrap=True,
        highlight=False,
    )


def _counts_table(counts: Counts, records: str) -> Table:
    table = _table("Read and left out", records, "count")
    table.add_row("read", f"{counts.read:,}")
    for reason, number in sorted(counts.left_out.items()):
        table.add_row(f"left out: {reason}", f"{number:,}")
    table.add_row("kept", f"{counts.kept:,}", style="bold")
    return table


def _splits_table(splits: dict[str, tuple[int, int]]) -> Table:
    table = _table("Corpus", "split", "documents", "tokens", "tokens a document")
    for name, (documents, tokens) in sorted(splits.items(), reverse=True):
        table.add_row(name, f"{documents:,}", f"{tokens:,}", f"{tokens / max(documents, 1):,.0f}")
    return table


def _waterfall_table(steps: list[Step], kept: int) -> Table:
    table = _table("Read, left out, kept", "step", "papers", "left", "")
    read = steps[0].left + steps[0].left_out if steps else kept
    table.add_row("read", "", f"{read:,}", Text(_bar(read, read)))
    for step in steps:
        gone = _bar(step.left_out, read, "░")
        bar = Text(_bar(step.left, read)[: _BAR - len(gone)] + gone)
        table.add_row(step.reason, f"-{step.left_out:,}", f"{step.left:,}", bar)
    table.add_row("kept", "", f"{kept:,}", Text(_bar(kept, read)), style="bold")
    return table


def _quantiles_table(quantiles: dict[str, float]) -> Table:
    table = Table(*quantiles, title="Tokens a paper", title_justify="left")
    table.add_row(*(f"{value:,.0f}" for value in quantiles.values()))
    return table


def _histogram_table(found: Statistics) -> Table:
    table = _table("Papers by tokens", "tokens from", "papers", "")
    for start, papers in zip(found.edges, found.histogram, strict=False):
        table.add_row(f"{start:,}", f"{papers:,}", Text(_bar(papers, max(found.histogram))))
    return table


def _shares_table(title: str, shares: dict[str, Share], width: int) -> Table:
    table = _table(title, "", "papers", "tokens", "")
    # A long name ends in an ellipsis, so that a row is a line, also in a log.
    table.columns[0].no_wrap, table.columns[0].max_width = True, width - _BESIDE_NAMES
    most = max((share.papers for share in shares.values()), default=0)
    for name, share in shares.items():
        table.add_row(Text(name), f"{share.papers:,}", f"{share.tokens:,}", Text(_bar(share.papers, most)))
    return table


def _overlaps_table(overlaps: dict[str, Overlap]) -> Table:
    table = _table("Test questions", "set", "questions", "too short", "overlap any", "train", "held-out")
    for name, one in overlaps.items():
        numbers = (one.questions, one.unmatched, one.overlapping, one.train, one.heldout)
        table.add_row(Text(name), *(f"{number:,}" for number in numbers))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    """A table with its numbers to the right, and its bars, the columns without name, to the left."""
    table = Table(first, *others, title=title, title_justify="left")
    for column, name in zip(table.columns[1:], others, strict=True):
        column.justify = "right" if name else "left"
    return table


def _bar(value: int, most: int, character: str = "█") -> str:
    return character * -(-_BAR * value // most) if most else ""


def _document_table(
    corpus: Corpus, number: int, start: int, row: dict[str, Any], ids: Any, text: str
) -> Table:
    table = Table(show_header=False, title=f"Document {number}", title_justify="left")
    title = text.partition("\n")[0].removeprefix("# ")
    facts = {
        "title": title,
        "PMC id": row["pmc_id"],
        "corpus id": row["corpus_id"],
        "DOI": row["doi"],
        "PubMed id": row["pubmed_id"],
        "licence": row["license"],
        "source": f"{row['source_file']}:{row['source_position']}",
        "split": _split_of(corpus, number, start),
        "tokens": f"{row['tokens']:,}",
        "first ids": " ".join(str(token) for token in ids[:_FIRST_IDS].tolist()),
    }
    for name, value in facts.items():
        table.add_row(name, Text("-" if value is None else str(value)))
    return table


def _split_of(corpus: Corpus, number: int, start: int) -> str:
    """Where a document is: the split, or the decision that left it out."""
    manifest = corpus.manifest
    path = manifest.path(corpus.directory, "reasons.npy")
    reason = int(read_reasons(path, sum(part.documents for part in manifest.parts))[number])
    if reason:
        return f"left out: {manifest.decisions[reason - 1].reason}"
    positions = corpus.split("heldout").positions[:-1]
    place = int(np.searchsorted(positions, start))
    return "heldout" if place < len(positions) and positions[place] == start else "train"


def _locate(corpus: Corpus, number: int) -> tuple[str, int]:
    total = sum(part.documents for part in corpus.manifest.parts)
    if not 0 <= number < total:
        raise UserError(f"There is no document {number} in {corpus.directory}; it has 0 to {total - 1}.")
    local = number
    for part in corpus.manifest.parts:
        if local < part.documents:
            return part.name, local
        local -= part.documents
    raise AssertionError("unreachable")


def _part_start(corpus: Corpus, name: str) -> int:
    names = [part.name for part in corpus.manifest.parts]
    return int(corpus.part_starts[names.index(name)])
