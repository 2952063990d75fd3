"""The command line: `pmc-llama plan | preflight | train | compare | export | evaluate | report | checkpoint`.

Each command is one function that reads its arguments and calls the module that does the work. torch is
imported only then, so that help and mistakes in a recipe are told at once.
"""

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

import yaml

from data_tools.errors import UserError
from pmc_llama.arguments import Parser
from pmc_llama.config import BackendName, plain

USAGE = "usage: pmc-llama [-h] COMMAND ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; those of the process when None.

    Returns:
        Exit status: 0, 2 for what the user can mend, told in one sentence on stderr, 75 of a run that was
        asked to stop and goes on with --resume, 130 when interrupted, 1 on a rank that fails because another
        did.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command}; expected one of {', '.join(COMMANDS)}")
        return COMMANDS[command](rest) or 0
    except UserError as error:
        if command not in WITH_RANKS or _first_to_fail(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # the launcher interrupts all ranks
            print("interrupted", file=sys.stderr)
        return 130
    except SystemExit:
        raise  # of --help
    except BaseException as error:  # torch's CheckpointException is no Exception
        if command in WITH_RANKS and not _first_to_fail(error):
            return 1  # of a peer that is gone, which says why
        raise


def program() -> NoReturn:
    """The process: `main`, then an end that cannot change its exit status.

    A process that fails leaves its process groups open, since closing them needs its peers, and may leave
    threads that hang; while Python shuts down the ones would abort it now and then, the others keep it.
    """
    status = 1
    try:
        status = main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
    if "torch.distributed" not in sys.modules:
        sys.exit(status)
    atexit._run_exitfuncs()  # a checkpoint under way is given its minute
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def train(arguments: Sequence[str]) -> int:
    """Train a model as a recipe says, on the ranks that torchrun, srun or mpirun started, or alone."""
    from pmc_llama.recipe_file import RecipeParser, recipe_path

    parser = RecipeParser("pmc-llama train", recipe_path(arguments), _summary(train))
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on from the newest sound checkpoint of the output, or from this one",
    )
    parser.add_argument("--print_config", action="store_true", help="print the recipe as resolved, and end")
    parser.add_argument(
        "--profile", action="store_true", help="profile three steady steps: --logging.profile_steps 3"
    )
    recipe, options = parser.read(arguments)
    if options["profile"]:
        recipe.logging.profile_steps = recipe.logging.profile_steps or 3
    if options["print_config"]:
        print(yaml.safe_dump(plain(recipe), sort_keys=False), end="")
        return 0

    import psutil

    from pmc_llama import trainer

    return trainer.train(recipe, options["resume"], psutil.Process().create_time())


def compare(arguments: Sequence[str]) -> None:
    """Train a recipe in several variants from the same first weights, and report on all of them."""
    from pmc_llama.recipe_file import RecipeParser, recipe_path
    from pmc_llama.variants import cross, read_varied

    parser = RecipeParser("pmc-llama compare", recipe_path(arguments), _summary(compare))
    parser.add_argument("--backends", default="deepspeed,fsdp", help="names, with commas between them")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a key of the recipe, or `ranks`, with the values to try; again for more keys: all combinations",
    )
    parser.add_argument("--repeat", type=int, default=1, help="times that each variant is trained")
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes of each run, on this machine; one a GPU when not given, or 2 without GPUs",
    )
    recipe, options = parser.read(arguments)
    backends = options["backends"].split(",")
    if len(backends) > len({*backends}) or not {*backends} <= {*get_args(BackendName)}:
        known = ", ".join(get_args(BackendName))
        raise UserError(f"--backends is {options['backends']}, expected different ones of {known}")
    for name in ("ranks", "repeat"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name} is {options[name]}, expected 1 or more")

    import torch

    from pmc_llama import compare as comparison

    ranks = options["ranks"] or torch.cuda.device_count() or 2
    variants = cross(backends, read_varied(options["vary"]), ranks)
    # Read now, so that a mistake in the last variant is told before the first is trained.
    changed = [(variant, parser.read([*arguments, *variant.options])[0]) for variant in variants]
    report = comparison.compare(recipe, changed, options["repeat"])
    print(f"{report} and comparison.png beside it say how they compare")


