"""A report in tables: on a terminal, as Markdown, as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pmc_llama.evaluate.results import Scores, Setting
from pmc_llama.report.paper import LLAMA, PMC_LLAMA, published
from pmc_llama.report.rows import Accuracy, Report, Row, make_report

NAMES = {"medqa_4options": "USMLE", "medqa_5options": "USMLE, 5 options", "medmcqa": "MedMCQA"} | {
    "pubmedqa": "PubMedQA",
    "bioasq_yesno": "BioASQ yes/no",
}
"""Of sets, as the paper calls them."""
_SETTINGS: dict[Setting | None, str] = {
    "zero-shot": "zero-shot",
    "full": "full fine-tuning",
    "peft": "parameter-efficient fine-tuning",
    "data-efficient": "data-efficient fine-tuning",
    "peft-data-efficient": "data-efficient, parameter-efficient fine-tuning",
    None: "setting not told",
}
READING = (
    "Accuracy in percent, with Wilson's 95% interval. An invalid answer counts as wrong.",
    "Majority is the accuracy of always giving the split's most frequent answer.",
    "Published figures are without interval; prompt and test questions of theirs may differ. Their USMLE is "
    "out of the domain of full and parameter-efficient fine-tuning, which was on PubMedQA and MedMCQA.",
)


@dataclass(frozen=True)
class Cells:
    """A table in words: its title, heads of columns, and rows as long as those."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report) -> list[Cells]:
    """The tables of a report; those that would be empty are left out."""
    found = [_overview(report), _details(report.rows), _pairs(report), _overlap(report)]
    return [table for table in found if table.rows]


def answers_table(scores: Scores) -> RenderableType:
    """One model's answers, for a terminal."""
    lines = tuple(_figures(row) for row in make_report([scores]).rows)
    return _rich(Cells(f"Answers of {scores.name}, {scores.method}", _FIGURES, lines))


def describe(report: Report) -> RenderableType:
    """All of it, for a terminal."""
    notes = [Text(sentence, style="dim") for sentence in (*READING, *report.notes)]
    return Group(*(_rich(cells) for cells in tables(report)), *notes)


def markdown(report: Report) -> str:
    """All of it as Markdown; the picture is `report.png` beside it."""
    lines = ["# Answers to questions", ""]
    for cells in tables(report):
        rule = ["---", *["---:"] * (len(cells.head) - 1)]
        lines += [f"## {cells.title}", ""]
        lines += [f"| {' | '.join(map(_escape, row))} |" for row in (cells.head, rule, *cells.rows)]
        lines += [""]
    lines += [f"- {sentence}" for sentence in (*READING, *report.notes)]
    lines += ["", "![accuracies with their intervals, majority class and published figures](report.png)", ""]
    return "\n".join(lines)


def as_csv(report: Report) -> str:
    """A line a model and set; shares from 0 to 1, empty where there is none."""
    buffer = io.StringIO()
    lines = [_flat(row) for row in report.rows]
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def name_of(row: Row) -> str:
    """A set's name in a table, with its split where that is not the test."""
    name = NAMES.get(row.set, row.set)
    return name if row.split == "test" else f"{name} ({row.split})"


def _overview(report: Report) -> Cells:
    """Settings by sets, as the paper prints it, with its own rows below ours."""
    sets = list(dict.fromkeys(name_of(row) for row in report.rows))
    majorities = {name_of(row): _percent(row.majority) for row in report.rows}
    lines = [("majority class", *(majorities[name] for name in sets))]
    for setting in sorted({row.setting for row in report.rows}, key=list(_SETTINGS).index):
        lines.append((_SETTINGS[setting], *[""] * len(sets)))
        ours = [row for row in report.rows if row.setting == setting]
        for label in dict.fromkeys(row.label for row in ours):
            cells = {name_of(row): _with_interval(row.accuracy) for row in ours if row.label == label}
            lines.append((f"  {label}", *(cells.get(name, "-") for name in sets)))
        for model in (LLAMA, PMC_LLAMA):
            figures = {name_of(row): published(setting, row.set, row.split) for row in report.rows}
            cells = {name: _percent(found[model]) for name, found in figures.items() if model in found}
            if cells:
                lines.append((f"  {model}, published", *(cells.get(name, "-") for name in sets)))
    return Cells("Accuracy, %", ("", *sets), tuple(lines))


