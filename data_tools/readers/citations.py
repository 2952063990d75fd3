"""Numeric citation markers: which they are, and how a sentence reads when they are gone.

Author-year citations are part of the sentence and stay; numbers point into a reference list that is not in
the text, and a superscript one would run into the number before it.
"""

import re

MARK = "\x00"
"""Stands where a reader took a marker out, until `close_gaps`."""

# Every pattern below is for text whose white space is collapsed, and takes linear time on it.
_SEPARATORS = r"\s,;\-\u2010-\u2015\u2212"
_LEAD = r"(?:(?:see|also|e\.?g\.|cf\.?|refs?\.?|reviewed (?:in|by)|for (?:a )?reviews?)[\s,:]*)*"
_BRACKETED = re.compile(rf"\s?[\[(][{_SEPARATORS}]*{_LEAD}{MARK}[{_SEPARATORS}{MARK}]*[\])]", re.IGNORECASE)
_RUN = re.compile(rf"{MARK}(?:[{_SEPARATORS}]*{MARK})*")
_FIRST_IN_BRACKETS = re.compile(rf"([\[(])\s?{MARK}[,;\s]*")
_LAST_IN_BRACKETS = re.compile(rf"(?<![,;\s])[,;\s]*{MARK}[,;\s]*(?=[\])])")
_BETWEEN_SEPARATORS = re.compile(rf"[,;]\s?{MARK}(?=\s?[,;])")
_SECOND_STOP = re.compile(rf"(\bal\.)\s?{MARK}\.")
_BEFORE_STOP = re.compile(rf"\s{MARK}(?=[.,;:])")
_SPACE = re.compile(r"\s+")
_YEAR = re.compile(r"(?<!\d)(?:1[5-9]|20)\d\d[a-z]?(?!\d)")


def is_numeric(marker: str) -> bool:
    """Whether a citation marker has neither letter nor year, such as `[3]`, `4,5` or `*`.

    A year alone is what sources mark of an author-year citation: `Lovelace (1843)`.
    """
    return not any(character.isalpha() for character in marker) and not _YEAR.search(marker)


def close_gaps(text: str) -> str:
    """Remove the marks and what only held them: brackets, separators, a `see` before them.

    White space is collapsed where there is a mark.
    """
    if MARK not in text:
        return text
    text = _BRACKETED.sub(MARK, _SPACE.sub(" ", text))
    text = _RUN.sub(MARK, text)
    text = _FIRST_IN_BRACKETS.sub(r"\1", text)
    text = _LAST_IN_BRACKETS.sub("", text)
    text = _BETWEEN_SEPARATORS.sub("", text)
    text = _SECOND_STOP.sub(r"\1", text)
    return _BEFORE_STOP.sub("", text).replace(MARK, "")
