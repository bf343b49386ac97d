# SPDX-License-Identifier: Apache-2.0
"""Wrong poses, depths and axes are told from right ones, and from scenes that change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lab.synthetic.camera import look_at
from adatoken3d_ros.scene import agreement as agreement_module
from adatoken3d_ros.scene.agreement import JUDGED, Agreement, Sketch, contradiction, likely_cause, tilt
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, KeyFrameSelector, Verdict
from tests.scene.room import CUPBOARD, SIZE, TABLE, TO_BODY, Y_DOWN, K, Pose, view, walk
from tests.scene.test_keyframes import Memory

LIMIT = 0.2


def wrong(pose: Pose, metres: float = 0.0, degrees: float = 0.0) -> Pose:
    """Off by so much, across the optical axis and around the camera's up."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    off = np.array([[c, 0, s, metres], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])
    return np.asarray(pose @ off, np.float64)


def shown(frames: list[PosedFrame], agreement: Agreement) -> list[int]:
    """Stamps of the frames that are believed; what is outvoted goes."""
    believed = []
    for frame in frames:
        if agreement.believes(frame):
            agreement.keep(frame)
            believed.append(frame.stamp_ns)
            for stamp in list(agreement.outvoted):
                agreement.drop(stamp)
                believed.remove(stamp)
    return believed


def test_a_wall_by_hand() -> None:
    at = np.eye(4)
    back = np.eye(4)
    back[2, 3] = -1.0
    wall = np.full(SIZE, 2.0, np.float32)
    a, b, further = (
        Sketch.of(PosedFrame(np.zeros((*SIZE, 3), np.uint8), depth, K, pose, 1))
        for depth, pose in ((wall, at), (wall, back), (wall + 1, back))
    )
    assert contradiction(a, further) == 0.0  # the same wall from a metre farther away
    # b's wall is at z = 1, a metre in front of a's; what b saw hides a's, which says nothing.
    assert contradiction(a, b) == contradiction(b, a) == 1.0
    away = np.diag([-1.0, 1.0, -1.0, 1.0])
    assert math.isnan(contradiction(a, Sketch.of(PosedFrame(np.zeros((*SIZE, 3), np.uint8), wall, K, away, 1))))


def test_where_nothing_was_measured_nothing_is_contradicted() -> None:
    blind = PosedFrame(np.zeros((*SIZE, 3), np.uint8), np.full(SIZE, np.nan, np.float32), K, np.eye(4), 1)
    a = Sketch.of(blind)
    assert len(a.xyz) == len(a.normals) == 0
    assert math.isnan(contradiction(a, Sketch.of(view(2, walk(1)[0]))))


def test_a_right_walk_is_believed() -> None:
    agreement = Agreement(LIMIT)
    frames = [view(i, pose) for i, pose in enumerate(walk(30))]
    assert shown(frames, agreement) == list(range(30))
    assert agreement.problem == ""


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 29), st.sampled_from([(0.0, 30.0), (1.0, 20.0)]))
def test_one_wrong_pose_is_not_kept_and_costs_hardly_another(place: int, off: tuple[float, float]) -> None:
    poses = walk(30)
    frames = [view(i, pose, said=wrong(pose, *off) if i == place else None) for i, pose in enumerate(poses)]
    agreement = Agreement(LIMIT)
    believed = shown(frames, agreement)
    assert place not in believed and len(believed) >= 28
    assert agreement.problem == ""


def test_a_first_view_that_is_wrong_is_outvoted() -> None:
    poses = walk(12)
    frames = [view(i, pose, said=wrong(pose, 0.9, 20.0) if i == 0 else None) for i, pose in enumerate(poses)]
    believed = shown(frames, agreement := Agreement(LIMIT))
    assert 0 not in believed and len(believed) >= 10
    assert agreement.problem == ""


