"""What is compared: one recipe with a few of its keys changed, in every combination."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_tools.errors import UserError
from pmc_llama.config import Recipe, plain

RANKS = "ranks"
"""The one thing that varies without being a key of the recipe: processes of a run."""

ROUNDING = 5e-3
"""Relative difference of losses allowed to runs that round differently.

A difference in the last bit of one step flips roundings to bf16 in the next, so it grows with the number of
steps; the largest seen in 60 steps of the demo's recipe stands in `benchmarks/README.md`.
"""

# Keys that move memory and time, and by the contract of the backends no number.
_WITHOUT_EFFECT = re.compile(
    r"backend|output|sharding\.(?!shard_group).*|checkpoint\..*|logging\..*|hangs\..*"
)


@dataclass(frozen=True)
class Variant:
    """One way to run the recipe.

    Attributes:
        name: what tells it from the others: its backend, and the keys that vary with their values.
        backend: what shards the model.
        ranks: processes.
        changes: key to value, as options of `pmc-llama train`; the backend among them.
    """

    name: str
    backend: str
    ranks: int
    changes: Mapping[str, str]

    @property
    def directory(self) -> str:
        """The name as that of a directory."""
        return re.sub(r"[^\w.=]+", "-", self.name)

    @property
    def options(self) -> list[str]:
        """The changes as they are typed."""
        return [word for key, value in self.changes.items() for word in (f"--{key}", value)]


def read_varied(given: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=VALUE,VALUE...` texts as key to values.

    Raises:
        UserError: one has no key, fewer than two values, the same value twice, or its key comes twice.
    """
    varied: dict[str, list[str]] = {}
    for text in given:
        key, _, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not key or len(values) < 2 or "" in values or len({*values}) < len(values):
            raise UserError(f"--vary is {text}, expected KEY=VALUE,VALUE with two or more different values")
        if key in varied or key == "backend":
            raise UserError(f"--vary names {key} once too often; --backends chooses the backends")
        varied[key] = values
    return varied


def cross(backends: Sequence[str], varied: Mapping[str, Sequence[str]], ranks: int) -> list[Variant]:
    """Every combination of backends and values; the first one is what the others are compared with.

    Args:
        backends: names of backends.
        varied: key of the recipe, or `ranks`, to its values.
        ranks: processes of each run, where they do not vary.

    Raises:
        UserError: fewer than two combinations, or `ranks` is no positive whole number.
    """
    short = {key: key.rpartition(".")[2] for key in varied}
    if len({*short.values()}) < len(short):
        short = {key: key for key in varied}
    variants = []
    for backend, *values in itertools.product(backends, *varied.values()):
        changes = dict(zip(varied, values, strict=True))
        name = " ".join([backend, *(f"{short[key]}={value}" for key, value in changes.items())])
        processes = _positive(changes.pop(RANKS, str(ranks)))
        variants.append(Variant(name, backend, processes, {"backend": backend, **changes}))
    if len(variants) < 2:
        raise UserError("there is one variant only; name two --backends, or vary something with --vary")
    return variants


def allowed_difference(one: Recipe, other: Recipe, ranks: tuple[int, int], on_gpu: bool) -> float:
    """Relative difference of losses that two variants may show; 0 promises equal bits.

    Equal bits are promised on CPU where nothing differs that rounds: with bf16 compute and fp32 reduction, on
    the same number of ranks, a power of two (`docs/architecture.md`, Backends).
    """
    changed = _changed(plain(one), plain(other))
    exact = (
        not on_gpu
        and ranks[0] == ranks[1]
        and ranks[0].bit_count() == 1
        and (one.precision.compute, one.precision.reduce) == ("bf16", "fp32")
        and all(_WITHOUT_EFFECT.fullmatch(key) for key in changed)
    )
    return 0.0 if exact else ROUNDING


def _changed(one: Mapping[str, object], other: Mapping[str, object], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key in one.keys() | other.keys():
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            keys |= _changed(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            keys.add(prefix + key)
    return keys


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"ranks is {text}, expected a whole number, 1 or more")
    return int(text)
