# SPDX-License-Identifier: Apache-2.0
"""What answers say of themselves, with the tiny model, in a room from which a box goes and comes up elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine import answering
from adatoken3d_ros.engine.answer import Box, Question, Status
from adatoken3d_ros.engine.autosave import state_of
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.events import Listeners, SceneView
from adatoken3d_ros.engine.knowing import SHOWN, Recalled, floor_map, seen_floor, what_is_known
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.stages import STAGES
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.scene.evidence import Observed
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.occupancy import VOXEL
from adatoken3d_ros.settings import Settings
from tests.engine.scenes import THINGS, ask, room_frame

MakeSession = Callable[..., Scene]
LIMIT = 30.0  # seconds until a test that hangs fails
EVERY = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0))
THERE = np.array([[0.05, 1.2, 0.6]])  # on the box that goes
BEHIND = np.array([[0.05, 2.6, 0.5]])  # behind the wall
GONE_NS = 10**10
STEP = np.array([[1, 0, 0, 0.001], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # 1 mm along x


def changing(session: Scene, boxes: tuple = (THINGS[1],)) -> Scene:
    """The room with both boxes from three places, then ten seconds later with `boxes`."""
    for index in (0, 1, 2):
        session.observe(room_frame(index))
    session.encode_pending()
    for index in (0, 1, 2):
        session.observe(replace(room_frame(index, boxes), stamp_ns=GONE_NS + index))
        session.encode_pending()
    return session


def test_a_thing_that_is_there_one_that_went_and_a_place_that_was_never_seen(make_session: MakeSession) -> None:
    session = make_session(EVERY)
    for index in (0, 1, 2):
        session.observe(room_frame(index))
    answer = ask(session, Question("What?", THERE, max_new_tokens=2))
    assert (answer.verdict, answer.as_of_ns) == (Observed.SEEN, 300_000_000)
    first = answer.evidence[0]
    assert (first.first_ns, first.last_ns, first.gone_ns) == (100_000_000, 300_000_000, 0) and first.views == 3
    assert np.abs(np.array(first.place) - THERE[0]).max() < 0.3 and 0.0 < answer.coverage <= 1.0
    hidden = ask(session, Question("What?", BEHIND, max_new_tokens=2))
    assert hidden.verdict is Observed.NOT_OBSERVED and hidden.coverage < 0.3
    assert hidden.goal is None and hidden.goal_reason == "what was asked about was never seen"
    assert hidden.status is Status.TRUNCATED
    session.runtime.eos_ids = frozenset(range(1_000_000))  # a random model never ends by itself
    for place, status, message in (
        (BEHIND, Status.UNSURE, "nobody has looked at the place"),
        (THERE, Status.OK, ""),
    ):
        ended = ask(session, Question("What?", place))
        assert (ended.status, ended.status_message) == (status, message)
    session.runtime.eos_ids = frozenset()
    changing(session)
    answer = ask(session, Question("What?", THERE, max_new_tokens=2))
    assert answer.verdict is Observed.SEEN_THEN_GONE, answer.verdict_reason
    gone = answer.evidence[-1]
    assert gone.last_ns == 300_000_000 and GONE_NS <= gone.gone_ns <= GONE_NS + 2
    assert np.abs(np.array(gone.place) - THERE[0]).max() < 0.4 and answer.verdict_reason.startswith("it was at (")


def test_what_is_in_words_is_compared_with_what_has_gone(make_session: MakeSession) -> None:
    """The prompt with what has gone is read by the same model: here it is random, and only the sums are looked at."""
    session = changing(make_session(EVERY))
    past = session.memory.past
    block = session.prepared.block(None)
    found = past.with_the_gone(block.tokens, session.memory.asked, 10_000, session.runtime.model.lift_places)
    assert found is not None
    tokens, owner = found
    assert (owner >= 0).sum() == sum(len(thing.keys) for thing in past.tombstones.gone) > 0
    assert len(tokens) == len(block.tokens) + (owner >= 0).sum()
    voxel = tokens.voxel.numpy()
    assert (np.lexsort(voxel.T[::-1]) == np.arange(len(voxel))).all()  # in the order of voxels
    there = tokens.xyz.numpy()[owner >= 0]
    assert np.abs(there - THERE[0]).max() < 0.7
    answer = ask(session, Question("What is there?", max_new_tokens=2))
    assert answer.verdict in (Observed.SEEN, Observed.SEEN_THEN_GONE, Observed.NOT_OBSERVED)
    assert answer.evidence and 0 < sum(item.contribution for item in answer.evidence) <= 1.0 + 1e-6


def test_evidence_begins_with_what_was_asked_about_and_ends_with_what_has_gone(make_session: MakeSession) -> None:
    """Then come the boxes that the answer names, as it names them, and where it drew from, most contribution first."""
    session = changing(make_session(EVERY))
    answer = ask(session, Question("What?", THERE, max_new_tokens=2))
    named = (Box((-0.65, 1.3, 0.2), (0.4, 0.4, 0.4)), Box((0.5, 2.0, 1.5), (0.3, 0.3, 0.3)))
    clicks = np.concatenate([[[0.6, 2.0, 1.2], [-0.65, 1.2, 0.3]], THERE])  # of the last one nothing is there
    known = what_is_known(session.memory, session.config, replace(answer, boxes=named), clicks, None)
    *there, gone = known["evidence"]
    places = np.array([one.place for one in there])
    assert (np.abs(places[:2] - clicks[:2]) <= 0.25).all() and gone.gone_ns and not any(one.gone_ns for one in there)
    np.testing.assert_allclose(places[2:4], [box.centre for box in named])
    drawn = what_is_known(session.memory, session.config, replace(answer, boxes=named[:1]), clicks[:0], None)
    shares = [one.contribution for one in drawn["evidence"][1:] if not one.gone_ns]
    assert drawn["evidence"][0].place == named[0].centre and len(shares) > 1
    assert shares == sorted(shares, reverse=True) and shares[0] > drawn["evidence"][0].contribution


@pytest.mark.parametrize(
    ("given", "strategy", "second", "readings"),
    [
        ({}, "ours", "", 2),
        ({"clicks": THERE}, "ours", "", 1),  # a place is judged without the model
        ({}, "none", "", 1),  # nothing is measured
        ({"latency_budget_ms": 9e3}, "ours", "", 2),
        ({"latency_budget_ms": 2.5e3}, "ours", "", 1),  # not time for a second one
        ({"latency_budget_ms": 9e3}, "ours", "slow", 1),  # given up before its first layer
        ({}, "ours", "out of memory", 1),
    ],
)
def test_what_has_gone_costs_another_prefill_only_where_it_tells_and_there_is_time(
    make_session: MakeSession,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    strategy: str,
    second: str,
    readings: int,
) -> None:
    now, calls, read = [0.0], [], []

    def reading(*args: Any, **options: Any) -> Any:
        calls.append(len(args))
        if len(calls) == 2 and second == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        now[0] += 60.0 if len(calls) == 2 and second else 1.0
        read.append(prefill(*args, **options))
        return read[-1]

    session = changing(make_session(EVERY, clock=lambda: now[0]))
    session.set_strategy(default_strategy(strategy, session.runtime.n_layers))
    monkeypatch.setattr(answering, "prefill", reading)
    answer = ask(session, Question("What is there?", max_new_tokens=2, **given), arrived=0.0)
    assert answer.status is Status.TRUNCATED and answer.verdict_reason, answer.status_message
    assert len(read) == readings and len(calls) == readings + bool(second)
    assert answer.times.total == pytest.approx(sum(getattr(answer.times, stage) for stage in STAGES))


@pytest.mark.parametrize(("within", "moved"), [(300.0, True), (0.0, False)])
def test_what_comes_up_elsewhere_is_what_went(make_session: MakeSession, within: float, moved: bool) -> None:
    """The pictures are noise, so it is only asked whether there is a link where looks do not count."""
    session = changing(
        make_session(replace(EVERY, moved_within=within)), (THINGS[1], ((0.95, 1.35, 0.5), (0.5, 0.3, 1.0)))
    )
    past = session.memory.past
    assert past.tombstones.gone and past.tombstones.appeared
    went = past.tombstones.gone[0]
    alike = [
        replace(thing, features=went.features[:1].expand(len(thing.keys), -1)) for thing in past.tombstones.appeared
    ]
    past.tombstones.gone = [replace(went, features=went.features[:1].expand(len(went.keys), -1))]
    past.tombstones.appeared = alike
    past.tombstones.link(went.features[0] * 0)
    assert (past.tombstones.gone[0].moved_to is not None) is moved


def test_what_moved_and_has_gone_from_there_too_is_not_there(make_session: MakeSession) -> None:
    """All that a question in words rests on is what went first; whether it is where it moved to is the map's to say."""
    elsewhere = ((0.95, 1.35, 0.5), (0.5, 0.3, 1.0))
    session = changing(make_session(EVERY), (THINGS[1], elsewhere))
    answer, tombstones = ask(session, Question("What is there?", max_new_tokens=2)), session.memory.past.tombstones
    went = next(t for t in tombstones.gone if np.abs(t.place - THINGS[0][0]).max() < 0.4)
    x, y, z = next(t.place for t in tombstones.appeared if np.abs(t.place - elsewhere[0]).max() < 0.4)
    recalled = Recalled(went.xyz.numpy(), np.ones(len(went.xyz), np.float32), np.zeros(len(went.xyz), np.int64))

    def known() -> dict[str, Any]:
        tombstones.gone = [replace(went, moved_to=(x, y, z), confidence=0.9), *tombstones.gone[1:]]
        return what_is_known(session.memory, session.config, answer, np.zeros((0, 3)), recalled)

    assert known()["verdict"] is Observed.SEEN
    for index in (0, 1, 2):
        session.observe(replace(room_frame(index, THINGS[1:]), stamp_ns=2 * GONE_NS + index))
        session.encode_pending()
    found = known()
    assert found["verdict"] is Observed.SEEN_THEN_GONE, found["verdict_reason"]
    gone = found["evidence"][-1]
    assert np.abs(np.array(gone.place) - elsewhere[0]).max() < 0.4 and gone.gone_ns >= 2 * GONE_NS


