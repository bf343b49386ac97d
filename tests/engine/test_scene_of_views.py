# SPDX-License-Identifier: Apache-2.0
"""A model whose tokens are those of its views goes through engine and scene: frames in, answers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_memory import ViewError
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.qwen3vl.tiny import write_tiny_checkpoint
from adatoken3d_ros.pruning.policies import POLICY_NAMES
from adatoken3d_ros.pruning.strategy import StrategyError, default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import Settings
from tests.engine.scenes import ask, load_scene, new_scene

LAYERS = 8
CONFIG = SessionConfig(max_new_tokens=5)
GRID = (6, 8)  # of views of 160 x 120 pixels


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("views"), seed=3, layers=LAYERS, tie_word_embeddings=False)
    return registry.load(path)[:2]


@pytest.fixture
def seen(loaded: tuple[Any, Any], frames: list[PosedFrame]) -> Callable[..., Scene]:
    def look(policy: str = "ours", config: SessionConfig = CONFIG) -> Scene:
        scene = new_scene(*loaded, config, strategy=default_strategy(policy, LAYERS))
        for frame in frames:
            scene.observe(frame)
        assert scene.encode_pending() == len(frames)
        return scene

    return look


def test_each_view_is_a_block_at_its_places(seen: Callable[..., Scene], frames: list[PosedFrame]) -> None:
    """The wall is 2 m away: a token is 20 of 160 pixels wide, a third of a metre."""
    tokens = seen().tokens()
    assert tokens is not None and tokens.view is not None and tokens.grids == (GRID,) * len(frames)
    assert torch.bincount(tokens.view).tolist() == [GRID[0] * GRID[1]] * len(frames)
    torch.testing.assert_close(tokens.xyz[:, 1], torch.full((len(tokens),), 2.0))
    row = tokens.xyz[: GRID[1], 0]
    torch.testing.assert_close(row.diff(), torch.full((GRID[1] - 1,), 20 / 60), rtol=0, atol=0.02)
    torch.testing.assert_close(tokens.xyz[GRID[0] * GRID[1] :][: GRID[1], 0], row + 0.5, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_it_answers_with_every_policy(seen: Callable[..., Scene], policy: str) -> None:
    answer = ask(seen(policy), Question("What is red?"))
    assert answer.status in (Status.OK, Status.TRUNCATED) and answer.spatial_tokens == 3 * GRID[0] * GRID[1]
    report = answer.report
    assert report is not None and len(report.xyz) == len(report.retained) == answer.spatial_tokens
    if policy != "none":
        assert answer.retained_tokens < answer.spatial_tokens
        assert answer.prefill_flops < answer.prefill_flops_unpruned


def test_the_prefix_gives_the_answer_of_the_whole(seen: Callable[..., Scene]) -> None:
    whole = [ask(seen("none"), Question(text)) for text in ("What is red?", "Where is the chair?")]
    scene = seen("none", replace(CONFIG, budget=BudgetConfig(reuse=Reuse.PREFIX)))
    scene.prepare()
    for expected in whole:
        answer = ask(scene, expected.question)
        assert answer.strategy == "scene-prefix" and answer.text == expected.text


def test_a_scene_is_saved_and_fits_this_model_alone(
    seen: Callable[..., Scene], make_session: Callable[..., Scene], loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    scene = seen()
    scene.save(tmp_path / "scene")
    again = new_scene(*loaded, CONFIG)
    assert again.load(tmp_path / "scene") == 3
    assert ask(again, Question("What is red?")).text == ask(scene, Question("What is red?")).text
    other = make_session()
    with pytest.raises(ValueError, match="has model"):
        other.load(tmp_path / "scene")
    with pytest.raises(StrategyError):
        other.set_strategy(replace(scene.strategy, model_hash=loaded[0].identity))


def test_a_budget_is_planned_for(loaded: tuple[Any, Any], frames: list[PosedFrame]) -> None:
    scene = new_scene(*loaded, CONFIG)
    assert not scene.runtime.warm_up(scene.strategy)
    scene = scene.runtime.open(CONFIG)  # type: ignore[attr-defined]
    for frame in frames:
        scene.observe(frame)
    rushed = ask(scene, Question("What is red?", latency_budget_ms=1e-3))
    assert rushed.status is not Status.ERROR and rushed.status_message
    assert ask(scene, Question("What is red?", latency_budget_ms=1e6)).budget_met


def test_a_view_without_depth_or_smaller_than_a_patch_is_told(
    seen: Callable[..., Scene], frames: list[PosedFrame]
) -> None:
    scene = seen()
    far = replace(frames[0], stamp_ns=10**10, T_world_camera=frames[0].T_world_camera + np.eye(4, k=3) * 9)
    assert scene.observe(replace(far, depth=np.full_like(far.depth, np.nan))).value == "no_depth"
    tiny = replace(far, rgb=far.rgb[:12, :12], depth=far.depth[:12, :12], K=np.diag([120.0, 120.0, 1.0]))
    scene.observe(tiny)
    with pytest.raises(ViewError, match="12x12 pixels is smaller than a patch of 16x16"):
        scene.encode_pending()
    assert ask(scene, Question("What is red?")).status in (Status.OK, Status.TRUNCATED)


def test_views_of_other_sizes_keep_their_shape(loaded: tuple[Any, Any], frames: list[PosedFrame]) -> None:
    scene = new_scene(*loaded, CONFIG)
    upright = replace(frames[1], rgb=frames[1].rgb[:, :96].copy(), depth=frames[1].depth[:, :96].copy())
    for frame in (frames[0], upright):
        scene.observe(frame)
    scene.encode_pending()
    tokens = scene.tokens()
    assert tokens is not None and tokens.grids == (GRID, (8, 6))
    assert ask(scene, Question("What is red?")).spatial_tokens == 48 + 48


def test_points_are_told_in_words_of_the_views_that_there_are(
    loaded: tuple[Any, Any], frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the views are encoded while the question is answered. A token's pixel is to the left of its middle."""
    model, told = loaded[0], []

    def prompt(tokenizer: Any, question: str, **options: Any) -> Any:
        told.append(question)
        return type(model).prompt(model, tokenizer, question, **options)

    monkeypatch.setattr(model, "prompt", prompt)
    scene = new_scene(*loaded, CONFIG)
    for frame in frames:
        scene.observe(frame)
    answer = ask(scene, Question("What is at [-1.1, 2.0, 1.8]?", clicks=np.array([[2.1, 2.0, 0.2]])))
    assert answer.status in (Status.OK, Status.TRUNCATED)
    assert told[-1] == (
        "The question is about the point [919, 908] in image 3. What is at the point [94, 108] in image 1?"
    )
    assert ask(scene, Question("What is at [900, 2, 1]?")).status is Status.INVALID_REQUEST


