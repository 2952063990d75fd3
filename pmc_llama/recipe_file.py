"""From a recipe file and command-line options to a checked `Recipe`.

jsonargparse reads and converts; the sentences about what is wrong are written here, because a key that nobody
knows or a value of the wrong kind is the most common mistake in a run.
"""

import argparse
import difflib
import glob
import json
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from data_tools.errors import UserError
from pmc_llama.config import CorpusConfig, Projection, Recipe

Check = tuple[Callable[[Any], bool], str]

_ONE_OR_MORE: Check = (lambda value: value >= 1, "1 or more")
_TWO_OR_MORE: Check = (lambda value: value >= 2, "2 or more")
_ZERO_OR_MORE: Check = (lambda value: value >= 0, "0 or more")
_NOT_NEGATIVE: Check = (lambda value: 0 <= value < math.inf, "a finite number, 0 or more")
_ABOVE_ZERO: Check = (lambda value: 0 < value < math.inf, "a finite number above 0")
_FRACTION: Check = (lambda value: 0 <= value <= 1, "between 0 and 1")
_DECAY: Check = (lambda value: 0 <= value < 1, "0 or more and below 1")
_SEED: Check = (lambda value: 0 <= value < 2**63, "0 or more and below 2^63")  # torch and numpy take 64 bits

CHECKS: dict[str, Check] = {
    "seed": _SEED,
    "model.vocab_size": _ONE_OR_MORE,
    "lora.rank": _ONE_OR_MORE,
    "lora.alpha": _ABOVE_ZERO,
    "lora.dropout": _DECAY,
    "data.sequence_length": _ONE_OR_MORE,
    "batch.global_size": _ONE_OR_MORE,
    "batch.micro_size": _ONE_OR_MORE,
    "schedule.epochs": _ABOVE_ZERO,
    "schedule.steps": _ONE_OR_MORE,
    "schedule.warmup_ratio": _FRACTION,
    "schedule.final_learning_rate_ratio": _FRACTION,
    "optimizer.learning_rate": _ABOVE_ZERO,
    "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY,
    "optimizer.epsilon": _ABOVE_ZERO,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.max_grad_norm": _ABOVE_ZERO,
    "sharding.checkpointed_layers": _ONE_OR_MORE,
    "sharding.shard_group": _ONE_OR_MORE,
    "sharding.prefetch_layers": _ZERO_OR_MORE,
    "sharding.reduce_bucket_mb": _ONE_OR_MORE,
    "checkpoint.every_steps": _ONE_OR_MORE,
    "checkpoint.keep_last": _ONE_OR_MORE,
    "checkpoint.keep_every": _ZERO_OR_MORE,
    "checkpoint.max_failed": _ZERO_OR_MORE,
    "guards.max_skipped": _ZERO_OR_MORE,
    "guards.spike_deviations": _ABOVE_ZERO,
    "guards.spike_window": _TWO_OR_MORE,
    "hangs.start_seconds": _ABOVE_ZERO,
    "hangs.step_seconds": _ABOVE_ZERO,
    "hangs.save_seconds": _ABOVE_ZERO,
    "evaluation.every_steps": _ONE_OR_MORE,
    "evaluation.max_sequences": _ONE_OR_MORE,
    "logging.every_steps": _ONE_OR_MORE,
    "logging.profile_steps": _ZERO_OR_MORE,
}

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text that is not empty",
    Path: "a path",
    types.NoneType: "null",
    list[tuple[int, int]]: "a list of [first, last] pairs of whole numbers",
    list[CorpusConfig]: "a list of corpora, each with a path and a weight",
    list[Projection]: f"a list of {', '.join(get_args(Projection))}",
}


class _Mistake(Exception):
    """What jsonargparse says of a value."""


