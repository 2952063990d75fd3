"""Which test questions a document overlaps: runs of 13 words that stand in both.

13 words as in GPT-3 (Brown et al. 2020, appendix C), over words as `words.py` has them. Looked for are the
13-grams of a question followed by its options; as a whole a question of 8 to 12 words, or a shorter one with
its options when both together have 8 to 12; and the 13-grams of the conclusion where the set has one:
PubMedQA's, the sentences of the paper from which its label was made. PubMedQA's contexts are not looked for:
a model is given them with the question, and having read them betrays no answer. A run that stands in more
than 10 questions is a phrase of examiners and proves nothing (as in GPT-3); a question that has fewer than 8
words together with its options cannot be matched and is counted as such.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.errors import UserError
from data_tools.files import checksum
from data_tools.questions import Question, read_questions
from data_tools.words import Hashes, ngrams, ngrams_at, word_hashes

WORDS = 13
"""Words of a run that counts as overlap."""
FEWEST_WORDS = 8
"""Of a question that is matched as a whole."""
MOST_QUESTIONS = 10
"""In which a run may stand and still be evidence."""
_BETWEEN = "\U0010ffff"  # a noncharacter, which no text has
_BYTES_A_RUN = 16  # of each table that is asked first: of 16 to 32 runs one passes by chance


@dataclass(frozen=True)
class TestQuestion:
    """A question of a test set: the set's name, its id there, and whether it is long enough to be matched."""

    __test__ = False  # not one of pytest's

    set: str
    id: str
    matched: bool


class TestSets:
    """The questions of some test sets, to look for in documents.

    Args:
        paths: the file of each set, by the set's name.

    Attributes:
        questions: all of them; their places here are their numbers. Sets in the order of their names.
        checksums: XXH3-128 of each set's file, by name.

    Raises:
        UserError: a file cannot be read or is of no known form.
    """

    __test__ = False

    def __init__(self, paths: dict[str, str]) -> None:
        self.questions: list[TestQuestion] = []
        self.checksums: dict[str, str] = {}
        texts: dict[int, list[tuple[int, Hashes]]] = {}
        for name in sorted(paths):
            self.checksums[name] = _checksum(Path(paths[name]))
            questions = read_questions(Path(paths[name]))
            for question, found in zip(questions, _runs(questions), strict=True):
                number = len(self.questions)
                self.questions.append(TestQuestion(name, question.id, bool(found)))
                for length, words in found:
                    texts.setdefault(length, []).append((number, words))
        self._runs = {length: _Runs(texts[length], length) for length in texts}
        self._beginnings = _HashSet([runs.beginnings for runs in self._runs.values()])

    def overlaps(self, words: Hashes) -> tuple[int, ...]:
        """The numbers of the questions that a document overlaps, ascending.

        Args:
            words: the hashes of its words.
        """
        # Every run begins with 8 words, so one look at the document's 8-grams serves runs of any length.
        places = self._beginnings.places_in(ngrams(words, FEWEST_WORDS))
        found: set[int] = set()
        if not len(places):
            return ()
        for length, runs in self._runs.items():
            starts = places[places + length <= len(words)]
            found.update(runs.questions_with(ngrams_at(words, starts, length)))
        return tuple(sorted(found))


def _runs(questions: list[Question]) -> Iterator[list[tuple[int, Hashes]]]:
    """The runs that show each question: their length, and the words of which every such run counts."""
    for asked, whole, conclusion in zip(
        _words_of([one.question for one in questions]),
        _words_of([" \n".join((one.question, *one.options)) for one in questions]),
        _words_of([one.conclusion for one in questions]),
        strict=True,
    ):
        found = [(WORDS, words) for words in (whole, conclusion) if len(words) >= WORDS]
        for words in (asked, whole):
            if FEWEST_WORDS <= len(words) < WORDS:
                found.append((len(words), words))
                break
        yield found


def _words_of(texts: list[str]) -> list[Hashes]:
    """The words of each text, hashed; all in one pass, for a pass over a short text is no quicker."""
    words = word_hashes(f" {_BETWEEN} ".join(texts))
    ends = np.flatnonzero(words == word_hashes(_BETWEEN))
    if len(ends) != len(texts) - 1:
        return [word_hashes(text) for text in texts]
    return [words[first:end] for first, end in zip([0, *(ends + 1)], [*ends, len(words)], strict=True)]


class _Runs:
    """Runs of one length and the questions that they are of.

    Args:
        texts: number of the question, ascending, and words; of each text every run counts.
        length: words of a run.

    Attributes:
        beginnings: the hash of the first `FEWEST_WORDS` words of each run.
    """

    def __init__(self, texts: list[tuple[int, Hashes]], length: int) -> None:
        # All texts are one array of words; a run that reaches from one into the next is none.
        words = np.concatenate([words for _, words in texts])
        counts = np.array([len(words) - length + 1 for _, words in texts])
        starts = np.arange(counts.sum()) + np.repeat(np.arange(len(texts)) * (length - 1), counts)
        self.beginnings = ngrams(words, FEWEST_WORDS)[starts]
        hashes = ngrams(words, length)[starts]
        owners = np.repeat([number for number, _ in texts], counts)
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        # A run that comes again in a question is its neighbour now.
        new = np.append(True, (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1]))
        distinct, firsts, counts = np.unique(hashes[new], return_index=True, return_counts=True)
        told = counts <= MOST_QUESTIONS
        self._hashes, self._firsts, self._ends = distinct[told], firsts[told], (firsts + counts)[told]
        self._owners = owners[new]

    def questions_with(self, hashes: Hashes) -> set[int]:
        if not len(self._hashes):
            return set()
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found = np.unique(places[self._hashes[places] == hashes])
        return {int(number) for at in found for number in self._owners[self._firsts[at] : self._ends[at]]}


class _HashSet:
    """A set of the hashes in some arrays. Tables by their first and by their last bits are asked first."""

    def __init__(self, hashes: list[Hashes]) -> None:
        self._hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes]))
        bits = max(8, int(len(self._hashes) * _BYTES_A_RUN).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        self._firsts = np.zeros(1 << bits, np.bool_)
        self._firsts[self._hashes >> self._shift] = True
        self._lasts = np.zeros(1 << bits, np.bool_)
        self._lasts[self._hashes & self._mask] = True

    def places_in(self, hashes: Hashes) -> NDArray[np.intp]:
        """Where in an array there are hashes of the set, ascending."""
        places = np.flatnonzero(self._firsts[(hashes >> self._shift).view(np.int64)])
        places = places[self._lasts[(hashes[places] & self._mask).view(np.int64)]]
        if not len(places):
            return places
        hashes = hashes[places]
        nearest = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        found: NDArray[np.intp] = places[self._hashes[nearest] == hashes]
        return found


def _checksum(path: Path) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise UserError(f"The questions {path} cannot be read: {error.strerror}.") from error
