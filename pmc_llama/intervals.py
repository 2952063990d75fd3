"""Arithmetic of time: sets of moments as sorted lists of intervals that neither overlap nor touch."""

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
"""Begin and end, end excluded; the unit is the caller's."""


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The moments that are in any of the intervals, which may overlap and come in any order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif begin < end:
            joined.append((begin, end))
    return joined


def intersect(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The moments that are in both sets."""
    common: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            common.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def subtract(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The moments of `left` that are not in `right`."""
    rest: list[Interval] = []
    j = 0
    for begin, end in left:
        while j < len(right) and right[j][1] <= begin:
            j += 1
        k = j
        while k < len(right) and right[k][0] < end:
            if begin < right[k][0]:
                rest.append((begin, right[k][0]))
            begin = right[k][1]
            k += 1
        if begin < end:
            rest.append((begin, end))
    return rest


def length(intervals: Sequence[Interval]) -> float:
    """The time that a set takes."""
    return sum(end - begin for begin, end in intervals)
