# SPDX-License-Identifier: Apache-2.0
"""Questions about a part of the scene, and how probable answers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.decode import chance, decode
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.requests import MAX_CANDIDATES, InvalidRequest, check_question
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints
from tests.architectures import NAMES
from tests.engine.scenes import THINGS, ask, new_scene, room_frame

CONFIG = SessionConfig(max_new_tokens=4)
EVERY = replace(CONFIG, key_frames=KeyFrameConfig(0.0, 0.0))
QUESTION = Question("What is red?")
FRAMES = [room_frame(0), room_frame(1)]


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> registry.LoadedModel:
    return registry.load(tiny_of(request.param))


def look(loaded: registry.LoadedModel, frames: list[PosedFrame], config: SessionConfig = CONFIG) -> Scene:
    decoder = loaded.model.decoder
    strategy = default_strategy("ours", len(decoder), decoder.first_gate)
    scene = new_scene(loaded.model, loaded.tokenizer, config, strategy=strategy)
    for frame in frames:
        scene.observe(frame)
    assert scene.encode_pending() == len(frames)
    return scene


def left_out(scene: Scene) -> np.ndarray[Any, Any]:
    """The places of a third of the scene's tokens."""
    tokens = scene.tokens()
    assert tokens is not None
    return tokens.xyz[tokens.xyz[:, 0] < tokens.xyz[:, 0].quantile(0.33)].double().numpy()


def blind(model: Any, scene: Scene, voxels: np.ndarray[Any, Any]) -> Callable[..., PatchPoints]:
    """`place_tokens` for which nothing was measured in these voxels."""
    place = model.place_tokens

    def placed(frame: PosedFrame, config: PatchConfig) -> PatchPoints:
        points = place(frame, config)
        keys = np.full(len(points.valid), -1)
        keys[points.valid] = scene.memory.voxels(points.xyz[points.valid])
        return replace(points, valid=points.valid & ~np.isin(keys, voxels))

    return placed


def same(found: Answer, expected: Answer) -> None:
    assert (found.text, found.spatial_tokens, found.status) == (expected.text, expected.spatial_tokens, expected.status)
    assert found.report is not None and expected.report is not None
    for name in ("xyz", "rgb", "contribution", "last_layer", "retained"):
        np.testing.assert_array_equal(getattr(found.report, name), getattr(expected.report, name), err_msg=name)


