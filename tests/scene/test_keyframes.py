# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from adatoken3d_ros.scene.carving import carve_free_space
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.keyframes import (
    KeyFrameConfig,
    KeyFrameSelector,
    Verdict,
    rotation_angle,
)
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.token_map import TokenMap


def frame(stamp: int, x: float = 0.0, yaw: float = 0.0, depth: float = 2.0) -> PosedFrame:
    """A camera at (x, 0, 0), turned by `yaw` degrees."""
    T = np.eye(4)
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    T[:2, :2] = [[c, -s], [s, c]]
    T[0, 3] = x
    K = np.array([[40.0, 0, 20], [0, 40, 15], [0, 0, 1]])
    return PosedFrame(np.zeros((30, 40, 3), np.uint8), np.full((30, 40), depth, np.float32), K, T, stamp)


def selector_with(*frames: PosedFrame, config: KeyFrameConfig | None = None) -> KeyFrameSelector:
    selector = KeyFrameSelector(config)
    for f in frames:
        assert selector.decide(f) == Verdict.KEY_FRAME
        selector.accepted(f)
    return selector


def test_the_first_frame_is_a_key_frame_and_deciding_keeps_nothing() -> None:
    selector = KeyFrameSelector()
    assert selector.decide(frame(1)) == Verdict.KEY_FRAME
    assert selector.decide(frame(1)) == Verdict.KEY_FRAME
    assert len(selector) == 0


@pytest.mark.parametrize(
    ("x", "yaw", "verdict"),
    [
        (0.0, 0.0, Verdict.TOO_SIMILAR),
        (0.14, 9.9, Verdict.TOO_SIMILAR),
        (0.16, 0.0, Verdict.KEY_FRAME),
        (0.0, 10.1, Verdict.KEY_FRAME),
        (0.0, -10.1, Verdict.KEY_FRAME),
        (0.0, 180.0, Verdict.KEY_FRAME),
    ],
)
def test_a_move_or_a_turn_makes_a_key_frame(x: float, yaw: float, verdict: Verdict) -> None:
    assert selector_with(frame(1)).decide(frame(2, x, yaw)) == verdict


def test_coming_back_to_any_kept_view_adds_nothing() -> None:
    selector = selector_with(frame(1, 0.0), frame(2, 1.0), frame(3, 2.0))
    assert selector.decide(frame(4, 0.05)) == Verdict.TOO_SIMILAR


def test_the_same_stamp_is_never_encoded_twice() -> None:
    selector = selector_with(frame(1), config=KeyFrameConfig(max_views=1))
    assert selector.decide(frame(1, 5.0)) == Verdict.DUPLICATE_STAMP
    with pytest.raises(ValueError, match="1 ns"):
        selector.accepted(frame(1, 5.0))
    selector.accepted(frame(2, 5.0))
    assert selector.evict() == 1
    assert selector.decide(frame(1)) == Verdict.DUPLICATE_STAMP, "not after its view is gone either"


@pytest.mark.parametrize("depth", [math.nan, 0.0, 10.5, math.inf])
def test_a_frame_without_usable_depth_is_refused(depth: float) -> None:
    assert KeyFrameSelector().decide(frame(1, depth=depth)) == Verdict.NO_DEPTH


def test_the_view_that_arrived_first_is_evicted_whatever_its_stamp() -> None:
    selector = selector_with(frame(20, 0.0), frame(10, 1.0), frame(15, 2.0), config=KeyFrameConfig(max_views=2))
    assert [selector.order(stamp) for stamp in (20, 10, 15)] == [0, 1, 2]
    assert selector.evict() == 20
    assert selector.evict() is None
    assert selector.stamps() == (10, 15)
    assert selector.decide(frame(40, 0.0)) == Verdict.KEY_FRAME, "the place of an evicted view is new again"


def test_clear_forgets_views_and_stamps() -> None:
    selector = selector_with(frame(1))
    selector.clear()
    assert selector.decide(frame(1)) == Verdict.KEY_FRAME


