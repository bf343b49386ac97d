# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d demo --robots 2` as a user runs it: Ray, an engine, two rooms, two robots over DDS, one table."""

from __future__ import annotations

import importlib.util
import re

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")
if importlib.util.find_spec("ray") is None:
    pytest.skip("without the extra fleet", allow_module_level=True)

from test_demo import Run

QUESTIONS = ("How many chairs are there?", "Is there a bed?")


@pytest.mark.timeout(600)
def test_two_robots_ask_one_engine_and_nothing_is_left() -> None:
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    run = Run("--robots", "2", "--views", "2", *asked)
    try:
        out, err = run.process.communicate(timeout=500)
    finally:
        run.process.kill()
    assert (run.process.returncode, err) == (0, ""), out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│ robot")]
    assert [row[:2] for row in rows] == [[f"robot{n}", question] for n in range(2) for question in QUESTIONS]
    for _, _, answer, known, status, total, queue, tokens in rows:
        assert answer and not known and status in ("OK", "TRUNCATED", "UNSURE")
        assert float(total) > float(queue) >= 0.0 and re.fullmatch(r"[1-9]\d* of [1-9]\d*", tokens)
    run.wait_until_alone()
