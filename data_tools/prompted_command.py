"""The command `pmc-data prompts`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from data_tools.manifest import Manifest
    from data_tools.prompt_documents import PromptDocument, PromptRecipe
    from data_tools.prompt_questions import Asked
    from data_tools.tokenizer import Tokenizer

_NO_LOSS, _LOSS = "dim", "bold green"


def add_arguments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `prompts`; it sets `run`, which takes the parsed arguments."""
    text = "make a corpus of questions with their answers, for fine-tuning"
    command = commands.add_parser(
        "prompts",
        help=text,
        description=f"{text}: each a document by itself, BOS, prompt, answer and EOS, on which "
        "`pmc-llama train` trains with data.mode whole. The train splits are trained on, the dev splits are "
        "held out.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_run)
    command.add_argument("--questions", type=Path, required=True, metavar="DIR", help="what `questions` made")
    command.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="of the model")
    command.add_argument(
        "--prompt",
        required=True,
        metavar="ID",
        help="the template: pmc-llama, plain, or alpaca for instructions",
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="where the corpus goes")
    command.add_argument(
        "--sets", default="", metavar="NAMES", help="sets to train on, with commas between (default all)"
    )
    drawn = command.add_mutually_exclusive_group()
    drawn.add_argument("--number", type=int, metavar="N", help="draw so many training questions")
    drawn.add_argument(
        "--fraction", type=float, metavar="F", help="draw this share of the training questions"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the draw; fewer are among more (default 0)"
    )
    command.add_argument(
        "--max-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="longest document, with BOS and EOS (default 2048)",
    )
    command.add_argument(
        "--overlong",
        choices=("drop", "cut_context", "refuse"),
        default="drop",
        help="what to do with longer ones, which are counted: leave them out, shorten the context from its "
        "end, or make nothing (default drop)",
    )
    command.add_argument(
        "--loss",
        choices=("answer", "all"),
        default="answer",
        help="train on the answer and EOS, or on the prompt, too (default answer)",
    )
    command.add_argument(
        "--show-prompt",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="print training question N, from 0 (default 0), what is trained on in green; without --output "
        "nothing is made",
    )


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from data_tools.prompt_documents import PromptRecipe
    from data_tools.prompted import make_prompts

    recipe = PromptRecipe(
        options.prompt,
        tuple(name for name in options.sets.split(",") if name),
        options.number,
        options.fraction,
        options.seed,
        options.max_tokens,
        options.overlong,
        options.loss,
    )
    if options.output is None and options.show_prompt is None:
        raise UserError("Give --output, where the corpus goes, or --show-prompt to look at a prompt.")
    if options.show_prompt is not None:
        _show(options.questions, options.tokenizer, options.show_prompt, recipe, Console())
    if options.output is not None:
        made = make_prompts(options.questions, options.tokenizer, options.output, recipe)
        _tell(made, options.output, Console())


def _tell(made: "Manifest", output: Path, console: "Console") -> None:
    """Print what was made, and how many questions there were to make it of."""
    from data_tools import show

    show.result(made, output, console, records="questions")
    prompts = json.loads((output / "prompts.json").read_bytes())
    for split, counts in prompts["splits"].items():
        console.print(
            f"{split}: {counts['documents']:,} of {counts['questions']:,} questions, "
            f"{counts['context_cut']:,} with a shortened context",
            highlight=False,
        )
    if "medmcqa" in prompts["recipe"]["sets"] and prompts["splits"]["dev"]["documents"]:
        console.print(
            "MedMCQA's dev split is held out, and is what the paper tests on: choose nothing by its loss."
        )


def _show(questions: Path, path: Path, number: int, recipe: "PromptRecipe", console: "Console") -> None:
    """Print a training question as a document.

    Raises:
        UserError: there is none of this number, or it cannot be made one.
    """
    from data_tools.prompt_documents import NotUsable, document_of, require_possible
    from data_tools.prompt_questions import chosen_sets, read_asked
    from data_tools.questions.written import QuestionSets
    from data_tools.tokenizer import Tokenizer

    require_possible(recipe)
    found, tokenizer = QuestionSets.open(questions), Tokenizer(path)
    asked = read_asked(found, chosen_sets(found, recipe), "train")
    if not 0 <= number < len(asked):
        raise UserError(f"There is no training question {number} in {questions}; it has {len(asked):,}.")
    one = asked[number]
    document = document_of(one.question, tokenizer, recipe)
    if isinstance(document, NotUsable):
        raise UserError(
            f"Question {number}, {one.set}.train.jsonl:{one.line}, is left out, {document.reason}: "
            f"{document.detail}; show another."
        )
    show_document(document, one, tokenizer, recipe, console)


def show_document(
    document: "PromptDocument",
    asked: "Asked",
    tokenizer: "Tokenizer",
    recipe: "PromptRecipe",
    console: "Console",
) -> None:
    """Print a document, what carries loss in green, and how many tokens it has."""
    from rich.text import Text

    ids, first = document.tokens, document.answer if recipe.loss == "answer" else 1
    before = tokenizer.decode(ids[:first])
    text = Text("<BOS>" if tokenizer.bos >= 0 else "", style=_NO_LOSS)
    text.append(before, style=_NO_LOSS)
    text.append(document.text[len(before) :], style=_LOSS)
    text.append("<EOS>", style=_LOSS)
    console.print(text, soft_wrap=True)
    cut = f"; {document.cut:,} words of its context are left out" if document.cut else ""
    console.print(
        f"{asked.set}.train.jsonl:{asked.line}, id {asked.question.id}, prompt {recipe.prompt}: {len(ids):,} "
        f"tokens, loss on the last {len(ids) - first:,}, in green: "
        f"{(document.text[len(before) :] + '<EOS>')!r}{cut}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
