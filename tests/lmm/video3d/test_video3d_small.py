# SPDX-License-Identifier: Apache-2.0
"""The second trained model, which the benchmarks compare with the embedded one: whole, small, and of use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views, sights
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.weights import embedded_path
from tests.engine.scenes import ask, new_scene

SMALL = Path(__file__).parents[3] / "benchmarks" / "data" / "video3d_small"


def test_it_is_loaded_with_the_tower_of_the_embedded_model_and_answers() -> None:
    assert sum(file.stat().st_size for file in SMALL.iterdir()) < 15e6
    model, tokenizer, report = registry.load(SMALL, dtype=torch.float32)
    assert report.vision == str(embedded_path()) and report.ignored == [] and model.sizes.tokens == "views"
    assert model.decoder.size.keys < model.decoder.size.queries
    embedded = registry.load(embedded_path(), dtype=torch.float32).model
    for name, tensor in embedded.vision.state_dict().items():
        assert torch.equal(tensor, model.vision.state_dict()[name])
    room = make_room(7, "test")
    views = render_views(room, seed=7, count=8)
    session = new_scene(model, tokenizer)
    for view in views:
        session.observe(view.frame)
    asked = generate(room, np.random.default_rng(0), sights(views, np.random.default_rng(0)), families=("colour",))
    said = [ask(session, Question(qa.question, max_new_tokens=8)) for qa in asked]
    assert all(answer.status == Status.OK for answer in said)
    assert any(answer.text == qa.answer for answer, qa in zip(said, asked, strict=True))


def test_its_accuracy_is_that_of_these_weights() -> None:
    """The figures in the results name the model and how it was trained."""
    told = json.loads((SMALL.parents[1] / "results" / "accuracy_video3d_cpu.json").read_text())
    content = json.loads((SMALL / "config.json").read_text())
    assert told["model"]["hash"] == registry.load(SMALL).model.identity
    assert told["model"]["training"] == content["training"] and content["training"]["step"] == 5150
    assert told["test"]["questions"] >= 300 and told["test"]["macro"] > told["majority"]["test"]["macro"] + 0.2
