# SPDX-License-Identifier: Apache-2.0
"""What a session has seen, with the tiny model: where the model sees it from, and which views a question is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.events import FrameTaken, Listeners
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_memory import ViewError
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import orbit
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.patches import patch_points
from adatoken3d_ros.scene.storage import SceneFileError
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.voxels import voxel_pool
from adatoken3d_ros.scene.window import OriginMode
from tests.engine.scenes import THINGS, ask, new_scene, room_frame, working

MakeSession = Callable[..., Scene]
AUTO = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0), origin_mode=OriginMode.AUTO)
QUESTION = Question("What is on the table?", max_new_tokens=6)


@pytest.fixture(scope="module")
def walk() -> list[PosedFrame]:
    """Eight views of a room whose floor is at 1.25 m and whose middle is at (31, -7) m."""
    room = make_room(18)
    renderer, K = Renderer(room), np.array([[138.0, 0, 79.5], [0, 138.0, 59.5], [0, 0, 1]])
    frames = []
    for i in range(8):
        T = orbit(room, 3.0 * i)
        rgb, depth, _ = renderer.render(K, 160, 120, T)
        T = T.copy()
        T[:3, 3] += (31.0, -7.0, 1.25)
        frames.append(PosedFrame(rgb, depth, K, T, (i + 1) * 10**9))
    return frames


def looked(session: Scene, frames: list[PosedFrame]) -> Scene:
    for frame in frames:
        session.observe(frame)
        session.encode_pending()
    assert len(session.poses) == len(frames)
    return session


def embeds(session: Scene, question: Question = QUESTION) -> torch.Tensor:
    return session.spliced(question)[0].embeds


def test_the_model_sees_the_floor_at_zero_and_the_room_around_the_origin(
    make_session: MakeSession, walk: list[PosedFrame]
) -> None:
    session = looked(make_session(AUTO), walk)
    assert np.abs(session.memory.origin - (31.0, -7.0, 1.25)).max() < 1.0
    assert abs(session.memory.origin[2] - 1.25) <= 0.1
    scene = session.tokens()
    assert scene is not None and abs(float(scene.xyz[:, 2].min()) - 1.25) < 0.1, "others see it where it is"
    # The same as with an origin that was put there from the beginning, voxels included: nothing was encoded again.
    origin = tuple(session.memory.origin.tolist())
    there = looked(make_session(replace(AUTO, origin_mode=OriginMode.FIXED, origin=origin)), walk)
    a, b = session.spliced(QUESTION)[1].tokens, there.spliced(QUESTION)[1].tokens
    assert torch.equal(a.count, b.count)
    torch.testing.assert_close(a.features, b.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeds(session), embeds(there), atol=1e-5, rtol=1e-4)
    assert ask(session, QUESTION).text == ask(there, QUESTION).text


def test_every_history_of_origins_ends_at_the_same_tokens(make_session: MakeSession, walk: list[PosedFrame]) -> None:
    session = looked(make_session(replace(AUTO, origin_mode=OriginMode.FIXED)), walk[:3])
    before = embeds(session)
    session.memory._map.move_origin((5, -20, 3))
    session.prepared.forget()
    assert not torch.allclose(embeds(session), before, atol=1e-3), "the model sees it from elsewhere"
    session.memory._map.move_origin((0, 0, 0))
    session.prepared.forget()
    assert torch.equal(embeds(session), before)


def test_position_before_or_after_pooling_is_the_same(make_session: MakeSession, walk: list[PosedFrame]) -> None:
    """The published order, each patch's feature and embedding added and then averaged, by the loop."""
    session = looked(make_session(replace(AUTO, key_frames=KeyFrameConfig(0.0, 0.0, carving=None))), walk[:4])
    model, patches = session.runtime.model, session.memory._patches
    points = [patch_points(frame, patches) for frame in walk[:4]]
    origin = torch.from_numpy(session.memory.origin)
    xyz = torch.stack([torch.from_numpy(p.xyz) for p in points])
    with torch.inference_mode():
        features = torch.stack(
            [model.encode_images([f.rgb])[0] + model.position(x - origin) for f, x in zip(walk[:4], xyz, strict=True)]
        )
        grid = (xyz - session.memory._map.origin).float().flatten(0, 1)
        valid = torch.from_numpy(np.concatenate([p.valid for p in points]))
        mean, _, count, _ = voxel_pool(features.flatten(0, 1), grid, 0.2, valid=valid)
        tokens = session.memory.question_tokens(10_000)
        found = tokens.features + model.position.finish(tokens.position)
    assert torch.equal(tokens.count, count)
    torch.testing.assert_close(found, mean, atol=1e-5, rtol=1e-4)


