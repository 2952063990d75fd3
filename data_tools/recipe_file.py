"""From a recipe file and options to a checked `Recipe`.

The file is read by hand and not by jsonargparse, which `pmc_llama` uses: its import alone takes longer than a
tenth of a plain build of 128 MB, and it does not know the parameters of a rule.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from data_tools.errors import UserError
from data_tools.recipe import Recipe
from data_tools.rules import RULES

_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def read_recipe(path: Path | None, options: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a file, its defaults filled in, with single values changed by options.

    Args:
        path: a YAML file; None for the defaults.
        options: YAML values by dotted key, such as `{"decisions.near_duplicates": "0.8"}`.

    Raises:
        UserError: the file cannot be read, or a key or value in it or in an option is not one of a recipe.
    """
    recipe: Recipe = Recipe()
    if path is not None:
        recipe = _updated(recipe, _content(path), str(path), "")
    recipe = changed(recipe, options or {})
    if not 0 <= recipe.max_bad <= 1:
        raise UserError(f"max_bad is {recipe.max_bad}; give a share of records from 0 to 1.")
    return recipe


def changed(recipe: Any, options: Mapping[str, str], prefix: str = "") -> Any:
    """A recipe, or a section of it that stands under `prefix`, with single values changed.

    Raises:
        UserError: a key or a value is not one of a recipe.
    """
    for key, value in options.items():
        where = f"the option --{key}"
        tree = _parsed(value, f"The value {_shown(value)} of {where}")
        for name in reversed(key.removeprefix(prefix).split(".")):
            tree = {name: tree}
        recipe = _updated(recipe, tree, where, prefix)
    return recipe


def leaves(kind: type, prefix: str = "") -> dict[str, str]:
    """The keys of a dataclass that options may set, dotted, with what each has to be."""
    found: dict[str, str] = {}
    for key, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            found |= leaves(hint, f"{prefix}{key}.")
        elif key != "rules":  # a chain is nothing to type
            found[f"{prefix}{key}"] = _described(hint)
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but that a key given twice is an error and not its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _content(path: Path) -> Any:
    try:
        written = path.read_bytes()
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    content = _parsed(written, f"The recipe {path}")
    return {} if content is None else content


def _parsed(written: str | bytes, what: str) -> Any:
    """The content of YAML.

    Raises:
        UserError: it is none; the sentence begins with `what`.
    """
    try:
        return _Loader(written).get_single_data()
    except Exception as error:  # values that are not of their tag, `!!int x`, raise almost anything
        raise UserError(f"{what} is not YAML: {' '.join(str(error).split())}.") from error


def _shown(value: Any) -> str:
    """A value in a sentence; aliases can make it endless."""
    return _repr.repr(value)


def _updated(section: Any, content: Any, where: str, prefix: str) -> Any:
    """A dataclass with the values of a mapping, all checked."""
    if not isinstance(content, dict):
        name = prefix.rstrip(".") or "a recipe"
        raise UserError(f"{_capital(where)}: {name} has to be keys with values, not {_shown(content)}.")
    hints = get_type_hints(type(section))
    values = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"{_capital(where)}: unknown key {name}{_nearest(str(key), hints)}.")
        current = getattr(section, key)
        if is_dataclass(current):
            values[key] = _updated(current, value, where, f"{name}.")
        elif name == "rules":
            values[key] = _rules(value, where)
        else:
            values[key] = _value(hints[key], value, where, name)
    return replace(section, **values)


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    if not _fits(hint, value):
        raise UserError(f"{_capital(where)}: {name} is {_shown(value)}; expected {_described(hint)}.")
    return float(value) if float in (hint, *get_args(hint)) and type(value) is int else value


def _fits(hint: Any, value: Any) -> bool:
    container, inside = get_origin(hint), get_args(hint)
    if container is UnionType:
        return any(_fits(kind, value) for kind in inside)
    if container is Literal:
        return value in inside
    if container is list:
        return isinstance(value, list) and all(_fits(inside[0], item) for item in value)
    if container is dict:
        return isinstance(value, dict) and all(
            _fits(inside[0], key) and _fits(inside[1], item) for key, item in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _described(hint: Any) -> str:
    container, inside = get_origin(hint), get_args(hint)
    if container is UnionType:
        return " or ".join(map(_described, inside))
    if container is Literal:
        return " or ".join(map(str, inside))
    if container is list:
        return f"a list of {_described(inside[0])} ([A, B])"
    if container is dict:
        return f"names with {_described(inside[1])} ({{NAME: VALUE}})"
    return _KINDS[hint]


def _rules(content: Any, where: str) -> list[dict[str, Any]]:
    """The rules as written; RULES_VERSION stands for the defaults of what is not."""
    if not isinstance(content, list):
        raise UserError(f"{_capital(where)}: rules is {_shown(content)}; expected a list of rules.")
    return [_rule(rule, where, number) for number, rule in enumerate(content, start=1)]


def _rule(content: Any, where: str, number: int) -> dict[str, Any]:
    place = f"{_capital(where)}: rule {number}"
    if isinstance(content, str):
        content = {"rule": content}
    if not isinstance(content, dict) or not isinstance(content.get("rule"), str):
        raise UserError(
            f"{place} is {_shown(content)}; expected a name, or `rule: NAME` with its parameters."
        )
    name = content["rule"]
    if name not in RULES:
        raise UserError(
            f"{place}: there is no rule {name}{_nearest(name, RULES)}; expected one of {', '.join(RULES)}."
        )
    hints = {field.name: get_type_hints(RULES[name])[field.name] for field in fields(RULES[name])}
    for key, value in content.items():
        if key == "rule":
            continue
        if key not in hints:
            known = ", ".join(hints) or "none"
            raise UserError(
                f"{place}: {name} has no parameter {key}{_nearest(str(key), hints)}; it has {known}."
            )
        _value(hints[key], value, where, f"{key} of rule {number}, {name},")
    return dict(content)


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(map(str, known)), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _capital(text: str) -> str:
    return text if "/" in text or "." in text.split()[0] else text[0].upper() + text[1:]
