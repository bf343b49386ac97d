# SPDX-License-Identifier: Apache-2.0
"""Every fault of the inputs: said with its value, nothing else lost, and the next good frame works."""

from __future__ import annotations

import array
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rig import LIMIT, STALE_AFTER, START_NS, STEP_NS, TOPICS, Rig, set_header
from ros_graph import synthetic_frame
from ros_messages import at, cloud_message, image, pose_message, transform

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.ros.inputs.clouds import MAX_POINTS
from adatoken3d_ros.ros.inputs.pairing import LazyFrame
from adatoken3d_ros.ros.outputs import diagnostics
from benchmarks._ros import unaccounted

MakeRig = Callable[..., Rig]
SECOND = 1_000_000_000


def depth_of(values: Any) -> Any:
    """A depth image (48, 64): float32 metres or uint16 millimetres."""
    values = np.asarray(values)
    kind = "32FC1" if values.dtype == np.float32 else "16UC1"
    return image(kind, 64, 48, values.itemsize * 64, values.tobytes())


def set_depth(messages: dict[str, Any], values: Any) -> None:
    header = messages["depth"].header
    messages["depth"] = depth_of(values)
    messages["depth"].header = header


def check_that_all_is_well(rig: Rig, before: Any, send: Callable[[int], dict[str, Any]] | None = None) -> None:
    """What was seen before is there, the next good frame becomes a view, questions are answered, counts add up."""
    views, xyz = rig.scene()
    assert set(before[0]) <= set(views) and len(xyz) >= len(before[1])
    assert rig.ask().status == Status.TRUNCATED
    rig.send((send or rig.messages)(20))
    assert rig.fates[-1] == "key_frame" and len(rig.scene()[0]) == len(views) + 1
    assert rig.ask().stamp_ns == START_NS + 20 * STEP_NS
    assert rig.report().level == diagnostics.OK, rig.report().message
    counts = rig.counts()
    for name in [
        name.removeprefix("received.") for name in counts if f"paired.{name.removeprefix('received.')}" in counts
    ]:
        dropped = sum(count for key, count in counts.items() if key.startswith(f"dropped.{name}."))
        assert counts[f"received.{name}"] == counts[f"paired.{name}"] + counts[f"pending.{name}"] + dropped
    lost = sum(count for key, count in counts.items() if key.startswith("pairs.dropped."))
    assert counts["pairs.matched"] == counts["pairs.handed_over"] + counts["pairs.waiting"] + lost


# --- depth


HALF = (np.arange(64) < 32)[None, :] & np.ones((48, 1), bool)
BAD_DEPTHS = [
    pytest.param(np.float32(math.nan), id="nan"),
    pytest.param(np.float32(math.inf), id="inf"),
    pytest.param(np.float32(-math.inf), id="minus-inf"),
    pytest.param(np.float32(-1.5), id="negative"),
    pytest.param(np.uint16(0), id="zero"),
    pytest.param(np.uint16(65535), id="saturated"),
]


@pytest.mark.parametrize("value", BAD_DEPTHS)
def test_bad_depth(make_rig: MakeRig, value: Any) -> None:
    """In half of the image it costs that half; everywhere it costs the frame, and the status says so."""
    rig = make_rig(scene__max_depth=100.0)
    good = np.full((48, 64), 2000 if value.dtype == np.uint16 else 2.0, value.dtype)
    messages = rig.messages(0)
    set_depth(messages, np.where(HALF, value, good))
    rig.send(messages)
    assert rig.fates == ["key_frame"]
    views, xyz = rig.scene()
    # The camera looks along +x from (0, 0, 1): the left half of the picture would be at y > 0.
    assert len(xyz) > 10 and np.allclose(xyz[:, 0], 2.0, atol=1e-3) and (xyz[:, 1] < 0.05).all()
    messages = rig.messages(1)
    set_depth(messages, np.full((48, 64), value))
    rig.send(messages)
    assert rig.fates[-1] == "no_depth"
    report = rig.report()
    assert report.level == diagnostics.ERROR and "no valid depth: none between 0 and 100 m" in report.message
    check_that_all_is_well(rig, (views, xyz))


