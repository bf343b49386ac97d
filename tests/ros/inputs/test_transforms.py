# SPDX-License-Identifier: Apache-2.0
"""The tree of transforms: hand-made ones, random ones against matrices, and tf2 itself where it is installed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import MS, at, transform
from scipy.spatial.transform import Rotation, Slerp

from adatoken3d_ros.ros.inputs import transforms as t
from adatoken3d_ros.ros.inputs.conversions import ConversionError

TF2_EXAMPLES = int(os.environ.get("ADATOKEN3D_TF2_EXAMPLES", "300"))
FRAMES = ["map", "odom", "base", "arm", "camera", "marker"]


def tree_of(*edges: tuple[int, str, str, np.ndarray], static: tuple[tuple[str, str, np.ndarray], ...] = ()) -> Any:
    """(stamp in ms, parent, child, T) of what moves; (parent, child, T) of what does not."""
    tree = t.TransformTree()
    for parent, child, T in static:
        tree.add(transform(0, parent, child, T), static=True)
    for stamp, parent, child, T in edges:
        tree.add(transform(stamp * MS, parent, child, T))
    return tree


def test_static_and_moving_transforms_are_chained() -> None:
    tree = tree_of(
        (100, "odom", "/base", at(0.0, 90.0)), (200, "odom", "base", at(1.0, 90.0)),
        static=(("base", "camera", at(0.5)), ("/map", "odom", at(10.0))),
    )  # fmt: skip
    np.testing.assert_allclose(tree.transform("map", "camera", 150 * MS), at(10.5, 90.0) @ at(0.5), atol=1e-12)
    assert tree.frames() == ["base", "camera", "map", "odom"]
    np.testing.assert_allclose(tree.transform("camera", "base", 5), at(-0.5), atol=1e-12)  # static at any time
    assert tree.connected("map", "/camera") and not tree.connected("map", "nowhere")


def test_down_and_across() -> None:
    tree = tree_of(static=(("world", "marker", at(2.0)), ("world", "camera", at(5.0))))
    np.testing.assert_allclose(tree.transform("marker", "camera", 1), at(3.0), atol=1e-12)
    np.testing.assert_allclose(tree.transform("marker", "world", 1), at(-2.0), atol=1e-12)
    assert (tree.transform("anything", "/anything", 7) == np.eye(4)).all()


def test_what_is_refused_takes_no_place() -> None:
    tree = t.TransformTree()
    for index in range(t.MAX_FRAMES + 1):
        bad = transform(1, "map", f"wheel{index}", at(0.0))
        bad.transform.translation.x = math.nan
        with pytest.raises(ConversionError, match="not finite"):
            tree.add(bad)
    assert tree.frames() == []
    with pytest.raises(t.PoseUnavailable, match="the transform from 'wheel3' to 'map' cannot be used"):
        tree.transform("map", "wheel3", 1)
    tree.add(transform(1, "map", "base", at(1.0)))
    assert tree.connected("map", "base")


def test_nothing_is_extended() -> None:
    tree = tree_of((100, "odom", "base", at(1.0)))
    np.testing.assert_allclose(tree.transform("odom", "base", 100 * MS), at(1.0))
    with pytest.raises(t.PoseUnavailable, match=r"'base' to 'odom' at 0\.099000 s.*extrapolation beyond|before"):
        tree.transform("odom", "base", 99 * MS)
    tree.add(transform(200 * MS, "odom", "base", at(2.0)))
    for stamp, named in ((99, r"before the oldest one, at 0\.100000 s"), (201, r"beyond the newest one, at 0\.200000")):
        with pytest.raises(t.PoseUnavailable, match=named):
            tree.transform("odom", "base", stamp * MS)


def test_the_newest_is_that_of_all_on_the_way() -> None:
    """Stamp 0: the newest time at which the whole way is known; what lies elsewhere does not count."""
    tree = tree_of(
        (100, "map", "odom", at(1.0)), (200, "map", "odom", at(2.0)), (100, "odom", "base", at(0.0)),
        (300, "odom", "base", at(2.0)), (50, "base", "wheel", at(0.0)),
        static=(("base", "camera", at(0.5)),),
    )  # fmt: skip
    np.testing.assert_allclose(tree.transform("map", "camera", 0), at(2.0 + 1.0 + 0.5))
    np.testing.assert_allclose(tree.transform("odom", "camera", 0), at(2.0 + 0.5))
    np.testing.assert_allclose(tree.transform("base", "camera", 0), at(0.5))


def test_frames_that_nothing_connects() -> None:
    tree = tree_of(static=(("odom", "camera", at(1.0)), ("map", "base", at(1.0))))
    with pytest.raises(t.PoseUnavailable, match="'camera' to 'map'.*two trees"):
        tree.transform("map", "camera", 1)
    with pytest.raises(t.PoseUnavailable, match="'head' to 'map'.*told of 'head', only of base, camera, map, odom"):
        tree.transform("map", "head", 1)
    with pytest.raises(t.PoseUnavailable, match="nothing has come on TF"):
        t.TransformTree().transform("map", "head", 1)


def test_a_circle_ends() -> None:
    tree = tree_of(static=(("a", "b", at(1)), ("b", "a", at(1))))
    tree.add(transform(0, "a", "map", at(1.0)), static=True)
    with pytest.raises(t.PoseError, match="circle through"):
        tree.transform("map", "a", 1)
    assert tree.transform("a", "b", 1)[0, 3] == 1.0


def test_a_frame_that_changes_its_parent() -> None:
    """A gripped object: until the next sample it hangs where it was; a static transform replaces what moved."""
    tree = tree_of(
        (100, "map", "cup", at(1.0)), (200, "map", "cup", at(2.0)), (300, "hand", "cup", at(0.1)),
        static=(("map", "hand", at(7.0)),),
    )  # fmt: skip
    assert [round(tree.transform("map", "cup", ms * MS)[0, 3], 9) for ms in (150, 250, 300)] == [1.5, 2.0, 7.1]
    tree.add(transform(0, "map", "cup", at(9.0)), static=True)
    assert tree.transform("map", "cup", 5 * MS)[0, 3] == 9.0
    tree.add(transform(400 * MS, "map", "cup", at(3.0)))
    with pytest.raises(t.PoseUnavailable):
        tree.transform("map", "cup", 150 * MS)


def test_ten_seconds_are_kept() -> None:
    tree = tree_of(*((100 * i, "map", "base", at(float(i))) for i in range(1, 201)))
    with pytest.raises(t.PoseUnavailable, match="before the oldest"):
        tree.transform("map", "base", 5_000 * MS)
    assert tree.transform("map", "base", 10_050 * MS)[0, 3] == pytest.approx(100.5)
    whole = t.TransformTree(cache_ns=None)
    for i in range(1, 201):
        whole.add(transform(100 * i * MS, "map", "base", at(float(i))))
    assert whole.transform("map", "base", 150 * MS)[0, 3] == pytest.approx(1.5)


def test_what_is_late_is_sorted_in() -> None:
    tree = tree_of(*((ms, "map", "base", at(ms / 100)) for ms in (100, 5000, 300, 200)))
    assert tree.transform("map", "base", 250 * MS)[0, 3] == pytest.approx(2.5)
    assert tree.transform("map", "base", 4000 * MS)[0, 3] == pytest.approx(40.0)


def test_one_that_is_too_old_is_ignored_and_two_are_a_clock_that_was_set_back() -> None:
    tree = tree_of((99_000, "map", "base", at(1.0)), (99_100, "map", "base", at(1.0)), (10, "map", "base", at(5.0)))
    assert tree.transform("map", "base", 99_050 * MS)[0, 3] == 1.0
    tree.add(transform(20 * MS, "map", "base", at(5.0)))
    assert tree.transform("map", "base", 15 * MS)[0, 3] == 5.0
    with pytest.raises(t.PoseUnavailable):
        tree.transform("map", "base", 99_050 * MS)


@pytest.mark.parametrize("transforms_first", [True, False])
def test_two_runs_are_not_mixed(transforms_first: bool) -> None:
    """A bag of two seconds that starts again with the robot elsewhere: all stamps of it have been there before."""
    tree = tree_of(
        *((10 * i, "map", "base", at(0.0)) for i in range(1, 201)), static=(("base", "camera", at(0.5)),)
    )  # fmt: skip
    if not transforms_first:
        tree.reset(20 * MS)
        with pytest.raises(t.PoseUnavailable, match="since stamps jumped back"):
            tree.transform("map", "camera", 15 * MS)
    for ms in (11, 21, 31):
        tree.add(transform(ms * MS, "map", "base", at(5.0)))
    if transforms_first:
        tree.reset(20 * MS)
    assert [tree.transform("map", "camera", ms * MS)[0, 3] for ms in (11, 15, 31)] == [5.5] * 3
    for ms in (10, 500, 2000):
        with pytest.raises(t.PoseUnavailable):
            tree.transform("map", "camera", ms * MS)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(lambda m: setattr(m.transform.rotation, "x", math.nan), "'base'.*'map'.*nan", id="nan"),
        pytest.param(lambda m: setattr(m.transform.rotation, "w", 1.01), "length 1.01", id="denormalised"),
        pytest.param(lambda m: setattr(m.transform.translation, "y", math.inf), "position.*inf", id="infinite"),
        pytest.param(lambda m: setattr(m, "child_frame_id", "map"), "'map' to itself", id="itself"),
        pytest.param(lambda m: setattr(m, "child_frame_id", "/"), "1 to 256 characters, not 0", id="no-name"),
        pytest.param(lambda m: setattr(m.header, "frame_id", "x" * 10**6), "not 1000000: 'x{40}'$", id="long-name"),
    ],
)  # fmt: skip
def test_a_transform_that_cannot_be_used_changes_nothing(spoil: Any, named: str) -> None:
    tree = tree_of((100, "map", "base", at(1.0)))
    message = transform(200 * MS, "map", "base", at(2.0))
    spoil(message)
    with pytest.raises((t.PoseError, ConversionError), match=named):
        tree.add(message)
    assert tree.transform("map", "base", 100 * MS)[0, 3] == 1.0
    with pytest.raises(t.PoseUnavailable):
        tree.transform("map", "base", 200 * MS)
    tree.add(transform(200 * MS, "map", "base", at(2.0)))
    assert tree.transform("map", "base", 150 * MS)[0, 3] == 1.5


def test_names_without_end() -> None:
    tree = tree_of((100, "map", "base", at(1.0)))
    with pytest.raises(t.PoseError, match="new frame, and 10000 are known"):
        for i in range(t.MAX_FRAMES):
            tree.add(transform(0, "map", f"f{i}", at(0.0)), static=True)
    tree.add(transform(200 * MS, "map", "base", at(2.0)))
    assert len(tree.frames()) == t.MAX_FRAMES and tree.transform("map", "base", 150 * MS)[0, 3] == 1.5


def test_the_message_of_tf_is_everybodys() -> None:
    """Where this project makes tf2_msgs itself: the same type, by its hash, as in ROS and in bags."""
    interfaces = pytest.importorskip("tf2_msgs").__path__[0]
    from rosbags.typesys import Stores, get_typestore

    prefix = Path(interfaces).parents[3]
    described = json.loads((prefix / "share" / "tf2_msgs" / "msg" / "TFMessage.json").read_text())
    expected = get_typestore(Stores.ROS2_KILTED).hash_rihs01("tf2_msgs/msg/TFMessage")
    hashes = {entry["type_name"]: entry["hash_string"] for entry in described["type_hashes"]}
    assert hashes["tf2_msgs/msg/TFMessage"] == expected


# --- properties


def pose(draw: Any) -> np.ndarray:
    numbers = draw(st.lists(st.integers(-3000, 3000), min_size=6, max_size=6))
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("xyz", [value / 1000 for value in numbers[3:]]).as_matrix()
    T[:3, 3] = [value / 1000 for value in numbers[:3]]
    return T


@st.composite
def histories(draw: Any) -> list[tuple[int, str, str, np.ndarray, bool]]:
    """(stamp in ns, parent, child, T, static): mostly chains, with late, repeated and contradicting samples."""
    found = []
    for _ in range(draw(st.integers(1, 25))):
        child = draw(st.integers(1, len(FRAMES) - 1))
        anywhere = draw(st.integers(0, 9)) == 0
        parent = draw(st.integers(0, len(FRAMES) - 1)) if anywhere else draw(st.integers(max(0, child - 2), child - 1))
        stamp = draw(st.one_of(st.integers(1, 12), st.integers(1, 30)))
        found.append((stamp * 700 * MS, FRAMES[parent], FRAMES[child], pose(draw), draw(st.integers(0, 5)) == 0))
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_chain_is_the_product_of_its_transforms(data: Any) -> None:
    """Against scipy: two samples each, asked in between."""
    edges = [(pose(data.draw), pose(data.draw)) for _ in FRAMES[1:]]
    share = data.draw(st.integers(1, 99)) / 100
    tree, expected = t.TransformTree(), [np.eye(4)]
    for parent, child, (T0, T1) in zip(FRAMES, FRAMES[1:], edges, strict=False):
        tree.add(transform(100, parent, child, T0))
        tree.add(transform(200, parent, child, T1))
        T = np.eye(4)
        T[:3, 3] = (1 - share) * T0[:3, 3] + share * T1[:3, 3]
        T[:3, :3] = Slerp([0, 1], Rotation.from_matrix([T0[:3, :3], T1[:3, :3]]))(share).as_matrix()
        expected.append(expected[-1] @ T)
    a, b = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    found = tree.transform(FRAMES[a], FRAMES[b], 100 + round(100 * share))
    np.testing.assert_allclose(found, np.linalg.inv(expected[a]) @ expected[b], atol=1e-9)


def test_every_answer_is_tf2s() -> None:
    """Where tf2 is installed (ROS has it, the wheels of PyPI do not): the same answers, or none from both."""
    tf2 = pytest.importorskip("tf2_py")
    from builtin_interfaces.msg import Time
    from geometry_msgs.msg import TransformStamped

    from adatoken3d_ros.ros.inputs.conversions import transform_to_matrix
    from adatoken3d_ros.ros.outputs.fill import ns_to_stamp

    compared, worst = {"answers": 0, "refused": 0}, [0.0]

    @settings(max_examples=TF2_EXAMPLES, deadline=None)
    @given(histories(), st.lists(st.tuples(st.sampled_from(FRAMES), st.sampled_from(FRAMES), st.integers(0, 42)),
                                 min_size=4, max_size=12))  # fmt: skip
    def compare(history: Any, questions: Any) -> None:
        tree, core = t.TransformTree(), tf2.BufferCore()
        newest: dict[str, int] = {}
        for stamp, parent, child, T, static in history:
            if parent == child or (not static and stamp < newest.get(child, 0) - t.CACHE_NS):
                continue  # a second one that is too old means more to us than to tf2
            newest[child] = 0 if static else max(stamp, newest.get(child, 0))
            message = TransformStamped(child_frame_id=child)
            message.header.frame_id = parent
            ns_to_stamp(message.header.stamp, stamp)
            q = Rotation.from_matrix(T[:3, :3]).as_quat()
            p, r = message.transform.translation, message.transform.rotation
            p.x, p.y, p.z = map(float, T[:3, 3])
            r.x, r.y, r.z, r.w = map(float, q)
            tree.add(message, static=static)
            (core.set_transform_static if static else core.set_transform)(message, "test")
        for target, source, half in questions:
            stamp_ns = half * 350 * MS
            try:
                theirs = core.lookup_transform_core(target, source, ns_to_stamp(Time(), stamp_ns))
            except tf2.TransformException:
                with pytest.raises(t.PoseError):
                    tree.transform(target, source, stamp_ns)
                compared["refused"] += 1
            else:
                found = tree.transform(target, source, stamp_ns)
                worst[0] = max(worst[0], float(abs(found - transform_to_matrix(theirs.transform)).max()))
                assert worst[0] < 1e-9
                compared["answers"] += 1

    compare()
    print(compared, worst)
    assert min(compared.values()) > TF2_EXAMPLES / 2
