# SPDX-License-Identifier: Apache-2.0
"""The way from frames to an answer, with a tiny random model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.budget.warmup import key_of
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.report import lorenz_share
from adatoken3d_ros.engine.requests import clicks_of
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError
from adatoken3d_ros.pruning.strategy import Strategy, StrategyError, default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, Verdict
from tests.engine.scenes import ask, new_scene

MakeSession = Callable[..., Scene]
WallFrame = Callable[..., PosedFrame]


def looked(session: Scene, frames: list[PosedFrame]) -> Scene:
    for frame in frames:
        assert session.observe(frame) == Verdict.KEY_FRAME
        session.encode_pending()
    return session


def same(a: Answer, b: Answer) -> bool:
    assert a.report is not None and b.report is not None
    return (a.text, a.status, a.spatial_tokens) == (b.text, b.status, b.spatial_tokens) and np.array_equal(
        a.report.contribution, b.report.contribution
    )


def test_an_answer_accounts_for_its_tokens_times_and_stamp(make_session: MakeSession, frames: list[PosedFrame]) -> None:
    session = looked(make_session(), frames)
    answer = ask(session, Question("What is on the wall?", max_new_tokens=5))
    scene = session.tokens()
    assert scene is not None and answer.report is not None
    assert answer.status in (Status.OK, Status.TRUNCATED)
    assert answer.stamp_ns == frames[-1].stamp_ns
    assert answer.spatial_tokens == len(scene.xyz) == len(answer.report.xyz) > 10
    assert answer.retained_tokens == answer.report.retained.sum() == answer.report.spatial_per_layer[-1]
    assert answer.retained_tokens == max(1, math.floor(0.125 * answer.spatial_tokens))
    assert answer.report.spatial_per_layer[0] == answer.spatial_tokens
    assert answer.report.contribution.sum() == pytest.approx(1.0, abs=1e-4)
    reached_the_end = answer.report.last_layer == session.runtime.n_layers - 1
    assert np.array_equal(reached_the_end, answer.report.retained)
    assert answer.prefill_flops < answer.prefill_flops_unpruned
    *stages, total = astuple(answer.times)
    assert sum(stages) == pytest.approx(total) and total > 0
    # The wall stands at y = 2: that is where the tokens lie.
    assert np.allclose(answer.report.xyz[:, 1], 2.0, atol=1e-4)


def test_the_same_frames_and_question_give_the_same_answer(make_session: MakeSession, frames: list[PosedFrame]) -> None:
    first = ask(looked(make_session(), frames), Question("What is this?", max_new_tokens=8))
    again = looked(make_session(), frames)
    assert same(first, ask(again, Question("What is this?", max_new_tokens=8)))
    ask(again, Question("Something else?", max_new_tokens=3))
    assert same(first, ask(again, Question("What is this?", max_new_tokens=8)))


def test_pruning_nothing_equals_the_stock_language_model(make_session: MakeSession, frames: list[PosedFrame]) -> None:
    session = looked(make_session(strategy=default_strategy("none", 8)), frames)
    question = Question("How many chairs are there?", max_new_tokens=12)
    spliced, _ = session.spliced(question)
    with torch.inference_mode():
        ids = session.runtime.model.language.generate(
            inputs_embeds=spliced.embeds, attention_mask=torch.ones(spliced.embeds.shape[:2]), max_new_tokens=12
        )[0]
    expected = (
        session.runtime.tokenizer.decode(ids, skip_special_tokens=True).strip().rstrip("\N{REPLACEMENT CHARACTER}")
    )
    assert ask(session, question).text == expected


def test_a_frame_is_encoded_once(make_session: MakeSession, frames: list[PosedFrame], monkeypatch: Any) -> None:
    session = make_session()
    encoded: list[int] = []
    original = session.runtime.model.encode_images

    def spy(images: list[Any], **options: Any) -> Any:
        encoded.append(len(images))
        return original(images, **options)

    monkeypatch.setattr(session.runtime.model, "encode_images", spy)
    looked(session, frames)
    assert session.observe(frames[0]) == Verdict.DUPLICATE_STAMP
    ask(session, Question("One?", max_new_tokens=1))
    ask(session, Question("Two?", max_new_tokens=1))
    assert encoded == [1, 1, 1]


def test_views_are_bounded_and_dropped_ones_leave_no_trace(make_session: MakeSession, wall_frame: WallFrame) -> None:
    config = SessionConfig(key_frames=KeyFrameConfig(max_views=2))
    session = looked(make_session(config), [wall_frame(i) for i in range(5)])
    assert len(session.poses) == 2 and session.stamp_ns == 500_000_000
    fresh = looked(make_session(config), [wall_frame(stamp // 100_000_000 - 1) for stamp in sorted(session.poses)])
    a, b = session.tokens(), fresh.tokens()
    assert a is not None and b is not None
    assert sorted(session.poses) == sorted(fresh.poses)
    assert torch.equal(a.voxel, b.voxel)
    assert torch.allclose(a.features, b.features, atol=1e-5)


def test_a_saved_scene_gives_the_same_answer(
    make_session: MakeSession, frames: list[PosedFrame], tmp_path: Path
) -> None:
    session = make_session()
    for frame in frames:
        session.observe(frame)
    session.save(tmp_path / "scene")
    other = looked(make_session(), [replace(frames[0], stamp_ns=77)])
    assert other.load(tmp_path / "scene") == 3 == len(other.poses)
    question = Question("What is on the wall?", max_new_tokens=6)
    assert same(ask(other, question), ask(session, question))
    assert other.observe(frames[1]) == Verdict.DUPLICATE_STAMP
    with pytest.raises(ValueError, match="frame 'map'.*'odom'"):
        other.load(tmp_path / "scene", frame_id="odom")
    assert len(other.poses) == 3


def test_other_weights_of_the_same_shape_are_another_model(
    make_session: MakeSession, frames: list[PosedFrame], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a scene nor a strategy nor a fit of yesterday's weights passes for one of today's."""
    session = looked(make_session(), frames)
    session.save(tmp_path / "scene")
    model, tokenizer, _ = registry.load(write_tiny_checkpoint(tmp_path / "other", seed=1))
    other = new_scene(model, tokenizer)
    assert model.config.hash() == session.runtime.model.config.hash()
    with pytest.raises(ValueError, match=f"{session.runtime.model.identity}.*{model.identity}"):
        other.load(tmp_path / "scene")
    assert len(other.poses) == 0
    measured = replace(default_strategy("ours", 8), model_hash=session.runtime.model.identity)
    session.set_strategy(measured)
    with pytest.raises(StrategyError, match=f"{session.runtime.model.identity}.*this model is {model.identity}"):
        other.set_strategy(measured)
    assert key_of(model, measured) != key_of(session.runtime.model, measured)
    # A strategy from before weights had an identity says only of what shape they were.
    assert not caplog.records
    other.set_strategy(replace(measured, model_hash=model.config.hash()))
    assert "says only of what shape" in caplog.text


