# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lab.cost import cost_share
from adatoken3d_ros.lab.gates import Front, place_gates
from adatoken3d_ros.lab.probe import RATIOS, CalibrationError
from adatoken3d_ros.pruning.schedule import Schedule
from tests.lab.conftest import LinearCost


def brute_force(gaps: np.ndarray, layers: list[int], ratios: list[float], limit: float, n: int, most: int, end: int):
    """Every choice of at most `most` gates with falling ratios: (least divergence, whether any is cheap enough)."""
    best = np.inf
    for k in range(most + 1):
        for rows in itertools.combinations(range(len(layers)), k):
            if any(layers[row] >= end for row in rows):
                continue
            for columns in itertools.combinations(range(len(ratios)), k):
                schedule = Schedule.of(
                    [layers[r] for r in rows], [ratios[c] for c in columns], end if end < n else None
                )
                if cost_share(LinearCost(), schedule, n) <= limit + 1e-9:
                    best = min(best, sum(gaps[r, c] for r, c in zip(rows, columns, strict=True)))
    return best


@settings(max_examples=150, deadline=None)
@given(
    n_layers=st.integers(2, 6),
    n_ratios=st.integers(1, 3),
    most=st.integers(1, 4),
    limit=st.floats(0.1, 1.0),
    withdraw=st.none() | st.integers(0, 6),
    seed=st.integers(0, 2**16),
    coarse=st.booleans(),
)
def test_planning_equals_brute_force(
    n_layers: int, n_ratios: int, most: int, limit: float, withdraw: int | None, seed: int, coarse: bool
) -> None:
    random = np.random.default_rng(seed)
    layers = sorted(random.choice(n_layers, size=random.integers(1, n_layers + 1), replace=False).tolist())
    ratios = [0.6, 0.3, 0.1][:n_ratios]
    gaps = random.random((len(layers), n_ratios))
    if coarse:  # many ties
        gaps = np.round(gaps * 2) / 2
    end = n_layers if withdraw is None else min(withdraw, n_layers)
    expected = brute_force(gaps, layers, ratios, limit, n_layers, most, end)
    more = {"max_gates": most, "withdraw_layer": end if end < n_layers else None}
    if np.isinf(expected):
        with pytest.raises(CalibrationError, match="cannot be reached"):
            place_gates(gaps, layers, ratios, LinearCost(), limit, n_layers, **more)
        return
    found = place_gates(gaps, layers, ratios, LinearCost(), limit, n_layers, **more)
    assert found.divergence == pytest.approx(expected)
    assert (
        found.cost == pytest.approx(cost_share(LinearCost(), found.schedule, n_layers)) and found.cost <= limit + 1e-9
    )
    assert len(found.schedule.stages) <= most
    again = sum(gaps[layers.index(s.layer), ratios.index(s.ratio)] for s in found.schedule.stages)
    assert again == pytest.approx(found.divergence)


def test_a_plan_of_seven_billion_parameters_size() -> None:
    random = np.random.default_rng(0)
    depth, share = np.arange(1, 32)[:, None], np.array(RATIOS)[None, :]
    gaps = np.exp(-depth / 8) * (1 - share) ** 2 * random.uniform(0.8, 1.2, (31, 7))
    found = place_gates(gaps, range(1, 32), RATIOS, LinearCost(), 0.37, 32)
    assert found.cost <= 0.37 and 1 <= len(found.schedule.stages) <= 4
    assert found.divergence <= place_gates(gaps, range(1, 32), RATIOS, LinearCost(), 0.37, 32, max_gates=2).divergence


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"divergences": np.ones((2, 3))}, r"\(2, 3\) divergences"),
        ({"divergences": np.full((2, 2), np.nan)}, "finite"),
        ({"layers": [3, 1]}, r"\[3, 1\]"),
        ({"layers": [3, 4]}, r"\[3, 4\].* 4 layers"),
        ({"ratios": [0.1, 0.5]}, r"\[0.1, 0.5\]"),
        ({"ratios": [1.0, 0.5]}, r"\[1.0, 0.5\]"),
        ({"max_gates": 5}, "5 gates"),
        ({"max_gates": 0}, "0 gates"),
        ({"limit": 0.05}, "0.050 .* cannot be reached"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change: dict[str, object], match: str) -> None:
    arguments = {
        "divergences": np.ones((2, 2)),
        "layers": [1, 3],
        "ratios": [0.5, 0.1],
        "cost": LinearCost(),
        "limit": 0.5,
        "n_layers": 4,
        **change,
    }
    with pytest.raises(CalibrationError, match=match):
        place_gates(**arguments)  # type: ignore[arg-type]


def test_only_partial_schedules_that_nothing_beats_go_on() -> None:
    gates = np.arange(4).reshape(4, 1, 1).repeat(2, axis=2)
    front = Front(np.array([3.0, 1.0, 2.0, 2.0]), np.array([3.0, 1.0, 5.0, 0.5]), gates)
    best = Front.best([front, front])
    assert best.cost.tolist() == [1.0, 2.0] and best.divergence.tolist() == [1.0, 0.5]
    assert best.gates[:, 0, 0].tolist() == [1, 3]