def test_a_thing_that_comes_and_goes_is_no_wrong_pose() -> None:
    poses = walk(20)
    more = np.array([[-1.8, 0.6, 0.0], [-0.9, 1.5, 1.2]])
    frames = [
        view(i, pose, CUPBOARD, *((TABLE,) if i < 8 else ()), *((more,) if i > 12 else ()))
        for i, pose in enumerate(poses)
    ]
    assert len(shown(frames, agreement := Agreement(LIMIT))) >= 19
    assert agreement.problem == ""


def test_a_jump_of_the_map_is_believed_when_others_agree() -> None:
    """The robot was found somewhere else (a loop was closed): what was seen before does not fit any more."""
    poses = walk(24)
    frames = [view(i, pose, said=pose if i < 12 else shifted(pose)) for i, pose in enumerate(poses)]
    believed = shown(frames, Agreement(LIMIT))
    assert believed[-4:] == [20, 21, 22, 23]
    assert len([i for i in believed if i < 12]) <= 6


def test_who_was_believed_by_others_and_not_kept_leaves_them_to_the_next() -> None:
    """A blurred frame waits for a sharper one, which the same doubted frames speak for."""
    agreement = Agreement(LIMIT)
    poses = walk(24)
    shown([view(i, pose) for i, pose in enumerate(poses[:12])], agreement)
    believed = [agreement.believes(view(i, pose, said=shifted(pose))) for i, pose in enumerate(poses[12:], 12)]
    assert not any(believed[5:8]) and all(believed[8:])


def shifted(pose: Pose) -> Pose:
    moved = pose.copy()
    moved[:3, 3] += (0.9, -0.5, 0.0)
    return moved


@pytest.mark.parametrize(
    ("said", "scale", "cause"),
    [
        (np.linalg.inv, 1.0, "the poses are inverted"),
        (lambda pose: pose @ TO_BODY, 1.0, "the poses are of a body"),
        (lambda pose: pose, 5.0, "depth is 5 times what it should be"),
        (lambda pose: pose, 2.0, "depth is 2 times what it should be"),
        (lambda pose: Y_DOWN @ pose, 1.0, "the scene frame's z is not up: -y seems to be"),
    ],
    ids=["inverted", "body", "scale-5", "scale-2", "y-down"],
)
def test_what_is_wrong_with_all_of_them_is_named(said: Callable[[Pose], Pose], scale: float, cause: str) -> None:
    agreement = Agreement(LIMIT)
    shown([view(i, pose, said=said(pose), scale=scale) for i, pose in enumerate(walk(20))], agreement)
    assert cause in agreement.problem
    agreement.clear()
    assert agreement.problem == ""


def test_views_that_agree_have_nothing_wrong() -> None:
    sketches = [Sketch.of(view(i, pose)) for i, pose in enumerate(walk(8))]
    assert tilt(sketches) == ""
    above = [look_at(np.array([x, 0.0, 2.0]), np.array([x, 0.01, 0.0])) for x in np.linspace(-2, 2, 8)]
    down = [Sketch.of(view(0, pose)) for pose in above]
    assert tilt(down) == ""  # what a camera above sees faces it
    assert tilt(sketches[:2]) == ""
    assert likely_cause([], LIMIT) == ""


@pytest.mark.parametrize(("scale", "highest", "wrong"), [(1.0, 4.0, False), (5.0, 4.0, True), (5.0, 0.0, False)])
def test_a_wrong_scale_shows_in_the_height_of_a_camera_that_only_turns(
    scale: float, highest: float, wrong: bool
) -> None:
    """Its views agree whatever the scale is. It is 1.5 m high; of the least depth around each pixel a little less."""
    agreement, eye = Agreement(LIMIT, highest), np.array([0.0, 0.0, 1.5])
    for i, angle in enumerate(np.linspace(0.0, 3.0, 10)):
        frame = view(i, look_at(eye, np.array([2.0 * math.cos(angle), 2.0 * math.sin(angle), 0.5])))
        frame = replace(frame, depth=(frame.depth * np.float32(scale)).astype(np.float32))
        assert agreement.believes(frame)
        agreement.keep(frame)
        assert bool(agreement.problem) is (wrong and i >= 5)
    assert ("its scale is wrong" in agreement.problem and "7.3 m below the camera" in agreement.problem) is wrong
    agreement.restore(agreement.sketches())
    assert bool(agreement.problem) is wrong
    for stamp in range(5):
        agreement.drop(stamp)
    assert agreement.problem == ""  # too few are left


