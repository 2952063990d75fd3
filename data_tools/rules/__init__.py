"""The cleaning chain: rules that change a paper or leave it out, in the order of the recipe.

A new rule is a file here and a line in `RULES`.
"""

from collections.abc import Sequence
from typing import Any

from data_tools.papers import Paper
from data_tools.rules.base import Dropped, Rule
from data_tools.rules.boilerplate import Boilerplate
from data_tools.rules.language import Language
from data_tools.rules.length import Length
from data_tools.rules.long_lines import LongLines
from data_tools.rules.normalize import Normalize
from data_tools.rules.ocr import Ocr
from data_tools.rules.prose import Prose
from data_tools.rules.repetition import Repetition
from data_tools.rules.sections import Sections
from data_tools.rules.symbols import Symbols
from data_tools.rules.top_word import TopWord

RULES_VERSION = 6
"""Version of everything that decides a paper's text (here, in the readers and in `render.py`). Raise it with
any change: parts made under other rules are not continued."""

RULES: dict[str, type[Any]] = {
    "normalize": Normalize,
    "sections": Sections,
    "boilerplate": Boilerplate,
    "prose": Prose,
    "length": Length,
    "language": Language,
    "symbols": Symbols,
    "long_lines": LongLines,
    "top_word": TopWord,
    "repetition": Repetition,
    "ocr": Ocr,
}


def chain(specifications: Sequence[dict[str, Any]]) -> list[Rule]:
    """The rules of a recipe."""
    return [
        RULES[rule["rule"]](**{key: value for key, value in rule.items() if key != "rule"})
        for rule in specifications
    ]


def apply(rules: Sequence[Rule], paper: Paper) -> Paper | Dropped:
    """A paper through the whole chain; the first rule that leaves it out ends it."""
    for rule in rules:
        result = rule(paper)
        if isinstance(result, Dropped):
            return result
        paper = result
    return paper