def test_a_camera_inside_an_object(make_rig: MakeRig) -> None:
    """Whether it sees nothing or a surface a millimetre away: what it saw before stays, and it goes on afterwards."""
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    for index, millimetres in ((1, 0), (2, 1)):
        messages = rig.messages(index)
        set_depth(messages, np.full((48, 64), millimetres, np.uint16))
        rig.send(messages)
    assert rig.fates[1] == "no_depth" and any("no valid depth" in line for line in rig.node.log)
    assert np.isfinite(rig.scene()[1]).all()
    check_that_all_is_well(rig, before)


# --- images


def cut(messages: dict[str, Any], name: str, n: int) -> None:
    messages[name].data = messages[name].data[:-n]


def resize(messages: dict[str, Any], width: int, height: int) -> None:
    """All four messages agree on a size; the pixels are what little data there is, which comes later."""
    for name, step in (("rgb", 3 * width), ("depth", 2 * width), ("rgb_info", 0), ("depth_info", 0)):
        messages[name].width, messages[name].height, messages[name].step = width, height, step
    messages["rgb"].data = array.array("B", bytes(3 * width * height)) if height == 1 else array.array("B")


BAD_FRAMES = [
    pytest.param(lambda m: setattr(m["rgb"], "width", 63), "63x48", id="wrong-size"),
    pytest.param(lambda m: setattr(m["depth"], "height", 0), "64x0", id="no-size"),
    pytest.param(lambda m: setattr(m["rgb"], "encoding", "yuv422"), "'yuv422'", id="wrong-encoding"),
    pytest.param(lambda m: setattr(m["depth"], "encoding", "8UC1"), "'8UC1'", id="wrong-depth-encoding"),
    pytest.param(lambda m: setattr(m["rgb"], "step", 7), "step 7", id="wrong-step"),
    pytest.param(lambda m: cut(m, "depth", 5), "6139 bytes", id="wrong-length"),
    pytest.param(lambda m: setattr(m["rgb"], "data", array.array("B")), "0 bytes", id="no-data"),
    pytest.param(lambda m: setattr(m["rgb_info"], "k", [0.0] * 9), "not calibrated", id="not-calibrated"),
    pytest.param(lambda m: setattr(m["rgb_info"], "k", [math.nan] * 9), "nan", id="nan-calibration"),
    # 50 * 50 - 2500 * 1 = 0: positive focal lengths, and no inverse.
    pytest.param(
        lambda m: setattr(m["rgb_info"], "k", [50, 2500, 31.5, 1, 50, 23.5, 0, 0, 1]), "not the matrix", id="singular"
    ),
    pytest.param(
        lambda m: setattr(m["depth_info"], "k", [0.03, 0, 31.5, 0, 50, 23.5, 0, 0, 1]), "fx=0.03", id="focal-length"
    ),
    pytest.param(lambda m: resize(m, 3000, 1), "3000x1 pixels is too narrow", id="narrow"),
    pytest.param(lambda m: resize(m, 10_000, 5000), "10000x5000 pixels is too large", id="large"),
    pytest.param(
        lambda m: [setattr(m["rgb_info"], side, 2**32 - 1) for side in ("width", "height")],
        "4294967295x4294967295",
        id="large-calibration",
    ),
]


@pytest.mark.parametrize(("spoil", "named"), BAD_FRAMES)
def test_a_bad_frame(make_rig: MakeRig, spoil: Any, named: str) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    messages = rig.messages(1)
    spoil(messages)
    rig.send(messages)
    report = rig.report()
    assert report.level == diagnostics.ERROR and named in report.message, report.message
    assert named in rig.node.log[-1]
    assert rig.fates[-1].startswith("error: ") and rig.inputs.fates["error"] == 1
    check_that_all_is_well(rig, before)


