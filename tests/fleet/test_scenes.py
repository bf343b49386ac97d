# SPDX-License-Identifier: Apache-2.0
"""Scenes that are made of bodies: the same answers as where they were seen, for every architecture, and bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.fleet.bodies import BodyError, Whose, body_of, jpeg, packed, packed_things, picture_of
from adatoken3d_ros.fleet.scenes import Held, HeldScene, NoRoom, Scenes, Shelf
from adatoken3d_ros.fleet.wire import Manifest, ViewEntry
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.settings import DEFAULTS, OF_CHOSEN_FRAMES
from tests.architectures import NAMES
from tests.engine.scenes import room_frame


def sent(scene: Any, whose: Whose, shelf: Shelf) -> Manifest:
    """The manifest of a scene, with its views' features on the shelf."""
    views, blocks, origin, shift = scene.memory.views()
    entries = []
    for stamp, view in views.items():
        name = shelf.put(packed(body_of(view, blocks.get(stamp)), whose))
        entries.append(ViewEntry(stamp, name, tuple(scene.poses[stamp].reshape(-1).tolist())))
    return Manifest(tuple(entries), tuple(origin.tolist()), tuple(shift.tolist()))


@pytest.fixture(scope="module", params=NAMES)
def engine(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> Engine:
    model, tokenizer, _ = registry.load(tiny_of(request.param))
    return Engine(model, tokenizer)


def smooth(frame: PosedFrame) -> PosedFrame:
    """With a picture that a JPEG keeps."""
    v, u = np.mgrid[:120, :160]
    rgb = np.stack([u, v, (u + v) // 2], axis=-1).astype(np.uint8)
    return PosedFrame(picture_of(jpeg(rgb)), frame.depth, frame.K, frame.T_world_camera, frame.stamp_ns)


def both(engine: Engine, whose: Whose, views: int) -> tuple[Scene, Shelf, HeldScene]:
    """A robot's scene of so many views, and an empty one on a replica, with its shelf."""
    own = engine.open()
    for index in range(views):
        own.observe(room_frame(index))
    own.encode_pending()
    shelf = Shelf(whose, 1e8)
    return own, shelf, HeldScene(engine, OF_CHOSEN_FRAMES, shelf)


def test_a_scene_of_bodies_is_answered_as_the_robots_own(engine: Engine) -> None:
    """In 16 bits: the same places, and about the same numbers; carved rows are left out and views may go."""
    whose = Whose(engine.model.identity, engine.model.sizes)
    own, shelf, there = both(engine, whose, 3)
    manifest = sent(own, whose, shelf)
    assert shelf.want(manifest) == []
    there.become(manifest)
    question = Question("What is there?", max_new_tokens=4)
    ours, theirs = engine.ask(own, question), engine.ask(there, question)
    assert ours.status == theirs.status and ours.report is not None and theirs.report is not None
    assert ours.spatial_tokens == theirs.spatial_tokens and ours.retained_tokens == theirs.retained_tokens
    assert np.array_equal(ours.report.xyz, theirs.report.xyz) and np.array_equal(ours.report.rgb, theirs.report.rgb)
    a, b = own.tokens(), there.tokens()
    assert a is not None and b is not None
    assert torch.allclose(a.features, b.features, rtol=2e-3, atol=2e-3 * float(a.features.abs().max()))
    assert np.array_equal(own.memory.origin, there.memory.origin) and own.memory.floor == there.memory.floor
    # A view that went, and rows of another that did.
    views = manifest.views
    fewer = Manifest((ViewEntry(views[0].stamp, views[0].body, views[0].pose, (0, 2)), views[2]), manifest.origin)
    there.become(fewer)
    own.memory._map.remove_view(views[1].stamp)
    own.memory._map.restore({
        key: view.rows(torch.arange(len(view.keys)).ne(0) & torch.arange(len(view.keys)).ne(2)) if not place else view
        for place, (key, view) in enumerate(sorted(own.memory._map.contributions().items()))
    })  # fmt: skip
    a, b = own.tokens(), there.tokens()
    assert a is not None and b is not None and torch.equal(a.xyz, b.xyz) and torch.equal(a.count, b.count)


def test_a_picture_is_encoded_to_what_its_robot_would_have_made_of_it(engine: Engine) -> None:
    """To the bit, as the picture that both see is the same."""
    whose = Whose(engine.model.identity, engine.model.sizes)
    frame = smooth(room_frame())
    own = engine.open()
    own.observe(frame)
    own.encode_pending()
    blind = engine.open()  # knows of each patch its number alone
    blind.observe(frame)
    model = blind.memory._model
    blind.memory._model = SimpleNamespace(
        **{name: getattr(model, name) for name in ("sizes", "place_tokens", "grid", "identity")},
        encode_views=lambda rgb, should_stop=None: [
            torch.arange(len(one)).float()[:, None] for one in model.encode_views(rgb)
        ],
    )  # type: ignore[assignment]
    blind.encode_pending()
    views, blocks, origin, shift = blind.memory.views()
    ((stamp, view),) = views.items()
    data = packed(body_of(view, blocks.get(stamp), jpeg(frame.rgb)), whose)
    shelf = Shelf(whose, 1e8)
    there = HeldScene(engine, OF_CHOSEN_FRAMES, shelf)
    pose = tuple(frame.T_world_camera.reshape(-1).tolist())
    there.become(Manifest((ViewEntry(stamp, shelf.put(data), pose),), tuple(origin.tolist()), tuple(shift.tolist())))
    again = engine.open()
    again.observe(PosedFrame(picture_of(jpeg(frame.rgb)), frame.depth, frame.K, frame.T_world_camera, frame.stamp_ns))
    again.encode_pending()
    a, b = again.tokens(), there.tokens()
    assert a is not None and b is not None
    for name in ("features", "xyz", "rgb", "count", "position"):
        if name != "rgb":  # of the robot's own picture
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_views_are_made_one_by_one_and_kept_for_a_question_that_waits(engine: Engine) -> None:
    whose = Whose(engine.model.identity, engine.model.sizes)
    own, shelf, there = both(engine, whose, 3)
    whole = sent(own, whose, shelf)
    other = Manifest(whole.views[:2], (9.0, 0.0, 0.0), whole.shift)  # as when it was begun elsewhere
    assert [shelf.want(one) for one in (whole, other)] == [[], []]
    assert [there.make(whole, 1) for _ in range(4)] == [2, 1, 0, 0] and there.manifest == Manifest()
    assert [there.make(other, 1), len(there.unmade(other)), there.make(other)] == [1, 1, 0]
    there.become(other)
    assert not there.unmade(whole) and there.nbytes > 0
    there.become(whole)
    assert not there.unmade(other) and len(there.memory) == 3
    last = Manifest(whole.views[1:], whole.origin, whole.shift)
    assert shelf.want(last) == []
    there.become(last)
    assert [len(there.unmade(one)) for one in (other, whole)] == [0, 1]  # which nobody wants any more


def test_views_of_scenes_that_were_never_whole_go_too(engine: Engine) -> None:
    """As of a robot whose poses are mended again and again before a question has time for all of them."""
    whose = Whose(engine.model.identity, engine.model.sizes)
    own, shelf, there = both(engine, whose, 3)
    whole = sent(own, whose, shelf)
    scenes = [Manifest(whole.views, (float(metres), 0.0, 0.0), whole.shift) for metres in range(4)]
    assert [(shelf.want(one), there.make(one, 2)) for one in scenes] == [([], 1)] * 4
    assert [len(there.unmade(one)) for one in scenes] == [3, 3, 1, 1]


def test_a_scene_catches_up_a_view_at_a_time(engine: Engine) -> None:
    whose = Whose(engine.model.identity, engine.model.sizes)
    own, shelf, there = both(engine, whose, 2)
    queue: Any = None
    held = Held("a", "r1", {}, shelf, queue, told=sent(own, whose, shelf))
    assert held.catch_up(there) and len(there.unmade(held.told)) == 1 and held.made == there.nbytes
    assert not held.catch_up(there) and there.manifest == held.told and held.made == there.nbytes


def test_a_body_of_something_else_is_refused_and_the_scene_stays(engine: Engine) -> None:
    whose = Whose(engine.model.identity, engine.model.sizes)
    shelf = Shelf(whose, 1e8)
    there = HeldScene(engine, OF_CHOSEN_FRAMES, shelf)
    name = "0" * 32
    pose = tuple(np.eye(4).reshape(-1).tolist())
    with pytest.raises(BodyError, match="not here any more"):
        there.become(Manifest((ViewEntry(1, name, pose),)))
    assert there.manifest == Manifest() and not len(there.memory)
    with pytest.raises(BodyError, match="a scene of more than 1e-06 MB"):
        Shelf(whose, 1.0).put(packed_view(engine, whose))
    other = Whose("other", engine.model.sizes)
    with pytest.raises(BodyError, match="here it is 'other'"):
        Shelf(other, 1e8).put(packed_view(engine, whose))


def packed_view(engine: Engine, whose: Whose) -> bytes:
    scene = engine.open()
    scene.observe(room_frame())
    scene.encode_pending()
    views, blocks, _, _ = scene.memory.views()
    ((stamp, view),) = views.items()
    return packed(body_of(view, blocks.get(stamp)), whose)


def test_what_has_gone_counts_as_much_as_it_takes_and_once(engine: Engine) -> None:
    """Its features come in 16 bits and are held in 32."""
    whose = Whose(engine.model.identity, engine.model.sizes)
    place, voxels = np.zeros(3), torch.arange(8)
    features, xyz = torch.ones(8, whose.sizes.feature_width), torch.zeros(8, 3)
    thing = Thing(place, place + 1, voxels, features, xyz, xyz.to(torch.uint8), voxels + 1, 1, 2, 3, gone_ns=4)
    shelf = Shelf(whose, 1e8)
    there = HeldScene(engine, OF_CHOSEN_FRAMES, shelf)
    name = shelf.put(packed_things([thing] * 50, whose))
    assert shelf.nbytes == 50 * thing.nbytes
    empty = there.nbytes
    there.become(Manifest(things=name))
    assert len(there.memory.past.tombstones.gone) == 50 and there.nbytes == empty


class Opened:
    """A worker that makes nothing."""

    def __init__(self) -> None:
        self.closed: list[Any] = []

    def open(self, make: Any, **options: Any) -> object:
        return object()

    def close(self, queue: Any) -> None:
        self.closed.append(queue)


def test_the_least_recently_used_scene_goes_but_none_that_is_asked_about() -> None:
    worker, gone = Opened(), []
    whose: Any = SimpleNamespace()
    scenes = Scenes(worker, whose, DEFAULTS, most=2, most_bytes=100.0, gone=lambda held: gone.append(held.name))  # type: ignore[arg-type]
    a = scenes.of("a", "r1", {})
    scenes.of("b", "r2", {})
    scenes.of("a", "r1", {})
    scenes.of("c", "r3", {})
    assert gone == ["b"] and len(worker.closed) == 1
    with pytest.raises(ValueError, match="another robot's"):
        scenes.of("a", "r9", {})
    a.questions = 1
    scenes.of("d", "r4", {}).questions = 1
    assert gone == ["b", "c"]
    with pytest.raises(NoRoom, match="2 scenes are being asked about"):
        scenes.of("e", "r5", {})
    a.questions, a.made = 0, 90
    d = scenes.of("d", "r4", {})
    d.made = 20
    scenes.tidy()
    assert gone == ["b", "c", "a"] and [held.name for held in scenes.all()] == ["d"]
    d.made = 900
    scenes.tidy()
    assert len(scenes) == 1  # the one that was asked about last is kept whatever it takes


def test_bodies_of_which_no_scene_is_made_count_too() -> None:
    """A robot may send all of a scene but one body, and no question: what lies there makes room for others' scenes."""
    scenes = Scenes(Opened(), SimpleNamespace(), DEFAULTS, most=3, most_bytes=100.0)  # type: ignore[arg-type]
    for name in "abc":
        scenes.of(name, name, {}).shelf._bodies["0" * 32] = [], 45
    assert scenes.nbytes == 135
    scenes.tidy()
    assert [held.name for held in scenes.all()] == ["b", "c"]