def test_what_a_frame_that_is_no_view_shows_has_appeared_too(make_session: MakeSession) -> None:
    """It looks like nothing in particular, for such a frame is not encoded."""
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(min_change=1000)))
    for index in (0, 1, 2):
        session.observe(room_frame(index, THINGS[1:]))
    session.encode_pending()
    views, past = set(session.poses), session.memory.past
    session.observe(replace(room_frame(0, THINGS[1:]), stamp_ns=GONE_NS))
    assert past.tombstones.appeared == []
    session.observe(replace(room_frame(0), stamp_ns=2 * GONE_NS))
    (thing,) = past.tombstones.appeared
    assert set(session.poses) == views and thing.first_ns == 2 * GONE_NS
    assert np.abs(thing.place - THINGS[0][0]).max() < 0.4
    torch.testing.assert_close(thing.look(), mean_look(session))


@pytest.mark.parametrize("boxes", [THINGS[:1], ()])
def test_what_frames_that_are_no_views_find_is_new_to_be_saved(make_session: MakeSession, boxes: tuple) -> None:
    """What has come up, and what has gone: or a restart would bring back what has gone."""
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(min_change=1000)))
    for index in (0, 1, 2):
        session.observe(room_frame(index, boxes))
    session.encode_pending()
    views, saved = set(session.poses), state_of(session).what
    session.observe(replace(room_frame(0, boxes), stamp_ns=GONE_NS))
    assert state_of(session).what == saved
    session.observe(replace(room_frame(0, () if boxes else THINGS), stamp_ns=2 * GONE_NS))
    assert set(session.poses) == views and state_of(session).what != saved


