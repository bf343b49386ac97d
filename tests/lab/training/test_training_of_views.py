# SPDX-License-Identifier: Apache-2.0
"""Training of a model whose tokens are those of views: the same trainer, losses and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.training.data import (
    Scene,
    SceneConfig,
    build_scene,
    encode_views,
    grid_lines,
    read_scene,
    save_scene,
)
from adatoken3d_ros.lab.training.language import tokenizer
from adatoken3d_ros.lab.training.packing import Shape, embed, pack, run, spatial_tokens
from adatoken3d_ros.lab.training.pretrained import fingerprint
from adatoken3d_ros.lab.training.recipe import TrainConfig
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lab.training.variants import thinned, turned
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.lmm.untrained import trainable, trainable_of
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from tests.engine.scenes import new_scene
from tests.lab.training.conftest import SIZE

VIEWS = replace(SIZE, tokens="views", heads=4, kv_heads=2)
SIDE = 3  # tokens along the edge of a view


@pytest.fixture(scope="module")
def scenes(vision: VisionTower) -> list[Scene]:
    config = SceneConfig(3, SIZE.image_size, SIDE, 0.2, 27, fingerprint(vision), "views")
    return [build_scene(seed, "train", vision, config) for seed in range(3)]


@pytest.fixture
def make_trainer(vision: VisionTower, scenes: list[Scene]) -> Callable[..., Trainer]:
    def make(**settings: object) -> Trainer:
        given = {"steps": 20, "warmup": 2, "align": 0, "early": 10, "noise": 0.1, "sizes": ((60, 1),), "mix": (1.0,)}
        return Trainer(TrainConfig(**{**given, **settings}), VIEWS, vision, scenes)  # type: ignore[arg-type]

    return make


def test_a_scene_is_what_a_session_makes_of_the_views(make_trainer, scenes: list[Scene]) -> None:
    """Its tokens, their places and how many rows they take, for all that has not been carved out of the scene there."""
    trainer: Trainer = make_trainer()
    model, scene = trainer.model.eval(), scenes[0]
    session = new_scene(model, trainer.tokenizer, SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0)))
    for view in render_views(scene.room, seed=0, count=3):
        session.observe(view.frame)
    session.encode_pending()
    tokens = session.memory.question_tokens(100)
    assert scene.where is not None and scene.place is not None and scene.features.shape[1:] == (4, vision_width(model))
    ours = {pair: n for n, pair in enumerate(zip(scene.where.view.tolist(), scene.where.cell.tolist(), strict=True))}
    common = [ours[pair] for pair in zip(tokens.view.tolist(), tokens.cell.tolist(), strict=True)]
    assert len(common) > 0.9 * len(ours) and scene.where.grids == tokens.grids
    with torch.no_grad():
        expected = model.scene_tokens(tokens.features, tokens.position)
        (found,) = spatial_tokens(model, [scene])
        torch.testing.assert_close(found[common], expected, rtol=1e-4, atol=1e-5)
        assert scene.rows == len(model.lay_out(found, scene.where)[0]) == len(found) + 3 * SIDE
    torch.testing.assert_close(scene.place[common], tokens.xyz)


def vision_width(model) -> int:
    return int(model.vision.width)


def test_points_know_what_they_show_and_files_give_it_back(scenes: list[Scene], tmp_path: Path) -> None:
    scene = scenes[0]
    shown = scene.instance >= FIRST_ITEM
    assert shown.any() and set(scene.voxel.tolist()) == set(range(len(scene.features)))
    for xyz, instance in zip(scene.xyz[shown].numpy(), scene.instance[shown].tolist(), strict=True):
        item = scene.room.item(instance)
        assert (xyz > np.array(item.low) - 0.02).all() and (xyz < np.array(item.high) + 0.02).all()
    save_scene(scene, tmp_path / "00000000.npz")
    again = read_scene(tmp_path / "00000000.npz", "train")
    assert again.where is not None and scene.where is not None and again.where.grids == scene.where.grids
    assert torch.equal(again.where.view, scene.where.view) and torch.equal(again.where.cell, scene.where.cell)
    assert torch.equal(again.place, scene.place)  # type: ignore[arg-type]
    torch.testing.assert_close(again.features, scene.features, rtol=1e-3, atol=1e-3)


def test_a_token_without_a_measured_point_shows_the_room(vision: VisionTower, scenes: list[Scene]) -> None:
    """Depth only in columns that none of a token's 16 points is in: each has a place, and one point, which is that."""
    view = render_views(scenes[0].room, seed=0, count=1)[0]
    depth = np.full_like(view.frame.depth, np.nan)
    depth[:, 45::10] = view.frame.depth[:, 45::10]  # points are in columns 41, 61, 81, ...
    config = SceneConfig(1, SIZE.image_size, SIDE, 0.2, 27, fingerprint(vision), "views")
    scene = encode_views(scenes[0].room, [replace(view, frame=replace(view.frame, depth=depth))], vision, config)
    assert len(scene.features) == len(scene.voxel) == SIDE**2 and scene.place is not None
    assert torch.equal(scene.xyz[torch.argsort(scene.voxel)], scene.place) and (scene.instance < FIRST_ITEM).all()