def test_a_compressed_bomb(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 x 20,000 pixels in 48 kB, with a CameraInfo that agrees or not: refused by its header, never decoded."""
    import cv2
    from ros_messages import png_of

    rig = make_rig(input__transport="compressed")

    def good(index: int) -> dict[str, Any]:
        messages = rig.messages(index)
        rgb, depth = (np.frombuffer(messages[name].data, kind) for name, kind in (("rgb", "u1"), ("depth", "<u2")))
        for name, pixels in (("rgb", rgb.reshape(48, 64, 3)), ("depth", depth.reshape(48, 64))):
            compress(messages, name, cv2.imencode(".png", pixels)[1].tobytes())
        return messages

    rig.send(good(0))
    before = rig.scene()
    decode, decoded = cv2.imdecode, []
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: (decoded.append(len(data)), decode(data, flags))[1])
    for index, name in enumerate(("rgb", "depth", "rgb"), start=1):
        messages = good(index)
        compress(messages, name, png_of(20_000, 20_000))
        if index == 3:
            for info_name in ("rgb_info", "depth_info"):
                messages[info_name].width = messages[info_name].height = 20_000
        rig.send(messages)
        assert rig.report().level == diagnostics.ERROR and "20000x20000" in rig.report().message
        assert not decoded
    check_that_all_is_well(rig, before, good)


def compress(messages: dict[str, Any], name: str, data: bytes) -> None:
    from types import SimpleNamespace

    header, kind = messages[name].header, "16UC1; png" if name == "depth" else "png"
    messages[name] = SimpleNamespace(header=header, format=kind, data=array.array("B", data))


def test_a_frame_whose_encoding_fails(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs that frame, with what went wrong; it is not tried again, and no question fails by it."""
    rig = make_rig()
    rig.send(rig.messages(0))
    before, tries = rig.scene(), []

    def fail(rgb: Any, **_: Any) -> Any:
        tries.append(len(rgb))
        raise RuntimeError("shapes cannot be multiplied")

    with monkeypatch.context() as patch:
        rig.worker.call(lambda session: patch.setattr(session.runtime.model, "encode_images", fail)).result(LIMIT)
        rig.send(rig.messages(1))
        assert rig.fates[-1].startswith("error: the view at") and tries == [1]
        report = rig.report()
        assert report.level == diagnostics.ERROR and "shapes cannot be multiplied" in report.message
        assert rig.ask().status == Status.TRUNCATED and tries == [1]
    assert rig.inputs.fates["error"] == 1
    check_that_all_is_well(rig, before)


@pytest.mark.parametrize("kind", ["bad-frame", "bad-stamp"])
def test_a_camera_that_stands_still_is_well_again(make_rig: MakeRig, kind: str) -> None:
    """The next frame is not needed, so it is only checked; that it is good shows all the same."""
    rig = make_rig()
    rig.send(rig.messages(0))
    bad = rig.messages(0, after_ns=STEP_NS if kind == "bad-frame" else 10**18)
    bad["rgb"].step = 7
    rig.send(bad)
    assert rig.report().level == diagnostics.ERROR
    rig.send(rig.messages(0, after_ns=2 * STEP_NS))
    assert rig.fates[-1] == "too_similar" and rig.report().level == diagnostics.OK


def test_what_only_a_conversion_finds_is_not_forgotten_for_a_frame_that_was_only_checked(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    blind = rig.messages(1)
    set_depth(blind, np.zeros((48, 64), np.uint16))
    rig.send(blind)
    rig.send(rig.messages(0, after_ns=2 * STEP_NS))
    assert rig.fates == ["key_frame", "no_depth", "too_similar"] and rig.report().level == diagnostics.ERROR
    rig.send(rig.messages(3))
    assert rig.report().level == diagnostics.OK


def test_frames_are_counted_while_somebody_reads_the_counts(make_rig: MakeRig) -> None:
    inputs = make_rig().inputs
    inputs.frame_done("key_frame")
    for fate, count in inputs.fates.items():  # a fate that is new would else end this with a RuntimeError
        inputs.frame_done("nothing_new")
        assert (fate, count) == ("key_frame", 1)
    assert inputs.fates == {"key_frame": 1, "nothing_new": 1}


def test_a_size_that_changes_in_mid_stream(make_rig: MakeRig) -> None:
    """Without its calibration the new size is refused by name, with it the camera goes on in the new size."""
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    smaller = rig.messages(1, size=(32, 24))
    rig.send({name: smaller[name] for name in ("pose", "rgb", "depth")})
    assert rig.report().level == diagnostics.ERROR
    assert "image is 32x24 but its CameraInfo describes 64x48" in rig.report().message
    rig.send(rig.messages(2, size=(32, 24)))
    assert rig.fates[-1] == "key_frame"
    check_that_all_is_well(rig, before)


# --- time


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
    assert counts["pairs.dropped.time_jump"] == counts["time_jumps"] == 1 and rig.inputs.problem == ""
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


def all_around(stamp_ns: int) -> Any:
    """A coloured cloud of a ball around the sensor: four pictures."""
    directions = np.random.default_rng(0).normal(size=(20_000, 3))
    ball = 2 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    points = np.zeros(len(ball), np.dtype([("xyz", "<f4", 3), ("pad", "<u4"), ("rgb", "<u4")]))
    points["xyz"], points["rgb"] = ball, 0xFF8040
    cloud = cloud_message(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), np.float32), np.eye(3))
    cloud.height, cloud.width, cloud.row_step, cloud.data = 1, len(ball), 20 * len(ball), points.tobytes()
    return set_header(cloud, stamp_ns, "lidar")


