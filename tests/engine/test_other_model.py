# SPDX-License-Identifier: Apache-2.0
"""A model of another architecture goes through the engine: what the interface says is all that is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.budget.hurry import Hurry
from adatoken3d_ros.engine.budget.plans import options
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.events import FrameTaken, KeyFramesShown, Listeners
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm.text_places import PromptError
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import Settings
from tests.engine.scenes import ask
from tests.lmm import fake
from tests.lmm.fake import BREAK_EVERY, FIRST_GATE, LAYERS, FakeLMM, FakeTokenizer

CONFIG = SessionConfig(max_new_tokens=5)
LIMIT = 30.0  # seconds until a test that hangs fails


@pytest.fixture(scope="module")
def model() -> FakeLMM:
    return FakeLMM()


@pytest.fixture
def seen(model: FakeLMM, frames: list[PosedFrame]) -> Callable[..., Scene]:
    def look(policy: str = "ours", config: SessionConfig = CONFIG) -> Scene:
        scene = Engine(model, FakeTokenizer()).open(config, default_strategy(policy, LAYERS, FIRST_GATE))
        for frame in frames:
            scene.observe(frame)
        assert scene.encode_pending() == len(frames)
        return scene

    return look


def test_patches_are_where_the_model_says(seen: Callable[..., Scene], frames: list[PosedFrame]) -> None:
    """The pictures are stretched to 40x24, so the corners of all 15 patches are 32 and 40 pixels apart."""
    scene = seen()
    assert scene.memory.patches_per_view == 15
    tokens = scene.memory.tokens()
    assert tokens is not None and int(tokens.count.sum()) == 15 * len(frames)
    # The wall is 2 m away, the focal length 120 pixels, and the views are 0.5 m apart.
    x = tokens.xyz[:, 0]
    assert float(x.min()) == pytest.approx(-80 / 60, abs=0.13) and float(x.max()) == pytest.approx(
        48 / 60 + 1, abs=0.13
    )


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_it_answers_with_every_policy_and_keeps_its_line_breaks(seen: Callable[..., Scene], policy: str) -> None:
    scene = seen(policy)
    answer = ask(scene, Question("What is red?"))
    assert answer.status in (Status.OK, Status.TRUNCATED) and answer.text and answer.boxes == ()
    report = answer.report
    assert report is not None and len(report.retained) == answer.spatial_tokens == scene.prepared.size(None)
    assert report.spatial_per_layer[:FIRST_GATE] == (answer.spatial_tokens,) * FIRST_GATE
    if policy != "none":
        assert answer.retained_tokens < answer.spatial_tokens
    spliced, block = scene.spliced(Question("What is red?"))
    strategy = scene.strategy
    filled = prefill(
        scene.runtime.model.decoder,
        spliced.embeds,
        spliced.layout,
        strategy.schedule,
        scene.make_policy(strategy),
        scene=block.scene,
    )
    prompt = scene.runtime.model.prompt(FakeTokenizer(), "What is red?")
    text = prompt.n_tokens + answer.spatial_tokens // BREAK_EVERY
    assert filled.cache.lengths == tuple(text + n for n in filled.trace.spatial_per_layer)


def test_the_prefix_of_a_scene_gives_the_answer_of_the_whole(seen: Callable[..., Scene]) -> None:
    whole = ask(seen("none"), Question("What is red?"))
    scene = seen("none", replace(CONFIG, budget=BudgetConfig(reuse=Reuse.PREFIX)))
    scene.prepare()
    answer = ask(scene, Question("What is red?"))
    assert answer.strategy == "scene-prefix" and answer.text == whole.text
    assert answer.report is not None and len(answer.report.contribution) == answer.spatial_tokens


def test_points_are_refused_with_a_reason(seen: Callable[..., Scene]) -> None:
    scene = seen()
    for question in (Question("What is at [0, 2, 1]?"), Question("What is it?", clicks=np.array([[0.0, 2.0, 1.0]]))):
        answer = ask(scene, question)
        assert answer.status is Status.INVALID_REQUEST
        assert answer.status_message == "the question has 1 points, and this model takes none"
    assert ask(scene, Question("What is <SCENE>?")).status is Status.INVALID_REQUEST
    with pytest.raises(PromptError, match="no template 'llava_v1'"):
        scene.runtime.model.prompt(FakeTokenizer(), "a", template="llava_v1")


def test_no_gate_before_the_first_legal_one(seen: Callable[..., Scene]) -> None:
    scene = seen()
    early = replace(scene.strategy, schedule=Schedule.of([1], [0.5]))
    with pytest.raises(ScheduleError, match="gate layer 1 is before layer 2"):
        scene.set_strategy(early)
    for gate in (FIRST_GATE, 4):  # behind some of the layers at which plans would withdraw the scene
        for option in options(default_strategy("ours", LAYERS, gate), LAYERS, (), gate):
            option.strategy.schedule.check(LAYERS, gate)


def test_a_plan_and_a_hurry_keep_to_it(seen: Callable[..., Scene], tmp_path: Path) -> None:
    """With a latency model, and with a deadline that has passed before the first layer."""
    scene = seen()
    engine = scene.runtime
    assert not engine.warm_up(scene.strategy)
    planned = engine.open(CONFIG)  # type: ignore[attr-defined]
    for plan_of in planned.controller.options:
        plan_of.strategy.schedule.check(LAYERS, FIRST_GATE)
    spliced, block = scene.spliced(Question("What is red?"))
    n, assumed = spliced.n_spatial, engine.latency
    assert assumed is not None
    ticks = iter(range(1000))
    late = Hurry(
        assumed,
        lambda: float(next(ticks)),
        0.0,
        (n,) * LAYERS,
        n,
        spliced.n_tokens - n,
        steps=1,
        first_gate=FIRST_GATE,
    )
    policy = make_policy("random")
    filled = prefill(
        engine.model.decoder, spliced.embeds, spliced.layout, Schedule(), policy, scene=block.scene, at_most=late
    )
    assert filled.trace.spatial_per_layer[:FIRST_GATE] == (n,) * FIRST_GATE
    assert filled.trace.spatial_per_layer[FIRST_GATE] == 0 and late.drops[0][0] == FIRST_GATE


def test_a_scene_is_saved_for_this_model_alone(seen: Callable[..., Scene], tmp_path: Path) -> None:
    scene = seen()
    scene.save(tmp_path / "scene.npz")
    again = Engine(FakeLMM(), FakeTokenizer()).open(CONFIG)
    assert again.load(tmp_path / "scene.npz") == 3
    other = Engine(FakeLMM(seed=1), FakeTokenizer()).open(CONFIG)
    with pytest.raises(ValueError, match="model"):
        other.load(tmp_path / "scene.npz")
    assert torch.equal(again.memory.tokens().features, scene.memory.tokens().features)  # type: ignore[union-attr]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a checkpoint of it, which is found by its config.json once the architecture is registered."""
    path = fake.write_checkpoint(tmp_path / "fake")
    changes = {"model.path": str(path), "budget.warm_up": False, "max_new_tokens": 5}
    with pytest.raises(ValueError, match="model_type is 'fake'; known are "):
        load_engine(Settings(changes))
    fake.register(monkeypatch)
    return Settings(changes)


