"""Which rank is late, told from what every rank last said of itself. Pure functions, no processes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

_MOST_NAMED = 8  # ranks told one by one; of more, the rest is counted


@dataclass(frozen=True)
class Sign:
    """A sign of life: what a rank was doing at a moment.

    Attributes:
        host: name of its machine.
        step: optimizer steps that it has made.
        phase: what it is doing, in the trainer's words.
        phase_seconds: for how long.
        collectives: by process group the collectives that it has begun, those it waits in included.
        posted: `time.time()` of the sign on its machine; cluster clocks agree to well below a second.
    """

    host: str
    step: int
    phase: str
    phase_seconds: float
    collectives: dict[str, int]
    posted: float


def explain(signs: Mapping[int, Sign], world_size: int, answered: Collection[int], now: float) -> str:
    """Say who is late, and what the others do meanwhile.

    A rank that does not answer is late. Otherwise counts of collectives decide: a rank waits when another
    member of one of its groups has begun fewer of that group's collectives, and those are late that others
    wait for and that wait for nobody. So a rank that slept is told from those that only wait for somebody
    who waits, as in hybrid sharding. Where ranks wait for each other, or a few for most, those few are out of
    step: they skipped a collective, or made one too many.

    Args:
        signs: the last one of each rank; ranks that never gave one are missing.
        world_size: ranks in all.
        answered: ranks that live, since they gave a sign after they were asked for one.
        now: `time.time()`.

    Returns:
        Lines of text, the first of them the verdict.
    """
    if silent := [rank for rank in range(world_size) if rank not in answered]:
        verdict = _one_by_one(silent, lambda rank: _of_silent(rank, signs.get(rank), now))
        late = silent
    else:
        waits_for = _waits_for(signs)
        awaited = {rank for others in waits_for.values() for _, rank in others}
        late = sorted(awaited - waits_for.keys())
        if not waits_for:
            verdict = (
                "no rank is behind in the collectives; all wait for the same: network, files or a device"
            )
        elif late and len(late) <= len(waits_for):
            verdict = _one_by_one(late, lambda rank: _of_behind(rank, signs, waits_for))
        else:
            late = _fewest(signs, awaited | waits_for.keys())
            verdict = _one_by_one(late, lambda rank: _of_out_of_step(rank, late, signs))
    others = [rank for rank in sorted(answered) if rank not in late]
    return "\n".join([verdict, *_by_doing({rank: signs[rank] for rank in others})])


def ranges(ranks: Iterable[int]) -> str:
    """Ranks as a person writes them: `rank 3`, `ranks 0, 2-7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    one = len(runs) == 1 and len(runs[0]) == 1
    return ("rank " if one else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)


def doing(sign: Sign) -> str:
    """What a rank was doing, without the time."""
    return f"step {sign.step + 1}, {sign.phase}"


def _waits_for(signs: Mapping[int, Sign]) -> dict[int, set[tuple[str, int]]]:
    """By waiting rank the (group, rank) pairs that are furthest behind it."""
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, sign in signs.items():
        for group, count in sign.collectives.items():
            counts[group][rank] = count
    waits: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for group, of_group in counts.items():
        least = min(of_group.values())
        slowest = {rank for rank, count in of_group.items() if count == least}
        for rank in of_group.keys() - slowest:
            waits[rank] |= {(group, other) for other in slowest}
    return dict(waits)


def _one_by_one(ranks: list[int], of_rank: Callable[[int], str]) -> str:
    told = [of_rank(rank) for rank in ranks[:_MOST_NAMED]]
    if rest := ranks[_MOST_NAMED:]:
        told.append(f"and {ranges(rest)} likewise")
    return "\n".join(told)


def _of_silent(rank: int, sign: Sign | None, now: float) -> str:
    if sign is None:
        return f"rank {rank} is late: it has given no sign of life since the start"
    seconds = max(0.0, now - sign.posted)
    return (
        f"rank {rank} on {sign.host} is late: no sign of life for {seconds:.0f} s, last seen in {doing(sign)}"
    )


def _of_behind(rank: int, signs: Mapping[int, Sign], waits_for: Mapping[int, set[tuple[str, int]]]) -> str:
    sign = signs[rank]
    group = min(group for others in waits_for.values() for group, other in others if other == rank)
    most = max(each.collectives.get(group, 0) for each in signs.values())
    return (
        f"rank {rank} on {sign.host} is late: in {doing(sign)} for {sign.phase_seconds:.0f} s, it has begun "
        f"{sign.collectives[group]} collectives of group {group}, and the others wait for it in number {most}"
    )


def _of_out_of_step(rank: int, few: Collection[int], signs: Mapping[int, Sign]) -> str:
    sign = signs[rank]
    differences = []
    for group, count in sorted(sign.collectives.items()):
        others = [each.collectives.get(group) for other, each in signs.items() if other not in few]
        [(usual, _)] = Counter(each for each in others if each is not None).most_common(1) or [(count, 0)]
        if usual != count:
            differences.append(f"{count} collectives of group {group} where the others have begun {usual}")
    return (
        f"rank {rank} on {sign.host} is out of step: in {doing(sign)} for {sign.phase_seconds:.0f} s, it has "
        f"begun {' and '.join(differences)}"
    )


def _fewest(signs: Mapping[int, Sign], ranks: Iterable[int]) -> list[int]:
    """Of these ranks the smallest set that has begun the same collectives."""
    alike: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        alike[tuple(sorted(signs[rank].collectives.items()))].append(rank)
    return min(alike.values(), key=len)


def _by_doing(signs: Mapping[int, Sign]) -> list[str]:
    """A line for all ranks that do the same."""
    together: dict[str, list[int]] = defaultdict(list)
    for rank, sign in signs.items():
        together[doing(sign)].append(rank)
    return [
        f"{ranges(ranks)} in {what} for {max(signs[rank].phase_seconds for rank in ranks):.0f} s"
        for what, ranks in together.items()
    ]
