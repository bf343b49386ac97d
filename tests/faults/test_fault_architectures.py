# SPDX-License-Identifier: Apache-2.0
"""Faults that each architecture meets in its own way: of its tensors, of small pictures, of a question's length.

Configure, or the answer, says what is wrong with its value; the worker lives on, and the next good input counts.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("rclpy")

from rig import Rig

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Infeasible
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.loading import load_engine
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from adatoken3d_ros.settings import Settings
from tests.architectures import NAMES, write_tiny

ANSWERED = (Status.OK, Status.TRUNCATED)
NORM = "layers.1.input_layernorm.weight"  # of the language model, whatever stands before it
EXTRA = "model.layers.1.self_attn.sink.weight"


def another_type(path: Path) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "model_type": "unheard_of"}))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor], str], object]) -> None:
    """Edits the weights; told the name of a norm of the language model, too."""
    weights = load_file(path / "model.safetensors")
    (norm,) = (name for name in weights if name.endswith(NORM))
    edit(weights, norm)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def missing(path: Path) -> None:
    change(path, lambda weights, norm: weights.pop(norm))


def misshapen(path: Path) -> None:
    change(path, lambda weights, norm: weights.update({norm: torch.ones(3)}))


def extra(path: Path) -> None:
    change(path, lambda weights, norm: weights.update({EXTRA: torch.ones(3)}))


KNOWN = ", ".join(f"{one.model_type} ({one.class_name})" for one in registry.ARCHITECTURES)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(another_type, f"model_type is 'unheard_of'|known are {KNOWN}", id="unknown-type"),
        pytest.param(missing, f"lacks|{NORM}", id="missing-tensor"),
        pytest.param(misshapen, f"{NORM} in|has shape (3,), expected (64,)", id="misshapen-tensor"),
        pytest.param(extra, EXTRA, id="extra-tensor"),
    ],
)
@pytest.mark.parametrize("kind", NAMES)
def test_a_bad_checkpoint(
    kind: str,
    tiny_of: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
    named: str,
) -> None:
    """A tensor too much is refused, or, where published files may have more than was foreseen, a warning names it."""
    path = shutil.copytree(tiny_of(kind), tmp_path / "model")
    spoil(path)
    settings = Settings({"model.path": str(path), "budget.warm_up": False})
    with caplog.at_level(logging.WARNING, "adatoken3d_ros"):
        try:
            load_engine(settings)
        except CheckpointError as error:
            said = str(error)
        else:
            assert spoil is extra
            said = caplog.text
    for words in named.split("|"):
        assert words in said, said


@pytest.fixture(scope="module", params=NAMES)
def loaded_one(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> registry.LoadedModel:
    return registry.load(tiny_of(request.param))


@pytest.fixture
def rig(loaded_one: registry.LoadedModel, make_rig_of: Callable[..., Rig]) -> Rig:
    """Of one architecture; it has seen two views."""
    made = make_rig_of((loaded_one.model, loaded_one.tokenizer))
    for index in range(2):
        made.send(made.messages(index))
    return made


def check_that_it_goes_on(rig: Rig) -> None:
    """The next good frame counts, and a question is answered."""
    before = len(rig.scene()[0])
    rig.send(rig.messages(40))
    assert rig.fates[-1] == "key_frame" and len(rig.scene()[0]) == before + 1
    assert rig.ask().status in ANSWERED


def test_a_picture_smaller_than_a_patch(rig: Rig) -> None:
    """It is scaled to the size that the model sees, or, where the model keeps a picture's size, refused by its own."""
    views = len(rig.scene()[0])
    for index in range(20, 23):  # until the new CameraInfo has come
        rig.send(rig.messages(index, size=(8, 8)))
    if len(rig.scene()[0]) == views:
        assert "an image of 8x8 pixels is smaller than a patch of 16x16" in rig.report().message
        assert rig.fates[-1].startswith("error: the view at ")
    assert rig.ask().status in ANSWERED
    for index in range(30, 33):
        rig.send(rig.messages(index))
    check_that_it_goes_on(rig)


