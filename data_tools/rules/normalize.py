"""White space, characters without a shape, and the Unicode form."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from data_tools.papers import Block, Paper

Form = Literal["none", "NFC"]

# C0 and C1 controls but for those that are white space; the soft hyphen; zero-width space, word joiner and
# byte order mark; direction marks. The zero-width joiner and non-joiner stay: scripts and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")  # lone ones, which are not Unicode text
_LIGATURES = {
    "\ufb00": "ff",
    "\ufb01": "fi",
    "\ufb02": "fl",
    "\ufb03": "ffi",
    "\ufb04": "ffl",
    "\ufb05": "st",
    "\ufb06": "st",
}
_USUAL_SPACES = ("\n", "\u00a0", "\u2009")  # what else than a space there often is of white space
_BEYOND = 0x2E80  # Latin, Greek, Cyrillic, punctuation and signs come before
_EMPTY_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Normalize:
    """Runs of white space become one space; invisible characters go; ligatures become letters.

    Controls, soft hyphens, zero-width spaces and direction marks are the invisible ones; lone surrogates
    become U+FFFD. In a paper each block is one line; a document that came as text keeps its line breaks,
    at most two in a row.

    Attributes:
        form: NFC composes accents, which changes no meaning (Unicode Standard Annex 15). The compatibility
            forms are not offered: NFKC makes 10\u00b2 102.
    """

    form: Form = "NFC"

    def __call__(self, paper: Paper) -> Paper:
        """The paper with every text normalized; blocks that are empty then go."""
        texts = [*paper.abstract, *(block.text for block in paper.sections)]
        if paper.plain:
            texts = [_normalize_lines(text, self.form) for text in texts]
            title = normalize_text(paper.title, self.form)
        else:
            title, *texts = normalize_texts([paper.title, *texts], self.form)
        abstract, bodies = texts[: len(paper.abstract)], texts[len(paper.abstract) :]
        return replace(
            paper,
            title=title,
            abstract=tuple(text for text in abstract if text),
            sections=tuple(
                [
                    block if text == block.text else Block(text, block.depth)
                    for block, text in zip(paper.sections, bodies, strict=True)
                    if text
                ]
            ),
        )


def normalize_texts(texts: list[str], form: Form = "NFC") -> list[str]:
    """Normalized lines of text (`normalize_text`), most of which one look at all of them together does."""
    found = texts
    for space in _USUAL_SPACES:
        found = [text.replace(space, " ") for text in found]
    for place in _suspects(found):
        found[place] = normalize_text(found[place], form)
    return found


def normalize_text(text: str, form: Form = "NFC") -> str:
    """One normalized line of text."""
    # Of white space only the space is printable, and no invisible character is.
    if "  " in text or not text.isprintable():
        text = " ".join(text.split())
        if not text.isprintable():
            text = " ".join(_SURROGATE.sub("\ufffd", _INVISIBLE.sub("", text)).split())
    if not text.isascii():
        for ligature, letters in _LIGATURES.items():
            if ligature in text:  # found in a fiftieth of the time that `replace` takes for nothing
                text = text.replace(ligature, letters)
        if form == "NFC":
            text = unicodedata.normalize("NFC", text)
    return text.strip()


def _normalize_lines(text: str, form: Form) -> str:
    lines = "\n".join(normalize_texts(text.splitlines(), form))
    return _EMPTY_LINES.sub("\n\n", lines).strip("\n")


def _suspects(texts: list[str]) -> list[int]:
    """The places of those of the texts that `normalize_text` may change.

    Those with spaces at an end or side by side, with a control, or with a character beyond ASCII that is not
    known to be left alone.
    """
    # Encoded one by one: most are ASCII. The spaces between them show those at their ends.
    lines = [text.encode(errors="surrogatepass") for text in texts]
    content = np.frombuffer(b" ".join([b"", *lines, b""]), np.uint8)
    sizes = np.fromiter(map(len, lines), np.int64, len(lines))
    bounds = np.cumsum(sizes + 1) - sizes - 1
    spaces = content == ord(" ")
    odd = (content < ord(" ")) | (content == 0x7F)
    odd[:-1] |= spaces[:-1] & spaces[1:]
    beyond = content >= 0xC0
    suspect = np.flatnonzero(odd | beyond)
    harmless = beyond[suspect] & _left_alone().take(_code_points(content, suspect), mode="clip")
    places = np.searchsorted(bounds, suspect[~harmless], side="right") - 1
    return sorted(set(places.tolist()))


def _code_points(content: NDArray[np.uint8], places: NDArray[np.intp]) -> NDArray[np.int64]:
    """The characters of two or three bytes of UTF-8 that begin at some places; 0x10000 or more for others."""
    first, second, third = (content.take(places + offset, mode="clip") for offset in range(3))
    pairs = (first & 0x1F).astype(np.int64) << 6 | second & 0x3F
    triples = pairs << 6 | third & 0x3F
    return np.where(first < 0xE0, pairs, triples)


@lru_cache(maxsize=1)
def _left_alone() -> NDArray[np.bool_]:
    """Which code points below `_BEYOND` no step changes, next to whatever they stand: bool `[_BEYOND + 1]`.

    Characters that compose with one before them have a combining class or are of the scripts left out.
    """
    known = np.zeros(_BEYOND + 1, np.bool_)
    for code in (*range(0xA1, 0x0530), *range(0x1E00, _BEYOND)):
        character = chr(code)
        known[code] = (
            character.isprintable()
            and not unicodedata.combining(character)
            and unicodedata.is_normalized("NFC", character)
        )
    return known
