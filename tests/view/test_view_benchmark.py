# SPDX-License-Identifier: Apache-2.0
"""A browser that stops reading, as a process that is stopped: answers come all the same; how fast: the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("viser", reason="viser is not installed")

from benchmarks import view


def test_a_client_that_is_stopped_does_not_keep_answers(tiny_of: Callable[[str], Path]) -> None:
    words = ["--model", str(tiny_of("llava3d")), "--seconds", "0", "--views", "1", "--questions", "1"]
    times = view.measure(view.parse(words))
    assert {stopped: len(found) for stopped, found in times.items()} == {False: 2, True: 2}


def test_figures_by_hand() -> None:
    alike = view.figures({False: [100.0] * 200, True: [104.0] * 200})
    assert (alike["p99_ratio"], alike["p99_ratio_interval"], alike["met"]) == (1.04, [1.04, 1.04], True)
    slower = view.figures({False: [100.0] * 200, True: [100.0] * 190 + [120.0] * 10})
    assert slower["p99_ratio"] == 1.2 and not slower["met"]
    assert slower["answers"] == {"reads": 200, "stopped": 200}