def test_what_has_gone_is_forgotten_where_the_camera_looks_through_it(
    make_session: MakeSession, wall_frame: WallFrame
) -> None:
    session = looked(make_session(), [wall_frame(0)])
    behind = replace(wall_frame(0, depth=4.0), stamp_ns=5_000_000_000)
    looked(session, [behind])
    scene = session.tokens()
    assert scene is not None
    y = scene.xyz[:, 1]
    in_sight = (scene.xyz[:, 0].abs() < 0.5) & ((scene.xyz[:, 2] - 1).abs() < 0.4)
    assert bool((y[in_sight] > 3.9).all()) and bool((y > 3.9).any())


def test_the_origin_moves_what_the_model_sees_and_nothing_else(
    make_session: MakeSession, wall_frame: WallFrame
) -> None:
    here, there = wall_frame(0), wall_frame(0)
    T = there.T_world_camera.copy()
    T[:3, 3] += (40.0, -20.0, 0.0)
    there = replace(there, T_world_camera=T)
    question = Question("What is at [0.0, 2.0, 1.0]?", max_new_tokens=8)
    far_question = Question("What is at [40.0, -18.0, 1.0]?", max_new_tokens=8)
    a = ask(looked(make_session(), [here]), question)
    b = ask(looked(make_session(SessionConfig(origin=(40.0, -20.0, 0.0))), [there]), far_question)
    assert a.text == b.text and a.spatial_tokens == b.spatial_tokens
    assert a.report is not None and b.report is not None
    assert np.allclose(a.report.xyz + np.float32([40, -20, 0]), b.report.xyz, atol=1e-4)


