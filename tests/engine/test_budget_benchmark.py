# SPDX-License-Identifier: Apache-2.0
"""The benchmark's figures, by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("open3d")

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.stages import StageTimes
from benchmarks._budget_report import Row, by_decile, figures
from benchmarks.budget import parse


def row(budget: float, total: float, predicted: float, queue: float = 0.0) -> Row:
    answer = Answer(
        Question("?"),
        Status.OK,
        times=StageTimes(queue=queue, total=total),
        predicted=StageTimes(total=predicted),
    )
    return Row(budget, total + 1.0, answer, loss=1.0 / budget, score=None)


def test_figures_by_hand() -> None:
    found = figures([row(100.0, 80.0, 80.0), row(200.0, 300.0, 240.0), row(400.0, 410.0, 400.0, queue=10.0)])
    assert found["miss_rate"] == pytest.approx(2 / 3)
    assert found["median_use"] == pytest.approx(1.025)
    # Overshoots 0, 0.5 and 0.025; errors 0, 0.2 and 0.
    assert found["p95_overshoot"] == pytest.approx(0.025 + 0.9 * 0.475)
    assert found["p95_prediction_error"] == pytest.approx(0.18)
    assert found["clock_error_ms"] == pytest.approx(1.0)
    assert [one["budget_ms"] for one in found["late"]] == [200.0, 400.0]
    assert "accuracy" not in found


def test_deciles_go_from_tight_to_ample() -> None:
    rows = [row(float(budget), 1.0, 1.0) for budget in range(20, 0, -1)]
    assert by_decile(rows, lambda one: one.budget) == [1.5 + 2 * i for i in range(10)]


def test_bad_flags_are_refused() -> None:
    with pytest.raises(SystemExit):
        parse(["--questions", "0"])
