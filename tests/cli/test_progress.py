# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

from rich.console import Console

from adatoken3d_ros.cli.progress import step_progress


def test_a_log_has_a_line_every_ten_seconds_with_the_time_left() -> None:
    written, now = io.StringIO(), [0.0]
    with step_progress(Console(file=written), clock=lambda: now[0]) as report:
        for step, done, total, at in (
            ("frames", 1, None, 4.0),
            ("frames", 2, None, 12.0),  # ten seconds after the step began
            ("frames", 2, 2, 13.0),
            ("answers", 1, 100, 14.0),
            ("answers", 50, 100, 23.0),
            ("answers", 60, 100, 25.0),  # 12 s for 60
            ("answers", 70, 100, 30.0),
            ("answers", 100, 100, 33.0),
        ):
            now[0] = at
            report(step, done, total)
    assert written.getvalue().splitlines() == [
        "frames: 2, 12 s",
        "frames: 2 of 2, 13 s",
        "answers: 50 of 100, 10 s, about 10 s left",
        "answers: 100 of 100, 20 s",
    ]


def test_a_terminal_has_a_bar_a_step() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    with step_progress(console) as report:
        report("frames", 3, None)
        report("answers", 1, 4)
    shown = written.getvalue()
    assert "frames" in shown and "answers" in shown and "1/4" in shown and "left" in shown