@pytest.mark.parametrize("mirror", [False, True])
def test_places_are_turned_and_rows_run_the_other_way_in_a_mirror(scenes: list[Scene], mirror: bool) -> None:
    scene = scenes[0]
    other = turned(scene, 1, mirror, 0.2)
    assert scene.where is not None and other.where is not None and scene.place is not None and other.place is not None
    before = {pair: n for n, pair in enumerate(zip(scene.where.view.tolist(), scene.where.cell.tolist(), strict=True))}
    for n, (view, cell) in enumerate(zip(other.where.view.tolist(), other.where.cell.tolist(), strict=True)):
        row, column = divmod(cell, SIDE)
        old = before[view, row * SIDE + (SIDE - 1 - column if mirror else column)]
        assert torch.equal(other.features[n], scene.features[old])
        x, y, z = scene.place[old].tolist()
        assert other.place[n].tolist() == pytest.approx([-y, -x if mirror else x, z])
        assert set(other.instance[other.voxel == n].tolist()) == set(scene.instance[scene.voxel == old].tolist())
    assert other.rows == scene.rows


def test_what_is_left_out_takes_the_ends_of_its_rows_along(scenes: list[Scene]) -> None:
    scene = scenes[0]
    shown = set(scene.instance[scene.instance >= FIRST_ITEM].tolist())
    thin = thinned(scene, 0.0, 0.0, np.random.default_rng(0))
    assert set(thin.instance[thin.instance >= FIRST_ITEM].tolist()) == shown and thin.where is not None
    assert thin.rows == len(thin.features) + len(set(grid_lines(thin.where).tolist())) < scene.rows
    for most in range(thin.rows + 2, scene.rows + 2):
        capped = thinned(scene, 1.0, 1.0, np.random.default_rng(0), most=most)
        assert most - 2 <= capped.rows <= most or len(capped.features) == len(scene.features)
    whole = thinned(scene, 1.0, 1.0, np.random.default_rng(0))
    assert torch.equal(whole.features, scene.features) and whole.rows == scene.rows


def test_packed_questions_equal_questions_asked_alone(make_trainer, scenes: list[Scene]) -> None:
    """The logits of every answer, against transformers' own forward of each whole prompt, newlines and shared key heads
    included."""
    trainer: Trainer = make_trainer()
    model = trainer.model.eval()
    scenes = [scenes[0], thinned(scenes[1], 0.5, 0.1, np.random.default_rng(0))]
    qas = [generate(s.room, np.random.default_rng(0), s.sights, per_family=1) for s in scenes]
    asked = [[trainer.encoder.encode(qa, s) for qa in own] for own, s in zip(qas, scenes, strict=True)]
    language = model.decoder.language
    with torch.no_grad():
        spatial = spatial_tokens(model, scenes)
        prefixes, places = trainer.objective.prefixes(scenes, spatial)
        assert [len(p) - len(trainer.encoder.system) for p in prefixes] == [s.rows for s in scenes]
        for prefix, at, own in zip(prefixes, places, spatial, strict=True):
            assert torch.equal(prefix[at], own)
        packed = pack(asked, [len(p) for p in prefixes], Shape(2, 60, ((9, 24), (9, 72))))
        assert len(packed.questions) > 15
        logits = language.lm_head(run(language, prefixes, embed(model, packed), packed)[2 * 60 :])
        by_text = [{trainer.encoder.encode(qa, s): qa for qa in own} for own, s in zip(qas, scenes, strict=True)]
        for number, question in enumerate(packed.questions):
            scene = int(packed.scene[number])
            text, points = parse_clicks(by_text[scene][question].question)
            prompt = model.prompt(trainer.tokenizer, text, n_clicks=len(points))
            clicks = model.embed_clicks(torch.tensor(points).reshape(-1, 3).float())
            alone = model.splice(prompt, spatial[scene], clicks, where=scenes[scene].where).embeds
            answer = torch.tensor(question.ids[question.n_prompt :])
            whole = torch.cat([alone, language.model.embed_tokens(answer)[None]], dim=1)
            expected = language(inputs_embeds=whole).logits[0, len(prefixes[scene]) :]
            start = int(packed.start[number])
            torch.testing.assert_close(logits[start : start + len(question.ids)], expected, rtol=1e-5, atol=1e-5)


