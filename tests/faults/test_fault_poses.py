# SPDX-License-Identifier: Apache-2.0
"""Faults of calibration and poses: said with their values, nothing else lost, and the next good frame works."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rig import LIMIT, START_NS, STEP_NS, MakeRig, Rig, check_that_all_is_well, set_header
from ros_graph import synthetic_frame
from ros_messages import at, pose_message, transform

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.ros.outputs import diagnostics
from tests.scene.room import CUPBOARD, TABLE, Y_DOWN, K, depth_of, walk


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


def seen(rig: Rig, index: int, pose: Any, said: Any) -> dict[str, Any]:
    """What a camera at `pose` in a room sees, with the pose that is said of it."""
    messages = rig.messages(index)
    for name in ("rgb_info", "depth_info"):
        messages[name].k = K.reshape(-1).tolist()
    messages["depth"].data = (depth_of(pose, CUPBOARD, TABLE) * 1000).astype("<u2").tobytes()
    messages["pose"] = set_header(pose_message(START_NS + index * STEP_NS, said), START_NS + index * STEP_NS, "map")
    return messages


def test_one_pose_that_contradicts_the_others(make_rig: MakeRig) -> None:
    """The frame is passed over and counted; those before and after it are seen."""
    rig = make_rig()
    for index, pose in enumerate(walk(12)):
        said = pose.copy()
        said[:3, 3] += (1.2, -0.9, 0.0) if index == 8 else 0.0
        rig.send(seen(rig, index, pose, said))
    assert rig.fates == ["key_frame"] * 8 + ["disagrees"] + ["key_frame"] * 3
    assert rig.ask().status == Status.TRUNCATED
    assert START_NS + 8 * STEP_NS not in rig.scene()[0]


def test_poses_that_all_contradict_each_other(make_rig: MakeRig) -> None:
    """The scene is an error that names the cause, and no question is answered about it until it is well again."""
    rig = make_rig()
    for index, pose in enumerate(walk(12)):
        rig.send(seen(rig, index, pose, np.linalg.inv(pose)))
    assert rig.fates.count("disagrees") >= 4
    answer = rig.ask()
    assert answer.status == Status.ERROR
    assert "views do not agree" in answer.status_message and "probably the poses are inverted" in answer.status_message
    contradiction = rig.worker.call(lambda session: session.memory.contradiction).result(LIMIT)
    report = diagnostics.scene(True, 2, 100, 0.1, rig.inputs.fates, contradiction=contradiction)
    assert report.level == diagnostics.ERROR and report.message == answer.status_message
    rig.worker.call(lambda session: session.clear()).result(LIMIT)
    for index, pose in enumerate(walk(12)):
        rig.send(seen(rig, 100 + index, pose, pose))
    assert rig.fates[-12:] == ["key_frame"] * 12 and rig.ask().status == Status.TRUNCATED


def test_a_scene_frame_whose_z_is_not_up(make_rig: MakeRig) -> None:
    """Said with the axis that seems to be."""
    rig = make_rig()
    for index, pose in enumerate(walk(8)):
        rig.send(seen(rig, index, pose, Y_DOWN @ pose))
    answer = rig.ask()
    assert answer.status == Status.ERROR and "z is not up: -y seems to be" in answer.status_message
