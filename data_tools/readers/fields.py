"""Fields of JSON records, whose names and types differ from release to release."""

import re
from typing import Any

_LONGEST_ID = 18  # digits that surely fit int64
_YEAR = re.compile(r"(1[5-9]\d\d|20\d\d)(?:\D.*)?", re.DOTALL)


class WrongStructure(ValueError):
    """A record whose fields are not of the documented types."""


def json_object(value: object, name: str) -> dict[str, Any]:
    """A JSON object, empty for null, with its keys in lower case: they differ in that (`PubMedCentral`).

    Raises:
        WrongStructure: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WrongStructure(f"{name} is {type(value).__name__}, not an object")
    return {str(key).lower(): item for key, item in value.items()}


def text_of(value: object, name: str) -> str:
    """A string, empty for null.

    Raises:
        WrongStructure: it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongStructure(f"{name} is {type(value).__name__}, not a string")
    return value


def _whole(value: object) -> str:
    """A text, or a number as digits; whole numbers are 2015.0 in a table with a null in the column."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() if isinstance(value, str | int) else ""


def corpus_id(value: object) -> int | None:
    """An S2 corpus id, given as a number or as digits; None for anything else."""
    digits = _whole(value)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= _LONGEST_ID else None


def pubmed_id(value: object) -> str | None:
    """A PubMed id, given as a number or as digits, as digits; None for anything else."""
    number = corpus_id(value)
    return str(number) if number else None


def year(value: object) -> int | None:
    """The year of a number or of a date that opens with it (`2017-03-30`); None for anything else."""
    match = _YEAR.fullmatch(_whole(value))
    return int(match[1]) if match else None


def words(value: object) -> str | None:
    """A string that says something; None for anything else."""
    return value if isinstance(value, str) and value.strip() else None
