# SPDX-License-Identifier: Apache-2.0
"""Events are plain values, and what one listener does is nothing to the others."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import (
    Answered,
    FrameTaken,
    KeyFramesShown,
    Listeners,
    SceneReplaced,
    SceneView,
    StageBegan,
    TextSoFar,
)
from adatoken3d_ros.engine.pictures import Picture, Voxels

EVENTS = [
    SceneView("map", np.ones((2, 3), np.float32), poses={5: np.eye(4)}, stamp_ns=5),
    SceneReplaced("map"),
    KeyFramesShown("map", 5, (Picture(5, b"", (4, 3), np.eye(4), 1.0),), Voxels((0.0, 0.0, 0.0), 0.2)),
    FrameTaken("error: step 5"),
    StageBegan(1, "prefill"),
    TextSoFar(1, "a chair", 2),
    Answered(1, Answer(Question("What?"), Status.OK, "a chair"), "map", 7),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_can_be_sent_to_another_process(event: Any) -> None:
    assert str(pickle.loads(pickle.dumps(event))) == str(event)


def test_who_only_listens_needs_no_torch() -> None:
    program = "import sys, adatoken3d_ros.engine.events; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_each_is_told_of_what_he_listens_for_in_order() -> None:
    heard: list[Any] = []
    events = Listeners().add(FrameTaken, lambda event: heard.append((1, event)))
    events.add(FrameTaken, lambda event: heard.append((2, event)))
    events.add(TextSoFar, heard.append)
    frame = FrameTaken("key_frame")
    events.tell(frame, lambda event: heard.append((0, event)))
    events.tell(SceneReplaced("map"))
    assert heard == [(0, frame), (1, frame), (2, frame)]
    assert events.wanted(TextSoFar) and not events.wanted(SceneReplaced)


@pytest.mark.parametrize("told", [False, True])
def test_what_a_listener_raises_costs_nobody_else(told: bool, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = []
    heard: list[Any] = []
    events = Listeners(errors.append) if told else Listeners()
    events.add(FrameTaken, lambda event: 1 // 0).add(FrameTaken, heard.append)
    with caplog.at_level(logging.ERROR):
        events.tell(FrameTaken("key_frame"), lambda event: heard[5])
    assert heard == [FrameTaken("key_frame")]
    found = errors if told else [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(error) for error in found] == [IndexError, ZeroDivisionError]
