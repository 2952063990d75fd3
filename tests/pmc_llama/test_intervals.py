"""Interval arithmetic is that of the sets of moments."""

from hypothesis import given
from hypothesis import strategies as st

from pmc_llama.intervals import Interval, intersect, length, subtract, union

_moments = st.integers(0, 40)
_intervals = st.lists(st.tuples(_moments, _moments).map(lambda pair: (min(pair), max(pair))), max_size=12)


def _seconds(intervals: list[Interval]) -> set[int]:
    """The whole seconds in a set whose borders are whole."""
    return {second for begin, end in intervals for second in range(int(begin), int(end))}


@given(_intervals)
def test_a_union_has_the_same_moments_sorted_and_apart(intervals: list[Interval]) -> None:
    joined = union(intervals)
    assert _seconds(joined) == _seconds(intervals)
    borders = [border for interval in joined for border in interval]
    assert borders == sorted(set(borders))


@given(_intervals, _intervals)
def test_intersection_and_difference_are_those_of_the_moments(
    left: list[Interval], right: list[Interval]
) -> None:
    both, rest = intersect(union(left), union(right)), subtract(union(left), union(right))
    assert _seconds(both) == _seconds(left) & _seconds(right)
    assert _seconds(rest) == _seconds(left) - _seconds(right)
    assert both == union(both)
    assert rest == union(rest)


@given(_intervals, _intervals)
def test_what_is_in_and_what_is_out_add_up(left: list[Interval], right: list[Interval]) -> None:
    whole, part = union(left), union(right)
    assert length(intersect(whole, part)) + length(subtract(whole, part)) == length(whole)
    assert length(whole) == len(_seconds(left))