def _details(rows: Sequence[Row]) -> Cells:
    lines = [(row.label, *_figures(row), row.prompt, row.method) for row in rows]
    return Cells("Each model on each set", ("model", *_FIGURES, "prompt", "answer"), tuple(lines))


_FIGURES = ("questions", "n", "majority", "accuracy", "95% interval", "invalid", "cut")


def _figures(row: Row) -> tuple[str, ...]:
    return (
        name_of(row),
        f"{row.accuracy.questions:,}",
        _percent(row.majority),
        _percent(row.accuracy.share),
        _interval(row.accuracy),
        f"{row.invalid:,}" if row.method == "generated" else "-",
        f"{row.cut:,}",
    )


def _pairs(report: Report) -> Cells:
    head = (
        *("first", "second", "questions", "n", "second - first, points", "only first right"),
        *("only second right", "p (McNemar, exact)"),
    )
    names = {(row.set, row.split): name_of(row) for row in report.rows}
    lines = [
        (
            pair.first,
            pair.second,
            names[pair.set, pair.split],
            f"{pair.test.questions:,}",
            f"{100 * pair.test.difference:+.2f}",
            f"{pair.test.only_first:,}",
            f"{pair.test.only_second:,}",
            f"{pair.test.p:.3g}",
        )
        for pair in report.pairs
    ]
    return Cells("Two models on the same questions", head, tuple(lines))


def _overlap(report: Report) -> Cells:
    head = ("model", "questions", "n", "in the corpus", "too short to find", "accuracy without", "interval")
    lines = [
        (
            row.label,
            name_of(row),
            f"{row.accuracy.questions:,}",
            f"{row.clean.overlapping:,}",
            f"{row.clean.too_short:,}",
            _percent(row.clean.accuracy.share),
            _interval(row.clean.accuracy),
        )
        for row in report.rows
        if row.clean
    ]
    return Cells(f"Questions that training papers of {report.corpus} overlap", head, tuple(lines))


def _flat(row: Row) -> dict[str, object]:
    def ends(accuracy: Accuracy | None) -> tuple[object, object]:
        found = accuracy.interval if accuracy else None
        return (found.low, found.high) if found else (None, None)

    clean = row.clean
    low, high = ends(row.accuracy)
    clean_low, clean_high = ends(clean.accuracy if clean else None)
    return {
        "model": row.label,
        "setting": row.setting,
        "set": row.set,
        "split": row.split,
        "prompt": row.prompt,
        "method": row.method,
        "questions": row.accuracy.questions,
        "right": row.accuracy.right,
        "majority": row.majority,
        "accuracy": row.accuracy.share,
        "low": low,
        "high": high,
        "invalid": row.invalid,
        "cut": row.cut,
        "unanswerable": row.unanswerable,
        **{f"published {model}": row.published.get(model) for model in (LLAMA, PMC_LLAMA)},
        "overlapping": clean.overlapping if clean else None,
        "too_short": clean.too_short if clean else None,
        "accuracy_without": clean.accuracy.share if clean else None,
        "low_without": clean_low,
        "high_without": clean_high,
    }


def _rich(cells: Cells) -> Table:
    table = Table(box=box.SIMPLE, title=cells.title, title_justify="left")
    for number, name in enumerate(cells.head):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in cells.rows:
        table.add_row(*map(Text, row))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _interval(accuracy: Accuracy) -> str:
    found = accuracy.interval
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}" if found else "-"


def _with_interval(accuracy: Accuracy) -> str:
    return f"{_percent(accuracy.share)} ({_interval(accuracy)})"


def _escape(cell: str) -> str:
    return cell.strip().replace("|", "\\|")
