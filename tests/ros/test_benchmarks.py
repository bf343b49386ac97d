# SPDX-License-Identifier: Apache-2.0
"""The node's benchmarks: their figures by hand, and each once at its smallest size."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("rclpy")

from benchmarks import ingest, responsiveness, soak
from benchmarks._ros import percentiles
from benchmarks.soak import RATES, Tally, growth_mb_per_hour, schedule


def test_percentiles_by_hand() -> None:
    found = percentiles("x_ms", [float(value) for value in range(1, 102)])
    assert found == {"x_ms_p50": 51.0, "x_ms_p95": 96.0, "x_ms_p99": 100.0, "x_ms_max": 101.0}
    fast = dict.fromkeys(responsiveness.NAMES, [1.0] * 200)
    assert responsiveness.figures(fast)["met"]
    slow = responsiveness.figures({**fast, "cancel_ms": [1.0] * 190 + [60.0] * 10})
    assert not slow["met"]
    # Both goals have to be met, and one pair of clocks that disagrees is one too many.
    near, far = responsiveness.clock_figures([1.0] * 99 + [9.0]), responsiveness.clock_figures([1.0] * 99 + [11.0])
    assert (near["clock_error_ms_p95"], near["clock_error_ms_max"]) == (1.0, 9.0)
    quick = responsiveness.figures(fast)
    assert [responsiveness.both(*pair)["met"] for pair in ((quick, near), (quick, far), (slow, near))] == [
        True,
        False,
        False,
    ]


def test_ingested_frames_by_hand() -> None:
    values = {
        "received.points": "9", "paired.points": "9", "pending.points": "0", "pairs.matched": "9",
        "pairs.handed_over": "8", "pairs.waiting": "0", "pairs.dropped.no_pose": "1", "frames.key_frame": "2",
        "frames.too_similar": "4", "received.pose": "7", "accepted.age_ms.p95": "12.50",
    }  # fmt: skip
    sent = {"sent": {"points": 10, "pose": 10}, "latest_ms": 1.0, "acknowledged": True, "repeated": 0}
    found = ingest.figures(values, sent, ("points",))
    assert (found["unaccounted_frames"], found["unaccounted"]) == (2, {"frames": 2})
    assert (found["not_received"], found["poses_not_received"], found["accept_ms_p95"]) == (1, 3, 12.5)
    assert found["fates"] == {"key_frame": 2, "too_similar": 4} and found["dropped"] == {"pairs.dropped.no_pose": 1}


def test_a_schedule_is_its_seed_s() -> None:
    hour = schedule(7, 3600.0)
    assert hour == schedule(7, 3600.0) != schedule(8, 3600.0)
    assert [action.at for action in hour] == sorted(action.at for action in hour)
    assert [action.number for action in hour] == list(range(len(hour)))
    counts = Counter(action.what for action in hour)
    for what, rate in RATES.items():
        assert counts[what] == pytest.approx(3600 * rate, abs=5 * (3600 * rate) ** 0.5), what


def test_growth_by_hand() -> None:
    # 36 MB an hour, after a jump while it warms up, and with some samples that are far off.
    samples = [(float(t), 500.0 * (t >= 60) + 0.01 * t) for t in range(600)]
    samples[300], samples[400] = (300.0, 9e3), (400.0, 0.0)
    assert growth_mb_per_hour(samples) == pytest.approx(36.0)
    assert growth_mb_per_hour([]) is growth_mb_per_hour(samples[:2]) is None


@pytest.mark.parametrize("module", [ingest, responsiveness, soak])
def test_sizes_that_make_no_sense_are_refused(module: object) -> None:
    flag = {"ingest": "--seconds", "responsiveness": "--requests", "soak": "--minutes"}[module.__name__.split(".")[1]]
    with pytest.raises(SystemExit):
        module.parse([flag, "0"])  # type: ignore[attr-defined]


def test_clouds_are_ingested(tiny_model: Path) -> None:
    before = dict(os.environ)
    small = ["--model", str(tiny_model), "--seconds", "1", "--cloud-rate", "5", "--points", "3000", "--speed", "0"]
    found = ingest.measure(ingest.parse(small), "cloud")
    assert found["unaccounted_frames"] == 0 and found["acknowledged"] and found["sent"] == {"points": 5, "pose": 5}
    # The first that comes is drawn in four directions; of what came later hardly anything is new. Its contents are four
    # at random in turn, and which of them arrive is the middleware's choice.
    fates = found["fates"]
    assert fates.get("key_frame", 0) <= max(4, sum(fates.values()) // 2) and found["cpu_cores"] > 0
    assert dict(os.environ) == before


def test_replies_are_measured_while_the_model_writes(tiny_model: Path) -> None:
    found = responsiveness.measure(responsiveness.parse(["--model", str(tiny_model), "--requests", "2"]))
    assert found["long_answers"] >= 1
    for name in responsiveness.NAMES:
        assert 0 < found[f"{name}_p50"] <= found[f"{name}_p99"] <= found[f"{name}_max"]


def test_clocks_are_compared_while_frames_come(tiny_model: Path) -> None:
    found = responsiveness.clock_error(responsiveness.parse(["--model", str(tiny_model), "--budgeted", "2"]))
    assert found["budgeted"] == 2 and 0 <= found["late"] <= 2
    # The asker sees the answer's own time and the way there and back, nothing less.
    assert 0 < found["clock_error_ms_p50"] <= found["clock_error_ms_max"]


def test_everything_happens_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RATES", dict.fromkeys(RATES, 1.0))
    args = soak.parse(["--model", str(tiny_model), "--minutes", "0.05", "--seed", "0"])
    wanted = Counter(action.what for action in schedule(0, 3.0))
    assert set(wanted) == set(RATES)
    found = soak.measure(args)
    assert (found["unanswered"], found["crashes"], found["problems"]) == (0, 0, [])
    assert found["actions"] == dict(sorted(wanted.items())) and found["unaccounted"] == {}
    asked = sum(wanted[kind] for kind in ("question", "cancelled_question", "abandoned_question"))
    assert sum(found["answers_by_status"].values()) == asked


def test_a_node_that_ends_is_a_crash() -> None:
    tally = Tally(crashes=1, problems=["ProcessError: the process node ended with status -11"])
    assert soak.figures(tally, {})["crashes"] == 1 and soak.figures(tally, {})["unaccounted"] == {}