def test_which_thing_is_meant_without_a_grounding_head(rig: Rig) -> None:
    refused = rig.ask(Question("locate: the red chair"))
    assert refused.status == Status.INVALID_REQUEST and "this model has no grounding head" in refused.status_message
    check_that_it_goes_on(rig)


def test_a_scene_without_valid_depth(loaded_one: registry.LoadedModel, make_rig_of: Callable[..., Rig]) -> None:
    rig = make_rig_of((loaded_one.model, loaded_one.tokenizer))
    for index in range(2):
        messages = rig.messages(index)
        messages["depth"].data = type(messages["depth"].data)("B", bytes(len(messages["depth"].data)))
        rig.send(messages)
    assert rig.fates == ["no_depth", "no_depth"] and "no valid depth" in rig.report().message
    answer = rig.ask()
    assert answer.status == Status.NO_SCENE and "no key frame with valid depth" in answer.status_message
    check_that_it_goes_on(rig)


@pytest.mark.parametrize("kind", NAMES)
def test_a_question_longer_than_the_context(kind: str, tmp_path: Path, make_rig_of: Callable[..., Rig]) -> None:
    """Of a context that holds the scene and a few words."""
    model, tokenizer, _ = registry.load(write_tiny(kind, tmp_path, context_length=300))
    rig = make_rig_of((model, tokenizer))
    rig.send(rig.messages(0))
    assert rig.ask().status in ANSWERED
    answer = rig.ask(Question("\N{SLIGHTLY SMILING FACE}" * 100))  # four tokens each
    assert answer.status == Status.INVALID_REQUEST, answer
    assert re.search(r"make 4\d\d, more than the context of 300$", answer.status_message), answer.status_message
    check_that_it_goes_on(rig)


@pytest.mark.parametrize("first_gate", [0, 3])
def test_a_budget_too_small_for_the_first_legal_gate(
    loaded_one: registry.LoadedModel,
    make_rig_of: Callable[..., Rig],
    monkeypatch: pytest.MonkeyPatch,
    first_gate: int,
) -> None:
    """The smallest that can be kept is told, and can be; layers before the gate see every token, whatever is asked."""
    monkeypatch.setattr(loaded_one.model.decoder, "first_gate", first_gate)
    rig = make_rig_of((loaded_one.model, loaded_one.tokenizer))
    rig.send(rig.messages(0))

    def slow(scene: Any) -> None:
        # Seconds that no machine needs for models so small: 1 a token and layer, so that 1 s more or less decides.
        terms = {"encode": [10.0], "tokens": [0.0] * 3, "prefill": [0.0, 1.0, 0.0, 0.0, 0.0], "decode": [1.0, 0.0]}
        scene.controller.latency = LatencyModel(terms)
        scene.controller.config = BudgetConfig(Infeasible.REFUSE)

    rig.worker.call(slow).result()
    refused = rig.ask(Question("What is there?", latency_budget_ms=1e-3))
    assert refused.status == Status.BUDGET_INFEASIBLE and refused.report is None
    said = "the latency budget of 0.001 ms cannot be kept: the smallest feasible one is "
    assert refused.status_message.startswith(said)
    smallest = float(refused.status_message.removeprefix(said).removesuffix(" ms"))
    answer = rig.ask(Question("What is there?", latency_budget_ms=smallest + 1000))
    assert answer.status in ANSWERED and answer.report is not None, answer.status_message
    assert answer.report.spatial_per_layer[:first_gate] == (answer.spatial_tokens,) * first_gate
    assert answer.spatial_tokens < len(rig.scene()[1]) and answer.decision is not None and answer.decision.rung > 1

    def check(scene: Any) -> None:
        for option in scene.controller.options:
            option.strategy.schedule.check(scene.runtime.n_layers, first_gate)

    rig.worker.call(check).result()
    check_that_it_goes_on(rig)