def test_what_a_frame_that_is_no_view_takes_out_is_shown(tiny_directory: Path) -> None:
    """Nobody asks, and the camera stands still."""
    shown: list[SceneView] = []
    owner = EngineOwner(Listeners().add(SceneView, shown.append))
    given = {"scene.min_change": 1000, "scene.min_gain": 0.0, "scene.min_sharpness": 0.0, "budget.warm_up": False}
    try:
        owner.start(Settings({"model.path": str(tiny_directory), **given})).result(LIMIT)
        assert owner.queue is not None
        for seconds, boxes in ((1, THINGS), (10, THINGS), (20, ()), (30, ())):
            owner.take_frame(lambda t=seconds, b=boxes: replace(room_frame(0, b), stamp_ns=t * 10**9))  # type: ignore[misc]
            owner.queue.call(lambda scene: scene.encode_pending()).result(LIMIT)
            owner.queue.call(lambda scene: None, chore=True).result(LIMIT)  # after what is shown
    finally:
        owner.drop()
    views = [view for view in shown if view.poses]
    assert not views[0].gone and views[1].gone and len(views) <= 3


def test_what_came_up_long_ago_does_not_come_up_again(make_session: MakeSession) -> None:
    """It stands there, and frames show it: that is one thing, since then, however often it is seen."""
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(min_change=1000), moved_within=30.0))
    for index in (0, 1, 2):
        session.observe(room_frame(index, THINGS[1:]))
    session.encode_pending()
    session.observe(replace(room_frame(0, THINGS[1:]), stamp_ns=GONE_NS))
    for n in range(2, 12):
        session.observe(replace(room_frame(0), stamp_ns=n * GONE_NS))
    (thing,) = session.memory.past.tombstones.appeared
    assert (thing.first_ns, thing.last_ns) == (2 * GONE_NS, 11 * GONE_NS)
    answer = ask(session, Question("What changed in the last 20 seconds?"))
    assert answer.text == "Nothing that I have looked at has changed in the last 20 seconds."
    answer = ask(session, Question("What changed in the last 2 minutes?"))
    assert len(answer.evidence) == 1 and answer.evidence[0].first_ns == 2 * GONE_NS