def test_it_is_loaded_like_those_that_ship(settings: Settings, seen: Callable[..., Scene], tmp_path: Path) -> None:
    """Nothing of the package is changed for it; the same weights answer as they do without a file."""
    engine = load_engine(settings)
    assert engine.model_id == f"fake@{FakeLMM().shape_hash}-{engine.model.identity.partition('-')[2]}"
    assert engine.model.identity == FakeLMM().identity and engine.model.loaded_identity is not None
    built = seen()
    built.save(tmp_path / "scene")
    scene = open_scene(engine, settings)
    assert scene.load(tmp_path / "scene") == 3
    question = Question("What is red?")
    assert ask(scene, question).text == ask(built, question).text


def test_the_node_owns_it_like_those_that_ship(settings: Settings, frames: list[PosedFrame], tmp_path: Path) -> None:
    owner = EngineOwner(Listeners())
    try:
        owner.start(settings).result(LIMIT)
        assert owner.model_id.startswith("fake@") and not owner.problem
        for frame in frames:
            owner.take_frame(lambda frame=frame: frame)
            assert owner.queue is not None
            owner.queue.call(lambda scene: scene.encode_pending()).result(LIMIT)  # one frame waits, the newest
        for name in ("ours", "none"):
            owner.check_strategy(name)
            answer = owner.ask(Question("What is red?"), settings | {"strategy": name}, number=1).result.result(LIMIT)
            assert answer.status in (Status.OK, Status.TRUNCATED), answer.status_message
            assert (answer.retained_tokens < answer.spatial_tokens) == (name == "ours")
        early = tmp_path / "early.yaml"
        replace(default_strategy("ours", LAYERS), schedule=Schedule.of([1], [0.5])).save(early)
        with pytest.raises(ScheduleError, match="gate layer 1 is before layer 2"):
            owner.check_strategy(str(early))
    finally:
        owner.drop()


def test_a_view_for_which_memory_ran_out_at_first_is_shown_once_it_is_one(
    settings: Settings, frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    fates: SimpleQueue[FrameTaken] = SimpleQueue()
    shown: list[KeyFramesShown] = []
    owner = EngineOwner(Listeners().add(FrameTaken, fates.put).add(KeyFramesShown, shown.append))
    try:
        scene = owner.start(settings).result(LIMIT)
        with monkeypatch.context() as patch:
            patch.setattr(scene.memory, "encode", full)
            owner.take_frame(lambda: frames[0])
            assert "waits to be encoded" in fates.get(timeout=LIMIT).fate
            assert owner.queue is not None
            owner.queue.call(owner.show).result(LIMIT)
        owner.queue.call(lambda scene: scene.encode_pending()).result(LIMIT)
        owner.queue.call(owner.show).result(LIMIT)
        assert [one.stamp_ns for one in shown[-1].pictures] == [frames[0].stamp_ns]
    finally:
        owner.drop()
