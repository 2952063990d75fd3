"""Speed of the sample order on a corpus of PMC-LLaMA's size: 4.9 million documents, 75 billion tokens.

    python benchmarks/sample_order.py

Needs no data: documents have log-normal lengths and reading is left out, since it is the order that is
measured. It prints what opening costs, samples a second by batch size, and, for small sizes, how far the
permutations are from equal odds. Figures are in `benchmarks/README.md`.
"""

import resource
import time
from dataclasses import dataclass
from math import factorial, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pmc_llama.data import sample_order
from pmc_llama.randomness import IntArray, permute

DOCUMENTS = 4_900_000
MEAN_TOKENS = 15_300
SEQUENCE_LENGTH = 512
MODES: tuple[Literal["window", "packed"], ...] = ("window", "packed")


@dataclass(frozen=True)
class SyntheticStream:
    """Document borders without tokens."""

    starts: IntArray

    @property
    def documents(self) -> int:
        """How many documents."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return int(self.starts[-1])

    def read(self, ranges: list[tuple[int, int]]) -> list[NDArray[np.integer]]:
        """Not measured here."""
        raise NotImplementedError


def synthetic_stream() -> SyntheticStream:
    """Log-normal lengths (sigma 0.7), as of PMC's full texts."""
    sigma = 0.7
    lengths = np.random.default_rng(0).lognormal(np.log(MEAN_TOKENS) - sigma**2 / 2, sigma, DOCUMENTS)
    return SyntheticStream(np.concatenate([[0], np.cumsum(np.maximum(1, lengths).astype(np.int64))]))


def peak_mib() -> float:
    """Peak resident memory of this process, MiB (Linux gives KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_speed(stream: SyntheticStream) -> None:
    """Print the time to the first batch and samples a second."""
    print(f"{stream.documents:,} documents, {stream.tokens:,} tokens, sequences of {SEQUENCE_LENGTH}")
    for mode in MODES:
        memory, start = peak_mib(), time.perf_counter()
        order = sample_order(stream, mode, SEQUENCE_LENGTH, seed=0)
        order.spans(np.arange(128))
        opening = (time.perf_counter() - start) * 1e3
        print(
            f"{mode}: start to first batch {opening:.1f} ms, {peak_mib() - memory:.1f} MiB more", flush=True
        )
        for batch in (128, 1024, 8192):
            start, samples = time.perf_counter(), 0
            while (seconds := time.perf_counter() - start) < 2:
                order.spans(np.arange(samples, samples + batch))
                samples += batch
            print(f"  batches of {batch:5}: {samples / seconds:11,.0f} samples/s", flush=True)


def measure_odds(epochs: int = 20_000) -> None:
    """Print how far orders and neighbours are from equal odds, in standard deviations of chi-square."""
    print(f"chi-square of {epochs:,} epochs against equal odds, in standard deviations (chance: within 3)")
    for size in (3, 4, 5, 7, 8, 13, 16, 64, 100):
        index = np.tile(np.arange(size), epochs)
        order = permute(index, size, 0, np.arange(epochs).repeat(size)).reshape(epochs, size)
        places = np.bincount((index.reshape(order.shape) * size + order).ravel(), minlength=size**2)
        pairs = np.bincount((order[:, :-1] * size + order[:, 1:]).ravel(), minlength=size**2)
        neighbours = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
        line = f"  {size:3} items: places {deviations(places, (size - 1) ** 2):6.1f}"
        line += f"  neighbours {deviations(neighbours, neighbours.size - 1):6.1f}"
        if size <= 5:
            _, counts = np.unique(order, axis=0, return_counts=True)
            counts = np.pad(counts, (0, factorial(size) - len(counts)))
            line += f"  orders {deviations(counts, factorial(size) - 1):6.1f}"
        print(line, flush=True)


def deviations(counts: NDArray[np.integer], freedom: int) -> float:
    """Excess of the chi-square statistic of equal odds over its mean, in its standard deviations."""
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / sqrt(2 * freedom))


if __name__ == "__main__":
    measure_speed(synthetic_stream())
    measure_odds()