def test_every_word_is_one_token_and_every_digit(make_trainer, scenes: list[Scene]) -> None:
    trainer: Trainer = make_trainer()
    families = set()
    for scene in scenes:
        for qa in generate(scene.room, np.random.default_rng(0), scene.sights, per_family=2):
            families.add(qa.family)
            encoded = trainer.encoder.encode(qa, scene)
            names = trainer.tokenizer.convert_ids_to_tokens(list(encoded.ids))
            assert [n for n in names if len(n) == 1 and n.isascii() and n.isalpha() and n != "D"] == [], (
                qa.question,
                names,
            )
            said = trainer.tokenizer.decode(list(encoded.ids[encoded.n_prompt : -1])).strip()
            assert said == qa.answer
    assert families == set(FAMILIES)
    ids = trainer.encoder.text("[-1.25, 0.50]")
    weights = [trainer.encoder._weight(a, b) for a, b in zip(ids, (*ids[1:], -1), strict=True)]
    names = trainer.tokenizer.convert_ids_to_tokens(list(ids))
    assert names == ["Ġ[-", "1", ".", "2", "5", ",", "Ġ", "0", ".", "5", "0", "]"]
    assert weights == [1, 1, 0.15, 1, 0.15, 0.15, 0.15, 1, 0.15, 1, 0.15, 0.15]


def test_it_learns_is_resumed_and_exported(make_trainer, scenes: list[Scene], tmp_path: Path) -> None:
    """To the bit the run that was not interrupted; exported without a tower, which is that of another checkpoint."""
    through: Trainer = make_trainer(steps=8, align=3, decay=0.0, rate=4e-3, thinnest=(1.0, 1.0))
    reports = [through.train_step() for _ in range(8)]
    assert "click@0" not in reports[0].losses  # nothing that could be learned embeds the places
    assert reports[-1].losses["answer"] < 0.9 * reports[3].losses["answer"]
    assert {"kind@1", "told kind@2", "pointing", "related", "rank@2"} <= set(reports[-1].losses)
    first: Trainer = make_trainer(steps=8, align=3, decay=0.0, rate=4e-3, thinnest=(1.0, 1.0))
    for _ in range(4):
        first.train_step()
    first.save(tmp_path / "whole")
    second: Trainer = make_trainer(steps=8, align=3, decay=0.0, rate=4e-3, thinnest=(1.0, 1.0))
    second.resume(tmp_path / "whole")
    for _ in range(4):
        second.train_step()
    assert all(torch.equal(p, second.parameters[name]) for name, p in through.parameters.items())
    second.save(tmp_path / "whole")
    second.export(tmp_path / "a" / "half", tmp_path / "whole")
    content = json.loads((tmp_path / "a" / "half" / "config.json").read_text())
    assert content["mm_vision_tower"] == "../../whole" and content["training"]["step"] == 8
    model, words, report = registry.load(tmp_path / "a" / "half", dtype=torch.float32)
    assert report.vision == str(tmp_path / "whole") and report.ignored == []
    assert words.get_vocab() == tokenizer("views").get_vocab()
    for name, tensor in registry.load(tmp_path / "whole").model.state_dict().items():
        close = 0.0 if name.startswith("vision.") else 1e-3
        assert torch.allclose(model.state_dict()[name], tensor, rtol=close, atol=close * 1e-3), name
    (tmp_path / "whole").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="carries no vision tower.*names, .*whole"):
        registry.load(tmp_path / "a" / "half")
    assert registry.load(tmp_path / "a" / "half", vision_path=tmp_path / "moved").report.ignored == []


def test_a_blind_one_sees_one_empty_token(make_trainer, scenes: list[Scene]) -> None:
    trainer: Trainer = make_trainer(blind=True)
    assert trainer.alone == 2  # and the end of its row
    assert "pointing" not in trainer.train_step().losses
    assert set(trainer.evaluate(scenes[:1])) <= {*FAMILIES, "macro"}


def test_what_is_not_trained_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="whose tokens are 'pictures'"):
        trainable("pictures")
    with pytest.raises(ValueError, match="model_type 'qwen3_vl' is none"):
        trainable_of({"model_type": "qwen3_vl"})
    assert trainable_of({"model_type": "llava_qwen"}) is trainable("views")
