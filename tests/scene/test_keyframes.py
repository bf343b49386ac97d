# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, KeyFrameSelector, Verdict, rotation_angle


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


def test_the_oldest_stamp_is_evicted_whatever_the_order_of_arrival() -> None:
    selector = selector_with(frame(20, 0.0), frame(10, 1.0), frame(30, 2.0), config=KeyFrameConfig(max_views=2))
    assert selector.evict() == 10
    assert selector.evict() is None
    assert selector.stamps() == (20, 30)
    assert selector.decide(frame(40, 1.0)) == Verdict.KEY_FRAME, "the place of an evicted view is new again"


def test_clear_forgets_views_and_stamps() -> None:
    selector = selector_with(frame(1))
    selector.clear()
    assert selector.decide(frame(1)) == Verdict.KEY_FRAME


@pytest.mark.parametrize("angle", [0.0, 1e-4, 10.0, 90.0, 179.9, 180.0])
def test_rotation_angle(angle: float) -> None:
    a, b = frame(0, yaw=20.0).T_world_camera, frame(0, yaw=20.0 + angle).T_world_camera
    assert rotation_angle(a, b) == pytest.approx(angle, abs=1e-6)


@pytest.mark.parametrize(
    "bad", [{"min_translation": -0.1}, {"min_rotation": 181.0}, {"min_rotation": math.nan}, {"max_views": 0}]
)
def test_bad_configurations_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        KeyFrameConfig(**bad)