def test_boxes_in_the_text_are_in_the_scene_frame_while_it_is_written_too(
    make_session: MakeSession, frames: list[PosedFrame], monkeypatch: Any
) -> None:
    written = "The chair is at [1.0, 2.0, 0.50, 1, 1, 1], not at [3, 4, 5]."
    for origin, text in (
        ((31.0, -7.0, 1.25), "The chair is at [32.0, -5.0, 1.75, 1, 1, 1], not at [3, 4, 5]."),
        ((0.0, 0.0, 0.0), written),
    ):
        session = looked(make_session(SessionConfig(origin=origin)), frames)
        monkeypatch.setattr(session.runtime, "decode", lambda ids: written[: 3 * len(ids)].strip())
        shown: list[str] = []
        answer = session.runtime.ask(
            session, Question("Where?", max_new_tokens=30), on_text=lambda text, _, to=shown: to.append(text)
        )
        assert answer.text == text and len(shown) == 30
        assert all(b.startswith(a) for a, b in zip(shown, [*shown[1:], text], strict=True))
        centre = answer.boxes[0].centre
        assert centre == pytest.approx(np.add((1.0, 2.0, 0.5), origin))
        # A box that is copied from the answer into a question is the same place for the model.
        box = answer.text[answer.text.index("[") : answer.text.index("]") + 1]
        (click,) = clicks_of(Question(f"What is at {box}?"), taken=True)[1]
        assert click == pytest.approx(centre)


def test_no_scene_is_said(make_session: MakeSession, wall_frame: WallFrame) -> None:
    session = make_session()
    answer = ask(session, Question("Anything?"))
    assert answer.status == Status.NO_SCENE and "no key frame" in answer.status_message
    looked(session, [wall_frame(0)]).clear()
    assert ask(session, Question("Anything?")).status == Status.NO_SCENE
    assert session.observe(wall_frame(0)) == Verdict.KEY_FRAME


@pytest.mark.parametrize(
    ("question", "named"),
    [
        (Question(""), "empty"),
        (Question("  \n"), "empty"),
        (Question("What is <image> here?"), "<image>"),
        (Question("Where is <boxes>?"), "<boxes>"),
        (Question("x" * 1_000_000), "1000000"),
        (Question("ok?", latency_budget_ms=-5.0), "-5.0"),
        (Question("ok?", latency_budget_ms=math.nan), "nan"),
        (Question("ok?", max_new_tokens=-1), "-1"),
        (Question("ok?", clicks=np.array([[0.0, math.nan, 1.0]])), "nan"),
        (Question("ok?", clicks=np.zeros((2, 2))), "(2, 2)"),
        (Question("ok?", clicks=np.zeros((1000, 3))), "1000"),
        (
            Question("ok?", clicks=np.array([[0.0, 1.0, 1.0], [1e20, 0.0, 1.0]])),
            "[1e+20, 0.0, 1.0] is not within 100000 m",
        ),
        (Question("What is at [1e300, 2, 1]?"), "[1e+300, 2.0, 1.0] is not within 100000 m"),
        (Question("What is at [0, -1e6, 1, 1, 1, 1]?"), "[0.0, -1000000.0, 1.0] is not within 100000 m"),
        (Question("ok?", clicks=np.array([[500.0, 2.0, 1.0]])), "m from what has been seen, more than 100 m"),
        (Question("What is at [0, 2, 300]?"), "m from what has been seen, more than 100 m"),
    ],
)
def test_a_bad_question_is_refused_by_name_and_the_next_is_answered(
    make_session: MakeSession, question: Question, named: str, wall_frame: WallFrame
) -> None:
    for reuse in Reuse:
        session = looked(make_session(SessionConfig(budget=BudgetConfig(reuse=reuse))), [wall_frame(0)])
        answer = ask(session, question)
        assert answer.status == Status.INVALID_REQUEST
        assert named in answer.status_message and len(answer.status_message) < 200
        assert ask(session, Question("ok?", max_new_tokens=1)).status in (Status.OK, Status.TRUNCATED)


def test_a_point_as_far_as_a_large_scene_goes_may_be_asked_about(
    make_session: MakeSession, wall_frame: WallFrame
) -> None:
    session = looked(make_session(), [wall_frame(0)])
    asked = Question("What is there?", clicks=np.array([[99.0, 2.0, 1.0]]), max_new_tokens=1)
    assert ask(session, asked).status in (Status.OK, Status.TRUNCATED)


def test_the_budget_ends_the_answer_in_time_by_the_clock_it_is_given(
    make_session: MakeSession, wall_frame: WallFrame
) -> None:
    ticks = count()
    session = looked(make_session(clock=lambda: next(ticks) * 0.010), [wall_frame(0)])  # each look takes 10 ms
    unlimited = ask(session, Question("What is this?", max_new_tokens=20))
    short = ask(session, Question("What is this?", max_new_tokens=20, latency_budget_ms=90.0))
    assert short.status == Status.TRUNCATED and "90.0 ms" in short.status_message
    assert unlimited.text.startswith(short.text) and short.text != unlimited.text
    assert unlimited.budget_met


