"""What a build measures of a document's text, so that decisions need no text later."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_tools.contamination import TestSets
from data_tools.minhash import signature
from data_tools.recipe import Measures
from data_tools.words import hashed_words


@dataclass(frozen=True)
class Measured:
    """The measures of one document.

    Attributes:
        signature: its MinHash signature, or None when not asked for or the document has no word.
        overlaps: the numbers of the test questions that it overlaps, ascending.
    """

    signature: bytes | None = None
    overlaps: tuple[int, ...] = ()


class Measurer:
    """Measures documents as a recipe asks; the words of a document are hashed once for all measures.

    Attributes:
        test_sets: the questions looked for.
        identity: what the measures depend on, as JSON: the switches, and the checksum of each test set, not
            its path.

    Raises:
        UserError: a test set cannot be read.
    """

    def __init__(self, measures: Measures) -> None:
        self._near_duplicates = measures.near_duplicates
        self.test_sets = _test_sets(tuple(sorted(measures.test_sets.items())))
        self.identity: dict[str, Any] = {
            "near_duplicates": measures.near_duplicates,
            "test_sets": self.test_sets.checksums,
        }

    def __call__(self, text: str) -> Measured:
        """The measures of a training text."""
        if not self._near_duplicates and not self.test_sets.questions:
            return Measured()
        words = hashed_words(text)
        return Measured(
            signature(words) if self._near_duplicates else None,
            self.test_sets.overlaps(words) if self.test_sets.questions else (),
        )


@lru_cache(maxsize=1)
def _test_sets(paths: tuple[tuple[str, str], ...]) -> TestSets:
    """The questions that a worker looks for, part after part."""
    return TestSets(dict(paths))
