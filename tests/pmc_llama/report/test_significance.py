"""Intervals and tests are those of scipy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pmc_llama.report.significance import mcnemar, wilson


@st.composite
def right_of(draw: st.DrawFn) -> tuple[int, int]:
    questions = draw(st.integers(1, 5000))
    return draw(st.integers(0, questions)), questions


@given(right_of(), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_is_scipys_score_interval(counts: tuple[int, int], confidence: float) -> None:
    found = wilson(*counts, confidence)
    wanted = binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= found.low <= counts[0] / counts[1] <= found.high <= 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_mcnemar_is_the_exact_binomial_test_of_the_questions_that_one_has_right(
    pairs: list[tuple[bool, bool]],
) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = mcnemar(first, second)
    only_first = sum(a > b for a, b in pairs)
    only_second = sum(b > a for a, b in pairs)
    assert (found.questions, found.only_first, found.only_second) == (len(pairs), only_first, only_second)
    discordant = only_first + only_second
    wanted = binomtest(only_first, discordant).pvalue if discordant else 1.0
    assert found.p == pytest.approx(wanted, rel=1e-9)
    assert found.difference == pytest.approx((sum(second) - sum(first)) / len(pairs))
    other = mcnemar(second, first)
    assert (other.p, other.difference) == (found.p, -found.difference)


def test_thousands_of_questions_that_one_has_right_are_no_overflow() -> None:
    found = mcnemar([True] * 2000 + [False] * 2200, [False] * 2000 + [True] * 2200)
    assert found.p == pytest.approx(binomtest(2000, 4200).pvalue, rel=1e-9)
    assert mcnemar([True] * 4000, [False] * 4000).p == pytest.approx(0, abs=1e-300)
