# SPDX-License-Identifier: Apache-2.0
"""A question about which thing is meant: from a scene's clusters over the model's grounding head to boxes and words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Box, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.pointing import meant, told
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.window import OriginMode
from tests.architectures import NAMES, write_tiny
from tests.decoder.oracle import MaskedOracle, last_of_rows
from tests.engine.scenes import THINGS, ask, new_scene, room_frame

LAYERS = 6
QUESTION = Question("locate: the red chair")


@pytest.fixture(scope="module")
def pointing(tmp_path_factory: pytest.TempPathFactory) -> registry.LoadedModel:
    path = tmp_path_factory.mktemp("pointing")
    return registry.load(write_tiny("video3d", path, seed=2, layers=LAYERS, image_size=480, grounds=True))


@pytest.fixture
def see(pointing: registry.LoadedModel) -> Callable[..., Scene]:
    def look(policy: str = "none", boxes: Any = THINGS, n: int = 2, **config: Any) -> Scene:
        strategy = default_strategy(policy, LAYERS)
        scene = new_scene(pointing.model, pointing.tokenizer, SessionConfig(**config), strategy=strategy)
        for index in range(n):
            scene.observe(room_frame(index, boxes))
        assert scene.encode_pending() == n
        return scene

    return look


def test_which_boxes_are_meant_by_hand() -> None:
    assert meant(np.array([0.1, 0.5, 0.2, 0.2])).tolist() == [1]
    assert meant(np.array([0.25, 0.1, 0.3, 0.15, 0.2])).tolist() == [2, 0]
    assert meant(np.array([0.2, 0.2, 0.2, 0.2, 0.2])).tolist() == [0, 1]  # the earlier of equal ones
    assert meant(np.array([0.3, 0.3, 0.4])).tolist() == []
    boxes, chances = np.array([[1, 2, 3, 4, 5, 6], [-0.001, 0.5, 0, 1, 1, 1]]), np.array([0.125, 0.8, 0.075])
    assert told(boxes, chances, np.array([1])) == "1 of 2 boxes: [0.00, 0.50, 0.00, 1.00, 1.00, 1.00] (0.80)"
    both = "2 of 2 boxes: [0.00, 0.50, 0.00, 1.00, 1.00, 1.00] (0.80), [1.00, 2.00, 3.00, 4.00, 5.00, 6.00] (0.12)"
    assert told(boxes, chances, np.array([1, 0])) == both
    assert told(boxes, chances, np.array([], int)) == "none of 2 boxes (0.07)"


def test_the_things_of_a_room_are_what_can_be_meant(see: Callable[..., Scene]) -> None:
    found = see().objects()
    assert found.tokens.shape == (len(found.boxes), 64) and bool(found.tokens.isfinite().all())
    low, high = found.boxes[:, :3] - found.boxes[:, 3:] / 2, found.boxes[:, :3] + found.boxes[:, 3:] / 2
    for centre, size in THINGS:
        # Fronts, tops and sides are seen, in steps of 5 cm; the lowest 0.1 m counts as floor.
        least, most = np.subtract(centre, np.divide(size, 2)), np.add(centre, np.divide(size, 2))
        fits = (np.abs(high - most)[:, [0, 2]] < 0.08).all(axis=1) & (np.abs(low - least)[:, :2] < 0.08).all(axis=1)
        assert (fits & (np.abs(low[:, 2] - 0.12) < 0.06)).any()
    # Others are parts of them.
    things = np.array(THINGS)
    apart = np.abs(found.boxes[:, None, :3] - things[:, 0]) + found.boxes[:, None, 3:] / 2 - things[:, 1] / 2
    assert (apart.max(axis=2).min(axis=1) < 0.01).all()


@pytest.mark.parametrize("mode", OriginMode)
def test_an_answer_is_what_the_head_says_of_them(see: Callable[..., Scene], mode: OriginMode) -> None:
    """Step by step beside: the state behind the last layer, the boxes, the probabilities, the words."""
    scene = see(origin_mode=mode, origin=(0.1, 0.2, 0.0))
    texts: list[str] = []
    answer = ask(scene, QUESTION, on_text=lambda text, _: texts.append(text))
    assert (answer.status, answer.status_message) == (Status.OK, "")
    spliced, _ = scene.spliced(QUESTION)
    model, found = scene.runtime.model, scene.objects()
    state = model.language.model(inputs_embeds=spliced.embeds).last_hidden_state[0, -1]
    with torch.no_grad():
        chances = model.head(state, found.tokens).double().numpy()
    chosen = meant(chances)
    assert answer.text == told(found.boxes, chances, chosen) and texts == [answer.text]
    assert answer.boxes == tuple(Box(tuple(b[:3].tolist()), tuple(b[3:].tolist())) for b in found.boxes[chosen])
    # The model's frame moves, the boxes do not; the sine of their centres is of that frame.
    assert found.boxes[0, :2] == pytest.approx([0.05, 1.35], abs=0.15)


@pytest.mark.parametrize("meant_one", [0, 1])
def test_the_box_whose_vector_is_looked_for_is_told(
    see: Callable[..., Scene], meant_one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = see()
    tokens, model = scene.objects().tokens, scene.runtime.model
    monkeypatch.setattr(model.head.query, "forward", lambda state: model.head.obj(tokens[meant_one]))
    answer = ask(scene, QUESTION)
    assert answer.text.startswith(f"1 of {len(tokens)} boxes: [")
    assert [box.centre for box in answer.boxes] == [tuple(scene.objects().boxes[meant_one, :3])]
    monkeypatch.setattr(model.head.query, "forward", lambda state: model.head.obj(model.head.zero_target))
    answer = ask(scene, QUESTION)
    assert (answer.status, answer.boxes) == (Status.OK, ())
    assert answer.text.startswith(f"none of {len(tokens)} boxes (")


@pytest.mark.parametrize("policy", ["ours", "random", "divprune"])
def test_under_gates_it_reads_what_a_masked_run_gives(see: Callable[..., Scene], policy: str) -> None:
    """The row that is read stays at every gate; boxes are described by what the tower saw, not by rows."""
    scene = see()
    spliced, block = scene.spliced(QUESTION)
    decoder, schedule = scene.runtime.model.decoder, Schedule.of([1, 3], [0.5, 0.1])
    made = make_policy(policy)
    filled = prefill(decoder, spliced.embeds, spliced.layout, schedule, made, scene=block.scene)
    start, end = spliced.spatial_start, spliced.layout.spatial_end
    last = last_of_rows(spliced.layout, filled.trace.last_layer, LAYERS)[start:end]
    assert len(filled.trace.last_layer.unique()) == 3
    masked = MaskedOracle(decoder.language, start, last)
    hidden: list[torch.Tensor] = []
    handle = decoder.language.lm_head.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    masked(spliced.embeds[0].clone())
    handle.remove()
    model, tokens = scene.runtime.model, scene.objects().tokens
    state = hidden[-1].reshape(-1, 64)[-1]
    torch.testing.assert_close(model.language.model.norm(filled.last), state, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.point_at(filled.last, tokens), model.head(state, tokens), atol=1e-5, rtol=0)


def test_gates_prefixes_and_budgets_go_with_it(see: Callable[..., Scene]) -> None:
    pruned = see("ours")
    answer = ask(pruned, QUESTION)
    assert answer.status == Status.OK and 0 < answer.retained_tokens < answer.spatial_tokens
    assert answer.prefill_flops < answer.prefill_flops_unpruned
    whole = ask(see(), QUESTION)
    scene = see(budget=BudgetConfig(reuse=Reuse.PREFIX))
    scene.prepare()
    again = ask(scene, QUESTION)
    assert (again.strategy, again.boxes) == ("scene-prefix", whole.boxes)
    pruned.runtime.warm_up(pruned.strategy)
    pruned.controller.latency = pruned.runtime.latency
    within = ask(pruned, replace(QUESTION, latency_budget_ms=60_000))
    assert within.status == Status.OK and within.budget_met and within.text
    late = ask(pruned, replace(QUESTION, latency_budget_ms=1e-3))
    assert late.text and not late.budget_met and "cannot be kept" in late.status_message


def test_boxes_are_found_once_until_the_scene_changes_and_after_a_file(
    see: Callable[..., Scene], tmp_path: Path
) -> None:
    scene = see()
    before = scene.objects()
    assert scene.objects() is before
    answer = ask(scene, QUESTION)
    scene.save(tmp_path / "scene")
    scene.clear()
    assert scene.load(tmp_path / "scene") == 2
    again = scene.objects()
    assert again is not before and torch.equal(again.tokens, before.tokens)
    np.testing.assert_array_equal(again.boxes, before.boxes)
    assert ask(scene, QUESTION).text == answer.text
    scene.observe(room_frame(3))
    scene.encode_pending()
    assert scene.objects() is not again


def test_with_points_and_in_the_authors_words(see: Callable[..., Scene]) -> None:
    scene = see()
    beside = ask(scene, replace(QUESTION, clicks=np.array([[0.0, 1.2, 0.5]])))
    within = ask(scene, Question("LOCATE: what is near [0.0, 1.2, 0.5]"))
    assert beside.status == within.status == Status.OK
    own = ask(scene, Question("Identify the object according to the following description.\nThe red chair."))
    assert own.status == Status.OK and f" of {len(scene.objects().boxes)} boxes" in own.text
    nothing = ask(scene, Question("locate: "))
    assert nothing.status == Status.INVALID_REQUEST and "nothing is described" in nothing.status_message


def test_a_scene_in_which_nothing_stands_out(see: Callable[..., Scene]) -> None:
    answer = ask(see(boxes=()), QUESTION)
    assert answer.status == Status.NO_SCENE and answer.boxes == ()
    assert answer.status_message.startswith("nothing to point at stands out in the scene: ")
    assert answer.status_message.endswith("above the floor at 0.00 m")
    assert ask(see(boxes=()), Question("What is there?")).status in (Status.OK, Status.TRUNCATED)
    empty = ask(see(n=0), QUESTION)
    assert empty.status == Status.NO_SCENE and "the scene is empty" in empty.status_message


def test_a_scene_without_a_floor(see: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """Things hang together over it until it goes as the largest plane."""
    scene = see()
    whole = ask(scene, QUESTION)
    monkeypatch.setattr(type(scene.memory), "floor", None)
    scene.prepared.forget()
    answer = ask(scene, QUESTION)
    assert whole.status == answer.status == Status.OK and len(scene.objects().boxes) >= 1
    bare = see(boxes=())
    answer = ask(bare, QUESTION)
    assert answer.status == Status.NO_SCENE and answer.status_message.endswith("and no floor was found")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_gives_no_numbers(see: Callable[..., Scene], value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = see()
    with monkeypatch.context() as patch:
        patch.setattr(scene.runtime.model.head.query[3], "bias", torch.nn.Parameter(torch.full((64,), value)))
        answer = ask(scene, QUESTION)
    assert answer.status == Status.ERROR and answer.boxes == ()
    assert answer.status_message == "the model's grounding head gave numbers that are not finite (NaN or infinite)"
    assert ask(scene, QUESTION).status == Status.OK


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_the_head_says_so(name: str, tmp_path: Path, frames: list[PosedFrame]) -> None:
    model, tokenizer, _ = registry.load(write_tiny(name, tmp_path))
    scene = new_scene(model, tokenizer, SessionConfig(max_new_tokens=4))
    scene.observe(frames[0])
    answer = ask(scene, QUESTION)
    assert answer.status == Status.INVALID_REQUEST and "this model has no grounding head" in answer.status_message
    assert ask(scene, Question("Where is the red chair?")).status in (Status.OK, Status.TRUNCATED)
    for call in (
        lambda: model.ground_prompt(tokenizer, "the chair"),
        lambda: model.object_tokens(torch.zeros(1, 1), torch.zeros(1, 1, 3), torch.zeros(1, 6)),
        lambda: model.point_at(torch.zeros(1), torch.zeros(1, 1)),
    ):
        if name != "video3d":
            with pytest.raises(NotImplementedError, match="points at no boxes"):
                call()
