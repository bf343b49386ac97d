# SPDX-License-Identifier: Apache-2.0
"""The short form of `python -m benchmarks.fleet`: two real replicas, robots that ask, one replica killed."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from benchmarks import fleet
from benchmarks.fleet import Told, recovery, times, ttft
from tests.fleet.test_spread import LOOPBACK, listening


@pytest.mark.timeout(600)
def test_no_question_is_lost_when_a_replica_is_killed(local_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of the service, replicas included, listens to other machines."""
    heard: set[str] = set()
    kill = fleet.kill_one

    def looked(*given: Any) -> None:
        heard.update(listening())
        kill(*given)

    monkeypatch.setattr(fleet, "kill_one", looked)
    args = fleet.parser().parse_args(["--json", "unused", "--robots", "2", "--seconds", "3", "--budget-ms", "20000"])
    found = fleet.run(args, Console(quiet=True))
    assert found["lost"] == 0 and found["killed"]["lost"] == 0
    assert found["killed"]["replaced_s"] is not None and found["killed"]["questions"] > 0
    assert found["late"] == found["late_alone"] == 0
    assert 0 < found["bytes_per_key_frame"] < 500_000
    assert heard and heard <= LOOPBACK
    # On a busy machine a connection may take too long: that is an answer, too, and says so.
    # There, too, chance may ask for no question in 3 s at half of the load: only the idle robot's do not depend on it.
    assert found["parts"]["idle"]["questions"]
    wrong = {name: part for name, part in found["parts"].items() if sum(part["why"].values()) != part["errors"]}
    assert not wrong, wrong


def told(robot: int, asked: float, ended: float, status: str = "OK", in_time: bool = True) -> Told:
    return Told(robot, asked, ended - 0.1, ended, status, in_time, True, True)


def test_recovery_by_hand() -> None:
    """Killed at 10: robot 0 has an error and then an answer at 12.5, robot 1 one at 11; what was asked before does not
    count, nor what was late."""
    answers = [told(0, 9.9, 10.4), told(0, 10.2, 11.0, "ERROR"), told(0, 12.0, 12.5), told(1, 10.1, 11.0)]
    assert recovery(answers, 10.0, 2) == 2.5
    assert recovery([*answers[:2], told(0, 12.0, 12.5, in_time=False), answers[3]], 10.0, 2) is None


def test_times_and_percentiles() -> None:
    found = times(10.0, 1000.0, 0)
    assert found == sorted(found) and len(found) == pytest.approx(10_000, rel=0.03) and found == times(10.0, 1000.0, 0)
    assert ttft([told(0, 0.0, 0.1 + n / 100) for n in range(101)]) == pytest.approx(950.0)
