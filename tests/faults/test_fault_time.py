# SPDX-License-Identifier: Apache-2.0
"""Faults of stamps and clocks, and what only time trips: said, nothing else lost, and the next good frame works."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("rclpy")

from rig import LIMIT, SECOND, STALE_AFTER, START_NS, STEP_NS, TOPICS, MakeRig, check_that_all_is_well, set_header

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.ros.outputs import diagnostics


def test_colour_and_depth_from_different_times(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    for index in range(1, 4):
        messages = rig.messages(index)
        late = START_NS + index * STEP_NS + STEP_NS // 2
        set_header(messages["depth"], late, "camera")
        rig.seconds += STALE_AFTER / 2
        rig.send(messages)
        level = diagnostics.WARN if index == 1 else diagnostics.ERROR
        assert rig.report().level == level
    assert "no synchronised pair for 7.5 s: the newest stamps are 50.0 ms apart" in rig.report().message
    assert rig.fates == ["key_frame"]
    check_that_all_is_well(rig, before)


@pytest.mark.parametrize(
    ("after_ns", "reason", "named"),
    [
        pytest.param(SECOND // 2, "out_of_order", "is 0.500 s older than one that was used", id="past"),
        pytest.param(10**18, "future_stamp", "later than may be believed", id="future"),
        pytest.param(-START_NS, "no_stamp", "the stamp 0.000000 s is not set", id="zero"),
        pytest.param(SECOND, "duplicate_stamp", "has come before", id="equal"),
    ],
)
def test_a_bad_stamp(make_rig: MakeRig, after_ns: int, reason: str, named: str) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    rig.send(rig.messages(1, after_ns=SECOND))
    before = rig.scene()
    rig.send(rig.messages(2, after_ns=after_ns))
    for name in ("rgb/image", "depth/image"):
        assert rig.counts()[f"dropped.{name}.{reason}"] == 1
        assert any(f"{reason}: /{name}" in line and named in line for line in rig.node.log), rig.node.log
    assert rig.report().level == (diagnostics.ERROR if reason in ("future_stamp", "no_stamp") else diagnostics.OK)
    assert rig.fates == ["key_frame", "key_frame"] and rig.counts()["time_jumps"] == 0
    check_that_all_is_well(rig, before)


def test_a_frame_id_of_a_megabyte(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    spoilt = rig.messages(1)
    for name in ("rgb", "depth"):
        spoilt[name].header.frame_id = "x" * 10**6
    rig.send(spoilt)
    assert rig.counts()["dropped.rgb/image.bad_frame_id"] == rig.counts()["dropped.depth/image.bad_frame_id"] == 1
    report = rig.report()
    assert report.level == diagnostics.ERROR and "1000000 characters, at most 256" in report.message
    check_that_all_is_well(rig, before)


def test_a_stamp_some_seconds_ahead(make_rig: MakeRig) -> None:
    """Less than the limit, but not like the others: dropped by itself, and no jump in time afterwards."""
    rig = make_rig()
    rig.node.now_ns = START_NS
    for index in range(2):
        rig.send(rig.messages(index))
    before = rig.scene()
    rig.send(rig.messages(2, after_ns=2 * STEP_NS + 5 * SECOND))
    report = rig.report()
    assert report.level == diagnostics.ERROR and "5.200 s ahead of the clock" in report.message
    rig.send(rig.messages(3))
    counts = rig.counts()
    assert counts["dropped.rgb/image.future_stamp"] == counts["dropped.depth/image.future_stamp"] == 1
    assert counts["time_jumps"] == 0 and len(rig.scene()[0]) == 3 and rig.report().level == diagnostics.OK
    rig.node.now_ns = START_NS + 2 * SECOND
    check_that_all_is_well(rig, before)


def test_time_that_jumps_back(make_rig: MakeRig) -> None:
    """A bag that starts again: said, the old scene is cleared, and the frames of the new time count at once."""
    rig = make_rig()
    rig.send(rig.messages(100))
    rig.send(rig.messages(0))
    assert any("stamps have jumped back" in line for line in rig.node.log)
    rig.send(rig.messages(1))
    assert rig.scene()[0][-1] == START_NS + STEP_NS and rig.ask().status == Status.TRUNCATED
    check_that_all_is_well(rig, ([], []))


@pytest.mark.parametrize("what", ["clear", "keep"])
def test_simulated_time_that_begins_late_and_is_set_back(make_rig: MakeRig, what: str) -> None:
    """Before the first /clock, with it, and after its bag has begun again: frames are used, and one jump is seen."""
    rig = make_rig(scene__on_time_jump=what)

    def send(view: int, seconds: float, clock: float | None = None) -> None:
        rig.node.now_ns = 0 if clock is None else START_NS + round(clock * SECOND)
        rig.send(rig.messages(view, after_ns=round(seconds * SECOND)))

    send(0, 0.0)
    send(1, 0.1)
    assert rig.report().values["accepted.age_ms.p95"] == "n/a"
    send(2, 0.2, clock=0.25)
    send(3, 1.5, clock=1.5)
    assert rig.report().values["accepted.age_ms.p95"] == "47.50"
    assert rig.fates == ["key_frame"] * 4 and rig.counts()["time_jumps"] == 0
    send(4, 1.6, clock=0.0)  # the clock is back first, this was under way
    for view in range(3):
        send(10 + view, 0.05 + 0.1 * view, clock=0.1 * (1 + view))
    assert set(rig.fates) == {"key_frame"} and rig.counts()["time_jumps"] == 1
    seconds = [(stamp - START_NS) / SECOND for stamp in rig.scene()[0]]
    assert seconds == ([0.05, 0.15, 0.25] if what == "clear" else [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 1.5, 1.6])
    rig.node.now_ns = START_NS + 2 * SECOND
    check_that_all_is_well(rig, rig.scene())


@pytest.mark.parametrize("graph", ["two", "one"])
def test_two_publishers_whose_clocks_differ(make_rig: MakeRig, graph: str) -> None:
    """For 6 s at 10 Hz, 1.5 s apart: said with the distance and the names, and the scene survives.

    Where the graph does not tell of the second one, the first of its messages is a jump in time, and no other.
    """
    rig = make_rig()
    rig.send(rig.messages(0, after_ns=-3 * SECOND))
    before = rig.scene()
    if graph == "two":
        rig.node.publishers = ["driver", "simulator"]
    for step in range(60):
        rig.node.now_ns = START_NS + step * STEP_NS + SECOND
        for late in (0, 15):
            rig.send(rig.messages(1 + step % 3, after_ns=(step - late) * STEP_NS))
        assert rig.counts()["time_jumps"] == (graph == "one")
    counts, report = rig.counts(), rig.report()
    for name in ("rgb/image", "depth/image"):
        assert counts[f"dropped.{name}.two_clocks"] >= 59
        text = f"/{name}: the stamp"
        assert report.level == diagnostics.WARN and text in report.message and "two clocks" in report.message
    names = "2 publishers: ['/driver', '/simulator']"
    assert (names in report.message) == (graph == "two")
    assert sum("two clocks" in line for line in rig.node.log) > 0
    assert rig.inputs.warnings.texts() and all("two clocks" in text for text in rig.inputs.warnings.texts())
    assert len(rig.scene()[0]) >= 3 and (graph == "one" or set(before[0]) <= set(rig.scene()[0]))
    # The other one ends; its warning fades.
    rig.node.publishers, rig.seconds, rig.node.now_ns = ["driver"], rig.seconds + 11.0, START_NS + 60 * SECOND
    last = rig.messages(20, after_ns=60 * STEP_NS)
    rig.send(last)
    assert rig.report().level == diagnostics.OK and rig.ask().stamp_ns == START_NS + 60 * STEP_NS


def test_what_is_under_way_when_time_jumps_back(make_rig: MakeRig) -> None:
    """A frame that the worker has not taken yet and a pair that waits for its pose: counted, but no error."""
    rig = make_rig()
    rig.send(rig.messages(100))
    busy, go_on = threading.Event(), threading.Event()
    rig.worker.call(lambda _: (busy.set(), go_on.wait(LIMIT)))
    assert busy.wait(LIMIT)
    for name, message in rig.messages(101).items():
        rig.node.subscriptions[TOPICS[name]](message)
    for messages in (rig.messages(102), rig.messages(0)):
        for name in ("rgb", "depth"):
            rig.node.subscriptions[TOPICS[name]](messages[name])
    go_on.set()
    rig.send({})
    counts = rig.counts()
    assert rig.fates[-1].startswith("error: ") and rig.inputs.fates == {"key_frame": 1, "time_jump": 1}
    assert counts["pairs.dropped.time_jump"] == counts["time_jumps"] == 1 and rig.inputs.state().problem == ""
    assert not any("not used" in line for line in rig.node.log)
    rig.send({"pose": rig.messages(0)["pose"]})
    assert rig.scene()[0] == [START_NS]
    check_that_all_is_well(rig, rig.scene())


def test_two_streams_that_jump_back_one_after_the_other(make_rig: MakeRig) -> None:
    """Depth of the old time that comes after colour of the new: one jump, and no frame of the new time is lost."""
    rig = make_rig()
    rig.send(rig.messages(100))
    late, new = rig.messages(101), rig.messages(0)
    for messages in ({"pose": late["pose"], "rgb": late["rgb"]}, {"pose": new["pose"], "rgb": new["rgb"]}):
        rig.send(messages)
    rig.send({"depth": late["depth"]})
    rig.send({"depth": new["depth"]})
    rig.send(rig.messages(1))
    counts = rig.counts()
    assert counts["time_jumps"] == counts["dropped.rgb/image.time_jump"] == counts["dropped.depth/image.time_jump"] == 1
    assert rig.scene()[0] == [START_NS, START_NS + STEP_NS] and rig.report().level == diagnostics.OK
    check_that_all_is_well(rig, rig.scene())


@pytest.mark.parametrize("first", ["images", "poses"])
def test_a_robot_elsewhere_after_a_jump(make_rig: MakeRig, first: str) -> None:
    """No pose of the old time is taken for one of the new, whichever stream jumps first."""
    rig = make_rig()
    for index in range(12):
        rig.send(rig.messages(index % 3, after_ns=index * STEP_NS))
    for step in range(3):
        messages = rig.messages(20 + step, after_ns=step * STEP_NS + STEP_NS // 2)
        images = {name: messages[name] for name in ("rgb", "depth")}
        for part in (images, {"pose": messages["pose"]})[:: 1 if first == "images" else -1]:
            rig.send(part)
    before = rig.scene()
    views = rig.worker.call(lambda session: dict(session.poses)).result(LIMIT)
    assert [T[1, 3] for _, T in sorted(views.items())] == [10.0, 10.5, 11.0]
    assert rig.counts()["time_jumps"] == 1
    check_that_all_is_well(rig, before, lambda _: rig.messages(30, after_ns=20 * STEP_NS))


def test_silence_rate_and_gap(make_rig: MakeRig) -> None:
    rig = make_rig(diagnostics__min_rate=9.0)
    before = rig.report().values
    assert before["rate_hz.rgb/image"] == before["gap_s.depth/image"] == before["stamps_apart_ms"] == "n/a"
    for index in range(20):
        rig.send(rig.messages(index % 5, after_ns=index * STEP_NS))
        rig.seconds += 0.1
    assert rig.report().level == diagnostics.OK and rig.report().values["rate_hz.rgb/image"] == "10.00"
    rig.seconds += 1.0
    assert rig.report().level == diagnostics.WARN and "times a second, less than 9" in rig.report().message
    rig.seconds += 1.5
    assert rig.report().level == diagnostics.ERROR and rig.report().values["gap_s.rgb/image"] == "2.600"
    rig.parameters["diagnostics.min_rate"] = 0.0
    assert rig.report().level == diagnostics.WARN and "rgb/image has been silent for 2.6 s" in rig.report().message
    rig.seconds += 3.0
    assert rig.report().level == diagnostics.ERROR
    check_that_all_is_well(rig, ([], []))
