"""pmc-data: the command line of the data tools."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

# Without the threads that numpy and pyarrow start when they are imported, a build can fork its workers.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

from data_tools.errors import UserError
from data_tools.fetch.command import add_arguments as add_fetch
from data_tools.prompted_command import add_arguments as add_prompts
from data_tools.questions.command import add_arguments as add_questions
from data_tools.recipe import Decisions, Recipe
from data_tools.recipe_file import changed, leaves, read_recipe

# Each command imports what it needs: a build waits for its imports, and every worker imports this module.


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
    from rich.console import Console

    from data_tools import show
    from data_tools.build import build
    from data_tools.decide import require_possible
    from data_tools.launcher import discover, require_alone

    recipe = read_recipe(options.recipe, _dotted(options))
    require_possible(recipe.decisions, recipe.measures)
    task = discover()
    if options.shared:
        from data_tools.shared_build import build_shared

        share = build_shared(options.input, options.tokenizer, options.output, recipe, options.workers, task)
        if share.finalized:
            show.result(share.manifest, options.output, Console())
        else:
            parts = f"{share.parts:,} of {len(share.manifest.parts):,} parts"
            print(f"The corpus {options.output} is finished; {parts} were made by this process.")
        return
    require_alone(task)
    manifest = build(options.input, options.tokenizer, options.output, recipe, options.workers)
    show.result(manifest, options.output, Console())


def _finalize(options: argparse.Namespace) -> None:
    from rich.console import Console

    from data_tools import show
    from data_tools.finalize import decide_again
    from data_tools.manifest import read_manifest

    current = read_manifest(options.corpus).recipe.decisions
    decisions: Decisions = changed(current, _dotted(options), prefix="decisions.")
    show.result(decide_again(options.corpus, decisions), options.corpus, Console())


def _merge(options: argparse.Namespace) -> None:
    from data_tools.merge import merge

    merged = merge(options.corpus, options.prefix, options.split)
    print(f"{options.prefix}.bin and .idx: {merged.documents:,} documents, {merged.tokens:,} tokens.")


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    from data_tools import show
    from data_tools.before_after import before_after
    from data_tools.corpus import Corpus

    if options.before_after:
        recipe = read_recipe(options.recipe, _dotted(options))
        before_after(options.corpus, options.document, recipe, Console())
    elif options.recipe or _dotted(options):
        raise UserError(
            "--recipe and --require-pmc-id belong to --before-after; a corpus has its own recipe."
        )
    else:
        show.document(Corpus.open(options.corpus), options.document, Console())


def _stats(options: argparse.Namespace) -> None:
    from rich.console import Console

    from data_tools import show
    from data_tools.charts import draw
    from data_tools.corpus import Corpus
    from data_tools.manifest import to_json
    from data_tools.stats import statistics

    found = statistics(Corpus.open(options.corpus))
    if options.png:
        draw(found, options.png)
    if options.json:
        print(to_json(asdict(found)).decode(), end="")
    else:
        show.statistics(found, Console())


def _verify(options: argparse.Namespace) -> None:
    from rich.console import Console

    from data_tools import show
    from data_tools.verify import verify

    show.verified(verify(options.corpus), Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pmc-data", description="From papers to token files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_fetch(commands)
    _add_build(commands.add_parser("build", help="read, select, clean, tokenize and divide papers"))
    text = "decide again which documents of a corpus count, without reading a text"
    finalize = commands.add_parser("finalize", help=text, description=f"{text}.", allow_abbrev=False)
    _add_corpus(finalize, _finalize)
    _add_dotted(finalize, leaves(Decisions, "decisions."))
    text = "write the documents of a split as one Megatron .bin and .idx"
    merging = commands.add_parser("merge", help=text, description=f"{text}.")
    _add_corpus(merging, _merge)
    merging.add_argument("prefix", type=Path, metavar="PREFIX", help="of the two files")
    merging.add_argument("--split", choices=("train", "heldout"), default="train", help="default train")
    _add_inspect(commands.add_parser("inspect", help="show a document, or what cleaning does to a paper"))
    text = "papers and tokens: lengths, years, journals, licences, kept and left out"
    stats = commands.add_parser("stats", help=text, description=f"{text}.")
    _add_corpus(stats, _stats)
    stats.add_argument("--png", type=Path, metavar="FILE", help="draw them, too")
    stats.add_argument("--json", action="store_true", help="print them as JSON")
    text = "check every checksum, every index, and a sample of documents"
    _add_corpus(commands.add_parser("verify", help=text, description=f"{text}."), _verify)
    add_questions(commands)
    add_prompts(commands)
    return parser


def _add_corpus(command: argparse.ArgumentParser, run: object) -> None:
    command.set_defaults(run=run)
    command.add_argument("corpus", type=_local, metavar="DIR", help="a corpus that `build` made")


def _add_build(command: argparse.ArgumentParser) -> None:
    command.description = (
        "From papers to a corpus of token files. A killed or interrupted build goes on with the same command."
    )
    command.allow_abbrev = False
    command.set_defaults(run=_build)
    command.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, directories or URLs of papers: S2ORC and plain text as .jsonl or .parquet, JATS as "
        ".xml, .nxml or .tar.gz; gzip and zstd are known",
    )
    command.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL", help="SentencePiece model")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the corpus goes")
    command.add_argument(
        "--workers", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )
    command.add_argument(
        "--shared",
        action="store_true",
        help="build together with every process that was started with this command, on any machine: by srun, "
        "by mpirun, or as a SLURM array",
    )
    _add_recipe(command)
    command.add_argument(
        "--heldout",
        dest=_dest("decisions.heldout"),
        type=_fraction,
        metavar="F",
        help="share of papers held out (default 0.01)",
    )
    keys = leaves(Recipe)
    del keys["require_pmc_id"]
    _add_dotted(command, keys)


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Show a document of a corpus: its paper, tokens and text. With --before-after: a paper of the "
        "input and what each rule of a recipe does to it, removed in red, added in green."
    )
    command.set_defaults(run=_inspect)
    command.add_argument(
        "corpus",
        type=_local,
        metavar="PATH",
        help="a corpus; with --before-after papers, as `build` takes them",
    )
    command.add_argument(
        "--document", type=int, metavar="N", default=0, help="its number, from 0 (default 0)"
    )
    command.add_argument("--before-after", action="store_true", help="show what the rules do to a paper")
    _add_recipe(command)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="YAML: rules, measures and decisions, such as recipes/corpus_pmc.yaml (default: white space and "
        "the sections of references and declarations)",
    )
    command.add_argument(
        "--require-pmc-id",
        dest=_dest("require_pmc_id"),
        choices=("true", "false"),
        help="leave out papers without a PMC id (default true)",
    )


def _add_dotted(command: argparse.ArgumentParser, keys: dict[str, str]) -> None:
    group = command.add_argument_group("single values of the recipe, as YAML")
    for key, wanted in keys.items():
        group.add_argument(f"--{key}", dest=_dest(key), metavar="VALUE", help=wanted)


_OF_RECIPE = "recipe:"


def _dest(key: str) -> str:
    return _OF_RECIPE + key


def _dotted(options: argparse.Namespace) -> dict[str, str]:
    """The values of the recipe that were given as options, by dotted key."""
    given = {
        name.removeprefix(_OF_RECIPE): value
        for name, value in vars(options).items()
        if name.startswith(_OF_RECIPE)
    }
    return {key: str(value) for key, value in given.items() if value is not None}


def _local(value: str) -> Path:
    if "://" in value:
        raise argparse.ArgumentTypeError(f"{value} is not on this machine; copy it here for this command")
    return Path(value)


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
