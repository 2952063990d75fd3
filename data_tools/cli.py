"""pmc-data: the command line of the data tools."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_tools import show
from data_tools.build import build
from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.recipe import Decisions, Recipe
from data_tools.verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"pmc-data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pmc-data: interrupted; finished parts are kept, the same command goes on.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _build(options: argparse.Namespace) -> None:
    manifest = build(
        options.input,
        options.tokenizer,
        options.output,
        Recipe(require_pmc_id=options.require_pmc_id == "true", decisions=Decisions(heldout=options.heldout)),
        options.workers,
    )
    show.result(manifest, options.output, Console())


def _inspect(options: argparse.Namespace) -> None:
    show.document(Corpus.open(options.corpus), options.document, Console())


def _stats(options: argparse.Namespace) -> None:
    show.statistics(Corpus.open(options.corpus), Console())


def _verify(options: argparse.Namespace) -> None:
    show.verified(verify(options.corpus), Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pmc-data", description="From papers to token files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="read, select, clean, tokenize and divide papers"))
    for name, run, text in (
        ("inspect", _inspect, "show one document: its paper, tokens and text"),
        ("stats", _stats, "count documents and tokens, kept and left out"),
        ("verify", _verify, "check every checksum, every index, and a sample of documents"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("corpus", type=Path, metavar="DIR", help="a corpus that `build` made")
        command.set_defaults(run=run)
        if name == "inspect":
            command.add_argument(
                "--document", type=int, metavar="N", default=0, help="its number, from 0 (default 0)"
            )
    return parser


def _add_build(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_build)
    command.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="papers: .jsonl and .jsonl.gz (S2ORC), .xml and .nxml (JATS), or directories of them",
    )
    command.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL", help="SentencePiece model")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the corpus goes")
    command.add_argument(
        "--workers", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )
    command.add_argument(
        "--heldout", type=_fraction, default=0.01, metavar="F", help="share of papers held out (default 0.01)"
    )
    command.add_argument(
        "--require-pmc-id",
        choices=("true", "false"),
        default="true",
        help="leave out papers without a PMC id (default true)",
    )


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number of at least 1")
    return int(value)


def _fraction(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least 0 and below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
