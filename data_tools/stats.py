"""What is in a corpus, from its tables and corpus.json alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.corpus import Corpus
from data_tools.documents import read_table, table_path
from data_tools.licenses import license_group
from data_tools.question_table import read_question_table
from data_tools.splits import read_reasons

JOURNALS = 20
"""How many journals are named."""
_COLUMNS = ["tokens", "text_bytes", "year", "journal", "license"]
_BINS_A_DOUBLING = 2


@dataclass(frozen=True)
class Share:
    """Counted papers of one year, journal or licence group, and their tokens."""

    papers: int
    tokens: int


@dataclass(frozen=True)
class Step:
    """A step of the waterfall from records read to papers kept: why how many went, and what was left."""

    reason: str
    left_out: int
    left: int


@dataclass(frozen=True)
class Overlap:
    """The questions of a test set: all, those too short to be matched, and those that documents overlap.

    `ids` are those that overlap the training split.
    """

    questions: int
    unmatched: int
    overlapping: int
    train: int
    heldout: int
    ids: list[str]


@dataclass(frozen=True)
class Statistics:
    """A corpus in numbers; but for `waterfall` and `splits` of the papers that count in either split.

    Attributes:
        splits: by name.
        text_bytes: of the texts, UTF-8.
        quantiles: tokens a paper at the smallest, 10 %, 50 %, 90 %, 99 %, the largest, and the mean.
        edges: of the histogram of tokens a paper, `[bins + 1]`, two bins a doubling.
        histogram: papers in each bin, `[bins]`.
        years: in order, "none" last.
        journals: the 20 with most papers, then "others" and "none" where there are any.
        licenses: by group.
        waterfall: first what reading and the rules left out, by number, then the decisions in their order.
        overlaps: by test set.
    """

    splits: dict[str, Share]
    text_bytes: int
    quantiles: dict[str, float]
    edges: list[int]
    histogram: list[int]
    years: dict[str, Share]
    journals: dict[str, Share]
    licenses: dict[str, Share]
    waterfall: list[Step]
    overlaps: dict[str, Overlap]


def statistics(corpus: Corpus) -> Statistics:
    """Count a corpus; about 30 bytes a document are in memory at once.

    Raises:
        UserError: a table or a decided file cannot be read.
    """
    manifest = corpus.manifest
    table = _counted(corpus)
    tokens = table["tokens"].to_numpy()
    edges, histogram = _histogram(tokens)
    return Statistics(
        splits={name: Share(split.documents, split.tokens) for name, split in manifest.splits.items()},
        text_bytes=int(pc.sum(table["text_bytes"]).as_py() or 0),
        quantiles=_quantiles(tokens),
        edges=edges,
        histogram=histogram,
        years=dict(sorted(_shares(table, "year").items())),
        journals=_most(_shares(table, "journal")),
        licenses=_shares(table, "license"),
        waterfall=_waterfall(corpus),
        overlaps=_overlaps(corpus),
    )


def _counted(corpus: Corpus) -> Any:
    """The documents of both splits: tokens, bytes of text, year, journal, and the group of the licence."""
    manifest, start, tables = corpus.manifest, 0, []
    path = manifest.path(corpus.directory, "reasons.npy")
    reasons = read_reasons(path, sum(part.documents for part in manifest.parts))
    for part in manifest.parts:
        table = read_table(table_path(corpus.directory, part.name), _COLUMNS)
        counts = reasons[start : start + part.documents] == 0
        start += part.documents
        tables.append(_compact(table.filter(pa.array(counts))))
    return pa.concat_tables(tables).unify_dictionaries()


def _compact(table: Any) -> Any:
    """A table with the licences' groups in place of their statements, and names as dictionaries."""
    statements = table["license"].combine_chunks().dictionary_encode()
    groups = pa.array([license_group(one) for one in statements.dictionary.to_pylist()], pa.string())
    licenses = pc.fill_null(groups.take(statements.indices), "unknown")
    years = pc.fill_null(table["year"].cast(pa.string()), "none")
    for name, column in (("license", licenses), ("year", years), ("journal", table["journal"])):
        place = table.schema.get_field_index(name)
        encoded = pc.fill_null(column, "none").cast(pa.string()).dictionary_encode()
        table = table.set_column(place, name, encoded)
    return table