def test_left_out_places_were_never_seen(loaded: registry.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same to the bit as a scene in which nothing was measured there; and `only` the others is the same."""
    scene = look(loaded, FRAMES)
    places = left_out(scene)
    voxels = scene.memory.voxels(places)
    with monkeypatch.context() as patched:
        patched.setattr(loaded.model, "place_tokens", blind(loaded.model, scene, voxels), raising=False)
        oracle = look(loaded, FRAMES)
    expected, whole = ask(oracle, QUESTION), ask(scene, QUESTION)
    narrow = replace(QUESTION, without=places)
    found = ask(scene, narrow)
    assert 0 < found.spatial_tokens < whole.spatial_tokens
    same(found, expected)
    tokens = scene.tokens()
    assert tokens is not None
    others = tokens.xyz.double().numpy()
    others = others[~np.isin(scene.memory.voxels(others), voxels)]
    same(ask(scene, replace(QUESTION, only=others)), expected)
    same(ask(scene, replace(QUESTION, only=others, without=others[:1])), ask(scene, replace(narrow, only=others[1:])))
    same(ask(scene, QUESTION), whole)  # the scene is whole again


def test_what_was_prepared_is_kept_but_not_for_new_views(loaded: registry.LoadedModel) -> None:
    scene = look(loaded, FRAMES[:1])
    whole = ask(scene, QUESTION)
    block = scene.prepared.block(None)
    narrow = replace(QUESTION, without=left_out(scene))
    ask(scene, narrow)
    assert scene.prepared.block(None) is block
    scene.observe(FRAMES[1])
    ask(scene, narrow)  # encodes it
    assert scene.prepared.block(None) is not block
    same(ask(scene, QUESTION), ask(look(loaded, FRAMES), QUESTION))
    assert whole.spatial_tokens < scene.prepared.size(None)


def test_a_prefix_of_the_whole_scene_is_not_used(loaded: registry.LoadedModel) -> None:
    prefix = look(loaded, FRAMES, replace(CONFIG, budget=BudgetConfig(reuse=Reuse.PREFIX)))
    narrow = replace(QUESTION, without=left_out(prefix), candidates=("a",))
    scene = look(loaded, FRAMES)
    scene.set_strategy(default_strategy("none", len(loaded.model.decoder), loaded.model.decoder.first_gate))
    ask(prefix, QUESTION)
    ready = prefix.prepared.prefix
    found, expected = ask(prefix, narrow), ask(scene, narrow)
    assert found.text == expected.text and found.spatial_tokens == expected.spatial_tokens
    assert found.candidate_probabilities == pytest.approx(expected.candidate_probabilities, rel=1e-3)
    assert prefix.prepared.prefix is ready


def test_what_has_gone_from_a_place_that_is_left_out_does_not_speak(loaded: registry.LoadedModel) -> None:
    """Neither in words, nor of a place, nor of what has changed; what is left out is not read as if it were there."""
    scene = look(loaded, [room_frame(index) for index in (0, 1, 2)], EVERY)
    for index in (0, 1, 2):
        scene.observe(replace(room_frame(index, THINGS[1:]), stamp_ns=10**10 + index))
    scene.encode_pending()
    memory, past = scene.memory, scene.memory.past
    gone = np.concatenate([thing.xyz.double().numpy() for thing in past.tombstones.gone])
    assert len(gone)
    everywhere = np.concatenate([memory.tokens().xyz.double().numpy(), gone])  # type: ignore[union-attr]
    aside, changes = everywhere[:, 0] > 0.6, replace(QUESTION, text="What has changed?")
    place = Question("What?", np.median(gone, axis=0)[None], max_new_tokens=2)
    told = {"all": {}, "without": {"without": gone}, "only": {"only": everywhere[aside]}}
    for name, region in told.items():
        speaks = name == "all"
        narrow = replace(QUESTION, **region)
        with scene.seen_by(narrow):
            block, most = scene.prepared.block(None), 10**6
            found = past.with_the_gone(block.tokens, memory.asked, most, scene.runtime.model.lift_places)
        assert (found is not None) is speaks, name
        assert bool(ask(scene, replace(changes, **region)).evidence) is speaks
        there = ask(scene, replace(place, **region))
        assert any(np.isin(memory.voxels(np.array([e.place])), memory.voxels(gone)) and e.gone_ns and e.views
                   for e in there.evidence) <= speaks  # fmt: skip
    some = replace(QUESTION, without=everywhere[aside])
    with scene.seen_by(some):
        tokens = scene.prepared.block(None).tokens
        found = past.with_the_gone(tokens, memory.asked, 10**6, scene.runtime.model.lift_places)
    assert found is not None
    read, owner = found
    assert (owner < 0).sum() == len(tokens)
    assert not np.isin(memory.voxels(read.xyz.double().numpy()), memory.voxels(everywhere[aside])).any()


def test_nothing_is_left(loaded: registry.LoadedModel) -> None:
    scene = look(loaded, FRAMES)
    tokens = scene.tokens()
    assert tokens is not None
    answer = ask(scene, replace(QUESTION, without=tokens.xyz.double().numpy()))
    assert answer.status is Status.NO_SCENE and "all that was seen lies in the places" in answer.status_message
    assert ask(scene, replace(QUESTION, only=np.full((1, 3), 9e4))).status is Status.NO_SCENE
    assert ask(scene, replace(QUESTION, without=np.full((1, 3), 9e4))).status.answered


def test_how_probable_answers_are(loaded: registry.LoadedModel) -> None:
    """As the product of one decode step after the other."""
    scene = look(loaded, FRAMES)
    spliced, block = scene.spliced(QUESTION)
    runtime = scene.runtime
    decoder, policy = runtime.model.decoder, scene.make_policy(scene.strategy)

    def read() -> Any:
        return prefill(
            decoder, spliced.embeds, spliced.layout, scene.strategy.schedule, policy, scene=block.scene
        )  # fmt: skip

    def stepwise(ids: list[int]) -> float:
        filled = read()
        logits, p = filled.logits, 1.0
        for token in ids:
            p *= float(logits.double().softmax(0)[token])
            logits = decode(decoder, filled, token)
        return p * float(logits.double().softmax(0)[list(runtime.eos_ids)].sum())

    plain = ask(scene, QUESTION)
    candidates = ("red", "a table", "")
    answer = ask(scene, replace(QUESTION, candidates=candidates))
    assert answer.text == plain.text and math.isnan(plain.probability) and plain.candidate_probabilities == ()
    ids = [runtime.tokenizer(text, add_special_tokens=False).input_ids for text in candidates]
    assert answer.candidate_probabilities == pytest.approx([stepwise(one) for one in ids], rel=1e-3)
    filled = read()
    before = filled.cache.lengths, filled.next_position
    torch.manual_seed(0)
    assert chance(decoder, filled, ids[0], runtime.eos_ids) == chance(decoder, filled, ids[0], runtime.eos_ids)
    assert (filled.cache.lengths, filled.next_position) == before
    assert math.isnan(answer.probability) == (answer.status is Status.TRUNCATED)


def test_probabilities_cost_the_answer_no_time(loaded: registry.LoadedModel) -> None:
    scene = look(loaded, FRAMES[:1])
    now = [0.0]
    scene.runtime.clock = lambda: now[0]
    tokenizer = scene.runtime.tokenizer

    class Slow:
        def __call__(self, *args: Any, **options: Any) -> Any:
            now[0] += 5.0
            return tokenizer(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    ask(scene, QUESTION)
    scene.runtime.tokenizer = Slow()
    plain = ask(scene, QUESTION).times.total
    assert ask(scene, replace(QUESTION, candidates=("a", "b"))).times.total == plain


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"without": np.zeros((2, 2))}, r"without must be \(n, 3\)"),
        ({"only": np.full((1, 3), np.nan)}, "only must be finite"),
        ({"without": np.full((1, 3), 1e9)}, "is not within"),
        ({"candidates": ("a",) * (MAX_CANDIDATES + 1)}, "17 candidates are more than 16"),
        ({"candidates": ("a" * 2001,)}, "more than 2000 characters"),
    ],
)
def test_what_cannot_be_asked(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        check_question(replace(QUESTION, **changes))