def test_clicks_follow_the_origin(make_session: MakeSession, walk: list[PosedFrame]) -> None:
    session = looked(make_session(AUTO), walk[:4])
    origin = session.memory.origin
    clicked = Question("What is this?", clicks=np.array([[30.0, -6.5, 2.0]]), max_new_tokens=4)
    row = embeds(session, clicked)
    with torch.inference_mode():
        seen = session.runtime.model.embed_clicks(torch.tensor([[30.0, -6.5, 2.0]]) - torch.from_numpy(origin).float())
    assert bool((row[0] - seen).abs().amax(dim=1).min() < 1e-4)


def test_a_question_is_about_the_views_that_cover_most_and_the_newest(
    make_session: MakeSession, walk: list[PosedFrame]
) -> None:
    session = looked(make_session(replace(AUTO, question_views=3)), walk)
    chosen = session.memory.asked.keys()
    assert len(chosen) == 3 and walk[-1].stamp_ns in chosen
    everything = looked(make_session(AUTO), walk)
    shares = session.memory.asked.n_voxels / everything.memory.asked.n_voxels
    newest = everything.memory._map.subset([f.stamp_ns for f in walk[-3:]]).n_voxels
    assert session.memory.asked.n_voxels >= newest and 0.4 < shares < 1
    answer = ask(session, QUESTION)
    assert answer.spatial_tokens == session.memory.asked.n_voxels and answer.stamp_ns == walk[-1].stamp_ns
    scene = session.tokens()
    assert scene is not None and len(scene) == everything.memory.asked.n_voxels, "the others see all of it"


def test_a_scene_is_taken_up_with_its_origin(make_session: MakeSession, walk: list[PosedFrame], tmp_path: Path) -> None:
    session = looked(make_session(AUTO), walk[:5])
    session.save(tmp_path / "scene")
    other = make_session(AUTO)
    assert other.load(tmp_path / "scene") == 5
    assert np.array_equal(other.memory.origin, session.memory.origin)
    assert torch.equal(embeds(other), embeds(session))
    for one in (session, other):
        one.observe(walk[5])
        one.encode_pending()
    assert torch.equal(embeds(other), embeds(session)), "and goes on from there"
    fixed = make_session(SessionConfig())
    with pytest.raises(SceneFileError, match="origin"):
        fixed.load(tmp_path / "scene")
    session.clear()
    assert session.memory.origin.tolist() == [0, 0, 0] and len(session.memory) == 0


# Beside this origin the room has voxels, and what is at the other end of where a pose may be has none.
FAR_ORIGIN = replace(AUTO, origin=(140_000.0, 0.0, 0.0))


def lost(frame: PosedFrame) -> PosedFrame:
    T = frame.T_world_camera.copy()
    T[0, 3] = -1e5
    return replace(frame, T_world_camera=T)


def test_a_frame_without_a_place_is_given_up_and_the_others_are_encoded(
    make_session: MakeSession, walk: list[PosedFrame]
) -> None:
    session = make_session(FAR_ORIGIN)
    for frame in (walk[0], lost(walk[1]), walk[2]):
        session.observe(frame)
    with pytest.raises(ViewError, match=r"the view at 2.000000 s could not be encoded: .* voxels of 0.2 m away"):
        session.encode_pending()
    assert sorted(session.poses) == [walk[0].stamp_ns, walk[2].stamp_ns] and not session.memory.pending
    assert session.memory.given_up == 1 and "2.000000 s" in session.memory.problem
    assert ask(session, QUESTION).status in (Status.OK, Status.TRUNCATED)


