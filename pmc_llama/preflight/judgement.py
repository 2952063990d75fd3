"""From what all ranks found to lines for people: which node fails, of what, what to do. Pure functions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from pmc_llama.ranks import as_ranges

# A node takes so many times the median of all before it is called slow.
_SLOW = 1.5
# Clocks that differ by more make logs of nodes unreadable side by side, and credentials fail.
_CLOCK_SECONDS = 10.0


@dataclass
class Findings:
    """What one rank found out about its machine. Goes to rank 0 as JSON.

    Attributes:
        problems: what is wrong here, in sentences that say what to do.
        of_all: what is wrong with the job, wherever it runs.
        facts: what has to be the same on every rank that says it.
        gpu: identity of its GPU; empty without one.
        seconds_off: by how much its clock is ahead of rank 0's.
        wrote: whether it wrote to the directory that all share.
        seconds: what it measured, see `network.Speeds`.
    """

    problems: list[str] = field(default_factory=list)
    of_all: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    gpu: str = ""
    seconds_off: float = 0.0
    wrote: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


Problems = dict[int, list[str]]
"""Sentences by rank."""


def judge(found: Mapping[int, Findings], nodes: Sequence[str], seconds: float) -> Problems:
    """The problems of every rank: its own, and those that show only beside the others.

    Args:
        found: by rank; a rank that is missing has not answered.
        nodes: names of the machines by rank.
        seconds: how long answers were waited for.
    """
    problems = {rank: list(findings.problems) for rank, findings in found.items()}
    for rank in range(len(nodes)):
        if rank not in found:
            problems[rank] = [f"no answer within {seconds:.0f} s: the node or its network hangs"]
    for rank, sentences in _differing(found).items():
        problems[rank] += sentences
    for rank, findings in found.items():
        if abs(findings.seconds_off) > _CLOCK_SECONDS:
            direction = "ahead of" if findings.seconds_off > 0 else "behind"
            problems[rank].append(
                f"its clock is {abs(findings.seconds_off):.0f} s {direction} the first node's; mend its time "
                "service"
            )
    owners: dict[tuple[str, str], int] = {}
    for rank, findings in sorted(found.items()):
        if findings.gpu and (first := owners.setdefault((nodes[rank], findings.gpu), rank)) != rank:
            problems[rank].append(f"it has the same GPU as rank {first}; start one rank a GPU")
    return {rank: sentences for rank, sentences in sorted(problems.items()) if sentences}


def _differing(found: Mapping[int, Findings]) -> Problems:
    """What ranks say differently from most; in a tie, from the smallest rank."""
    problems: Problems = {rank: [] for rank in found}
    names = dict.fromkeys(name for _, findings in sorted(found.items()) for name in findings.facts)
    for name in names:
        values = {rank: found[rank].facts[name] for rank in sorted(found) if name in found[rank].facts}
        expected, count = Counter(values.values()).most_common(1)[0]  # the first seen of equals
        for rank, value in values.items():
            if value != expected:
                problems[rank].append(
                    f"{name} is {value}, on {count} other rank{'s' * (count > 1)} {expected}; make all nodes "
                    "alike"
                )
    return problems


def lines(problems: Problems, nodes: Sequence[str]) -> list[str]:
    """One line a node: `NODE (ranks 4-7): what; what`. What several of its ranks say is said once."""
    told = []
    for node in dict.fromkeys(nodes):
        ranks = [rank for rank in problems if nodes[rank] == node]
        if ranks:
            sentences = dict.fromkeys(sentence for rank in ranks for sentence in problems[rank])
            told.append(f"{node} ({as_ranges(ranks)}): {'; '.join(sentences)}")
    return told


def slow_nodes(seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Hints at nodes that are far from the median.

    Args:
        seconds: of each thing measured, by node.
    """
    hints = []
    for thing, by_node in seconds.items():
        middle = median(by_node.values())
        hints += [
            f"{node}: {thing} takes {taken / middle:.1f} times the median of all nodes"
            for node, taken in by_node.items()
            if taken > _SLOW * middle
        ]
    return hints
