# SPDX-License-Identifier: Apache-2.0
"""Pictures of key frames: which patches are lit, by hand, by the scene's own voxels, after a way through a message."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.pictures import (
    MOST_BYTES,
    Left,
    Picture,
    PictureError,
    Pictures,
    Voxels,
    encoded,
    received,
    voxels_of,
)
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.scene.token_map import TokenMap
from tests.architectures import NAMES
from tests.engine.scenes import ask, new_scene, room_frame

NAN = [np.nan] * 3
JPEG, SIZE = encoded(np.full((60, 80, 3), 90, np.uint8))


@pytest.fixture(scope="module", params=NAMES)
def looked(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> tuple[Scene, Pictures]:
    model, tokenizer, _ = registry.load(tiny_of(request.param))
    scene, pictures = new_scene(model, tokenizer, SessionConfig(max_new_tokens=4)), Pictures()
    for index in range(2):
        frame = room_frame(index)
        scene.observe(frame)
        pictures.add(frame, scene)  # it waits
        assert len(pictures.of(scene)) == index
        scene.encode_pending()
    return scene, pictures


def test_lit_are_the_patches_in_the_voxel_of_a_token_that_was_left() -> None:
    """Voxels of 1 m around (0.25, 0, 0): from -0.25 to 0.75, from 0.75 to 1.75, ... along x."""
    voxels = Voxels((0.25, 0.0, 0.0), 1.0)
    places = np.array([[0, 0, 0], [0.7, 0.4, -0.4], [0.8, 0, 0], NAN, [0, 0.6, 0], [9e9, 0, 0]], np.float32)
    picture = Picture(1, JPEG, SIZE, np.eye(4), 1.0, (2, 3), places=places)
    assert picture.lit(Left.of(voxels, np.array([[0.1, 0.2, 0.3]], np.float32))).tolist() == [0, 1]
    assert picture.lit(Left.of(voxels, np.array([[1.5, 0, 0], [0, 1, 0]], np.float32))).tolist() == [2, 4]
    assert picture.lit(Left.of(voxels, np.array([NAN, [9e9, 0, 0]], np.float32))).size == 0
    assert picture.aspect == 4 / 3 and abs(int(picture.rgb.mean()) - 90) <= 2


def test_a_picture_that_was_taken_elsewhere_takes_its_patches_along() -> None:
    """Turned by 90 degrees about z and moved by 1 m along x: (1, 2, 3) comes to (1 - 2, 1, 3)."""
    pose = np.array([[0, -1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)
    picture = Picture(1, JPEG, SIZE, np.eye(4), 1.0, (1, 2), places=np.array([[1, 2, 3], NAN], np.float32))
    moved = picture.at(pose)
    np.testing.assert_allclose(moved.places, [[-1, 1, 3], NAN], atol=1e-6)
    np.testing.assert_allclose(moved.at(np.eye(4)).places, picture.places, atol=1e-6)
    assert picture.at(np.eye(4)) is picture


@given(
    arrays(np.float32, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-1e4, 1e4, width=32)),
    arrays(np.float64, 3, elements=st.floats(-100, 100)),
    st.sampled_from([0.05, 0.2, 1.0]),
)
def test_voxels_are_those_of_the_token_map(points: Any, origin: Any, size: float) -> None:
    voxels = Voxels(tuple(origin.tolist()), size)
    assert voxels.of(points).tolist() == TokenMap(size, origin).keys_at(points).tolist()


def test_the_patches_of_all_pictures_are_those_that_the_scene_is_made_of(looked: tuple[Scene, Pictures]) -> None:
    """Each token of an answer lights a patch in some picture, and all tokens light every patch that has a place."""
    scene, pictures = looked
    kept, tokens = pictures.of(scene), ask(scene, Question("What is red?")).report
    assert tokens is not None and len(kept) == 2
    every = Left.of(voxels_of(scene), tokens.xyz)
    for one in kept:
        assert one.lit(every).tolist() == np.flatnonzero(np.isfinite(one.places).all(axis=1)).tolist()
        assert len(one.places) == one.grid[0] * one.grid[1] > 0
        assert 0 <= one.area[0] < one.area[2] <= 1 and 0 <= one.area[1] < one.area[3] <= 1
    left = Left.of(voxels_of(scene), tokens.xyz[tokens.retained])
    lit = [voxels_of(scene).of(one.places[one.lit(left)]) for one in kept]
    assert 0 < len(left.keys) < len(every.keys) and set(np.concatenate(lit)) == set(left.keys)


def test_pictures_go_and_move_with_their_views(looked: tuple[Scene, Pictures], monkeypatch: Any) -> None:
    scene, pictures = looked
    copy = Pictures()
    copy._by_stamp = dict(pictures._by_stamp)
    newest, pose = max(scene.poses), np.eye(4)
    monkeypatch.setattr(scene.memory, "poses", {newest: pose})
    (moved,) = copy.of(scene)
    (before,) = (one for one in pictures._by_stamp.values() if one.stamp_ns == newest)
    assert moved.stamp_ns == newest and moved.pose is pose
    np.testing.assert_allclose(moved.at(before.pose).places, before.places, atol=1e-5)
    monkeypatch.undo()
    assert len(copy.of(scene)) == 1  # what was forgotten does not come back


def test_a_picture_comes_through_a_message_as_it_was(looked: tuple[Scene, Pictures]) -> None:
    """What a running node publishes lights exactly the patches that are lit in its own process."""
    pytest.importorskip("adatoken3d.msg", reason="the ROS interfaces are not built")
    from adatoken3d.msg import KeyFrames
    from rclpy.serialization import deserialize_message, serialize_message

    from adatoken3d_ros.engine.events import KeyFramesShown
    from adatoken3d_ros.ros.outputs.messages import key_frames_message
    from adatoken3d_ros.ros.watching import read_key_frames

    scene, pictures = looked
    kept, tokens = pictures.of(scene), ask(scene, Question("What is red?")).report
    assert tokens is not None
    shown = KeyFramesShown("map", scene.stamp_ns, kept, voxels_of(scene))
    data = serialize_message(key_frames_message(shown))
    assert len(data) < 40_000 * len(kept)
    voxels, read = read_key_frames(deserialize_message(data, KeyFrames))
    left = tokens.xyz[tokens.retained]
    assert voxels == voxels_of(scene)
    for one, other in zip(kept, read, strict=True):
        assert one.lit(Left.of(voxels, left)).tolist() == other.lit(Left.of(voxels, left)).tolist()
        assert (one.stamp_ns, one.jpeg, one.size, one.grid) == (other.stamp_ns, other.jpeg, other.size, other.grid)
        np.testing.assert_array_equal(one.places, other.places)
        np.testing.assert_allclose(one.pose, other.pose, atol=1e-12)
    message = key_frames_message(shown)
    assert read_key_frames(message, read)[1] == read  # the same objects: nothing is drawn anew
    message.frames[0].rows += 1
    with pytest.raises(PictureError, match="are not the places of"):
        read_key_frames(message)
    assert read_key_frames(KeyFrames()) == (None, ())


def sized(height_and_width: bytes) -> bytes:
    """A JPEG of one pixel whose header says something else."""
    jpeg, _ = encoded(np.zeros((1, 1, 3), np.uint8))
    return jpeg.replace(b"\x00\x01\x00\x01\x03", height_and_width + b"\x03")


GOOD: dict[str, Any] = {"stamp_ns": 1, "jpeg": JPEG, "pose": np.eye(4), "fov": 1.0, "grid": (1, 2),
                        "area": (0, 0, 1, 1), "places": np.zeros(6, np.float32)}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"grid": (2, 2)}, "places of 2 x 2"),
        ({"grid": (2**16, 2**16)}, "places of"),
        ({"area": (0, 0, 1, math.nan)}, "area"),
        ({"area": (0.5, 0, 0.5, 1)}, "area"),
        ({"fov": math.inf}, "inf rad"),
        ({"pose": np.full((4, 4), np.nan)}, "nan"),
        ({"jpeg": b"GIF89a"}, "no JPEG"),
        ({"jpeg": b"x" * (MOST_BYTES + 1)}, "larger"),
        ({"jpeg": sized(b"\xff\xff\xff\xff")}, "no JPEG that can be shown: Decomp"),
        ({"jpeg": sized(b"\x07\xd0\x07\xd0")}, "2000x2000"),
    ],
)  # fmt: skip
def test_pictures_from_elsewhere_are_not_believed(changes: dict[str, Any], named: str) -> None:
    assert received(**GOOD).size == (80, 60)
    with pytest.raises(PictureError, match=named):
        received(**{**GOOD, **changes})


def test_only_so_many_are_kept(looked: tuple[Scene, Pictures], monkeypatch: Any) -> None:
    from adatoken3d_ros.engine import pictures as module

    scene, _ = looked
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    some = Pictures()
    for stamp in (1, 2, 3):
        some.add(replace(room_frame(0), stamp_ns=stamp), scene)
    assert sorted(some._by_stamp) == [2, 3]
    views, newer = sorted(scene.poses), max(scene.poses) + 1
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    for stamp in (*views, newer, newer + 1):
        some.add(replace(room_frame(0), stamp_ns=stamp), scene)
    assert sorted(some._by_stamp) == [*views, newer + 1]  # a view that stays keeps its picture, however old