def test_a_first_view_that_fails_leaves_the_origin_where_it_was(
    make_session: MakeSession, walk: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its floor was at 1.25 m; a feature of NaN has no place in the map."""
    session = make_session(AUTO)
    features = session.runtime.model.encode_images
    monkeypatch.setattr(session.runtime.model, "encode_images", lambda rgb, **_: features(rgb) * float("nan"))
    session.observe(walk[0])
    with pytest.raises(ViewError, match="is not finite"):
        session.encode_pending()
    assert session.memory.origin.tolist() == [0.0, 0.0, 0.0] and len(session.memory) == 0
    answer = ask(session, QUESTION)
    assert answer.status == Status.NO_SCENE and "the feature of patch" in answer.status_message
    monkeypatch.setattr(session.runtime.model, "encode_images", features)
    assert abs(looked(session, [walk[1]]).memory.origin[2] - 1.25) < 0.1


@pytest.mark.parametrize("by", ["question", "idle", "save"])
def test_a_poison_frame_costs_itself_alone_and_is_not_tried_again(
    make_session: MakeSession, walk: list[PosedFrame], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    """What fails in the vision tower: once with the others, once by itself, then never, and no question fails by it."""
    session = make_session(AUTO)
    features, tries = session.runtime.model.encode_images, []

    def encode(rgb: Any, **_: Any) -> Any:
        tries.append(len(rgb))
        if any(picture is walk[1].rgb for picture in rgb):
            raise RuntimeError("shapes cannot be multiplied")
        return features(rgb)

    monkeypatch.setattr(session.runtime.model, "encode_images", encode)
    for frame in walk[:3]:
        session.observe(frame)
    if by == "idle":
        session.prepare()
    elif by == "save":
        session.save(tmp_path / "scene")
    answer = ask(session, QUESTION)
    assert answer.status in (Status.OK, Status.TRUNCATED), answer.status_message
    assert sorted(session.poses) == [walk[0].stamp_ns, walk[2].stamp_ns] and not session.memory.pending
    assert tries == ([1, 1, 1] if by == "idle" else [3, 1, 1, 1]) and session.memory.given_up == 1
    assert session.memory.problem.endswith("could not be encoded: RuntimeError: shapes cannot be multiplied")
    assert ask(session, QUESTION).text == answer.text and len(tries) < 5
    session.clear()
    assert session.memory.problem == "" and session.memory.given_up == 1


def test_memory_that_runs_out_is_nobodys_fault(
    make_session: MakeSession, walk: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(AUTO)
    features = session.runtime.model.encode_images

    def encode(rgb: Any, **_: Any) -> Any:
        if any(picture is walk[1].rgb for picture in rgb):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(rgb)

    monkeypatch.setattr(session.runtime.model, "encode_images", encode)
    for frame in walk[:3]:
        session.observe(frame)
    with pytest.raises(torch.OutOfMemoryError):
        session.encode_pending()
    assert len(session.memory.pending) == 3 and session.memory.given_up == 0
    monkeypatch.setattr(session.runtime.model, "encode_images", features)
    assert session.encode_pending() == 3


def test_a_frame_is_not_blamed_for_another_that_waited(
    make_session: MakeSession, walk: list[PosedFrame], caplog: pytest.LogCaptureFixture
) -> None:
    bad, session, fates = lost(walk[1]), make_session(FAR_ORIGIN), SimpleQueue[str]()
    events = Listeners().add(FrameTaken, lambda told: fates.put(told.fate))
    worker, queue = working(session, events=events, ahead=0.0)
    worker.start()
    seen = []
    try:
        # What waits already, and the frame that comes.
        for waits, frame in (
            (bad, walk[0]),
            (None, replace(bad, stamp_ns=77)),
            (replace(bad, stamp_ns=78), walk[0]),
        ):
            if waits is not None:
                queue.call(lambda session, waits=waits: session.observe(waits)).result(20.0)
            queue.submit_frame(lambda frame=frame: frame)
            seen.append(fates.get(timeout=20.0).partition(":")[0])
    finally:
        assert worker.stop(20.0)
    assert seen == ["key_frame", "error", "duplicate_stamp"]
    assert caplog.text.count("a view that waited could not be used") == 2 and list(session.poses) == [walk[0].stamp_ns]


def test_views_are_bounded_by_age_and_distance(make_session: MakeSession, wall_frame: Any) -> None:
    config = SessionConfig(key_frames=KeyFrameConfig(far=1.2, max_age=0.25))
    session = make_session(config)
    for i in range(6):  # half a metre and a tenth of a second apart
        session.observe(wall_frame(i))
        session.encode_pending()
    assert sorted(session.poses) == [wall_frame(i).stamp_ns for i in (3, 4, 5)]


def test_a_scene_that_is_kept_when_time_jumps_back_goes_on_being_renewed(
    make_session: MakeSession, wall_frame: Any, tmp_path: Path
) -> None:
    def at(second: int, place: int) -> PosedFrame:
        return replace(wall_frame(place), stamp_ns=second * 10**9)

    config = SessionConfig(key_frames=KeyFrameConfig(max_views=2), question_views=1)
    session = looked(make_session(config), [at(100, 0), at(101, 6)])
    session.save(tmp_path / "scene")
    loaded = make_session(config)
    loaded.load(tmp_path / "scene")
    for one in (session, loaded):
        for second, place in ((3, 12), (5, 18), (7, 24)):
            one.observe(at(second, place))
            one.encode_pending()
            assert one.stamp_ns == second * 10**9 == ask(one, QUESTION).stamp_ns
            assert one.memory.asked.keys() == (one.stamp_ns,)
        assert sorted(one.poses) == [5 * 10**9, 7 * 10**9]


def test_what_has_gone_is_forgotten_across_a_jump_in_time(make_session: MakeSession, wall_frame: Any) -> None:
    session = looked(make_session(), [replace(wall_frame(0), stamp_ns=100 * 10**9)])
    looked_again = replace(wall_frame(0, depth=4.0), stamp_ns=10**9)
    session.observe(looked_again)
    session.encode_pending()
    scene = session.tokens()
    assert scene is not None
    in_sight = (scene.xyz[:, 0].abs() < 0.5) & ((scene.xyz[:, 2] - 1).abs() < 0.4)
    assert bool((scene.xyz[in_sight, 1] > 3.9).all())


def test_views_that_are_encoded_late_do_not_bring_back_what_has_gone(
    make_session: MakeSession, wall_frame: Any
) -> None:
    """A wall at 2 m is seen, is gone, and stands at 3 m; some of the first one nobody has looked through."""
    seen = enumerate([(0, 2.0), (1, 2.0), (0, 4.0), (1, 3.0), (2, 3.0)], start=1)
    frames = [replace(wall_frame(place, depth=depth), stamp_ns=second * 10**9) for second, (place, depth) in seen]
    config = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0))
    expected = looked(make_session(config), frames).tokens()
    assert expected is not None and 0 < int((expected.xyz[:, 1] < 2.1).sum()) < 100
    for limits in ((None,), (1, None), (1, 1, 1, None), (2, 1, None)):
        session = make_session(config)
        for frame in frames:
            session.observe(frame)
        for limit in limits:
            session.encode_pending(limit)
        scene = session.tokens()
        assert scene is not None and len(session.poses) == len(frames)
        assert torch.equal(scene.voxel, expected.voxel) and torch.equal(scene.count, expected.count)
        torch.testing.assert_close(scene.features, expected.features)
        assert not session.memory._later, "no frame is kept for one that waits no more"


@pytest.mark.parametrize("reuse", Reuse)
def test_what_a_frame_that_is_no_view_took_out_is_in_no_answer(make_session: MakeSession, reuse: Reuse) -> None:
    """Blocks, prefix and stem of the scene before are not those of the scene that is left."""
    config = SessionConfig(budget=BudgetConfig(reuse=reuse), key_frames=KeyFrameConfig(min_change=1000))
    session = make_session(config)
    for index in (0, 1, 2):
        session.observe(room_frame(index))
    session.prepare()
    ask(session, QUESTION)
    views, voxels = len(session.poses), session.memory.asked.n_tokens
    for second in (10, 12):  # what was measured once goes when two frames look past it
        session.observe(replace(room_frame(0, THINGS[:1]), stamp_ns=second * 10**9))
    assert len(session.poses) == views and session.memory.asked.n_tokens < voxels and session.work_ahead
    held, blocks, origin, shift = session.memory.views()
    anew = new_scene(session.runtime.model, session.runtime.tokenizer, config)
    things = session.memory.past.tombstones.gone
    anew.memory.put(
        held, session.poses, origin=origin.tolist(), shift=torch.from_numpy(shift), blocks=blocks, things=things
    )
    for _ in range(2):
        session.prepare()
        anew.prepare()
        ours, expected = ask(session, QUESTION), ask(anew, QUESTION)
        assert ours.text == expected.text and ours.spatial_tokens == expected.spatial_tokens < voxels
        assert ours.report is not None and expected.report is not None
        assert np.array_equal(ours.report.xyz, expected.report.xyz)
        np.testing.assert_allclose(ours.report.contribution, expected.report.contribution, rtol=1e-5)


def test_frames_that_are_kept_for_older_ones_that_wait_are_bounded(make_session: MakeSession, wall_frame: Any) -> None:
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(max_views=3)))
    for i in range(9):
        session.observe(wall_frame(i))
        if i:
            session.encode_pending(1)
        assert len(session.memory._later) <= 3


@pytest.mark.parametrize("limits", [{"max_views": 2}, {"max_voxels": 100}, {"max_views": 3, "max_age": 1.5}])
def test_of_a_loaded_scene_as_much_is_kept_as_may_be(
    make_session: MakeSession,
    walk: list[PosedFrame],
    tmp_path: Path,
    limits: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked(make_session(AUTO), walk).save(tmp_path / "scene")
    # Neither taking up a view nor letting one go may cost a look at all of them: a thousand would take twenty seconds.
    for name in ("remove_view", "exclusive", "_insert", "_rebuild"):
        monkeypatch.delattr(TokenMap, name)
    small = make_session(replace(AUTO, key_frames=KeyFrameConfig(0.0, 0.0, **limits)))
    views, scene = small.load(tmp_path / "scene"), small.tokens()
    assert scene is not None and views == len(small.poses) == len(small.memory) <= limits.get("max_views", 20)
    assert walk[-1].stamp_ns in small.poses and (len(scene) <= limits.get("max_voxels", 20_000) or views == 1)