# --- calibration and poses


def test_no_camera_info(make_rig: MakeRig) -> None:
    """The frames wait, then they are dropped; the status names the topic, first as a warning."""
    rig = make_rig()
    for index in range(8):
        messages = rig.messages(index)
        rig.send({name: messages[name] for name in ("pose", "rgb", "depth")})
        assert "no CameraInfo on /rgb/camera_info" in rig.report().message
        assert rig.report().level == (diagnostics.WARN if index < 5 else diagnostics.ERROR)
    assert rig.counts()["pairs.dropped.no_camera_info"] == 3
    assert rig.ask().status == Status.NO_SCENE and "rgb/camera_info" in rig.inputs.explain()
    rig.send(rig.messages(8))
    assert set(rig.fates) <= {"key_frame", "superseded"} and rig.fates[-1] == "key_frame"
    check_that_all_is_well(rig, rig.scene())


def test_a_calibration_of_another_frame(make_rig: MakeRig) -> None:
    """Some drivers name it otherwise: it is used, and said; beside one of the images' own frame it is not used."""
    rig = make_rig()

    def send(index: int, *frames: str) -> None:
        messages = rig.messages(index)
        for frame in frames:
            wrong = rig.messages(index)["rgb_info"]
            wrong.k = [k * (1.0 if frame == "camera" else 2.0) for k in wrong.k[:8]] + [1.0]
            rig.send({"rgb_info": set_header(wrong, START_NS, frame)})
        rig.send({name: message for name, message in messages.items() if name != "rgb_info"})

    send(0, "link")
    said = "/rgb/camera_info: the CameraInfo is of frame 'link', the images of 'camera': it is "
    assert rig.fates == ["key_frame"] and rig.report().level == diagnostics.WARN
    assert said + "used all the same" in rig.report().message
    assert rig.ask().status == Status.TRUNCATED and rig.inputs.warnings.texts() == (said + "used all the same",)
    send(1, "camera")
    assert rig.report().level == diagnostics.OK and rig.inputs.warnings.texts() == ()
    send(2, "camera", "link")  # two cameras on one topic: the last one to come does not win
    assert said + "not used" in rig.report().message and rig.counts()["other_frame.rgb/camera_info"] == 2
    rig.worker.call(lambda session: session.clear()).result(LIMIT)
    send(3, "link")
    xyz = rig.scene()[1]
    assert np.ptp(xyz[:, 1]) > 1.5, "with twice the focal length it would be half as wide"
    rig.seconds += 11.0
    check_that_all_is_well(rig, rig.scene())


