"""`pmc-llama report`: what models answered, in one table beside what was published."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from data_tools.errors import UserError
from data_tools.files import write_published
from pmc_llama.arguments import Parser
from pmc_llama.evaluate.results import read_scores
from pmc_llama.report.contamination import read_looked_for
from pmc_llama.report.rows import Report, make_report
from pmc_llama.report.table import as_csv, describe, markdown

_WIDTH = 140


def report(arguments: Sequence[str]) -> int:
    """Put the answers of models to questions in one table, beside what was published."""
    options = _parser().parse_args(arguments)
    results = [read_scores(path) for path in options.results]
    looked_for = read_looked_for(options.corpus) if options.corpus else None
    found = make_report(results, str(options.corpus) if options.corpus else None, looked_for)

    from rich.console import Console

    # A file has no width, and a table that is folded into 80 columns cannot be read there.
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(describe(found))
    if options.output:
        _write(found, options.output)
        print(f"{options.output} has it as report.md, report.csv, report.json and report.png")
    return 0


def _write(found: Report, directory: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"The picture needs matplotlib ({error}); pip install matplotlib.") from error
    from pmc_llama.report.picture import draw

    content = msgspec.json.format(msgspec.json.encode(found), indent=2)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draw(found, directory / "report.png")
        write_published(directory / "report.csv", as_csv(found).encode())
        write_published(directory / "report.json", content + b"\n")
        write_published(directory / "report.md", markdown(found).encode())
    except OSError as error:
        raise UserError(f"The report cannot be written to {directory}: {error.strerror}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser("pmc-llama report", description=report.__doc__)
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULT.json",
        help="that `pmc-llama evaluate --questions DIR --output RESULT.json` wrote",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="that the models were trained on: also tell the accuracy on questions that are not in it",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write Markdown, CSV, JSON and a picture there, too"
    )
    return parser
