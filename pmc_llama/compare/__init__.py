"""One recipe in several variants, one report: do they compute the same, and at what price?"""

import json
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
import yaml

from data_tools.errors import UserError
from data_tools.files import write_published
from pmc_llama.compare.picture import draw
from pmc_llama.compare.report import as_data, describe, judge, sentence
from pmc_llama.compare.runs import GIB, Result, command, environment, read_run, train
from pmc_llama.config import Recipe, plain
from pmc_llama.variants import Variant, allowed_difference


def compare(recipe: Recipe, variants: Sequence[tuple[Variant, Recipe]], repeat: int = 1) -> Path:
    """Train every variant of `recipe`, one after another on this machine, and write the report.

    Repetitions take turns: all variants once, then all again, so that a machine that grows slower or faster
    does so for all. Everything goes into `recipe.output`: `recipe.yaml`, a run's directory and console log
    for each variant and repetition, `report.md`, `report.json` and `comparison.png`. A run that has finished
    is not repeated, and one that was interrupted goes on.

    Args:
        recipe: what to train; its seed decides the first weights, the same in every variant.
        variants: each with the recipe that it changes `recipe` to; differences are from the first.
        repeat: times that each is trained.

    Returns:
        The report.

    Raises:
        UserError: `recipe.output` holds the comparison of another recipe, or of other ranks or versions, a
            run failed, or losses differ by more than is allowed (the report is there then).
    """
    if find_spec("matplotlib") is None:
        raise UserError("compare draws with matplotlib, which is missing; pip install 'pmc-llama[compare]'")
    ranks = " and ".join(dict.fromkeys(str(variant.ranks) for variant, _ in variants))
    recipe_file = _keep_recipe(recipe, f"{ranks} ranks, {versions()}")
    for number in range(1, repeat + 1):
        for variant, _ in variants:
            directory = _directory(recipe.output, variant, number)
            arguments = command(recipe_file, variant, directory)
            log = recipe.output / f"{directory.name}.log"
            train(directory.name, arguments, environment(variant.ranks), log)
    results = [
        Result(variant, [read_run(_directory(recipe.output, variant, n)) for n in range(1, repeat + 1)])
        for variant, _ in variants
    ]
    return _report(recipe, recipe_file, results, [changed for _, changed in variants], ranks)


def _report(
    recipe: Recipe, recipe_file: Path, results: Sequence[Result], recipes: Sequence[Recipe], ranks: str
) -> Path:
    output, reference = recipe.output, results[0]
    on_gpu = torch.cuda.is_available()
    verdicts = [
        judge(
            result,
            reference,
            allowed_difference(recipes[0], changed, (reference.variant.ranks, result.variant.ranks), on_gpu),
        )
        for result, changed in zip(results[1:], recipes[1:], strict=True)
    ]
    shown = [
        shlex.join(
            ["python", *command(recipe_file, result.variant, _directory(output, result.variant, 1))[1:]]
        )
        for result in results
    ]
    facts = [f"{ranks} ranks on {machine()}", versions()]
    draw(results, verdicts, output / "comparison.png")
    data = as_data(results, verdicts, facts, shown)
    write_published(output / "report.json", (json.dumps(data, indent=1) + "\n").encode())
    report = output / "report.md"
    text = describe(results, verdicts, facts, shown, padded=recipe.data.mode == "window")
    write_published(report, text.encode())
    broken = [
        sentence(result, reference, verdict)
        for result, verdict in zip(results[1:], verdicts, strict=True)
        if not verdict.kept
    ]
    if broken:
        raise UserError(f"{broken[0]} {report} has the rest.")
    return report


def _directory(output: Path, variant: Variant, number: int) -> Path:
    return output / (variant.directory if number == 1 else f"{variant.directory}.{number}")


def _keep_recipe(recipe: Recipe, conditions: str) -> Path:
    """Write the recipe as resolved, headed by what it ran on, or check that what is there is the same."""
    path = recipe.output / "recipe.yaml"
    head, body = f"# {conditions}\n", yaml.safe_dump(plain(recipe), sort_keys=False)
    try:
        kept = path.read_text(errors="replace") if path.exists() else head + body
        before = kept.removesuffix(body).removeprefix("# ").strip() or "unknown conditions"
        if not kept.endswith(body):
            raise UserError(
                f"{recipe.output} holds the comparison of another recipe ({path}); choose another --output"
            )
        if not kept.startswith(head):
            raise UserError(
                f"{recipe.output} holds the comparison under {before}, expected {conditions}; "
                "choose another --output"
            )
        recipe.output.mkdir(parents=True, exist_ok=True)
        write_published(path, (head + body).encode())
    except OSError as error:
        raise UserError(
            f"{recipe.output} cannot be written: {error.strerror}; choose another --output"
        ) from error
    return path


def machine() -> str:
    """Processors, memory and GPUs of this machine."""
    parts = [f"{psutil.cpu_count()} x {_processor()}", f"{psutil.virtual_memory().total / GIB:.0f} GiB"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    parts += [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> str:
    """What ran."""
    packages = ("pmc-llama", "torch", "deepspeed", "transformers")
    return ", ".join(
        [f"Python {platform.python_version()}", *[f"{name} {version(name)}" for name in packages]]
    )
