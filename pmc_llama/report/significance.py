"""How sure an accuracy is, and whether two models differ on the same questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The ends of an interval of confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """Two models on the same questions.

    Attributes:
        questions: both were asked.
        only_first: of them only the first answered right.
        only_second: of them only the second.
        p: probability of a split at least as uneven when neither is better.
    """

    questions: int
    only_first: int
    only_second: int
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the second less that of the first, as a share."""
        return (self.only_second - self.only_first) / self.questions


def wilson(right: int, questions: int, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927), without continuity correction.

    Args:
        right: successes, from 0 to `questions`.
        questions: trials, 1 or more.
        confidence: that the interval covers the true share.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = right / questions, 1 + z * z / questions
    middle = (share + z * z / (2 * questions)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / questions + z * z / (4 * questions**2))
    # Rounding would leave the share outside of its own interval at both ends.
    return Interval(min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's test (Psychometrika 12, 1947), exact and two-sided, on the questions that only one has right.

    Args:
        first: which questions the first model answered right, `[questions]`, 1 or more.
        second: the same of the second.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, count) for count in range(fewer + 1))
    # Whole numbers, divided once: 2 ** 4000 is no float.
    return McNemar(len(pairs), only_first, only_second, min(1.0, (2 * tail) / 2**discordant))
