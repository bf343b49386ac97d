# SPDX-License-Identifier: Apache-2.0
"""The weights that come with the package: whole, small, of the stated make, and of use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.self_test import check, read_known
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views, sights
from adatoken3d_ros.lab.training.data import SceneConfig, encode_views
from adatoken3d_ros.lab.training.losses import Truth
from adatoken3d_ros.lab.training.pretrained import fingerprint, load_vision
from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.safetensors_files import LoadReport
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.weights import embedded_path
from tests.engine.scenes import ask, new_scene

Loaded = tuple[Llava3D, PreTrainedTokenizerFast, LoadReport]


@pytest.fixture(scope="module")
def embedded() -> Loaded:
    return checkpoint.load(embedded_path(), dtype=torch.float32)


def test_the_files_are_few_and_small(embedded: Loaded) -> None:
    path: Path = embedded_path()
    files = {f.name for f in path.iterdir() if f.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "model.safetensors",
        "self_test.json",
        "tokenizer.json",
        "understanding.json",
    }
    assert sum(f.stat().st_size for f in path.iterdir()) <= 40_000_000
    model, tokenizer, report = embedded
    assert report.vision == "embedded" and report.ignored == []
    assert len(tokenizer) == model.config.language.vocab_size
    assert model.config.language.num_hidden_layers >= 12
    assert 5e6 <= sum(p.numel() for p in model.language.parameters()) <= 15e6


def test_what_it_answers_to_the_self_test_is_of_these_weights(embedded: Loaded) -> None:
    model, tokenizer, _ = embedded
    known = read_known(embedded_path())
    assert known is not None and known.model == model.identity and known.losses.keys() == {"int8", "int4", "fp8"}
    assert "2 of 2 tokens as known" in check(model, tokenizer, known)


def test_the_vision_tower_is_the_published_one_to_stored_numbers(embedded: Loaded) -> None:
    """Features of stages 3, 5 and 7 as the package efficientnet-lite-pytorch 0.1.0 gave them on the same picture.

    There, cell i of stride s looks at pixel s i + s - 1, here at s i: the picture is moved by one pixel.
    """
    tower = embedded[0].vision.tower
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 64, 64, generator=generator), size=1024, mode="bicubic")
    moved = torch.nn.functional.pad(image, (1, 0, 1, 0))[:, :, :1024, :1024]
    stored = {
        3: [7.43882942, -0.48753870, 8.03536415, -20.10200310, 9.45602226, 10.79215050],
        5: [-3.14579844, -2.14817572, 1.09185803, 10.79554081, 4.62776756, -3.91397762],
        7: [-0.07565077, -1.39716363, -2.40447807, 1.88505042, 0.61066943, 1.51424348],
    }
    with torch.no_grad():
        x = torch.nn.functional.relu6(tower.stem(moved))
        for number, stage in enumerate(tower.stages, 1):
            x = stage(x)
            if number in stored:
                cell = x.shape[2] // 2 + 1
                assert x[0, :6, cell, cell].tolist() == pytest.approx(stored[number], abs=1e-3)


def test_its_features_have_one_scale_on_rooms_it_was_not_scaled_on(embedded: Loaded) -> None:
    vision = load_vision(embedded_path(), embedded[0].config.make_tower())
    assert fingerprint(vision) == fingerprint(embedded[0].vision)
    views = render_views(make_room(0, "test"), seed=0, count=4)
    features = vision([view.frame.rgb for view in views]).flatten(0, 1)
    assert 0.5 < float(features.std()) < 1.5 and float(features.mean().abs()) < 0.3


def test_it_answers_in_words_of_its_questions(embedded: Loaded) -> None:
    """Through the session, unpruned to pruned: every answer is one that its family can have."""
    model, tokenizer, _ = embedded
    room = make_room(3, "test")
    views = render_views(room, seed=3, count=model.config.num_views)
    session = new_scene(model, tokenizer, SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0)))
    for view in views:
        session.observe(view.frame)
    asked = generate(room, np.random.default_rng(0), sights(views, np.random.default_rng(0)), per_family=1)
    answers = {qa.family: ask(session, Question(qa.question)) for qa in asked}
    assert all(answer.status == Status.OK for answer in answers.values())
    assert answers["existence"].text in ("yes", "no")
    assert len(answers["box"].boxes) == 1


def test_its_tokens_were_taught_on_these_scenes(embedded: Loaded) -> None:
    """The recipe's scene settings are those of the checkpoint, so that training goes on from it as it was."""
    config = embedded[0].config
    room = make_room(1, "test")
    views = render_views(room, seed=1, count=2)
    settings = SceneConfig(2, config.image_size, config.grid, config.voxel_size, config.max_spatial_tokens, "")
    scene = encode_views(room, views, embedded[0].vision, settings)
    assert Truth.of(scene).share.shape == (len(scene.features), len(room.items) + 1)
