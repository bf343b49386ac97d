# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.pruning.decay import Decay, DecayError, adatoken_schedule, fit_decay, gates_on_curve


def exponential(rate: float, n_layers: int = 32, end: float = 0.1) -> np.ndarray:
    raw = np.exp(-rate * np.arange(n_layers))
    return end + (1 - end) * (raw - raw[-1]) / (raw[0] - raw[-1])


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("end", [0.05, 0.4])
def test_the_fit_finds_a_known_exponential(rate: float, end: float) -> None:
    decay = fit_decay(exponential(rate, end=end), end)
    assert np.isclose(decay.B, rate, rtol=1e-5)
    assert decay.curve() == pytest.approx(exponential(rate, end=end), abs=1e-6)
    x = np.arange(1, 33)
    assert decay.A * np.exp(-decay.B * (x - decay.C)) + decay.D == pytest.approx(decay.curve(), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.floats(0.01, 0.9))
def test_every_fit_falls_from_one_to_the_end_share(contribution: list[float], end: float) -> None:
    decay = fit_decay(np.array(contribution), end)
    curve = decay.curve()
    assert curve[0] == pytest.approx(1.0) and curve[-1] == pytest.approx(end)
    assert (np.diff(curve) <= 0).all()
    assert fit_decay(np.array(contribution), end) == decay


def test_the_fit_is_a_local_minimum() -> None:
    contribution = np.array([1.0, 0.2, 0.35, 0.1, 0.15, 0.0, 0.3, 0.05])
    best = fit_decay(contribution)

    def error(rate: float) -> float:
        curve = Decay(rate, 0.1, 8).curve()
        return float(((curve - contribution) ** 2).sum() + (np.diff(curve - contribution) ** 2).sum())

    assert best.error == pytest.approx(error(best.B))
    assert all(error(best.B) <= error(rate) + 1e-12 for rate in np.geomspace(1e-4, 10, 3000))


def test_the_fit_says_whether_contributions_decay() -> None:
    assert fit_decay(exponential(0.3)).correlation == pytest.approx(1.0)
    assert fit_decay(exponential(0.3)[::-1]).correlation < 0.0
    assert fit_decay(np.full(5, 0.7)).correlation == 0.0


def test_contributions_that_fall_late_give_a_straight_line() -> None:
    assert fit_decay(exponential(-0.3, 12), 0.1).curve() == pytest.approx(np.linspace(1, 0.1, 12), abs=1e-4)


@pytest.mark.parametrize(
    ("contribution", "end", "match"),
    [([1.0], 0.1, "two layers"), ([1.0, np.nan], 0.1, "nan"), ([1.0, 0.5], 1.0, "end share 1.0"), ([1, 0], 0.0, "0.0")],
)
def test_what_cannot_be_fitted(contribution: list[float], end: float, match: str) -> None:
    with pytest.raises(DecayError, match=match):
        fit_decay(np.array(contribution), end)


def staircase(curve: np.ndarray, layers: tuple[int, ...]) -> float:
    values = np.ones(len(curve))
    for layer in layers:
        values[layer:] = curve[layer]
    return float(values.sum())


@pytest.mark.parametrize("n_gates", [1, 2, 3, 4])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.6])
def test_gates_leave_the_least_excess_over_the_curve(n_gates: int, rate: float) -> None:
    curve = exponential(rate, 9)
    layers = tuple(stage.layer for stage in gates_on_curve(curve, n_gates).stages)
    least = min(staircase(curve, some) for some in itertools.combinations(range(1, 9), n_gates))
    assert len(layers) == n_gates
    assert staircase(curve, layers) == pytest.approx(least)


def test_gates_never_go_below_the_curve() -> None:
    schedule, decay = adatoken_schedule(exponential(0.2) ** 2, a=0.07, n_gates=4)
    counts = np.array(schedule.counts(10**6, 32)) / 10**6
    assert (counts >= decay.curve() - 1e-6).all()
    for stage in schedule.stages:
        assert stage.ratio == pytest.approx(decay.curve()[stage.layer], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=34), st.floats(0.01, 0.9), st.integers(1, 40))
def test_any_contributions_give_a_schedule_that_runs(contribution: list[float], end: float, n_gates: int) -> None:
    schedule, _ = adatoken_schedule(np.array(contribution), end, n_gates)
    schedule.check(len(contribution))
    assert len(schedule.stages) <= min(n_gates, len(contribution) - 1)
    ratios = [1.0, *(stage.ratio for stage in schedule.stages)]
    assert ratios == sorted(set(ratios), reverse=True)


def test_no_gates_are_no_schedule() -> None:
    with pytest.raises(DecayError, match="0 gates"):
        gates_on_curve(np.array([1.0, 0.5]), 0)
