# SPDX-License-Identifier: Apache-2.0
"""Where what contributed most lies, and what is said of it, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adatoken3d_ros.scene.evidence import MOST, Cluster, Observed, gather
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.verdict import of_words


def test_tokens_that_touch_are_one_place_and_the_one_of_most_contribution_is_first() -> None:
    xyz = np.array([[0.1, 0.1, 0.1], [0.3, 0.1, 0.1], [3.0, 0.0, 0.0], [6.0, 0.0, 0.0]])
    contribution = np.array([0.2, 0.2, 0.35, 0.25])
    first, second = gather(xyz, contribution)
    assert (sorted(first.rows.tolist()), second.rows.tolist()) == ([1], [2]) or sorted(first.rows.tolist()) == [2]
    everything = gather(xyz, np.array([0.3, 0.3, 0.2, 0.2]))
    assert sorted(everything[0].rows.tolist()) == [0, 1] and everything[0].contribution == pytest.approx(0.6)
    np.testing.assert_allclose([*everything[0].low, *everything[0].high], [0.1, 0.1, 0.1, 0.3, 0.1, 0.1])


def test_only_what_is_retained_counts_and_nothing_measured_is_no_place() -> None:
    xyz, contribution = np.eye(3), np.array([0.6, 0.3, 0.1])
    (place,) = gather(xyz, contribution, np.array([False, True, False]))
    assert place.rows.tolist() == [1] and place.contribution == pytest.approx(0.3)
    assert gather(xyz, np.zeros(3)) == [] and gather(np.zeros((0, 3)), np.zeros(0)) == []
    assert len(gather(np.arange(60.0).reshape(20, 3), np.ones(20))) == MOST


def thing(moved_to: tuple[float, float, float] | None = None) -> Thing:
    none = torch.zeros(0)
    return Thing(np.zeros(3), np.ones(3), none, none, none, none, none, 1, 2 * 10**9, 1, 5 * 10**9, moved_to, 0.7)


HERE = [Cluster(np.array([0]), 0.3, np.zeros(3), np.ones(3))]


@pytest.mark.parametrize(
    ("present", "gone", "coverage", "verdict", "why"),
    [
        (HERE, [], 1.0, Observed.SEEN, "rests on what is there"),
        (HERE, [(thing(), 0.2)], 1.0, Observed.SEEN, "rests on what is there"),
        (HERE, [(thing(), 0.4)], 1.0, Observed.SEEN_THEN_GONE, "until 2.00 s, and gone by 5.00 s"),
        (
            HERE,
            [(thing((4.0, 5.0, 6.0)), 0.4)],
            1.0,
            Observed.SEEN,
            "appeared at (4.00, 5.00, 6.00) m (confidence 0.70)",
        ),
        ([Cluster(np.array([0]), 0.05, np.zeros(3), np.ones(3))], [], 0.4, Observed.NOT_OBSERVED, "40% of the scene"),
        ([], [], 0.99, Observed.UNKNOWN, "nothing that was seen stands out"),
        ([], [], math.nan, Observed.UNKNOWN, "stands out, and how much of the scene was seen is not known"),
    ],
)
def test_what_is_known_of_a_question_in_words(
    present: list[Cluster], gone: list[tuple[Thing, float]], coverage: float, verdict: Observed, why: str
) -> None:
    found, reason, _ = of_words(present, gone, coverage, measured=True)
    assert found is verdict and why in reason and "nan" not in reason


def test_without_gates_nothing_is_known() -> None:
    assert of_words(HERE, [], 1.0, measured=False)[0] is Observed.UNKNOWN


@pytest.mark.parametrize(
    ("share", "confidence", "coverage", "verdict"),
    [
        (0.15, 0.5, 0.8, Observed.NOT_OBSERVED),  # 2.75 + 0 + 1.89 * -1.73
        (0.25, 0.5, 0.8, Observed.SEEN),
        (0.15, 0.7, 0.8, Observed.SEEN),  # 2.75 + 1.54 * 0.85 + 1.89 * -1.73
        (0.05, 0.97, 0.8, Observed.SEEN),
        (0.15, 0.5, 0.96, Observed.SEEN),  # nothing is left that it could be
        (0.15, math.nan, 0.8, Observed.SEEN),
        (0.11, math.nan, 0.8, Observed.NOT_OBSERVED),
        (0.0, 1.0, 0.8, Observed.NOT_OBSERVED),
    ],
)
def test_the_less_sure_the_words_are_the_more_a_place_must_stand_out(
    share: float, confidence: float, coverage: float, verdict: Observed
) -> None:
    present = [Cluster(np.array([0]), share, np.zeros(3), np.ones(3))]
    assert of_words(present, [], coverage, True, confidence)[0] is verdict
