"""Numeric citation markers: which they are, and how a sentence reads when they are gone.

Author-year citations are part of the sentence and stay; numbers point into a reference list that is not in
the text, and a superscript one would run into the number before it.
"""

import re

MARK = "\x00"
"""Stands where a reader took a marker out, until `close_gaps`."""

_SEPARATORS = r"\s,;\-\u2010-\u2015\u2212"
_LEAD = r"(?:(?:see|also|e\.?g\.|cf\.?|refs?\.?|reviewed (?:in|by)|for (?:a )?reviews?)[\s,:]*)*"
_LONGEST_LEAD = 48  # characters; `(for a review, see also refs. ` is the longest in use
_RUN = re.compile(rf"{MARK}(?:[{_SEPARATORS}]*{MARK})*")
_OPENING = re.compile(rf"\s*[\[(][{_SEPARATORS}]*{_LEAD}\Z", re.IGNORECASE)
_CLOSING = re.compile(rf"[{_SEPARATORS}]*[\])]")
_CLOSING_AFTER_COMMAS = re.compile(r"[,;\s]*(?=[\])])")
_COMMAS = ",;" + "".join(filter(str.isspace, map(chr, range(0x3001))))
_DEPENDENT = frozenset(_COMMAS + "[(.")  # what makes sense, at an end, only with what follows
_AL = re.compile(r"\bal\.\Z")
_ASCII_LETTER = re.compile(r"[A-Za-z]")
_YEAR = re.compile(r"(?<!\d)(?:1[5-9]|20)\d\d[a-z]?(?!\d)")


def is_numeric(marker: str) -> bool:
    """Whether a citation marker has neither letter nor year, such as `[3]`, `4,5` or `*`.

    A year alone is what sources mark of an author-year citation: `Lovelace (1843)`.
    """
    if marker.isascii():
        return not _ASCII_LETTER.search(marker) and not _YEAR.search(marker)
    return not any(character.isalpha() for character in marker) and not _YEAR.search(marker)


def close_gaps(text: str) -> str:
    """Remove the marks and what only held them: brackets, separators, a `see` before them."""
    if MARK not in text:
        return text
    pieces = _RUN.split(text)
    for place in range(1, len(pieces)):
        before, after = pieces[place - 1], pieces[place]
        closing = _CLOSING.match(after)
        opening = closing and _OPENING.search(before, max(0, len(before) - _LONGEST_LEAD))
        if opening and closing:
            pieces[place - 1], pieces[place] = before[: opening.start()], after[closing.end() :]
    pieces = _RUN.split(MARK.join(pieces))  # brackets that followed each other are one gap now
    for place in range(1, len(pieces)):
        before, after = pieces[place - 1], pieces[place]
        if before[-1:] in _DEPENDENT or _CLOSING_AFTER_COMMAS.match(after):
            pieces[place - 1 : place + 1] = _closed(before, after)
    return "".join(pieces)


def _closed(before: str, after: str) -> tuple[str, str]:
    """The text before and after a mark, without what makes no sense when the mark is gone."""
    if closing := _CLOSING_AFTER_COMMAS.match(after):
        return before.rstrip(_COMMAS), after[closing.end() :]
    bare = before.rstrip()
    if bare.endswith(("[", "(")):
        return bare, after.lstrip(_COMMAS)
    if bare.endswith((",", ";")) and after.lstrip().startswith((",", ";")):
        return bare[:-1], after
    if after.startswith(".") and _AL.search(bare, max(0, len(bare) - 4)):
        return bare, after[1:]
    return (bare if after.startswith((".", ",", ";", ":")) else before), after