@pytest.mark.parametrize("angle", [0.0, 1e-4, 10.0, 90.0, 179.9, 180.0])
def test_rotation_angle(angle: float) -> None:
    a, b = frame(0, yaw=20.0).T_world_camera, frame(0, yaw=20.0 + angle).T_world_camera
    assert rotation_angle(a, b) == pytest.approx(angle, abs=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"min_translation": -0.1},
        {"min_rotation": 181.0},
        {"min_rotation": math.nan},
        {"max_views": 0},
        {"max_voxels": 0},
        {"min_change": 0},
        {"change_interval": math.nan},
        {"near": 0.0},
        {"far": -1.0},
        {"max_age": math.nan},
        {"min_gain": 1.5},
        {"min_sharpness": -0.5},
        {"sharpness_wait": math.nan},
    ],
)
def test_bad_configurations_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        KeyFrameConfig(**bad)


# --- a scene that changes --------------------------------------------------------------------------------------------

PATCHES = PatchConfig(PatchGeometry.square(96, 24))
SECOND = 10**9


def room(stamp: int, chair: float | None = None, angle: float = 0.0) -> PosedFrame:
    """A level camera 3 m before a wall, with a chair of 0.5 m at 2 m whose middle is at `chair` metres to the right."""
    T = np.eye(4)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    T[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    T[2, 3] = 1.0
    K = np.array([[96.0, 0, 47.5], [0, 96.0, 47.5], [0, 0, 1]])
    depth = np.full((96, 96), 3.0, np.float32)
    if chair is not None:
        x = (np.arange(96) - 47.5) / 96 * 2.0
        depth[40:90, np.abs(x - chair) < 0.25] = 2.0
    return PosedFrame(np.zeros((96, 96, 3), np.uint8), depth, K, T, stamp)


class Memory:
    """A map and a selector, used as a session does."""

    def __init__(self, **config: Any) -> None:
        self.map = TokenMap(0.2)
        self.selector = KeyFrameSelector(KeyFrameConfig(**config), PATCHES, self.map)
        self.doubted: dict[int, int] = {}

    def see(self, f: PosedFrame) -> Verdict:
        verdict = self.selector.decide(f)
        if verdict == Verdict.KEY_FRAME:
            self.selector.accepted(f)
            points = patch_points(f, PATCHES)
            self.map.add_view(f.stamp_ns, torch.ones(len(points.valid), 3), points.xyz, points.rgb, points.valid)
            if self.selector.config.carving is not None:
                carve_free_space(self.map, f, self.selector.config.carving, doubted=self.doubted)
            while (stamp := self.selector.evict()) is not None:
                self.map.remove_view(stamp)
        return verdict

    def chair_voxels(self, y: float) -> int:
        """Occupied voxels at the chair's distance, between its sides. The world's y is to the left."""
        centres = self.map.centres()
        return int(((np.abs(centres[:, 0] - 2.0) < 0.15) & (np.abs(centres[:, 1] - y) < 0.2)).sum())


def test_a_chair_that_moved_is_where_it_is_and_no_longer_where_it_was() -> None:
    memory = Memory()
    assert memory.see(room(1 * SECOND, chair=-0.5)) == Verdict.KEY_FRAME
    assert memory.chair_voxels(0.5) > 0 and memory.chair_voxels(-0.5) == 0
    # The robot has not moved: the frame is worth encoding because the scene has changed.
    assert memory.see(room(3 * SECOND, chair=0.5)) == Verdict.KEY_FRAME
    assert memory.chair_voxels(0.5) == 0 and memory.chair_voxels(-0.5) > 0
    assert memory.see(room(5 * SECOND, chair=0.5)) == Verdict.TOO_SIMILAR
    assert memory.see(room(7 * SECOND)) == Verdict.KEY_FRAME
    assert memory.chair_voxels(-0.5) == 0, "it was carried out of the room"


def test_what_hides_the_place_does_not_empty_it() -> None:
    memory = Memory()
    memory.see(room(1 * SECOND, chair=0.0))
    before = memory.chair_voxels(0.0)
    near = room(3 * SECOND)
    near.depth[:] = 1.0
    assert memory.see(near) == Verdict.KEY_FRAME
    assert memory.chair_voxels(0.0) == before
    blind = room(5 * SECOND)
    blind.depth[:, ::2] = np.nan
    memory.see(blind)
    assert memory.chair_voxels(0.0) == before


def test_a_change_is_looked_for_once_in_an_interval_and_not_for_ever() -> None:
    memory = Memory(change_interval=2.0)
    memory.see(room(10 * SECOND, chair=-0.5))
    assert memory.see(room(11 * SECOND, chair=0.5)) == Verdict.TOO_SIMILAR
    assert memory.see(room(13 * SECOND, chair=0.5)) == Verdict.KEY_FRAME
    never = Memory(change_interval=1e6)
    never.see(room(10 * SECOND, chair=-0.5))
    assert never.see(room(99 * SECOND, chair=0.5)) == Verdict.TOO_SIMILAR
    small = Memory(min_change=10_000)
    small.see(room(10 * SECOND, chair=-0.5))
    assert small.see(room(99 * SECOND, chair=0.5)) == Verdict.TOO_SIMILAR


def test_a_frame_in_which_nothing_has_changed_confirms_the_scene() -> None:
    memory = Memory(min_gain=0.05, change_interval=1.0)
    memory.see(room(1 * SECOND, chair=-0.5))
    assert memory.selector.confirmed is None
    assert memory.see(room(3 * SECOND, chair=-0.5)) == Verdict.TOO_SIMILAR
    assert memory.selector.confirmed == 3 * SECOND
    # Nobody looks at what comes too soon after the last look.
    assert memory.see(room(3 * SECOND + SECOND // 2, chair=-0.5)) == Verdict.TOO_SIMILAR
    assert memory.selector.confirmed == 3 * SECOND
    covered = room(5 * SECOND)
    covered.depth[:] = np.nan
    assert memory.see(covered) == Verdict.TOO_SIMILAR
    assert memory.selector.confirmed == 3 * SECOND, "a lens that is covered shows nothing"
    assert memory.see(room(7 * SECOND)) == Verdict.KEY_FRAME, "the chair is gone"
    assert memory.selector.confirmed is None
    nearer = room(9 * SECOND)
    nearer.T_world_camera[0, 3] = 0.5
    nearer.depth[:] = 2.5
    assert memory.see(nearer) == Verdict.NOTHING_NEW
    assert memory.selector.confirmed == 9 * SECOND
    memory.selector.restore(memory.selector.poses())
    assert memory.selector.confirmed is None


def test_the_view_that_is_missed_least_goes_and_the_newest_stays() -> None:
    memory = Memory(max_views=3)
    for i, angle in enumerate((0, 60, 120)):
        memory.see(room((i + 1) * SECOND, angle=angle))
    # Between the first two, and it sees hardly more than they do: one of the two is missed least.
    exclusive = memory.map.exclusive()
    memory.see(room(4 * SECOND, angle=30))
    left = memory.selector.stamps()
    assert 4 * SECOND in left and 3 * SECOND in left and len(left) == 3 == len(memory.map)
    assert left == memory.map.keys() and exclusive.keys() >= {SECOND}


def test_of_equal_views_the_oldest_goes() -> None:
    memory = Memory(max_views=2)
    for i, angle in enumerate((0, 120, 240)):
        memory.see(room((i + 1) * SECOND, angle=angle))
    assert memory.selector.stamps() == (2 * SECOND, 3 * SECOND)


def test_a_robot_that_drives_on_remembers_where_it_is() -> None:
    """Views every 0.5 m along a wall show much the same; the first ones alone hold what is far behind."""

    def along(i: int) -> PosedFrame:
        f = room((i + 1) * SECOND)
        f.T_world_camera[1, 3] = 0.5 * i
        return f

    memory, forgetful = Memory(max_views=5), Memory(max_views=5, near=1e6)
    for i in range(60):
        memory.see(along(i))
        forgetful.see(along(i))
    # A picture is 3 m wide: every sixth view holds a part of the wall of its own.
    assert [stamp // SECOND for stamp in memory.selector.stamps()] == [19, 45, 51, 57, 60]
    assert [stamp // SECOND for stamp in forgetful.selector.stamps()] == [1, 7, 13, 19, 60]


def test_too_many_voxels_cost_views_but_never_the_last() -> None:
    memory = Memory(max_voxels=100)
    for i, angle in enumerate((0, 120, 240)):
        memory.see(room((i + 1) * SECOND, angle=angle))
    assert memory.selector.stamps() == (3 * SECOND,) and memory.map.n_voxels > 100


def test_views_that_are_restored_are_known() -> None:
    selector = selector_with(frame(1, 0.0), frame(2, 1.0))
    other = KeyFrameSelector()
    other.restore(selector.poses())
    assert other.stamps() == (1, 2)
    assert other.decide(frame(2, 9.0)) == Verdict.DUPLICATE_STAMP
    assert other.decide(frame(3, 1.0)) == Verdict.TOO_SIMILAR


# --- what a frame adds, and how sharp it is ---------------------------------------------------------------------------


def test_a_moved_frame_that_shows_nothing_new_is_passed_over_until_the_scene_changes() -> None:
    memory = Memory(min_gain=0.05, change_interval=1.0)
    assert memory.see(room(1 * SECOND)) == Verdict.KEY_FRAME
    nearer = room(2 * SECOND)
    nearer.T_world_camera[0, 3] = 0.5
    nearer.depth[:] = 2.5
    assert memory.see(nearer) == Verdict.NOTHING_NEW
    assert Memory(min_gain=0.0).see(nearer) == Verdict.KEY_FRAME
    changed = room(4 * SECOND, chair=0.0)
    changed.T_world_camera[1, 3] = 0.2
    assert memory.see(changed) == Verdict.KEY_FRAME
    assert memory.see(room(6 * SECOND, angle=60)) == Verdict.KEY_FRAME


def test_beside_what_was_seen_is_where_nothing_was_seen() -> None:
    """A step in the wall of one voxel's depth shows new places, although each has an occupied neighbour."""
    memory = Memory(min_gain=0.05, change_interval=1e6)
    assert memory.see(room(1 * SECOND)) == Verdict.KEY_FRAME
    step = room(2 * SECOND)
    step.T_world_camera[:2, 3] = 0.3, 0.2
    step.depth[:] = 2.7
    step.depth[:, 30:54] = 2.5
    assert memory.map.near_occupied(patch_points(step, PATCHES).xyz).all()
    assert memory.see(step) == Verdict.KEY_FRAME
    noisy = room(3 * SECOND)
    noisy.T_world_camera[1, 3] = 0.2
    noisy.depth[:] += np.random.default_rng(0).uniform(-0.03, 0.03, noisy.depth.shape).astype(np.float32)
    assert memory.see(noisy) == Verdict.NOTHING_NEW, "noise is nothing new"


def textured(stamp: int, x: float, blur: int) -> PosedFrame:
    f = frame(stamp, x)
    sharp = np.random.default_rng(7).integers(0, 255, f.rgb.shape, dtype=np.uint8)
    return PosedFrame(cv2.blur(sharp, (blur, blur)) if blur else sharp, f.depth, f.K, f.T_world_camera, stamp)


def test_a_blurred_key_frame_waits_for_a_sharper_one() -> None:
    selector = KeyFrameSelector(KeyFrameConfig(min_sharpness=0.5, sharpness_wait=0.1))
    tenth, period = 1.0, 33_000_000
    for i in range(5):
        if selector.decide(f := textured(i * period, i * tenth, 0)) == Verdict.KEY_FRAME:
            selector.accepted(f)
    assert selector.decide(textured(5 * period, 9.0, 7)) == Verdict.BLURRED
    assert selector.decide(textured(6 * period, 9.0, 0)) == Verdict.KEY_FRAME
    assert selector.decide(textured(7 * period, 4.0, 7)) == Verdict.TOO_SIMILAR, "nobody wants it, blurred or not"
    verdicts = [selector.decide(textured((8 + i) * period, 9.0, 7)) for i in range(4)]
    assert verdicts == [Verdict.BLURRED] * 3 + [Verdict.KEY_FRAME], "the wait has an end"


def test_a_direction_in_which_little_is_seen_is_kept_like_the_others() -> None:
    selector = KeyFrameSelector(KeyFrameConfig(min_sharpness=0.5, sharpness_wait=0.5))
    weak = 0
    for i in range(60):  # clouds at 10 Hz, two directions drawn of each
        for direction, blur in enumerate((0, 7)):
            f = textured(i * SECOND // 10 + direction, 1.0 * i, blur)
            f.T_world_camera[1, 3] = 1000.0 * direction
            if selector.decide(f) == Verdict.KEY_FRAME:
                selector.accepted(f)
                weak += direction
    assert weak == 60


def test_a_change_is_seen_in_each_direction_of_one_moment() -> None:
    memory = Memory(change_interval=1.0)
    for direction in range(2):
        memory.see(room(1 * SECOND + direction, angle=60 * direction))
    assert memory.see(room(3 * SECOND, angle=60)) == Verdict.TOO_SIMILAR
    assert memory.see(room(3 * SECOND + 1, chair=0.0)) == Verdict.KEY_FRAME
    assert memory.see(room(3 * SECOND + 50_000_000, chair=0.5)) == Verdict.TOO_SIMILAR, "another moment"


def test_views_that_are_too_far_or_too_old_go_first() -> None:
    far = selector_with(*[frame(i * SECOND, 2.0 * i) for i in range(5)], config=KeyFrameConfig(far=5.0))
    assert [far.evict(), far.evict(), far.evict()] == [0, SECOND, None]
    old = selector_with(*[frame(i * SECOND, 2.0 * i) for i in range(5)], config=KeyFrameConfig(max_age=1.5))
    assert [old.evict() for _ in range(4)] == [0, SECOND, 2 * SECOND, None]
    assert KeyFrameSelector().evict() is None
    jumped = selector_with(frame(9 * SECOND, 0.0), frame(SECOND, 2.0), config=KeyFrameConfig(max_age=100.0))
    assert [jumped.evict(), jumped.evict()] == [9 * SECOND, None], "nobody knows how old it is"
    assert selector_with(frame(9 * SECOND, 0.0), frame(SECOND, 2.0)).evict() is None


def test_without_carving_only_new_things_are_changes() -> None:
    for options, verdict in (({"carving": None}, Verdict.TOO_SIMILAR), ({}, Verdict.KEY_FRAME)):
        memory = Memory(**options)
        memory.see(room(1 * SECOND))
        assert memory.see(room(3 * SECOND, chair=0.0)) == Verdict.KEY_FRAME
        assert memory.see(room(5 * SECOND)) == verdict, "the chair has gone, and the wall behind it was known"
        assert bool(memory.chair_voxels(0.0)) == (verdict == Verdict.TOO_SIMILAR)


def test_a_view_that_cannot_be_used_is_forgotten_but_not_its_stamp() -> None:
    selector = selector_with(frame(1))
    selector.forget(1)
    assert selector.stamps() == () and selector.decide(frame(2)) == Verdict.KEY_FRAME
    assert selector.decide(frame(1)) == Verdict.DUPLICATE_STAMP


def test_stamp_and_pose_tell_some_of_it() -> None:
    memory = Memory(change_interval=2.0)
    memory.see(room(1 * SECOND))
    pose = room(0).T_world_camera
    assert memory.selector.announce(1 * SECOND, pose) == Verdict.DUPLICATE_STAMP
    assert memory.selector.announce(2 * SECOND, pose) == Verdict.TOO_SIMILAR
    assert memory.selector.announce(3 * SECOND, pose) is None, "the scene may have changed"
    assert memory.selector.announce(2 * SECOND, room(0, angle=60).T_world_camera) is None
