# SPDX-License-Identifier: Apache-2.0
"""Faults of clouds, and a cloud's pictures that are overtaken: said, nothing else lost, the next good one works."""

from __future__ import annotations

import array
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rig import LIMIT, SECOND, START_NS, MakeRig, all_around, check_that_all_is_well
from ros_messages import pose_message

from adatoken3d_ros.ros.inputs.clouds import MAX_POINTS
from adatoken3d_ros.ros.inputs.pictures import LazyFrame
from adatoken3d_ros.ros.outputs import diagnostics
from benchmarks._ros import unaccounted

BAD_CLOUDS = [
    pytest.param(lambda c: (setattr(c, "width", 0), setattr(c, "data", array.array("B"))), "empty: 0x48", id="empty"),
    pytest.param(lambda c: setattr(c, "width", MAX_POINTS), f"more than {MAX_POINTS}", id="huge"),
    pytest.param(lambda c: setattr(c, "row_step", 3), "row_step 3", id="malformed-step"),
    pytest.param(lambda c: setattr(c.fields[0], "offset", 99), "offset 99", id="malformed-field"),
    pytest.param(lambda c: setattr(c, "data", c.data[:-1]), "bytes of data", id="malformed-length"),
    pytest.param(lambda c: setattr(c, "data", array.array("B", b"\xff" * len(c.data))), "measured points", id="nan"),
]


@pytest.mark.parametrize(("spoil", "named"), BAD_CLOUDS)
def test_a_bad_cloud(make_rig: MakeRig, spoil: Any, named: str) -> None:
    rig = make_rig(input__source="organised_points")
    rig.send(rig.cloud(0))
    assert rig.fates == ["key_frame"], rig.fates
    before = rig.scene()
    messages = rig.cloud(1)
    spoil(messages["points"])
    rig.send(messages)
    assert rig.report().level == diagnostics.ERROR and named in rig.report().message, rig.report().message
    check_that_all_is_well(rig, before, rig.cloud)


@pytest.mark.parametrize("between", [True, False], ids=["before-the-next-picture", "while-it-waits"])
def test_a_cloud_of_the_old_time_ends_with_it(make_rig: MakeRig, between: bool) -> None:
    """A jump in the middle of a cloud that gives several pictures: none of those to come enters the new scene."""
    rig = make_rig(input__source="points")
    receive, fates, after_jump = rig.node.subscriptions, rig.fates, threading.Event()
    rig.node.now_ns = START_NS + 101 * SECOND
    cloud = all_around(START_NS + 100 * SECOND)

    def jump() -> None:
        receive["points"](all_around(START_NS))  # the pose of the new time is late
        after_jump.set()

    done = rig.done

    def on_frame(fate: str) -> None:
        first = not fates
        if first and between:
            jump()
        done(fate)
        if first and not between:
            jump()

    rig.on_fate = on_frame
    receive["pose"](pose_message(START_NS + 100 * SECOND, np.eye(4)))
    receive["points"](cloud)
    assert after_jump.wait(LIMIT)
    rig.send({})
    assert rig.scene()[0] == [] and fates[0] == "key_frame" and len(fates) == (1 if between else 2)
    rig.send({"pose": pose_message(START_NS, np.eye(4))})
    assert rig.scene()[0] == [START_NS + i for i in range(4)]
    counts = {name: str(count) for name, count in rig.counts().items()}
    assert not any(unaccounted({**counts, **{f"frames.{k}": str(n) for k, n in rig.inputs.fates.items()}}).values())


def test_a_picture_of_an_older_cloud_does_not_replace_a_newer_one(make_rig: MakeRig) -> None:
    """A cloud that comes while it is decided what is left of the one before."""
    rig = make_rig(input__source="points")
    receive, submit, submitted = rig.node.subscriptions, rig.on_submit, []
    receive["pose"](pose_message(START_NS, np.eye(4)))
    receive["pose"](pose_message(START_NS + SECOND, np.eye(4)))
    newer, came = threading.Thread(target=lambda: receive["points"](all_around(START_NS + SECOND))), threading.Event()

    def on_submit(draw: Any, view: Any) -> None:
        if len(submitted) == 0:
            submit(draw, view)
        elif newer.ident is None:  # the second picture of the first cloud
            newer.start()
            came.set()
            newer.join(0.2)  # time enough for it to come first, where it can
        submitted.append("newer" if threading.current_thread() is newer else "older")

    rig.on_submit = on_submit
    receive["points"](all_around(START_NS))
    assert came.wait(LIMIT)
    newer.join(LIMIT)
    assert submitted == ["older", "older", "newer"]


@pytest.mark.parametrize("when", ["before it is taken", "before its further pictures"])
def test_nothing_is_drawn_after_the_inputs_are_stopped(
    make_rig: MakeRig, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(input__source="points")
    receive, drawn, fates = rig.node.subscriptions, threading.Event(), rig.fates
    receive["pose"](pose_message(START_NS, np.eye(4)))
    if when == "before it is taken":
        rig.worker.call(lambda session: drawn.wait(LIMIT))
    else:
        pictures = LazyFrame.pictures

        def stopped_meanwhile(frame: LazyFrame) -> Any:
            rig.inputs.stop()
            monkeypatch.setattr(LazyFrame, "pictures", pictures)
            return pictures(frame)

        monkeypatch.setattr(LazyFrame, "pictures", stopped_meanwhile)
    receive["points"](all_around(START_NS))
    if when == "before it is taken":
        rig.inputs.stop()
        drawn.set()
    rig.send({})
    assert len(fates) == 1 and len(rig.scene()[0]) == (0 if when == "before it is taken" else 1)
    assert rig.inputs.fates == {"stopped" if when == "before it is taken" else "key_frame": 1}
    rig.inputs.start()
    receive["pose"](pose_message(START_NS + SECOND, np.eye(4)))
    rig.send({"points": all_around(START_NS + SECOND)})
    assert rig.inputs.fates["key_frame"] + rig.inputs.fates["too_similar"] >= 4