class _Parser(ArgumentParser):
    """jsonargparse's parser; a mistake is raised instead of printed with the usage.

    It makes parsers of this class itself, for the entries of lists.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise _Mistake(message) from ex


class RecipeParser:
    """All keys of a recipe as options, `--section.key`, over the values of a recipe file.

    Args:
        prog: the command with its program, for the usage line.
        path: the recipe file; None for `--help` alone.
        description: of the command.

    Raises:
        UserError: the file cannot be read, is not a recipe, or has an unknown key.
    """

    def __init__(self, prog: str, path: Path | None, description: str) -> None:
        self._path = path
        self._in_file: dict[str, Any] = dict(_leaves(_read(path))) if path else {}
        self._in_options: dict[str, str] = {}
        files: list[str | os.PathLike[Any]] = [glob.escape(str(path))] if path else []  # it takes patterns
        self._parser = _Parser(
            usage=f"{prog} RECIPE [--section.key VALUE ...] [OPTION ...]",
            description=description,
            default_config_files=files,
            allow_abbrev=False,
            print_config=None,  # its own would print the options of the command, too
        )
        self._parser.add_argument("RECIPE", help="recipe file (YAML); options change single values of it")
        self._parser.add_class_arguments(Recipe)
        for action in self._parser._actions:
            if (
                action.dest in SECTIONS - OPTIONAL_SECTIONS
            ):  # a whole section in one option: not something to type
                action.help = argparse.SUPPRESS

    def add_argument(self, *names: str, **settings: Any) -> None:
        """Add an option of the command, as `argparse` has it."""
        self._parser.add_argument(*names, **settings)

    def read(self, arguments: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
        """Parse and check.

        Args:
            arguments: the recipe file, then options.

        Returns:
            The recipe, and the values of options that belong to the command and not to the recipe.

        Raises:
            UserError: an option is unknown, or a value is of the wrong kind or out of range.
        """
        self._check_options(arguments)
        self._in_options = _given(arguments)
        for section in OPTIONAL_SECTIONS & self._in_options.keys():
            if (value := self._in_options[section]) != "null":
                raise UserError(
                    f"option --{section} is {value!r}, expected null; its keys are "
                    f"{', '.join(_keys(section))}"
                )
        for key, value in self._in_file.items():
            if value is None and types.NoneType not in get_args(RECIPE_KEYS[key]):
                self._refuse(key)  # jsonargparse takes null for any key
        try:
            values = vars(self._parser.instantiate(self._parser.parse_args(list(arguments))))
        except _Mistake as mistake:
            self._tell(mistake)
        for key, value in {**self._in_file, **self._in_options}.items():
            if value == "" and key in RECIPE_KEYS:
                self._refuse(key)  # the path that it converts to is the working directory
        recipe = Recipe(**{field.name: values[field.name] for field in fields(Recipe)})
        check(recipe)
        return recipe, values

    def _tell(self, mistake: "_Mistake") -> NoReturn:
        """Say in one sentence which value is wrong."""
        message = str(mistake)
        # Of a section that may be null it names the section first, then the key in it.
        named = re.findall(r'key "([^"]+)"', message)
        for key in (".".join(named[:1]), ".".join(named[:2])):
            if key in RECIPE_KEYS:
                self._refuse(key, mistake)
        raise UserError(" ".join(message.split())) from mistake

    def _refuse(self, key: str, cause: Exception | None = None) -> NoReturn:
        if key in self._in_options:
            where, value = f"option --{key}", repr(self._in_options[key])
        else:
            where, value = f"{self._path}: {key}", json.dumps(self._in_file.get(key), default=str)
        raise UserError(f"{where} is {value}, expected {_kind(RECIPE_KEYS[key])}") from cause

    def _check_options(self, arguments: Sequence[str]) -> None:
        options = [option for action in self._parser._actions for option in action.option_strings]
        sections = SECTIONS - OPTIONAL_SECTIONS
        known = [option for option in options if option.removeprefix("--") not in sections]
        known += [f"--{key}" for section in OPTIONAL_SECTIONS for key in _keys(section)]
        for argument in arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                raise UserError(f"unknown option {name}{_nearest(name, known)}")


def recipe_path(arguments: Sequence[str]) -> Path | None:
    """The recipe file, the first argument of a command; None for `--help` alone.

    Raises:
        UserError: there is no argument, or an option in its place, whose value would be taken for the file.
    """
    if not arguments:
        raise UserError("there is no RECIPE; name a recipe file, such as recipes/demo.yaml, or see --help")
    if arguments[0] in ("-h", "--help"):
        return None
    if arguments[0].startswith("-"):
        raise UserError(f"the first argument is {arguments[0]}, expected the RECIPE file; options come after")
    return Path(arguments[0])


def check(recipe: Recipe) -> None:
    """Check what the recipe alone decides: that every number is in its range and the batch can be cut.

    Raises:
        UserError: names the first key that is out of its range.
    """
    for key, (holds, range_) in CHECKS.items():
        section, _, name = key.rpartition(".")
        owner = getattr(recipe, section) if section else recipe
        value = None if owner is None else getattr(owner, name)
        if value is not None and not holds(value):
            raise UserError(f"{key} is {value}, expected {range_}")
    batch = recipe.batch
    if batch.global_size % batch.micro_size:
        raise UserError(
            f"batch.global_size is {batch.global_size}, expected a multiple of batch.micro_size, "
            f"{batch.micro_size}"
        )
    if recipe.lora is None:
        return
    targets = recipe.lora.targets
    if not targets or len(targets) > len({*targets}):
        raise UserError(
            f"lora.targets is [{', '.join(targets)}], expected one or more different ones of "
            f"{', '.join(get_args(Projection))}"
        )
    if recipe.model.initialize_from is None:
        raise UserError(
            "model.initialize_from is null, expected the Hugging Face directory of the weights that the "
            "adapters of lora are put on; name it, or set lora to null."
        )


def _leaf_types(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe, dotted, with its type."""
    for name, kind in get_type_hints(section).items():
        inner = _section(kind)
        if inner:
            yield from _leaf_types(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _section(kind: Any) -> type | None:
    """The dataclass of a section, also of one that may be null; None for the type of a value."""
    parts = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((part for part in parts if is_dataclass(part) and isinstance(part, type)), None)


RECIPE_KEYS: dict[str, Any] = dict(_leaf_types(Recipe))
SECTIONS = {key.partition(".")[0] for key in RECIPE_KEYS if "." in key}
OPTIONAL_SECTIONS = {name for name in SECTIONS if get_args(get_type_hints(Recipe)[name])}
"""Sections that may be null."""


def _keys(section: str) -> list[str]:
    return [key for key in RECIPE_KEYS if key.startswith(f"{section}.")]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UserError(
            f"recipe {path} holds {json.dumps(values, default=str)}, expected sections such as model and data"
        )
    for section, value in values.items():
        _check_keys(path, str(section), value)
    return values


def _check_keys(path: Path, section: str, value: Any) -> None:
    """Every key is known, and sections are sections."""
    if section not in SECTIONS:
        if section not in RECIPE_KEYS:
            raise UserError(f"{path}: unknown key {section}{_nearest(section, [*RECIPE_KEYS, *SECTIONS])}")
        return
    if value is None and section in OPTIONAL_SECTIONS:
        return
    if not isinstance(value, Mapping):
        keys = [key.partition(".")[2] for key in _keys(section)]
        found = json.dumps(value, default=str)
        raise UserError(f"{path}: {section} is {found}, expected a section with {', '.join(keys)}")
    for name in value:
        if (key := f"{section}.{name}") not in RECIPE_KEYS:
            raise UserError(f"{path}: unknown key {key}{_nearest(key, list(RECIPE_KEYS))}")


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys of a recipe file, dotted, with their values."""
    for section, value in values.items():
        if section in OPTIONAL_SECTIONS and value is None:
            continue
        if section in SECTIONS:
            yield from ((f"{section}.{name}", entry) for name, entry in value.items())
        else:
            yield section, value


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """The values of options as they were typed: `--key=value` or `--key value`."""
    given = {}
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            given[name] = value if equals else following
    return given


def _nearest(name: str, known: Sequence[str]) -> str:
    """Advice naming the known name that is most like `name`, if any is."""
    by_name = {option.removeprefix("--"): option for option in known}
    by_last_part = {option.rpartition(".")[2]: option for option in by_name.values()}  # without its section
    name = name.removeprefix("--")
    for names, wanted in ((by_name, name), (by_last_part, name.rpartition(".")[2])):
        if near := difflib.get_close_matches(wanted, names, n=1):
            return f"; the nearest valid one is {names[near[0]]}"
    return "; see --help"


def _kind(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    return _KINDS[annotation]
