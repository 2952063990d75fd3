"""The command `pmc-data questions`."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.questions.written import QuestionSets


def add_arguments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `questions`; it sets `run`, which takes the parsed arguments."""
    text = "bring question sets into one format, for fine-tuning and evaluation"
    command = commands.add_parser(
        "questions",
        help=text,
        description=f"{text}. Read are PubMedQA, MedMCQA, MedQA-USMLE, MMLU, BioASQ's yes-or-no questions "
        "and instructions, as published. Training questions that are also in a dev or test split are left "
        "out; bad ones go to rejected.jsonl.",
    )
    command.set_defaults(run=_run)
    command.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files (.json, .jsonl, .csv, .parquet) and directories of Hugging Face datasets; where the name "
        "tells no split, train=PATH, dev=PATH or test=PATH",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the questions go")
    command.add_argument(
        "--test-ids",
        type=Path,
        metavar="FILE",
        help="PubMedQA's test_ground_truth.json, or an id a line: these are for testing, others for training",
    )
    command.add_argument(
        "--medmcqa-cop-from",
        type=int,
        choices=(0, 1),
        help="what MedMCQA's `cop` counts from, for a file whose values do not tell",
    )
    command.add_argument(
        "--max-rejected",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="share of a file's questions that may be bad (default 0.05)",
    )


def _run(options: argparse.Namespace) -> None:
    from data_tools.questions.build import build_questions

    made = build_questions(
        options.input, options.output, options.test_ids, options.medmcqa_cop_from, options.max_rejected
    )
    show(made, Console())


def show(made: QuestionSets, console: Console) -> None:
    """Print what a directory of questions holds."""
    columns = ("split", "questions", "without answer", "repeated", "removed")
    table = Table("set", *columns, title="Questions", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, of_set in made.manifest.sets.items():
        for split, info in of_set.splits.items():
            counts = (info.questions, info.answers.get("none", 0), info.repeated, info.removed)
            table.add_row(name, split, *(f"{count:,}" for count in counts))
    console.print(table)
    for name, of_set in made.manifest.sets.items():
        _say(console, f"{name}: {of_set.license}")
    for found in made.manifest.duplicates:
        _say(console, f"{found.questions:,} of {found.train}'s training questions stand in {found.evaluated}")
    for source in made.manifest.sources:
        left_out = {**source["rejected"], **source["not_chosen"]}
        if left_out:
            told = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
            _say(console, f"{source['file']}: left out {told}")
    if made.manifest.test_ids_not_found:
        _say(console, f"{made.manifest.test_ids_not_found:,} of the test ids are ids of no question")
    _say(console, f"The questions are in {made.directory}")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _share(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 0 to 1")
    return number