@pytest.fixture
def tf_rig(make_rig: MakeRig) -> Rig:
    """With poses from TF; one frame has been seen."""
    rig = make_rig(pose__source="tf")
    broadcast(rig, 0)
    rig.send(rig.messages(0))
    assert rig.fates == ["key_frame"]
    return rig


def broadcast(rig: Rig, index: int, child: str = "camera", spoil: Callable[[Any], None] | None = None) -> None:
    """The transform of a frame's stamp."""
    message = transform(START_NS + index * STEP_NS, "map", child, synthetic_frame(index)[3])
    if spoil is not None:
        spoil(message.transform)
    rig.send({"tf": SimpleNamespace(transforms=[message])})


def with_tf(rig: Rig) -> Callable[[int], dict[str, Any]]:
    def send(index: int) -> dict[str, Any]:
        broadcast(rig, index)
        return rig.messages(index)

    return send


def test_tf_missing(tf_rig: Rig) -> None:
    """Both frames are named: a warning while the image waits, an error once it is dropped."""
    before = tf_rig.scene()
    for index in range(1, 8):
        messages = tf_rig.messages(index)
        for name in ("rgb", "depth"):
            messages[name].header.frame_id = "head"
        tf_rig.send(messages)
        assert "no transform from 'head' to 'map'" in tf_rig.report().message
        assert tf_rig.report().level == (diagnostics.WARN if index < 6 else diagnostics.ERROR)
    assert tf_rig.counts()["pairs.dropped.no_pose"] == 2
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


def test_tf_late(tf_rig: Rig) -> None:
    """An image waits for its transform and is used when it comes."""
    before = tf_rig.scene()
    tf_rig.send(tf_rig.messages(1))
    assert tf_rig.fates == ["key_frame"] and tf_rig.counts()["pairs.waiting"] == 1
    broadcast(tf_rig, 1)
    tf_rig.node.tick()
    tf_rig.send({})
    assert tf_rig.fates == ["key_frame", "key_frame"] and tf_rig.scene()[0][-1] == START_NS + STEP_NS
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


def test_tf_extrapolated(tf_rig: Rig) -> None:
    """Transforms that end before the image's stamp are not extended; the stamp is named."""
    before = tf_rig.scene()
    for index in range(1, 7):
        tf_rig.send(tf_rig.messages(index))
    line = tf_rig.node.log[-1]
    assert "no_pose" in line and f"at {(START_NS + STEP_NS) / 1e9:.6f} s" in line and "extrapolation" in line
    assert tf_rig.fates == ["key_frame"]
    broadcast(tf_rig, 7)  # those that still wait are used now
    assert tf_rig.fates[1:] and tf_rig.counts()["pairs.waiting"] == 0
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        pytest.param("rotation", math.nan, "nan", id="nan-quaternion"),
        pytest.param("rotation", 3.0, "has length", id="non-rigid"),
        pytest.param("translation", math.inf, "position (inf", id="not-finite"),
    ],
)
def test_tf_spoilt(tf_rig: Rig, part: str, value: float, named: str) -> None:
    """It is no transform, as for tf2; what waits for it says why, until a good one comes or it is dropped."""
    before = tf_rig.scene()
    for index in range(1, 7):
        broadcast(tf_rig, index, spoil=lambda found: setattr(getattr(found, part), "x", value))
        tf_rig.send(tf_rig.messages(index))
        assert named in tf_rig.report().message and "'camera' to 'map'" in tf_rig.report().message
        assert tf_rig.report().level == (diagnostics.WARN if index < 6 else diagnostics.ERROR)
    assert tf_rig.counts()["pairs.dropped.no_pose"] == 1 and tf_rig.counts()["transforms.refused"] == 6
    broadcast(tf_rig, 7)
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