def test_where_nothing_is_left_of_the_scene_what_comes_up_can_be_saved_all_the_same(
    make_session: MakeSession, tmp_path: Path
) -> None:
    """What has appeared looks like the mean of what is there, and nothing is."""
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(min_change=1000)))
    session.observe(room_frame(0, THINGS[1:]))
    session.encode_pending()
    memory = session.memory
    memory._map.carve(memory._map.occupied_keys, before=1 << 60)
    for seconds, boxes in ((10, THINGS[1:]), (20, THINGS)):
        frame = replace(room_frame(0, boxes), stamp_ns=seconds * 10**9)
        assert memory.past.look(frame, key_frame=False)
        memory.past.came(frame)
    assert memory.past.tombstones.appeared
    session.save(tmp_path / "empty.scene")
    assert session.load(tmp_path / "empty.scene") == 1 and memory.past.tombstones.appeared


def mean_look(session: Scene) -> torch.Tensor:
    views = session.memory.views()[0].values()
    total = torch.stack([view.features.sum(dim=0) for view in views]).sum(dim=0)
    return total / sum(int(view.count.sum()) for view in views)


def test_the_floor_is_told_apart(make_session: MakeSession) -> None:
    session = make_session(EVERY)
    assert np.isnan(seen_floor(session.memory.past.occupancy, None))
    session.observe(room_frame(0))
    occupancy = session.memory.past.occupancy
    free, unseen = floor_map(occupancy, 0.0, np.zeros(3))
    low, high = occupancy.extent() or (np.zeros(3), np.zeros(3))
    cells = float(np.round((high - low)[:2] / VOXEL).prod())
    assert len(free) and len(unseen) and seen_floor(occupancy, 0.0) == pytest.approx(1 - len(unseen) / cells)
    far = floor_map(occupancy, 0.0, np.array([high[0] + SHOWN - 0.1, 1.0, 1.0]))
    assert 0 < len(far[0]) + len(far[1]) < len(free)  # a strip of what is there


def test_what_was_seen_is_forgotten_and_moves_with_its_views(make_session: MakeSession) -> None:
    config = replace(EVERY, key_frames=KeyFrameConfig(0.0, 0.0, max_disagreement=0.5))
    session = changing(make_session(config))
    past = session.memory.past
    before = past.occupancy.extent()
    assert past.tombstones.gone and before is not None
    shift = np.eye(4)
    shift[0, 3] = 4.0
    session.memory.move({stamp: shift @ pose for stamp, pose in session.poses.items()})
    after = past.occupancy.extent()
    assert after is not None and after[0][0] == pytest.approx(before[0][0] + 4.0, abs=0.21)
    session.clear()
    assert past.occupancy.extent() is None and not past.tombstones.gone


@pytest.mark.parametrize("checked", [0.0, 0.5])
def test_where_it_has_looked_is_known_from_a_file_and_after_a_correction(
    make_session: MakeSession, tmp_path: Path, checked: float
) -> None:
    """Whether poses are checked or not."""
    session = make_session(replace(EVERY, key_frames=KeyFrameConfig(0.0, 0.0, max_disagreement=checked)))
    for index in (0, 1, 2):
        session.observe(room_frame(index))
    session.save(tmp_path / "room.scene")
    for change in (
        lambda: session.load(tmp_path / "room.scene"),
        lambda: session.move({stamp: STEP @ pose for stamp, pose in session.poses.items()}),
    ):
        change()
        answer = ask(session, Question("What?", THERE, max_new_tokens=2))
        assert answer.verdict is Observed.SEEN, answer.verdict_reason
        assert answer.coverage > 0.5 and not np.isnan(seen_floor(session.memory.past.occupancy, 0.0))


@pytest.mark.parametrize(("limit_mb", "checked"), [(0.4, 0.0), (0.6, 0.0), (1.0, 1.0)])
def test_a_scene_stays_within_its_memory(make_session: MakeSession, limit_mb: float, checked: float) -> None:
    """What poses are checked by counts, too."""
    every = replace(EVERY, key_frames=KeyFrameConfig(0.0, 0.0, max_disagreement=checked))
    unbounded, bounded = make_session(every), make_session(replace(every, memory_limit_mb=limit_mb))
    for index in range(40):
        frame = replace(room_frame(index % 9), stamp_ns=index + 1)
        for session in (unbounded, bounded):
            session.observe(frame)
            session.encode_pending()
        sketches = sum(sketch.near.nbytes for sketch in bounded.memory._selector.sketches().values())
        assert bounded.nbytes <= limit_mb * 1e6 and sketches
        assert bounded.memory._map.nbytes + bounded.memory.past.nbytes + sketches <= limit_mb * 1e6
    assert unbounded.nbytes > limit_mb * 1e6 > bounded.nbytes and len(bounded.poses) < len(unbounded.poses)
    answer = ask(bounded, Question("What is there?", max_new_tokens=2))
    assert answer.status in (Status.OK, Status.TRUNCATED) and bounded.nbytes <= limit_mb * 1e6
