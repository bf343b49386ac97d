# SPDX-License-Identifier: Apache-2.0
"""A run that begins with a trained model's weights, where the tower has got a detector and the vocabulary words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adatoken3d_ros.lab.synthetic import wordings
from adatoken3d_ros.lab.training import language
from adatoken3d_ros.lab.training.data import Scene, SceneConfig, build_scene, read_scene, save_scene
from adatoken3d_ros.lab.training.language import config_content
from adatoken3d_ros.lab.training.packing import spatial_tokens
from adatoken3d_ros.lab.training.recipe import TrainConfig, TrainingError
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lab.training.variants import detected, thinned, turned
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.vision.ssd import CLASSES
from adatoken3d_ros.lmm.vision.tower import VisionTower
from tests.lab.training.conftest import SIZE

OWN = 3 + 40  # channels of a patch without evidence


@pytest.fixture(scope="module")
def detecting(vision: VisionTower) -> VisionTower:
    """The tower with a detector that says nothing."""
    content = config_content(replace(SIZE, detector=True), 512)
    tower = Llava3DConfig.from_dict(content).make_tower().requires_grad_(False).eval()
    tower.tower.load_state_dict(vision.tower.state_dict(), strict=False)
    for head in tower.tower.detector.classes:
        head.weight.zero_()
        head.bias.fill_(-9.0)
    return tower


@pytest.fixture(scope="module")
def scene(detecting: VisionTower, scene_config: SceneConfig) -> Scene:
    return build_scene(1, "train", detecting, replace(scene_config, camera="real"))


def test_a_scene_keeps_what_a_detector_might_have_said(scene: Scene, tmp_path: Path) -> None:
    assert scene.evidence is not None and scene.evidence.shape == (len(scene.features), 2, len(CLASSES))
    assert scene.features.shape[1] == OWN + len(CLASSES) and (scene.features[:, OWN:] == 0).all()
    assert float(scene.evidence.max()) > 0.3 and not torch.equal(scene.evidence[:, 0], scene.evidence[:, 1])
    save_scene(scene, tmp_path / "00000001.npz")
    again = read_scene(tmp_path / "00000001.npz", "train").evidence
    assert again is not None
    torch.testing.assert_close(again, scene.evidence, atol=2e-3, rtol=1e-3)
    # Each token keeps its own when the room is turned or thinned.
    moved = turned(scene, 1, True, SIZE.voxel_size)
    assert moved.evidence is not None
    for token in (0, len(scene.features) // 2):
        same = (moved.features == scene.features[token]).all(dim=1).nonzero()[0, 0]
        assert torch.equal(moved.evidence[same], scene.evidence[token])
    few = thinned(scene, 0.5, 0.5, np.random.default_rng(0))
    assert few.evidence is not None and len(few.evidence) == len(few.features) < len(scene.features)


def test_evidence_is_the_detectors_own_or_simulated_or_all_that_there_is(scene: Scene) -> None:
    assert scene.evidence is not None
    rng = np.random.default_rng(0)
    real = detected(scene, 0.0, 0.0, rng)
    assert torch.equal(real.features, scene.features) and real.evidence is None
    simulated = detected(scene, 1.0, 0.0, rng)
    assert torch.equal(simulated.features[:, :OWN], scene.features[:, :OWN])
    assert any(torch.equal(simulated.features[:, OWN:], scene.evidence[:, k]) for k in (0, 1))
    strange = detected(scene, 0.0, 1.0, rng)
    assert torch.equal(strange.features[:, :3], scene.features[:, :3])  # colours stay
    both = torch.stack([strange.features[:, 3:OWN].flatten(), scene.features[:, 3:OWN].flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.5
    bare = replace(scene, evidence=None)
    assert detected(bare, 1.0, 1.0, rng) is bare


def test_what_was_learned_is_kept(
    make_trainer: Callable[..., Trainer],
    detecting: VisionTower,
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as without:
        without.setattr(language, "UNKNOWN", "no")
        old = make_trainer()
    assert len(make_trainer().tokenizer) > len(old.tokenizer)
    old.model.position.norm.weight.data.uniform_(0.5, 1.5)
    old.save(tmp_path)
    new = Trainer(TrainConfig(steps=2, seed=5, align=0, early=1), replace(SIZE, detector=True), detecting, [scene])
    new.start(tmp_path)
    word = new.tokenizer.encode(wordings.article("chair"), add_special_tokens=False)
    theirs = old.tokenizer.encode(wordings.article("chair"), add_special_tokens=False)
    with torch.no_grad():
        assert torch.equal(new.model.decoder.embed(torch.tensor(word)), old.model.decoder.embed(torch.tensor(theirs)))
        now = spatial_tokens(new.model, [scene])[0]
        before = spatial_tokens(old.model, [replace(scene, features=scene.features[:, :OWN])])[0]
        # The hidden layer of the places has grown, with units that LayerNorm finds much like the others.
        assert float((now - before).norm() / before.norm()) < 0.15
    assert new.recipe["started_from"]["step"] == 0 and new.step == 0


def test_another_model_is_refused(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path)

    def start(directory: Path = tmp_path, tower: VisionTower | None = None, **size: object) -> None:
        new = replace(SIZE, **size)  # type: ignore[arg-type]
        Trainer(trainer.config, new, tower or trainer.model.vision, trainer.scenes).start(directory)

    start()
    with pytest.raises(TrainingError, match=r"holds .* of shape"):
        start(width=32)
    with pytest.raises(TrainingError, match="has num_attention_heads 2, wanted is 4"):
        start(heads=4)
    other = copy.deepcopy(trainer.model.vision)
    other.tower.stem.weight += 0.1
    with pytest.raises(TrainingError, match=r"another vision tower: .*stem\.weight differs"):
        start(tower=other)
    with pytest.raises(TrainingError, match="tokens are not views"):
        start(tokens="views", heads=4, kv_heads=2)
    with pytest.raises(TrainingError, match="cannot be started from"):
        start(tmp_path / "nothing")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(TrainingError, match="cannot be started from"):
        start()
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match="lacks "):
        start()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TrainingError, match="cannot be started from"):
        start()


def test_where_it_began_is_told_after_it_went_on(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    make_trainer().save(tmp_path / "old")
    run = make_trainer()
    run.start(tmp_path / "old")
    run.save(tmp_path / "run")
    again = make_trainer()
    again.resume(tmp_path / "run")
    assert again.recipe["started_from"] == run.recipe["started_from"] != {}


def test_evidence_gets_less_noise_than_other_features_whatever_a_token_is(
    detecting: VisionTower, scene: Scene, scene_config: SceneConfig
) -> None:
    size = replace(SIZE, tokens="views", heads=4, kv_heads=2, detector=True)
    grids = replace(scene_config, grid=3, tokens="views")
    of_views = build_scene(1, "train", detecting, grids)
    config = TrainConfig(steps=2, align=0, early=2, sizes=((60, 1),), mix=(1.0,), noise=1.0, simulated=0.0, strange=0.0)
    for now, one in ((size, of_views), (replace(SIZE, detector=True), scene)):
        trainer = Trainer(replace(config, align=2), now, detecting, [one])
        noisy = trainer.sample(0, 0)[0][0].features
        assert noisy.shape[1:] == one.features.shape[1:]
        # What the detector said of these views is nothing, so all of it is noise.
        assert float(noisy[..., OWN:].std()) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    "wrong", [{"simulated": 1.1}, {"strange": float("nan")}, {"simulated": 0.6, "strange": 0.6}, {"unseen": -1}]
)
def test_parts_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match=f"{next(iter(wrong))}"):
        TrainConfig(**wrong)  # type: ignore[arg-type]