def test_without_a_limit_everything_is_believed() -> None:
    agreement = Agreement(0.0)
    frames = [view(i, pose, said=np.linalg.inv(pose)) for i, pose in enumerate(walk(8))]
    assert shown(frames, agreement) == list(range(8))


def test_the_selector_passes_a_wrong_frame_over_and_lets_an_outvoted_view_go() -> None:
    selector = KeyFrameSelector(KeyFrameConfig(max_disagreement=LIMIT))
    verdicts, gone = [], []
    for i, pose in enumerate(walk(14)):
        frame = view(i + 1, pose, said=wrong(pose, 0.9, 20.0) if i in (0, 9) else None)
        verdicts.append(selector.decide(frame))
        if verdicts[-1] == Verdict.KEY_FRAME:
            selector.accepted(frame)
            while (stamp := selector.evict()) is not None:
                gone.append(stamp)
    assert verdicts[9] == Verdict.DISAGREES
    assert gone == [1]
    assert verdicts.count(Verdict.DISAGREES) <= 3
    assert selector.contradiction == ""


def problems(said: list[Pose], poses: list[Pose]) -> list[str]:
    """What is wrong with the scene after each frame, seen from `poses` and said to be from others; two a second."""
    memory = Memory(max_disagreement=LIMIT, max_views=20, min_gain=0.02)
    found = []
    for i, (pose, other) in enumerate(zip(poses, said, strict=True)):
        memory.see(view((i + 1) * 500_000_000, pose, said=other))
        found.append(memory.selector.contradiction)
    return found


@pytest.mark.parametrize(
    ("fault", "before"),
    [(np.linalg.inv, 0), (np.linalg.inv, 20), (lambda p: p @ TO_BODY, 20), (lambda p: Y_DOWN @ p, 0)],
    ids=["inverted", "inverted-later", "body-later", "y-down"],
)
def test_a_fault_of_a_while_is_over_soon_after_it(fault: Callable[[Pose], Pose], before: int) -> None:
    """Also in a room that is known, where right frames show nothing new."""
    poses = walk(before + 50)
    found = problems([fault(p) if before <= i < before + 20 else p for i, p in enumerate(poses)], poses)
    assert found[before + 19]
    assert not any(found[before + 36 :])


def test_who_stands_still_is_well_by_what_other_views_say() -> None:
    """From one place frames agree with each other, however wrong their pose is."""
    poses = walk(40)
    still = [*poses, *[poses[-1]] * 60]
    inverted = [np.linalg.inv(p) for p in still]
    assert all(problems(inverted, still)[40:])
    assert not any(problems([*poses[:20], *inverted[20:40], *still[40:]], still)[-30:])


def test_a_cause_that_is_not_found_is_not_looked_for_with_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr(agreement_module, "likely_cause", lambda *_: searches.append(1) or "")
    rng = np.random.default_rng(1)
    agreement = Agreement(LIMIT)
    lost = [wrong(pose, *rng.uniform((0.8, 20), (3.0, 90))) for pose in walk(40)]
    shown([view(i, pose, said=said) for i, (pose, said) in enumerate(zip(walk(40), lost, strict=True))], agreement)
    assert agreement.problem.endswith("poses or depth are wrong")
    assert 1 <= len(searches) <= 40 // JUDGED + 4  # after 1, 2, 4 and 8 frames, too


def test_what_is_wrong_with_views_that_go_goes_with_them() -> None:
    agreement = Agreement(LIMIT)
    shown([view(i, pose, said=Y_DOWN @ pose) for i, pose in enumerate(walk(8))], agreement)
    assert "z is not up" in agreement.problem
    for i in range(8):
        agreement.drop(i)
    assert agreement.problem == ""
