"""A stream whose token at position p is the number p, so that tensors tell where they were read."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pmc_llama.randomness import IntArray


@dataclass
class NumberedStream:
    """Documents of these lengths; the token at position p is p."""

    lengths: list[int]
    reads: list[int] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def starts(self) -> IntArray:
        return np.cumsum([0, *self.lengths], dtype=np.int64)

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        assert all(0 <= start <= stop <= self.tokens for start, stop in ranges)
        self.reads.append(len(ranges))
        return [np.arange(start, stop, dtype=np.uint16) for start, stop in ranges]
