"""What the guards refuse, and that a resumed run refuses the same."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import UserError
from pmc_llama.config import GuardConfig
from pmc_llama.guards import Guard, check_skip_steps

SPIKES = GuardConfig(max_skipped=2, spike_deviations=3.0, spike_window=8)
# Losses and norms of fp32 numbers, now and then none.
VALUES = st.one_of(
    st.floats(0, 1e45), st.floats(1.0, 2.0), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
)
STEPS = st.lists(st.tuples(VALUES, VALUES), max_size=40)
CONFIGS = st.builds(
    GuardConfig,
    max_skipped=st.integers(0, 4),
    spike_deviations=st.none() | st.floats(0.1, 10),
    spike_window=st.integers(2, 12),
)


def _steady(count: int, seed: int = 0) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(draw.gauss(3.0, 0.01), draw.gauss(0.8, 0.05)) for _ in range(count)]


def _objection(guard: Guard, loss: float, norm: float) -> str | None:
    """A step as the trainer takes it, the host right behind the device."""
    refused = guard.judge(*(torch.tensor(value, dtype=torch.float64) for value in (loss, norm)))
    assert refused.item() in (0.0, 1.0)
    return guard.learn(loss, norm, bool(refused))


def _fed(config: GuardConfig, values: list[tuple[float, float]]) -> Guard:
    guard = Guard(config)
    for loss, norm in values:
        _objection(guard, loss, norm)
    return guard


# --- numbers that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [GuardConfig(), SPIKES])
def test_no_update_is_made_for_a_loss_or_norm_that_is_not_finite(bad: float, config: GuardConfig) -> None:
    guard = Guard(config)
    assert _objection(guard, 3.0, 1.0) is None
    assert _objection(guard, bad, 1.0) == f"loss {bad:.6g} and gradient norm 1"
    assert _objection(guard, 3.0, bad) == f"loss 3 and gradient norm {bad:.6g}"
    assert _objection(guard, 3.0, 1.0) is None
    assert (guard.skipped, guard.skipped_in_a_row) == (2, 0)


def test_numbers_that_are_not_finite_do_not_change_what_a_spike_is() -> None:
    steady, bad = _steady(8), [(math.nan, 1.0), (3.0, math.inf)]
    assert _fed(SPIKES, steady[:4] + bad + steady[4:]).state()["losses"] == [loss for loss, _ in steady]
    assert _objection(_fed(SPIKES, steady[:4] + bad + steady[4:]), 9.0, 0.8)


# --- spikes ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 100.0)), max_size=40), st.floats(0.1, 10.0))
def test_a_spike_is_a_value_many_deviations_above_the_mean_of_the_window_before_it(
    values: list[tuple[float, float]], deviations: float
) -> None:
    guard = Guard(dataclasses.replace(SPIKES, spike_deviations=deviations, max_skipped=99))
    for step, pair in enumerate(values):
        window = np.array(values[max(0, step - 8) : step]).reshape(-1, 2)
        known = len(window) >= 4
        limits = window.mean(axis=0) + deviations * window.std(axis=0, ddof=1) if known else [math.inf] * 2
        objection = _objection(guard, *pair)
        # Within rounding of the limit either answer is right.
        if not any(
            math.isclose(value, limit, rel_tol=1e-9) for value, limit in zip(pair, limits, strict=True)
        ):
            assert bool(objection) == any(value > limit for value, limit in zip(pair, limits, strict=True))


@pytest.mark.parametrize(("spike", "word"), [((4.0, 0.8), "loss 4 "), ((3.0, 5.0), "gradient norm 5 ")])
def test_the_objection_to_a_spike_names_the_value_and_its_limit(
    spike: tuple[float, float], word: str
) -> None:
    objection = _objection(_fed(SPIKES, _steady(8)), *spike)
    assert objection is not None
    assert objection.startswith(word)
    assert "3 deviations over the last 8" in objection


def test_a_loss_far_below_the_others_is_no_spike() -> None:
    assert _objection(_fed(SPIKES, _steady(8)), 0.1, 0.01) is None


def test_nothing_is_a_spike_before_half_the_window_is_known_or_when_spikes_are_not_guarded() -> None:
    assert _objection(_fed(SPIKES, _steady(3)), 1e9, 1e9) is None
    assert _objection(_fed(SPIKES, _steady(4)), 1e9, 1e9) is not None
    assert _objection(_fed(GuardConfig(), _steady(200)), 1e9, 1e9) is None


def test_a_lasting_change_of_level_costs_only_the_steps_that_the_docstring_promises() -> None:
    guard = _fed(GuardConfig(spike_deviations=6.0, spike_window=128), _steady(128))
    refused = [_objection(guard, loss + 5.0, norm) is not None for loss, norm in _steady(60, seed=1)]
    assert refused == [True] * 4 + [False] * 56


# --- stopping and passing over -----------------------------------------------------------------------------


def test_a_run_stops_after_more_skipped_updates_in_a_row_than_allowed_and_not_for_as_many_apart() -> None:
    guard = Guard(GuardConfig(max_skipped=2))
    for _ in range(10):
        _objection(guard, math.nan, 1.0)
        _objection(guard, math.nan, 1.0)
        assert not guard.must_stop
        _objection(guard, 3.0, 1.0)
    for expected in (False, False, True):
        _objection(guard, math.nan, 1.0)
        assert guard.must_stop is expected


def test_no_update_is_made_once_the_run_must_stop_even_before_the_host_knows() -> None:
    guard = Guard(GuardConfig(max_skipped=1))
    nan, good = (torch.tensor(value, dtype=torch.float64) for value in (math.nan, 3.0))
    assert [float(guard.judge(loss, good)) for loss in (nan, good, nan, nan, good)] == [1, 0, 1, 1, 1]
    for _ in range(2):
        guard.learn(math.nan, 3.0, True)
    assert guard.must_stop
    assert guard.learn(3.0, 3.0, True) == "following 2 updates that were skipped"


def test_the_sentence_of_a_stop_names_steps_limit_reason_and_what_to_do() -> None:
    guard, reason = Guard(GuardConfig(max_skipped=0)), ""
    reason = _objection(guard, math.nan, 2.0) or ""
    sentence = str(guard.stop(6, 7, reason))
    for part in ("step 7", "guards.max_skipped, 0", "loss nan", "step 6", "--guards.skip_steps='[[7, 7]]'"):
        assert part in sentence


def test_the_steps_that_a_recipe_names_are_passed_over_and_no_others() -> None:
    guard = Guard(GuardConfig(skip_steps=[(9, 9), (2, 4)]))
    assert [step for step in range(1, 12) if guard.passes_over(step)] == [2, 3, 4, 9]


@pytest.mark.parametrize(
    ("ranges", "named"),
    [
        ([(0, 3)], "[0, 3]"),
        ([(5, 4)], "[5, 4]"),
        ([(-2, -1)], "[-2, -1]"),
        ([(7, 9), (1, 7)], "[1, 7] and [7, 9]"),
        ([(1, 10), (3, 4)], "[1, 10] and [3, 4]"),
        ([(3, 3), (3, 3)], "[3, 3] and [3, 3]"),
    ],
)
def test_ranges_that_are_reversed_overlap_or_begin_before_step_1_are_refused(
    ranges: list[tuple[int, int]], named: str
) -> None:
    with pytest.raises(UserError, match=r"^guards\.skip_steps has ") as refused:
        check_skip_steps(ranges)
    assert named in str(refused.value)


def test_ranges_side_by_side_and_in_any_order_are_accepted() -> None:
    check_skip_steps([])
    check_skip_steps([(8, 9), (1, 1), (2, 7)])


# --- resuming ----------------------------------------------------------------------------------------------


@given(STEPS, CONFIGS, st.data())
def test_a_guard_resumed_anywhere_from_its_json_decides_as_one_never_interrupted(
    values: list[tuple[float, float]], config: GuardConfig, data: st.DataObject
) -> None:
    interrupted = data.draw(st.sets(st.integers(0, len(values))))
    whole, resumed = Guard(config), Guard(config)
    for step, pair in enumerate(values):
        if step in interrupted:
            resumed = Guard(config, json.loads(json.dumps(resumed.state(), allow_nan=False)))
        assert _objection(resumed, *pair) == _objection(whole, *pair)
        assert resumed.must_stop == whole.must_stop
        assert resumed.state() == whole.state()


@given(STEPS, CONFIGS)
def test_a_host_that_learns_late_learns_the_same(
    values: list[tuple[float, float]], config: GuardConfig
) -> None:
    late, prompt = Guard(config), Guard(config)
    refused = [
        bool(late.judge(*(torch.tensor(value, dtype=torch.float64) for value in pair))) for pair in values
    ]
    for pair, one in zip(values, refused, strict=True):
        assert late.learn(*pair, one) == _objection(prompt, *pair)
    assert late.state() == prompt.state()


def test_a_shorter_window_at_a_resume_keeps_the_newest_values() -> None:
    guard = _fed(SPIKES, _steady(8))
    shorter = Guard(dataclasses.replace(SPIKES, spike_window=3), guard.state())
    assert shorter.state()["losses"] == guard.state()["losses"][-3:]