def test_a_spoilt_transform_that_leads_nowhere(tf_rig: Rig) -> None:
    """A wheel's: it is counted and logged, and the inputs are well."""
    before = tf_rig.scene()
    broadcast(tf_rig, 1, "wheel", spoil=lambda found: setattr(found.rotation, "x", math.nan))
    broadcast(tf_rig, 1)
    tf_rig.send(tf_rig.messages(1))
    assert tf_rig.fates == ["key_frame"] * 2 and tf_rig.report().level == diagnostics.OK
    assert tf_rig.counts()["transforms.refused"] == 1 and "'wheel'" in tf_rig.node.log[-1]
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


def test_tf_from_the_future(tf_rig: Rig) -> None:
    """It does not become the newest: what comes after it would be too old."""
    before = tf_rig.scene()
    broadcast(tf_rig, 10**7)
    assert tf_rig.counts()["transforms.refused"] == 1 and "later than may be believed" in tf_rig.node.log[-1]
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


def test_tf_without_a_stamp(tf_rig: Rig) -> None:
    """It would be interpolated with, across all the time between zero and now."""
    before = tf_rig.scene()
    for _ in range(2):
        message = transform(0, "map", "camera", at(9.0))
        tf_rig.send({"tf": SimpleNamespace(transforms=[message])})
    assert tf_rig.counts()["transforms.refused"] == 2 and "is not set" in tf_rig.node.log[-1]
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


def test_tf_of_a_robot_elsewhere_after_a_jump(tf_rig: Rig) -> None:
    """A bag that starts again a second earlier, its transforms before its images: none of the old ones is used."""
    for index in (11, 12, 13):
        broadcast(tf_rig, index)
        tf_rig.send(tf_rig.messages(index))
    moved = at(7.0) @ synthetic_frame(0)[3]
    for after in (-STEP_NS // 2, STEP_NS // 2):
        message = transform(START_NS + after, "map", "camera", moved)
        tf_rig.send({"tf": SimpleNamespace(transforms=[message])})
    tf_rig.send(tf_rig.messages(0))
    stamps, xyz = tf_rig.scene()
    assert stamps == [START_NS] and xyz[:, 0].min() > 7.0


def odometry(rig: Rig, index: int, child: str) -> Any:
    """The odometry of frame `index`: the body is 2 m below the camera."""
    T = synthetic_frame(index)[3].copy()
    T[:3, :3], T[2, 3] = np.eye(3), T[2, 3] - 2.0
    message = pose_message(START_NS + index * STEP_NS, T)
    return SimpleNamespace(header=message.header, pose=SimpleNamespace(pose=message.pose), child_frame_id=child)


def with_odometry(rig: Rig) -> Callable[[int], dict[str, Any]]:
    return lambda index: {"odom": odometry(rig, index, "base_link"), **rig.messages(index)}


def mount(rig: Rig) -> None:
    T = synthetic_frame(0)[3].copy()
    T[:3, 3] = (0.0, 0.0, 2.0)
    rig.send({"tf_static": SimpleNamespace(transforms=[transform(0, "base_link", "camera", T)])})


def test_odometry_of_the_base(make_rig: MakeRig) -> None:
    """The static transforms may come after the images: they wait. Every token lies where it lies for the camera."""
    rig, other = make_rig(pose__source="odometry"), make_rig()
    rig.send(with_odometry(rig)(0))
    assert rig.counts()["pairs.waiting"] == 1
    assert "'base_link'" in rig.report().message and "'camera'" in rig.report().message
    mount(rig)
    other.send(other.messages(0))
    assert rig.fates == ["key_frame"]
    np.testing.assert_allclose(rig.scene()[1], other.scene()[1], atol=1e-6)
    check_that_all_is_well(rig, rig.scene(), with_odometry(rig))


def test_odometry_that_nothing_leads_to_the_camera(make_rig: MakeRig) -> None:
    """Never believed: both frames are named, a warning while the images wait, then an error."""
    rig = make_rig(pose__source="odometry")
    for index in range(7):
        rig.send(with_odometry(rig)(index))
        assert "'base_link'" in rig.report().message and "'camera'" in rig.report().message
        assert "pose.base_to_camera" in rig.report().message
        assert rig.report().level == (diagnostics.WARN if index < 5 else diagnostics.ERROR)
    assert rig.fates == [] and rig.ask().status == Status.NO_SCENE
    mount(rig)
    assert rig.fates and set(rig.fates) <= {"key_frame", "superseded"}
    check_that_all_is_well(rig, rig.scene(), with_odometry(rig))


@pytest.mark.parametrize(
    ("child", "named"),
    [pytest.param("", "child_frame_id is empty", id="nobody"), pytest.param("wheel", "'wheel'", id="another")],
)
def test_odometry_of(make_rig: MakeRig, child: str, named: str) -> None:
    rig = make_rig(pose__source="odometry")
    mount(rig)
    rig.send(with_odometry(rig)(0))
    before = rig.scene()
    rig.send({**rig.messages(1), "odom": odometry(rig, 1, child)})
    assert rig.report().level == diagnostics.ERROR and named in rig.report().message
    assert rig.counts()["poses.refused"] == 1 and rig.fates == ["key_frame"]
    check_that_all_is_well(rig, before, with_odometry(rig))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(lambda m: setattr(m["pose"].pose.orientation, "w", math.nan), "quaternion", id="nan-quaternion"),
        pytest.param(lambda m: setattr(m["pose"].header, "frame_id", "odom"), "'odom'", id="another-frame"),
        pytest.param(lambda m: set_header(m["pose"], 0, "map"), "pose: the stamp 0.000000 s is not set", id="zero"),
        pytest.param(lambda m: setattr(m["pose"].pose.position, "z", 1e6), "1e+06) m is not within", id="wild"),
        pytest.param(lambda m: setattr(m["pose"].pose.position, "z", 1e30), "1e+30) m is not within", id="absurd"),
        pytest.param(
            lambda m: set_header(m["pose"], START_NS + 10**18, "map"), "later than may be believed", id="future"
        ),
    ],
)
def test_a_bad_pose_message(make_rig: MakeRig, spoil: Any, named: str) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    messages = rig.messages(1)
    spoil(messages)
    rig.send(messages)
    assert rig.report().level == diagnostics.ERROR and named in rig.report().message
    assert rig.counts()["poses.refused"] == 1 and rig.fates == ["key_frame"]
    rig.send({"pose": rig.messages(1)["pose"]})  # the image had waited
    messages = rig.messages(2)
    rig.send({name: messages[name] for name in ("rgb", "depth", "pose")})  # and the next one waits for its own
    assert rig.fates == ["key_frame"] * 3 and rig.counts()["pairs.waiting"] == 0
    check_that_all_is_well(rig, before)


