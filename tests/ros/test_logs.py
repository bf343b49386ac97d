# SPDX-License-Identifier: Apache-2.0
"""What the node logs: lines stay lines, each caller is throttled for itself, and a library is no flood."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

from rclpy.impl import rcutils_logger

from adatoken3d_ros.ros.logs import WARN_SECONDS, ForwardedLog, NodeLog
from adatoken3d_ros.text import MESSAGE, trace


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What rcutils is given: severity, name, text, function, file, line."""
    lines: list[tuple[Any, ...]] = []
    real = rcutils_logger._rclpy

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def rclpy_logging_rcutils_log(self, *arguments: Any) -> None:
            lines.append(arguments)

    monkeypatch.setattr(rcutils_logger, "_rclpy", Recorder())
    return lines


def test_a_line_cannot_be_forged_and_is_bounded(written: list[tuple[Any, ...]]) -> None:
    log = NodeLog("test")
    log.warning("field 'x'\n[FATAL] [1.0] [test]: forged \x1b[2J")
    log.error("nan, " * 10**6)
    texts = [line[2] for line in written]
    assert texts[0] == "field 'x'\\n[FATAL] [1.0] [test]: forged \\x1b[2J"
    assert len(texts[1]) <= MESSAGE and "more characters" in texts[1]


def test_a_traceback_keeps_its_lines_but_not_those_of_its_message(written: list[tuple[Any, ...]]) -> None:
    try:
        raise ValueError("first\n[FATAL] second")
    except ValueError as error:
        NodeLog("test").error(trace(error, heading="what\nfailed"))
    lines = written[0][2].splitlines()
    assert lines[0] == "what\\nfailed" and lines[-1] == "ValueError: first\\n[FATAL] second" and len(lines) > 3


def test_each_caller_is_known_and_throttled_for_itself(written: list[tuple[Any, ...]]) -> None:
    log = NodeLog("test")

    def one() -> None:
        log.warning("one", throttle_duration_sec=60.0)

    def other() -> None:
        log.error("other", throttle_duration_sec=60.0)

    for function in (one, other, one, other):
        function()
    assert [(line[2], line[3]) for line in written] == [("one", "one"), ("other", "other")]
    assert written[0][4] == __file__


def test_the_library_is_forwarded_and_no_flood() -> None:
    lines: list[str] = []
    now = 100.0
    handler = ForwardedLog(
        SimpleNamespace(info=lines.append, warning=lines.append, error=lines.append), clock=lambda: now
    )
    logger = logging.Logger("adatoken3d_ros.part")
    logger.addHandler(handler)

    def warn(i: int) -> None:
        logger.warning("frame %d", i)

    for i in range(5):
        warn(i)
        logger.info("told %d", i)
    now += WARN_SECONDS
    warn(5)
    assert [line for line in lines if "told" in line] == [f"adatoken3d_ros.part: told {i}" for i in range(5)]
    assert [line for line in lines if "frame" in line] == [
        "adatoken3d_ros.part: frame 0",
        "adatoken3d_ros.part: frame 5 (4 more of these were left out)",
    ]
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger.exception("it failed")
    assert lines[-1].startswith("adatoken3d_ros.part: it failed\n") and lines[-1].endswith("ValueError: a\\nb")
