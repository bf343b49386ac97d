# SPDX-License-Identifier: Apache-2.0
"""A scene as a whole: joined with a saved one of the same map, and moved when its poses are corrected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.autosave import Versions
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.synthetic.camera import look_at
from adatoken3d_ros.scene.evidence import Observed
from adatoken3d_ros.scene.frames import FrameError, PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, Verdict
from adatoken3d_ros.scene.marks import Mark
from adatoken3d_ros.scene.sealed_file import SceneFileError
from adatoken3d_ros.scene.window import OriginMode
from tests.engine.scenes import THINGS, ask, room_frame
from tests.scene.room import CUPBOARD, TABLE, view, walk

MakeSession = Callable[..., Scene]
CONFIG = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0, max_disagreement=0.2), origin_mode=OriginMode.AUTO)
LATER_NS = 10**11
QUESTION = Question("What is there?", max_new_tokens=4)
FRAMES = [view((i + 1) * 10**9, pose) for i, pose in enumerate(walk(6))]


def looked(scene: Scene, frames: list[PosedFrame]) -> Scene:
    for frame in frames:
        assert scene.observe(frame) is Verdict.KEY_FRAME
        scene.encode_pending()
    return scene


def turn(degrees: float, x: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0, x], [s, c, 0, 0.4], [0, 0, 1, 0.0], [0, 0, 0, 1.0]])


def test_a_saved_scene_is_joined_to_one_of_the_same_map(make_session: MakeSession, tmp_path: Path) -> None:
    named = replace(CONFIG, map_id="cellar")
    saved = looked(make_session(named), FRAMES[:3])
    saved.memory.marks.add(Mark("dock", (1.0, 0.0, 0.0)))
    saved.save(tmp_path / "s")
    # The other began elsewhere, so that its voxels lie differently; one view is in both.
    other = looked(make_session(named), FRAMES[5:2:-1] + FRAMES[2:3])
    other.memory.marks.add(Mark("door", (0.0, 1.0, 0.0)))
    assert other.load(tmp_path / "s", merge=True) == 6
    assert other.memory._map.keys() == tuple(f.stamp_ns for f in FRAMES[:2] + FRAMES[5:2:-1] + FRAMES[2:3])
    assert [mark.name for mark in other.memory.marks.all()] == ["dock", "door"]
    assert other.memory._selector.sketches().keys() == other.poses.keys()
    expected = make_session(
        replace(named, origin_mode=OriginMode.FIXED, origin=tuple(other.memory._map.origin.tolist()))
    )
    looked(expected, FRAMES[:2] + FRAMES[5:2:-1] + FRAMES[2:3])
    a, b = other.tokens(), expected.tokens()
    assert a is not None and b is not None and torch.equal(a.voxel, b.voxel) and torch.equal(a.count, b.count)
    torch.testing.assert_close(a.features, b.features)
    # It lives on.
    looked(other, [replace(FRAMES[0], stamp_ns=10**11)])
    assert ask(other, QUESTION).status.answered


def confirmed_scene(scene: Scene) -> Scene:
    """Three views of one place and one of another, and a frame much later in which nothing of the first had changed."""
    for index in (0, 1, 2, 6):
        scene.observe(room_frame(index))
    scene.encode_pending()
    scene.observe(replace(room_frame(0), stamp_ns=LATER_NS))
    assert set(scene.poses) == {room_frame(index).stamp_ns for index in (0, 1, 2, 6)}
    return scene


@pytest.mark.parametrize("change", ["restart", "merge", "merge elsewhere", "correction"])
def test_when_it_was_last_seen_to_be_so_outlives_a_restart(
    make_session: MakeSession, tmp_path: Path, change: str
) -> None:
    """By frames that are no views, and are in no file; by what is joined, too; and after a correction of poses."""
    config = SessionConfig(key_frames=KeyFrameConfig(min_change=1000), map_id="m", origin_mode=OriginMode.AUTO)
    before = confirmed_scene(make_session(config))
    thing, dock = np.array([THINGS[1][0]]), Question("When did you last see [0.8, 2.0, 1.2]?")

    def told(scene: Scene) -> tuple[object, ...]:
        place = ask(scene, Question("What?", thing, max_new_tokens=2))
        assert place.verdict is Observed.SEEN, place.verdict_reason
        return place.evidence[0].last_ns, ask(scene, dock).evidence[0].last_ns

    wanted = (LATER_NS, LATER_NS)
    assert told(before) == wanted and before.confirmed_ns == LATER_NS
    before.save(tmp_path / "s")
    after = make_session(config)
    if change == "restart":
        after.load(tmp_path / "s")
        assert after.confirmed_ns == LATER_NS and "after the newest frame" not in ask(after, dock).text
    elif change == "correction":
        after = before
        after.move({stamp: turn(0.0, 0.0) @ pose for stamp, pose in after.poses.items()})  # 0.4 m to the side
        thing = thing + (0.0, 0.4, 0.0)
        assert told(after)[0] == LATER_NS and after.confirmed_ns == LATER_NS
        return
    else:
        # Far away, so that it says nothing of the place; voxels lie as those of the file, or do not.
        up = np.eye(4)
        up[:3, 3] = 6.0, 0.0, 0.03 if change == "merge elsewhere" else 0.0
        frame = replace(room_frame(0, ()), stamp_ns=LATER_NS + 10**9)
        after.observe(replace(frame, T_world_camera=up @ frame.T_world_camera))
        after.encode_pending()
        after.load(tmp_path / "s", merge=True)
        assert after.confirmed_ns == LATER_NS + 10**9
    assert told(after) == wanted
    # What was never looked at is as unseen as it was.
    assert ask(after, Question("When did you last see [0.0, 4.0, 0.5]?")).verdict is Observed.NOT_OBSERVED


def test_a_frame_that_waits_is_joined_by_older_views(make_session: MakeSession, tmp_path: Path) -> None:
    looked(make_session(replace(CONFIG, map_id="m")), FRAMES[:2]).save(tmp_path / "s")
    scene = make_session(replace(CONFIG, map_id="m"))
    scene.observe(FRAMES[4])
    assert scene.load(tmp_path / "s", merge=True) == 2 and len(scene.memory.pending) == 1
    scene.encode_pending()
    assert tuple(scene.poses) == (FRAMES[0].stamp_ns, FRAMES[1].stamp_ns, FRAMES[4].stamp_ns)


def test_another_map_is_refused_and_nothing_is_mixed(make_session: MakeSession, tmp_path: Path) -> None:
    saved = looked(make_session(CONFIG), FRAMES[:2])
    saved.save(tmp_path / "s")
    other = looked(make_session(CONFIG), FRAMES[3:4])
    before = other.memory.map_id, tuple(other.poses)
    with pytest.raises(SceneFileError, match=f"has map '{saved.memory.map_id}', here it is '{before[0]}'"):
        other.load(tmp_path / "s", merge=True)
    assert (other.memory.map_id, tuple(other.poses)) == before and ask(other, QUESTION).status.answered
    # In place of it, it is taken, with its map; a scene whose map has a name takes none of another name.
    assert other.load(tmp_path / "s") == 2 and other.memory.map_id == saved.memory.map_id
    looked(other, FRAMES[4:5]).save(tmp_path / "t")
    assert saved.load(tmp_path / "t", merge=True) == 3
    named = make_session(replace(CONFIG, map_id="attic"))
    with pytest.raises(SceneFileError, match="here it is 'attic'"):
        named.load(tmp_path / "s")
    # Into nothing anything of this model may be merged.
    empty = make_session(CONFIG)
    assert empty.load(tmp_path / "s", merge=True) == 2 and empty.memory.map_id == saved.memory.map_id


def test_nothing_is_restored_where_the_map_s_frame_has_another_name(make_session: MakeSession, tmp_path: Path) -> None:
    versions = Versions(tmp_path, "x")
    versions.write(looked(make_session(CONFIG), FRAMES[:2]).packed("map"), 3)
    other = make_session(CONFIG)
    said = versions.restore(lambda path: other.load(path, "map_2"))
    assert said.startswith("nothing was restored: ") and "has frame 'map', here it is 'map_2'" in said
    assert not len(other.memory)


def test_a_question_that_names_a_mark_is_about_its_place(make_session: MakeSession) -> None:
    scene = looked(make_session(CONFIG), FRAMES[:2])
    scene.memory.marks.add(Mark("charging dock", (0.5, 0.25, 0.1)))
    told = ask(scene, Question("What is near the charging dock?", max_new_tokens=4))
    meant = ask(scene, Question("What is near [0.500, 0.250, 0.100]?", max_new_tokens=4))
    assert told.question.text == "What is near the charging dock?"
    assert told.text == meant.text and told.retained_tokens == meant.retained_tokens
    scene.memory.marks.remove("charging dock")
    scene.memory.marks.add(Mark("charging dock", (1000.0, 0.0, 0.0)))
    far = ask(scene, Question("What is near the charging dock?"))
    assert far.status is Status.INVALID_REQUEST and "[1000.0, 0.0, 0.0]" in far.status_message


def test_marks_and_map_outlive_what_was_seen(make_session: MakeSession) -> None:
    scene = looked(make_session(CONFIG), FRAMES[:1])
    scene.memory.marks.add(Mark("dock", (1.0, 0.0, 0.0)))
    before = scene.memory.map_id
    scene.clear()
    assert len(scene.memory.marks) == 1 and scene.memory.map_id == before and not len(scene.memory)


def test_a_loaded_scene_judges_the_next_frame_at_once(make_session: MakeSession, tmp_path: Path) -> None:
    looked(make_session(CONFIG), FRAMES[:5]).save(tmp_path / "s")
    other = make_session(CONFIG)
    other.load(tmp_path / "s")
    T = FRAMES[5].T_world_camera.copy()
    T[:3, 3] += (0.9, 0.9, 0.0)
    assert other.observe(replace(FRAMES[5], T_world_camera=T)) is Verdict.DISAGREES
    assert other.observe(replace(FRAMES[5], stamp_ns=7 * 10**9)) is Verdict.KEY_FRAME


def test_views_move_with_their_poses_and_what_waits_does(make_session: MakeSession) -> None:
    """As if all had been seen from there: tokens, poses, what a new frame is compared with, the model's origin."""
    T = turn(40, 3.0)
    scene, there = looked(make_session(CONFIG), FRAMES[:4]), make_session(CONFIG)
    moved = [replace(f, T_world_camera=T @ f.T_world_camera) for f in FRAMES]
    looked(there, moved[:4])
    scene.observe(FRAMES[4])
    there.observe(moved[4])
    assert scene.move({f.stamp_ns: f.T_world_camera for f in moved}) == 5
    for one in (scene, there):
        one.encode_pending()
    a, b = scene.tokens(), there.tokens()
    assert a is not None and b is not None
    assert scene.poses.keys() == there.poses.keys()
    for stamp, pose in scene.poses.items():
        np.testing.assert_allclose(pose, there.poses[stamp])
    assert len(set(map(tuple, a.voxel.tolist())) ^ set(map(tuple, b.voxel.tolist()))) <= 0.02 * len(b), "rounding"
    assert np.abs(scene.memory.origin - there.memory.origin).max() <= 1.0
    assert scene.observe(moved[5]) is Verdict.KEY_FRAME
    assert scene.move({f.stamp_ns: f.T_world_camera for f in moved}) == 0, "they are there already"
    bad = moved[0].T_world_camera * 2
    with pytest.raises(FrameError, match="not a rigid transform"):
        scene.move({FRAMES[0].stamp_ns: bad})
    assert ask(scene, QUESTION).status.answered