def export(arguments: Sequence[str]) -> None:
    """Write a checkpoint as a Hugging Face model, or its adapters as PEFT has them."""
    parser = Parser("pmc-llama export", description=_summary(export))
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint directory, or the output directory of a run, whose newest checkpoint it is then",
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="where the model goes; must not exist, or be empty"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default bf16, of adapters fp32)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of a run with lora, as PEFT reads them (default: merge them)",
    )
    _add_publishing(parser.add_argument_group("publishing"))
    options = parser.parse_args(arguments)
    if options.push_to_hub and not options.license:
        raise UserError("--push-to-hub needs --license: whoever publishes a model says under which licence.")

    from pmc_llama import huggingface
    from pmc_llama.model_card import About

    about = About(options.license, tuple(options.results))

    source = _newest(options.checkpoint)
    if options.adapter:
        from pmc_llama.peft_directory import export_adapters

        export_adapters(source, options.directory, options.dtype or "fp32", about)
        ready = "PeftModel.from_pretrained and `pmc-llama evaluate --adapter`"
    else:
        huggingface.export(source, options.directory, options.dtype or "bf16", about=about)
        ready = "LlamaForCausalLM.from_pretrained and AutoTokenizer"
    print(f"{options.directory} is ready for {ready}")
    if options.push_to_hub:
        from pmc_llama import hub

        if options.dry_run:
            print(hub.listing(options.directory, options.push_to_hub))
        else:
            print(hub.upload(options.directory, options.push_to_hub, options.private))


def _add_publishing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload DIR to the Hugging Face Hub once it is written"
    )
    group.add_argument("--private", action="store_true", help="make the repository a private one")
    group.add_argument(
        "--dry-run", action="store_true", help="write DIR, and only list what would be uploaded"
    )
    group.add_argument(
        "--license",
        metavar="ID",
        help="for the model card: a licence of the Hub, such as apache-2.0 or llama2",
    )
    group.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="for the model card: what `pmc-llama evaluate --output` wrote of this model",
    )


def checkpoint(arguments: Sequence[str]) -> None:
    """List, verify or inspect checkpoints: progress and size, every checksum, all that is known of them."""
    parser = Parser("pmc-llama checkpoint", description=_summary(checkpoint))
    parser.add_argument("action", choices=("list", "verify", "inspect"), help="what to do")
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="output directory of a run, or one checkpoint"
    )
    options = parser.parse_args(arguments)

    from pmc_llama import checkpoint_report
    from pmc_llama.checkpoint import NewerFormat, read_manifest, verify

    describe: dict[str, Callable[[Path], str]] = {
        "list": lambda path: checkpoint_report.line(path, read_manifest(path)),
        "verify": lambda path: f"{checkpoint_report.line(path, verify(path))}, every file is sound",
        "inspect": lambda path: checkpoint_report.describe(path, read_manifest(path)),
    }
    damaged = 0
    paths = _checkpoints(options.directory)
    for path in paths:
        try:
            print(describe[options.action](path), flush=True)
        except NewerFormat:
            raise
        except UserError as error:
            damaged += 1
            print(f"{path}  {error}", flush=True)
    if damaged:
        raise UserError(
            f"{damaged} of {len(paths)} checkpoints of {options.directory} are damaged; "
            "--resume passes over them"
        )


def plan(arguments: Sequence[str]) -> int:
    """Tell the memory, time and GPU-hours of a recipe on any cluster, without a GPU."""
    from pmc_llama.plan.command import plan

    return plan(arguments)


def preflight(arguments: Sequence[str]) -> int:
    """Check every node before training: GPUs, versions, corpus, checkpoints, disk, memory, network."""
    from pmc_llama.preflight import preflight

    return preflight(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """Judge a model: its answers to questions, and its perplexity on the papers that a corpus holds out."""
    from pmc_llama.evaluate.command import evaluate

    return evaluate(arguments)


def report(arguments: Sequence[str]) -> int:
    """Put the answers of models to questions in one table, beside what was published."""
    from pmc_llama.report.command import report

    return report(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "plan": plan,
    "preflight": preflight,
    "train": train,
    "compare": compare,
    "export": export,
    "evaluate": evaluate,
    "report": report,
    "checkpoint": checkpoint,
}
WITH_RANKS = ("preflight", "train", "evaluate")
"""Commands that a launcher starts as several ranks, of which one shall speak."""


def _checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that a directory stands for, oldest first: a run's, those beside it, or itself."""
    from pmc_llama.checkpoint import MANIFEST, list_checkpoints

    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; expected a run's output directory or a checkpoint")
    if (directory / MANIFEST).is_file():
        return [directory]
    found = list_checkpoints(directory / "checkpoints") or list_checkpoints(directory)
    if not found:
        raise UserError(f"{directory} has no checkpoints; expected a run's output directory or a checkpoint")
    return found


def _newest(directory: Path) -> Path:
    return _checkpoints(directory)[-1]


def _first_to_fail(error: BaseException) -> bool:
    """Whether this rank is the one to say what is wrong; the others fail of it, or of the same."""
    from pmc_llama.distributed import first_to_fail

    return first_to_fail(error)


def _help() -> str:
    lines = [f"  {name:<12}{_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join([USAGE, "", *lines, "", "`pmc-llama COMMAND --help` says more."])


def _summary(command: Callable[[Sequence[str]], int | None]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    program()
