"""What the commands print: the result of a build, one document, the statistics of a corpus."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.corpus import Corpus
from data_tools.documents import SCHEMA, read_documents
from data_tools.errors import UserError
from data_tools.finalize import table_path
from data_tools.manifest import Counts, Manifest
from data_tools.token_files import TokenFile
from data_tools.tokenizer import Tokenizer
from data_tools.verify import Verified

_FIRST_IDS = 16


def result(manifest: Manifest, directory: Path, console: Console) -> None:
    """Print what a build made."""
    console.print(_counts_table(manifest.counts))
    console.print(_splits_table(manifest))
    console.print(
        f"The corpus is in {directory}; look at it with: pmc-data inspect {directory}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def statistics(corpus: Corpus, console: Console) -> None:
    """Print the counts of a corpus: splits, tokens a paper, licences, what was left out."""
    manifest = corpus.manifest
    console.print(_splits_table(manifest))
    paths = [table_path(corpus.directory, part.name) for part in manifest.parts]
    documents = read_documents(paths, ["tokens", "license"]).filter(_counted(corpus))
    console.print(_quantiles_table(documents["tokens"].to_numpy()))
    console.print(_licenses_table(documents["license"]))
    console.print(_counts_table(manifest.counts))


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


def _counts_table(counts: Counts) -> Table:
    table = Table("papers", "count", title="Read and left out", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("read", f"{counts.read:,}")
    for reason, number in sorted(counts.left_out.items()):
        table.add_row(f"left out: {reason}", f"{number:,}")
    table.add_row("kept", f"{counts.kept:,}", style="bold")
    return table


def _splits_table(manifest: Manifest) -> Table:
    table = Table("split", "documents", "tokens", title="Corpus", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in sorted(manifest.splits.items(), reverse=True):
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}")
    return table


def _quantiles_table(tokens: Any) -> Table:
    names = ("min", "10 %", "median", "90 %", "99 %", "max", "mean")
    values = [*np.quantile(tokens, [0, 0.1, 0.5, 0.9, 0.99, 1]), np.mean(tokens)]
    table = Table(*names, title="Tokens a paper", title_justify="left")
    table.add_row(*(f"{value:,.0f}" for value in values))
    return table


def _licenses_table(licenses: Any) -> Table:
    table = Table("license", "documents", title="Licences", title_justify="left")
    table.columns[1].justify = "right"
    counts = [
        (entry["counts"], entry["values"] or "none stated") for entry in licenses.value_counts().to_pylist()
    ]
    for count, name in sorted(counts, key=lambda entry: (-entry[0], entry[1])):
        table.add_row(Text(name), f"{count:,}")
    return table


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
        "split": _split_of(corpus, start),
        "tokens": f"{row['tokens']:,}",
        "first ids": " ".join(str(token) for token in ids[:_FIRST_IDS].tolist()),
    }
    for name, value in facts.items():
        table.add_row(name, Text("-" if value is None else str(value)))
    return table


def _split_of(corpus: Corpus, start: int) -> str:
    for name in corpus.manifest.splits:
        positions = corpus.split(name).positions[:-1]
        place = int(np.searchsorted(positions, start))
        if place < len(positions) and positions[place] == start:
            return name
    return "left out (a duplicate or retracted)"


def _counted(corpus: Corpus) -> Any:
    """Which documents of the corpus are in a split, `[documents]`."""
    paths = [table_path(corpus.directory, part.name) for part in corpus.manifest.parts]
    tokens = read_documents(paths, ["tokens"])["tokens"].to_numpy().astype(np.int64)
    starts = np.cumsum(tokens) - tokens
    return np.isin(
        starts, np.concatenate([corpus.split(name).positions[:-1] for name in corpus.manifest.splits])
    )


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