def _shares(table: Any, name: str) -> dict[str, Share]:
    """Papers and tokens by the values of a column, most papers first."""
    grouped = table.group_by(name).aggregate([("tokens", "count"), ("tokens", "sum")])
    rows = zip(
        grouped[name].to_pylist(),
        grouped["tokens_count"].to_pylist(),
        grouped["tokens_sum"].to_pylist(),
        strict=True,
    )
    ordered = sorted(rows, key=lambda row: (-row[1], row[0]))
    return {value: Share(papers, tokens) for value, papers, tokens in ordered}


def _most(shares: dict[str, Share]) -> dict[str, Share]:
    """The journals with most papers, and the others and those without name together."""
    named = [(name, share) for name, share in shares.items() if name != "none"]
    found = dict(named[:JOURNALS])
    if named[JOURNALS:]:
        found[f"{len(named) - JOURNALS:,} others"] = _sum(share for _, share in named[JOURNALS:])
    if "none" in shares:
        found["none"] = shares["none"]
    return found


def _sum(shares: Iterable[Share]) -> Share:
    listed = list(shares)
    return Share(sum(share.papers for share in listed), sum(share.tokens for share in listed))


def _quantiles(tokens: NDArray[np.int32]) -> dict[str, float]:
    names = ("min", "10 %", "median", "90 %", "99 %", "max")
    values = np.quantile(tokens, [0, 0.1, 0.5, 0.9, 0.99, 1]).tolist()
    return {**dict(zip(names, values, strict=True)), "mean": float(np.mean(tokens))}


def _histogram(tokens: NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Papers by tokens, in bins of equal ratio from the shortest to the longest."""
    low, high = np.log2([tokens.min(), tokens.max() + 1])
    first, last = np.floor(low * _BINS_A_DOUBLING), np.ceil(high * _BINS_A_DOUBLING)
    edges = np.unique(np.round(2.0 ** (np.arange(first, last + 1) / _BINS_A_DOUBLING)).astype(np.int64))
    counts, _ = np.histogram(tokens, np.append(edges[:-1], edges[-1] + 1))
    return edges.tolist(), counts.tolist()


def _waterfall(corpus: Corpus) -> list[Step]:
    counts, decisions = corpus.manifest.counts, corpus.manifest.decisions
    decided = {decision.reason: decision.documents for decision in decisions}
    by_reading = {reason: number - decided.get(reason, 0) for reason, number in counts.left_out.items()}
    order = sorted(by_reading, key=lambda reason: (-by_reading[reason], reason))
    left, steps = counts.read, []
    for reason, number in [*((reason, by_reading[reason]) for reason in order), *decided.items()]:
        if number:
            left -= number
            steps.append(Step(reason, number, left))
    return steps


def _overlaps(corpus: Corpus) -> dict[str, Overlap]:
    manifest = corpus.manifest
    if "questions.parquet" not in manifest.files:
        return {}
    table = read_question_table(manifest.path(corpus.directory, "questions.parquet"))
    sets = np.array([question.set for question in table.questions])
    unmatched = np.array([not question.matched for question in table.questions])
    found = {}
    for name in dict.fromkeys(sets.tolist()):
        of_set = sets == name
        found[name] = Overlap(
            questions=int(of_set.sum()),
            unmatched=int((of_set & unmatched).sum()),
            overlapping=int((of_set & (table.documents > 0)).sum()),
            train=int((of_set & (table.train > 0)).sum()),
            heldout=int((of_set & (table.heldout > 0)).sum()),
            ids=[table.questions[number].id for number in np.flatnonzero(of_set & (table.train > 0))],
        )
    return found
