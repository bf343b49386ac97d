# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.training.language import config_content
from adatoken3d_ros.lab.training.pretrained import PretrainedError, fingerprint, load_vision
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLite
from adatoken3d_ros.lmm.vision.tower import VisionTower
from tests.lmm.test_efficientnet import unfolded


@pytest.fixture(scope="module")
def config() -> Llava3DConfig:
    from tests.lab.training.conftest import SIZE

    return Llava3DConfig.from_dict(config_content(SIZE, 512))


def test_the_published_file_is_folded_and_brought_to_one_scale(config: Llava3DConfig, tmp_path: Path) -> None:
    torch.save(unfolded(torch.Generator().manual_seed(0)), tmp_path / "published.pth")
    tower = load_vision(tmp_path / "published.pth", config.make_tower(), rooms=range(2))
    assert isinstance(tower.tower, EfficientNetLite) and not tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    images = [view.frame.rgb for seed in range(2) for view in render_views(make_room(seed), seed=seed, count=4)]
    features = tower(images).flatten(0, 1)
    assert features.mean(dim=0).abs().max() < 1e-3
    assert features.std(dim=0).numpy() == pytest.approx(np.ones(features.shape[1]), abs=1e-3)


def test_a_checkpoint_gives_back_the_very_tower(
    make_trainer: Callable[..., Trainer], vision: VisionTower, config: Llava3DConfig, tmp_path: Path
) -> None:
    make_trainer().save(tmp_path)
    tower = load_vision(tmp_path, config.make_tower())
    assert (
        fingerprint(tower)
        == fingerprint(vision)
        == fingerprint(load_vision(tmp_path / "model.safetensors", config.make_tower()))
    )
    with torch.no_grad():
        next(tower.parameters()).add_(1e-3)
    assert fingerprint(tower) != fingerprint(vision)


def test_other_files_are_refused(config: Llava3DConfig, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(PretrainedError, match=r"other\.pth does not hold EfficientNet-Lite0"):
        load_vision(tmp_path / "other.pth", config.make_tower())
    # What could run code when it is read is not read.
    torch.save({"weight": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(PretrainedError, match=r"code\.pth does not hold"):
        load_vision(tmp_path / "code.pth", config.make_tower())
    with pytest.raises(PretrainedError, match=r"model\.safetensors"):
        load_vision(tmp_path, config.make_tower())
