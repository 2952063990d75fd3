"""JSON as the sources write it, decoded: with byte order marks, and with surrogates that are no text."""

import json
import re

import msgspec

_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(content: bytes) -> object:
    """What a piece of JSON says.

    A byte order mark is passed over; lone surrogates, which are not Unicode text, become U+FFFD.

    Raises:
        ValueError: it is not valid JSON, or nested too deep.
    """
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # whether it is wrong, and how, is for the tolerant way to say
    try:
        return _repaired(json.loads(content.decode("utf-8-sig")))
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _repaired(value: object) -> object:
    """A decoded value without lone surrogates; as many characters, so that offsets stay."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    if isinstance(value, dict):
        return {_repaired(key): _repaired(item) for key, item in value.items()}
    return value
