"""Which micro-batches a recipe may have."""

from pmc_llama.config import Recipe


def micro_sizes(recipe: Recipe, ranks: int) -> list[int]:
    """Micro-batches that can be set without another change, the smallest first.

    They divide a rank's part of the global batch; in `whole` mode, in which rows are filled, all are up to as
    many rows as a rank has documents.
    """
    share = -(-recipe.batch.global_size // ranks)
    if recipe.data.mode == "whole":
        return list(range(1, max(share, recipe.batch.micro_size) + 1))
    return divisors(share)


def divisors(number: int) -> list[int]:
    """Of a whole number above 0, the smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]