@pytest.mark.parametrize("x", [1e6, 1e30])
def test_a_wild_pose_from_tf(tf_rig: Rig, x: float) -> None:
    before = tf_rig.scene()
    broadcast(tf_rig, 1, spoil=lambda found: setattr(found.translation, "x", x))
    tf_rig.send(tf_rig.messages(1))
    report = tf_rig.report()
    assert report.level == diagnostics.ERROR and f"position ({x:g}, " in report.message and "'camera'" in report.message
    assert tf_rig.counts()["pairs.dropped.wild_pose"] == 1
    check_that_all_is_well(tf_rig, before, with_tf(tf_rig))


@pytest.mark.parametrize("z", [1e6, 1e30, -1e300])
def test_a_wild_first_pose(make_rig: MakeRig, z: float) -> None:
    """The scene's origin is not there, and not NaN: the next frame is seen."""
    rig = make_rig(scene__origin_mode="auto")
    messages = rig.messages(0)
    messages["pose"].pose.position.z = z
    rig.send(messages)
    assert rig.report().level == diagnostics.ERROR and f"{z:g}) m is not within 100000 m" in rig.report().message
    rig.send({"pose": rig.messages(0)["pose"]})
    assert rig.fates == ["key_frame"]
    assert np.abs(rig.worker.call(lambda session: session.memory.origin).result(LIMIT)).max() < 10.0
    check_that_all_is_well(rig, rig.scene())


# --- clouds


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


# --- statuses of the diagnostics that only time trips


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