def told_of(scene: Scene, question: Question) -> str:
    ids = [token for piece in scene.prompt(question)[0].pieces if isinstance(piece, tuple) for token in piece]
    return str(scene.runtime.tokenizer.decode(ids))


def test_a_view_that_lost_all_its_tokens_keeps_its_number(seen: Callable[..., Scene]) -> None:
    """By carving, by a cap or by a gate: its marks stand in the prompt, and what is said of images goes on counting."""
    scene = seen(config=replace(CONFIG, tell_poses=True))
    tokens = scene.memory.tokens()
    assert tokens is not None and tokens.view is not None
    scene.memory._map.carve(scene.memory._map._views[scene.memory._map.keys()[0]].keys, before=1)
    scene.prepared.forget()
    question = Question("What is at [2.1, 2.0, 0.2]?")
    spliced, block = scene.spliced(question)
    where = block.where
    assert where is not None and where.view.unique().tolist() == [1, 2] and len(where.grids) == 3
    text = told_of(scene, question)
    assert "point [919, 908] in image 3 at" in text and "Image 3: from (1.00, 0.00, 1.00)" in text
    settings, rows = scene.runtime.model.settings, spliced.embeds[0]
    marks = scene.runtime.model.decoder.embed(torch.tensor([settings.vision_start, settings.vision_end]))
    begins, ends = ((rows == mark).all(dim=1).nonzero()[:, 0].tolist() for mark in marks)
    assert len(begins) == len(ends) == 3 and ends[0] == begins[0] + 1  # nothing is between them
    assert spliced.layout.rows is not None and begins[1] < int(spliced.layout.rows[0])
    assert ask(scene, question).status in (Status.OK, Status.TRUNCATED)
    few = scene.memory.question_tokens(3)  # a cap that leaves some views without any
    assert len(few.grids) == 3 and few.view is not None and len(few.view) == 3


