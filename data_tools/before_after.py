"""What each rule of a recipe does to a paper: removed in red, added in green, what is the same folded."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

from rich.console import Console
from rich.rule import Rule as Line
from rich.text import Text

from data_tools.errors import UserError
from data_tools.inputs import find_inputs, shards
from data_tools.papers import Paper, Rejected
from data_tools.recipe import Recipe
from data_tools.render import training_text
from data_tools.rules import chain
from data_tools.rules.base import Dropped
from data_tools.shards import ShardReader

_REMOVED, _ADDED, _FOLDED = "red strike", "green", "dim"
_AROUND = 8  # words shown on both sides of a change
_FEW = 1000  # tokens that are matched in no time
_WORDS_OF_A_STRETCH = 32
_TOKEN = re.compile(r"\s+|\S+")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00a0\u00ad\u2000-\u200f\u2028-\u202f\u2060-\u206f\ufeff]"
)


def before_after(path: Path, number: int, recipe: Recipe, console: Console) -> None:
    """Print what the rules do to a record of some input.

    Args:
        path: an input file or a directory of them.
        number: of the record, from 0, in the order of a build.
        recipe: whose rules are applied.
        console: to print on.

    Raises:
        UserError: the path is a corpus or no input, or has no record of that number.
    """
    if (path / "corpus.json").exists():
        raise UserError(
            f"{path} is a corpus, which has only what the rules left; give the input it was built "
            "from: a file or directory of papers."
        )
    record = _record(path, number)
    if isinstance(record, Rejected):
        console.print(
            _words(f"{record.source}: not a paper: {record.reason} {record.detail}"), soft_wrap=True
        )
        return
    console.print(_words(f"{record.source}  {record.pmc_id or 'no PMC id'}  {record.title}"), soft_wrap=True)
    if recipe.require_pmc_id and record.pmc_id is None:
        console.print(Text("Left out before any rule: no_pmc_id.", "bold red"))
        return
    _show_rules(record, recipe, console)


def _record(path: Path, number: int) -> Paper | Rejected:
    count = 0
    for files in shards(find_inputs([path])):
        for record in ShardReader(files):
            if count == number:
                return record
            count += 1
    raise UserError(
        f"There is no record {number} in {path}; it has {f'0 to {count - 1}' if count else 'none'}."
    )


def _show_rules(paper: Paper, recipe: Recipe, console: Console) -> None:
    before = training_text(paper)
    for specification, rule in zip(recipe.rules, chain(recipe.rules), strict=True):
        name = specification["rule"]
        result = rule(paper)
        if isinstance(result, Dropped):
            console.print(Line(Text(f"{name}: left out", "bold red")))
            console.print(Text(f"{result.reason}: {result.detail}", "red"), soft_wrap=True)
            return
        after = training_text(result)
        if after == before:
            console.print(Line(Text(f"{name}: nothing changed", _FOLDED)))
        else:
            pieces = list(changes(before, after))
            console.print(Line(Text(f"{name}: {_summary(pieces)}", "bold")))
            console.print(_drawn(pieces), soft_wrap=True)
        paper, before = result, after
    verdict = f"Kept: {len(before):,} characters." if before else "Left out: no_text, nothing remains."
    console.print(Line(Text(verdict, "bold" if before else "bold red")))


def changes(before: str, after: str) -> Iterator[tuple[str, str]]:
    """The two texts as pieces, each (`same`, `removed` or `added`, text), in order.

    Paragraphs are matched first and words within those that differ, so a whole book takes no longer than its
    changes.
    """
    old, new = before.split("\n\n"), after.split("\n\n")
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        removed, added = old[i:j], new[k:m]
        if kind == "replace" and len(removed) == len(added):
            for one, other in zip(removed, added, strict=True):
                yield from _changed_words(one, other)
                yield "same", "\n\n"
        elif kind == "equal":
            yield "same", "\n\n".join(removed) + "\n\n"
        else:
            if removed:
                yield "removed", "\n\n".join(removed) + "\n\n"
            if added:
                yield "added", "\n\n".join(added) + "\n\n"


def _changed_words(before: str, after: str) -> Iterator[tuple[str, str]]:
    old, new = _TOKEN.findall(before), _TOKEN.findall(after)
    if max(len(old), len(new)) <= _FEW:
        yield from _compared(old, new)
        return
    for kind, one, other in _matched(_stretches(old), _stretches(new)):
        removed, added = _TOKEN.findall("".join(one)), _TOKEN.findall("".join(other))
        if kind == "replace" and max(len(removed), len(added)) <= _FEW:
            yield from _compared(removed, added)
        else:
            yield from _piece(kind, one, other)


def _compared(old: list[str], new: list[str]) -> Iterator[tuple[str, str]]:
    for kind, removed, added in _matched(old, new):
        yield from _piece(kind, removed, added)


def _matched(old: list[str], new: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Two sequences of texts matched: the kind of each opcode of difflib, and what it is of both."""
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        yield kind, old[i:j], new[k:m]


def _piece(kind: str, removed: list[str], added: list[str]) -> Iterator[tuple[str, str]]:
    if kind == "equal":
        yield "same", "".join(removed)
        return
    if removed:
        yield "removed", "".join(removed)
    if added:
        yield "added", "".join(added)


def _stretches(tokens: list[str]) -> list[str]:
    """A long text in stretches of some thirty words.

    Words that come everywhere would make matching a long text take the square of its length; stretches
    hardly come twice. Where they end is said by the words themselves, so they are the same behind a change.
    """
    stretches: list[list[str]] = [[]]
    for token in tokens:
        stretches[-1].append(token)
        if not token.isspace() and crc32(token.encode(errors="replace")) % _WORDS_OF_A_STRETCH == 0:
            stretches.append([])
    return ["".join(stretch) for stretch in stretches]


def _summary(pieces: Sequence[tuple[str, str]]) -> str:
    removed, added = (sum(len(text) for kind, text in pieces if kind == of) for of in ("removed", "added"))
    return f"{removed:,} characters removed, {added:,} added"


def _drawn(pieces: Sequence[tuple[str, str]]) -> Text:
    """The pieces in colour; on a console without colours the marks still tell them apart."""
    drawn = Text()
    for kind, text in pieces:
        if kind == "same":
            drawn.append_text(_folded(text))
        elif kind == "removed":
            drawn.append(f"[-{_visible(text).rstrip(chr(10))}-]", _REMOVED)
            drawn.append("\n\n" if text.endswith("\n\n") else "")
        else:
            drawn.append(f"{{+{_visible(text).rstrip(chr(10))}+}}", _ADDED)
            drawn.append("\n\n" if text.endswith("\n\n") else "")
    return drawn


def _folded(text: str) -> Text:
    tokens = _TOKEN.findall(text)
    if len(tokens) <= 4 * _AROUND:
        return Text(text)
    hidden = tokens[2 * _AROUND : -2 * _AROUND]
    middle = f" \u2026 {sum(not token.isspace() for token in hidden):,} words \u2026 "
    return Text.assemble("".join(tokens[: 2 * _AROUND]), (middle, _FOLDED), "".join(tokens[-2 * _AROUND :]))


def _visible(text: str) -> str:
    """Characters without a shape by their code points: `<U+00A0>`."""
    return _INVISIBLE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def _words(text: str) -> Text:
    return Text(text, "bold")
