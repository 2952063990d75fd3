"""Numeric citation markers: which they are, and how a sentence reads when they are gone.

Author-year citations are part of the sentence and stay; numbers point into a reference list that is not in
the text, and a superscript one would run into the number before it.
"""

import re

MARK = "\x00"
"""Stands where a reader took a marker out, until `close_gaps`."""

_SEPARATORS = r"\s,;\-\u2010-\u2015\u2212"
_BRACKETED = re.compile(rf"\s*[\[(][{_SEPARATORS}]*{MARK}[{_SEPARATORS}{MARK}]*[\])]")
_RUN = re.compile(rf"{MARK}(?:[{_SEPARATORS}]*{MARK})*")
_LAST_IN_BRACKETS = re.compile(rf"[,;\s]*{MARK}\s*(?=[\])])")
_BEFORE_STOP = re.compile(rf"\s+{MARK}(?=[.,;:])")


def is_numeric(marker: str) -> bool:
    """Whether a citation marker has no letter, such as `[3]`, `4,5` or `*`."""
    return not any(character.isalpha() for character in marker)


def close_gaps(text: str) -> str:
    """Remove the marks and what only held them: their brackets, the separators between them."""
    if MARK not in text:
        return text
    text = _BRACKETED.sub("", text)
    text = _RUN.sub(MARK, text)
    text = _LAST_IN_BRACKETS.sub("", text)
    return _BEFORE_STOP.sub("", text).replace(MARK, "")