def test_cancel_ends_the_answer_within_one_step(make_session: MakeSession, wall_frame: WallFrame) -> None:
    session = looked(make_session(), [wall_frame(0)])
    texts: list[str] = []
    answer = session.runtime.ask(
        session,
        Question("What is this?", max_new_tokens=50),
        on_text=lambda text, n: texts.append(text),
        should_stop=lambda: len(texts) >= 3,
    )
    assert answer.status == Status.CANCELLED and len(texts) == 3
    assert answer.text == texts[-1] and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    early = ask(session, Question("What is this?"), should_stop=lambda: True)
    assert early.status == Status.CANCELLED and early.text == ""


def test_cancel_ends_the_encoding_of_views_within_one_layer(make_session: MakeSession, wall_frame: WallFrame) -> None:
    session = make_session()
    for i in range(3):
        assert session.observe(wall_frame(i)) == Verdict.KEY_FRAME
    layers: list[str] = []
    with ExitStack() as hooks:
        for part in session.runtime.model.vision.modules():
            if not list(part.children()):
                hooks.enter_context(part.register_forward_hook(lambda part, *_: layers.append(type(part).__name__)))
        answer = ask(session, Question("What is this?"), should_stop=lambda: len(layers) >= 2)
    assert len(layers) == 2
    assert answer.status == Status.CANCELLED and answer.status_message == "cancelled during encode"
    assert len(session.memory.pending) == 3 and not len(session.memory)  # they wait for the next question
    assert ask(session, Question("What is this?", max_new_tokens=2)).status == Status.TRUNCATED
    assert len(session.memory) == 3


def test_a_cut_inside_a_character_costs_only_that_character(
    make_session: MakeSession, wall_frame: WallFrame, monkeypatch: Any
) -> None:
    session = looked(make_session(), [wall_frame(0)])
    written = session.runtime.tokenizer.encode("says 日本語", add_special_tokens=False)[:-1]
    monkeypatch.setattr("adatoken3d_ros.engine.answering.generate", lambda *_, **__: iter(written))
    shown: list[str] = []
    question = Question("What does the sign say?", max_new_tokens=len(written))
    answer = ask(session, question, on_text=lambda text, n: shown.append(text))
    assert answer.status == Status.TRUNCATED and answer.text == "says 日本"
    assert [shown[-8], shown[-5], shown[-2], shown[-1]] == ["says", "says 日", "says 日本", "says 日本"]
    assert all(b.startswith(a) for a, b in zip(shown, [*shown[1:], answer.text], strict=True))


def test_stages_are_announced_in_order(make_session: MakeSession, wall_frame: WallFrame) -> None:
    session = looked(make_session(), [wall_frame(0)])
    stages: list[str] = []
    ask(session, Question("What?", max_new_tokens=1), on_stage=stages.append)
    assert stages == ["encode", "tokens", "prefill", "decode"]


def test_a_strategy_for_another_model_or_too_deep_is_refused(make_session: MakeSession) -> None:
    with pytest.raises(StrategyError, match="0123456789abcdef"):
        make_session(strategy=replace(default_strategy("ours", 8), model_hash="0123456789abcdef"))
    with pytest.raises(ScheduleError, match="31"):
        make_session(strategy=replace(default_strategy("ours", 8), schedule=Schedule.of([31], [0.5])))


def test_lorenz_share_by_hand() -> None:
    assert lorenz_share(np.float32([0.1, 0.1, 0.1, 0.2, 0.5]), 0.6) == pytest.approx(0.3)
    assert lorenz_share(np.float32([0.2] * 5), 0.6) == pytest.approx(0.6)
    assert math.isnan(lorenz_share(np.zeros(5, np.float32), 0.6))


def test_strategies_are_values(make_session: MakeSession, wall_frame: WallFrame) -> None:
    strategy: Strategy = default_strategy("random", 8)
    session = looked(make_session(SessionConfig(seed=3), strategy=strategy), [wall_frame(0)])
    first = ask(session, Question("What?", max_new_tokens=4))
    assert same(first, ask(session, Question("What?", max_new_tokens=4)))
    assert first.strategy == strategy.name and first.seed == 3
