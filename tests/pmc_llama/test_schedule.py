"""The learning rate rises, peaks, falls; a run has the steps that its recipe asks for."""

import math

from hypothesis import given
from hypothesis import strategies as st

from pmc_llama.config import ScheduleConfig
from pmc_llama.schedule import learning_rate

PEAK = 2e-5
schedules = st.builds(
    ScheduleConfig,
    warmup_ratio=st.floats(0, 1),
    final_learning_rate_ratio=st.floats(0, 1),
)


@given(schedules, st.integers(1, 500))
def test_the_rate_rises_to_the_peak_and_then_falls_to_the_floor(schedule: ScheduleConfig, steps: int) -> None:
    rates = [learning_rate(step, steps, PEAK, schedule) for step in range(1, steps + 1)]
    warmup = math.ceil(schedule.warmup_ratio * steps)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == PEAK
    if warmup < steps:
        floor = PEAK * schedule.final_learning_rate_ratio
        assert floor <= rates[-1] * (1 + 1e-12)
        assert rates[-1] > 0
        assert math.isclose(learning_rate(steps + 1, steps, PEAK, schedule), floor, abs_tol=1e-18)


def test_known_rates_of_a_short_run() -> None:
    schedule = ScheduleConfig(warmup_ratio=0.2, final_learning_rate_ratio=0.1)
    rates = [learning_rate(step, 10, 1.0, schedule) for step in (1, 2, 6, 10)]
    expected = [
        0.5,
        1.0,
        0.1 + 0.45 * (1 + math.cos(math.pi * 4 / 9)),
        0.1 + 0.45 * (1 + math.cos(math.pi * 8 / 9)),
    ]
    assert rates == expected
