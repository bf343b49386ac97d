# SPDX-License-Identifier: Apache-2.0
"""What the demo of many robots decides, and how it ends where one of its processes does."""

from __future__ import annotations

import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.cli import fleet_demo
from adatoken3d_ros.cli.main import main
from adatoken3d_ros.cli.processes import ProcessError

LIMIT = 10.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--robots", "0"], "--robots 0 must be from 1 to 32"),
        (["--robots", "2", "--view"], "--view is for one robot: not with --robots 2"),
        (["--robots", "2", "--json", "F"], "--json is for one robot: not with --robots 2"),
        (["--robots", "2", "--seconds", "5"], "--seconds is for one robot: not with --robots 2"),
    ],
)
def test_what_means_one_robot_is_named(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rclpy", reason="without ROS")
    assert main(["demo", *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("step", ["state", "views"])
def test_a_process_that_ends_is_told_at_once_although_a_robot_waits(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call ends with its client, its looking around with the demo, not after --timeout."""
    client = pytest.importorskip("adatoken3d_ros.ros.client", reason="without ROS")
    waits, late = threading.Event(), list[Any]()

    class Client:
        node = None

        def __init__(self, namespace: str) -> None:
            self._closed = threading.Event()

        def diagnostics(self, task: str) -> dict[str, str]:
            waits.set()
            return {}

        def configure(self, timeout: float) -> None: ...

        activate = configure

        def state(self, timeout: float) -> None:
            if step != "state":
                return
            waits.set()
            late.extend([] if self._closed.wait(LIMIT) else [self])
            raise ConnectionError("closed")

        def close(self) -> None:
            self._closed.set()

    class Processes:
        def start(self, *given: Any) -> None: ...

        def check(self) -> None:
            if waits.wait(LIMIT):
                raise ProcessError("serve has ended")

    monkeypatch.setattr(client, "SceneClient", Client)
    monkeypatch.setattr(fleet_demo, "_wait", lambda *given: None)
    monkeypatch.setattr("adatoken3d_ros.ros.suggestions.Suggestions", lambda *given: None)
    args = Namespace(robots=2, timeout=LIMIT, seed=0, views=1, question=None, budget_ms=0.0)
    began = time.monotonic()
    with pytest.raises(ProcessError, match="serve has ended"):
        fleet_demo.run(args, Processes(), Path("model"), lambda *given: None, lambda *given: [])  # type: ignore[arg-type]
    assert not late and time.monotonic() - began < LIMIT