def test_poses_of_the_views_are_told_where_that_is_wanted(
    loaded: tuple[Any, Any], seen: Callable[..., Scene], frames: list[PosedFrame]
) -> None:
    """Before the views, in the frame of positions in a question, and counted before the views are encoded."""
    question = Question("What is 1.5 m from (0.5, 2.0, 1.0)?")
    scene = new_scene(*loaded, replace(CONFIG, tell_poses=True))
    for frame in frames:
        scene.observe(frame)
    ahead = scene.prompt(question, pending=True)[0]
    assert scene.encode_pending() == 3
    assert scene.prompt(question)[0].n_tokens == ahead.n_tokens and scene.prompt(question)[0].n_system == ahead.n_system
    text = told_of(scene, question)
    assert "Image 2: from (0.50, 0.00, 1.00), looking towards 90 degrees. Image 3: from (1.00," in text
    assert text.index("Image 3:") < text.index(question.text)
    plain = told_of(seen(), question)
    assert plain == "<|im_start|>user\n" + question.text + "<|im_end|>\n<|im_start|>assistant\n"
    more, less = scene.spliced(question)[0], seen().spliced(question)[0]
    words = len(text.removesuffix(plain[len("<|im_start|>user\n") :])) - len("<|im_start|>user\n")
    assert more.n_tokens - less.n_tokens == words, "a token is a byte"
    assert (
        scene.situation(question, ahead).n_system
        == words + scene.situation(question, seen().prompt(question)[0]).n_system
    )
    assert ask(scene, question).status in (Status.OK, Status.TRUNCATED)
    assert "image 1 at (-1.10, 2.00, 1.80)?" in told_of(scene, Question("What is at [-1.1, 2.0, 1.8]?"))


def test_who_cannot_be_told_poses_is_refused(tmp_path: Path, tiny_directory: Path) -> None:
    views = write_tiny_checkpoint(tmp_path / "views", layers=3)
    settings = Settings({"model.path": str(views), "model.tell_poses": True, "budget.warm_up": False})
    assert (
        load_scene(settings).config.tell_poses
        and not load_scene(settings | {"model.tell_poses": False}).config.tell_poses
    )
    with pytest.raises(ValueError, match="model.tell_poses is true, but this model reads no views"):
        load_scene(settings | {"model.path": str(tiny_directory)})


def test_the_prefix_changes_with_the_poses_that_are_told(loaded: tuple[Any, Any], frames: list[PosedFrame]) -> None:
    texts: dict[Reuse, list[str]] = {}
    for reuse in Reuse:
        config = replace(CONFIG, tell_poses=True, budget=BudgetConfig(reuse=reuse))
        scene = new_scene(*loaded, config, strategy=default_strategy("none", LAYERS))
        texts[reuse] = []
        for frame in frames:
            scene.observe(frame)
            scene.prepare()
            texts[reuse].append(ask(scene, Question("What is red?")).text)
    assert texts[Reuse.PREFIX] == texts[Reuse.OFF]


def test_boxes_in_an_answer_lie_in_the_scene(seen: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = seen("none")
    written = '[{"bbox_2d": [0, 0, 500, 1000], "image": 2, "label": "wall"}]'
    monkeypatch.setattr(scene.runtime, "decode", lambda ids: written)
    [box] = ask(scene, Question("Where is the wall?")).boxes
    left = 0.5 - 80 / 60
    np.testing.assert_allclose(box.centre, [(left + 0.5) / 2, 2.0, 1.0], atol=0.1)
    np.testing.assert_allclose(box.size, [1.0, 0.0, 5 * 20 / 60], atol=0.05)
