# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab.calibration import DIVERGENCE_STEPS, bisect, calibrate
from adatoken3d_ros.lab.cost import FlopsCost
from adatoken3d_ros.lab.probe import (
    CalibrationError,
    Probe,
    horizon,
    withdrawal_scan,
)
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, scaled
from tests.lab.conftest import N_LAYERS, LinearCost, samples


@pytest.mark.parametrize(("good", "bad"), [(4.0, 1.0), (0.0, 4.0)])
def test_bisection_meets_the_target_from_the_accepted_side(good: float, bad: float) -> None:
    target = 2.718281828
    upwards = good > bad
    asked: list[float] = []

    def accept(value: float) -> bool:
        asked.append(value)
        return value >= target if upwards else value <= target

    found = bisect(accept, good, bad, 30)
    assert found == pytest.approx(target, abs=1e-7)
    assert found >= target if upwards else found <= target
    assert len(asked) == 31
    assert bisect(lambda value: True, good, bad, 5) == bad


def test_scaling_keeps_the_order_and_stops_at_everything() -> None:
    schedule = scaled(Schedule.of([1, 2, 3], [0.8, 0.5, 0.1], withdraw_layer=4), 1.5)
    assert [stage.ratio for stage in schedule.stages] == pytest.approx([1.0, 0.75, 0.15])
    assert schedule.withdraw_layer == 4


def test_calibration_uses_up_the_cost_limit(probe: Probe) -> None:
    found = calibrate(probe, LinearCost(), 0.6, max_gates=2, ratios=(0.5, 0.1))
    assert found.within_limit and found.cost == pytest.approx(0.6, abs=1e-6)
    assert found.factor >= 1.0 and found.planned.cost <= 0.6
    assert found.divergence == pytest.approx(probe.divergence(found.schedule))
    assert found.schedule == scaled(found.planned.schedule, found.factor)
    assert found.sensitivity.shape == (N_LAYERS - 1, 2) and found.withdrawal is None


def test_calibration_meets_a_divergence_limit_by_bisection(probe: Probe) -> None:
    free = calibrate(probe, LinearCost(), 0.4, max_gates=1, ratios=(0.5, 0.1))
    asked = free.divergence / 3
    found = calibrate(probe, LinearCost(), 0.4, max_gates=1, ratios=(0.5, 0.1), max_divergence=asked)
    assert found.divergence <= asked
    assert found.factor > free.factor and not found.within_limit
    # No more is given back than bisection can tell.
    step = (1 / 0.1 - free.factor) / 2**DIVERGENCE_STEPS
    assert probe.divergence(scaled(found.planned.schedule, found.factor - step)) > asked


def test_calibration_withdraws_past_the_horizon(probe: Probe) -> None:
    scan = withdrawal_scan(probe)
    eta = float(scan[N_LAYERS - 1]) * 1.01
    found = calibrate(probe, LinearCost(), 0.6, ratios=(0.5, 0.1), withdraw=True, eta=eta)
    assert found.schedule.withdraw_layer == horizon(scan, eta)
    assert found.withdrawal == pytest.approx(scan)
    # What withdrawal alone costs is too much here: it is given up.
    strict = calibrate(probe, LinearCost(), 0.6, ratios=(0.5, 0.1), withdraw=True, eta=eta, max_divergence=1e-7)
    assert strict.schedule.withdraw_layer is None
    assert strict.divergence <= 1e-7


def test_calibrations_that_make_no_sense_are_refused(decoder: Decoder, probe: Probe) -> None:
    with pytest.raises(CalibrationError, match="no calibration prompt"):
        Probe(decoder, [], make_policy("ours"))
    with pytest.raises(CalibrationError, match="1.2"):
        calibrate(probe, LinearCost(), 1.2)
    with pytest.raises(CalibrationError, match="max_divergence -1"):
        calibrate(probe, LinearCost(), 0.5, max_divergence=-1)
    with pytest.raises(CalibrationError, match="0.110 .* cannot be reached"):
        calibrate(probe, LinearCost(), 0.11, ratios=(0.5, 0.1))
    with pytest.raises(CalibrationError, match="9 gates"):
        calibrate(probe, LinearCost(), 0.5, max_gates=9)


def test_a_limit_out_of_reach_is_found_before_the_long_measurement() -> None:
    class NeverAsked(Probe):
        n_layers = N_LAYERS

        def __init__(self) -> None: ...

        def divergence(self, schedule: Schedule) -> float:
            pytest.fail("measured in vain")

    # One full layer and four that keep a tenth: (1 + 4 * 0.19) / 5
    with pytest.raises(CalibrationError, match="least is 0.352"):
        calibrate(NeverAsked(), LinearCost(), 0.35, ratios=(0.5, 0.1))


def test_no_gate_is_measured_past_the_horizon(probe: Probe) -> None:
    found = calibrate(probe, LinearCost(), 0.6, ratios=(0.5, 0.1), withdraw=True, eta=1e6)
    assert found.schedule == Schedule(withdraw_layer=0) and found.sensitivity.shape == (0, 2)


def test_calibration_is_deterministic(decoder: Decoder) -> None:
    def once() -> Schedule:
        fresh = Probe(decoder, samples(), make_policy("ours"), n_tokens=2)
        return calibrate(fresh, FlopsCost(decoder.size, samples()), 0.5, ratios=(0.5, 0.25, 0.1)).schedule

    assert once() == once()