EYES = [(-1.5, -0.5, 1.4), (-1.3, 0.0, 1.6), (-1.0, 0.5, 1.5)]


def with_a_table_gone(scene: Scene) -> Scene:
    """A table was there for three seconds and was gone ten seconds later."""
    middle = TABLE.mean(axis=0)
    for i, eye in enumerate(2 * EYES):
        boxes = [CUPBOARD, TABLE] if i < 3 else [CUPBOARD]
        looked(scene, [view((10 * (i // 3) + i + 1) * 10**9, look_at(np.array(eye), middle), *boxes)])
    assert scene.memory.past.tombstones.gone
    return scene


def test_what_has_gone_moves_with_the_views(make_session: MakeSession) -> None:
    scene = with_a_table_gone(make_session(CONFIG))
    question = Question("", np.array([[*TABLE.mean(axis=0)[:2], 0.6]]))
    before = scene.memory.past.tombstones.gone
    T = turn(90, 3.0)
    assert scene.move({stamp: T @ pose for stamp, pose in scene.poses.items()}) == 6
    after = scene.memory.past.tombstones.gone
    for one, moved in zip(before, after, strict=True):
        # Half a box more or less where what it has around the means of its voxels is turned.
        np.testing.assert_allclose(moved.place, T[:3, :3] @ one.place + T[:3, 3], atol=0.2)
    there = (T[:3, :3] @ question.clicks[0] + T[:3, 3])[None]
    found = ask(scene, replace(QUESTION, clicks=there))
    assert found.verdict is Observed.SEEN_THEN_GONE
    np.testing.assert_allclose(found.evidence[-1].place, there[0], atol=0.7)
    assert ask(scene, replace(QUESTION, clicks=question.clicks)).verdict is not Observed.SEEN_THEN_GONE


def test_what_had_gone_is_joined_with_the_rest(make_session: MakeSession, tmp_path: Path) -> None:
    named = replace(CONFIG, map_id="cellar")
    with_a_table_gone(make_session(named)).save(tmp_path / "s")
    later = view(90 * 10**9, look_at(np.array((1.0, 0.0, 1.4)), CUPBOARD.mean(axis=0)), CUPBOARD)
    other = looked(make_session(named), [later])
    other.load(tmp_path / "s", merge=True)
    past = other.memory.past
    assert past.tombstones.gone
    for thing in past.tombstones.gone:
        assert thing.keys.tolist() == other.memory._map.keys_at(thing.xyz).tolist()
    point = np.array([[*TABLE.mean(axis=0)[:2], 0.6]])
    assert ask(other, replace(QUESTION, clicks=point)).verdict is Observed.SEEN_THEN_GONE
    # Where something stands now, nothing has gone.
    again = looked(make_session(named), [view(90 * 10**9, look_at(np.array((-1.5, -0.5, 1.4)), TABLE.mean(axis=0)))])
    again.load(tmp_path / "s", merge=True)
    assert len(again.memory.past.tombstones.gone) < len(past.tombstones.gone)


def test_what_had_appeared_is_joined_with_the_rest(make_session: MakeSession, tmp_path: Path) -> None:
    """It stands there now, unlike what had gone."""
    named, changed = replace(CONFIG, map_id="m"), Question("What has changed?")
    before = make_session(named)
    for run, things in enumerate((THINGS[1:], THINGS)):
        looked(before, [replace(room_frame(i, things), stamp_ns=(10 * run + i + 1) * 10**9) for i in (0, 1, 2)])
    (told,) = ask(before, changed).evidence
    assert told.gone_ns == 0 and told.first_ns == 11 * 10**9
    before.save(tmp_path / "s")
    other = looked(make_session(named), [replace(room_frame(8), stamp_ns=60 * 10**9)])
    other.load(tmp_path / "s", merge=True)
    assert [(one.place, one.first_ns) for one in ask(other, changed).evidence] == [(told.place, told.first_ns)]


def test_what_was_there_and_is_looked_through_now_has_gone_when_scenes_are_joined(
    make_session: MakeSession, tmp_path: Path
) -> None:
    named = replace(CONFIG, map_id="cellar")
    looks = [look_at(np.array(eye), TABLE.mean(axis=0)) for eye in EYES]
    looked(make_session(named), [view((i + 1) * 10**9, T, CUPBOARD, TABLE) for i, T in enumerate(looks)]).save(
        tmp_path / "s"
    )
    other = looked(make_session(named), [view((i + 60) * 10**9, T, CUPBOARD) for i, T in enumerate(looks)])
    assert not other.memory.past.tombstones.gone
    other.load(tmp_path / "s", merge=True)
    gone = other.memory.past.tombstones.gone
    for thing in gone:
        assert thing.last_ns <= 3 * 10**9 and 60 * 10**9 <= thing.gone_ns <= 62 * 10**9
    # As it would be had the views come one after the other.
    expected = with_a_table_gone(make_session(named))
    a, b = other.tokens(), expected.tokens()
    assert a is not None and b is not None and abs(len(a) - len(b)) <= 0.02 * len(b)
    assert len(gone) == len(expected.memory.past.tombstones.gone)
    point = np.array([[*TABLE.mean(axis=0)[:2], 0.6]])
    assert ask(other, replace(QUESTION, clicks=point)).verdict is Observed.SEEN_THEN_GONE


def test_what_was_loaded_does_not_follow_this_run_s_odometry(make_session: MakeSession, tmp_path: Path) -> None:
    """A robot that wakes up and is located anew moves what it has seen since, and not what it remembers."""
    named, T = replace(CONFIG, map_id="m"), turn(0, 3.0)
    with_a_table_gone(make_session(named)).save(tmp_path / "s")
    later = [replace(frame, stamp_ns=frame.stamp_ns + 10**12) for frame in FRAMES[:3]]
    for merge in (False, True):
        scene = make_session(named)
        if merge:
            looked(scene, later[:1])
        scene.load(tmp_path / "s", merge=merge)
        before, gone = dict(scene.poses), scene.memory.past.tombstones.gone[0].place
        looked(scene, later[merge:2])
        scene.observe(later[2])
        assert scene.move(scene.memory.followed(T)) == 3
        for stamp, pose in scene.memory.all_poses().items():
            seen = {frame.stamp_ns: frame.T_world_camera for frame in later}
            np.testing.assert_allclose(pose, T @ seen[stamp] if stamp in seen else before[stamp])
        np.testing.assert_array_equal(scene.memory.past.tombstones.gone[0].place, gone)
        scene.clear()
        assert not scene.memory.settled and not scene.memory.followed(T)
