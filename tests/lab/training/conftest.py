# SPDX-License-Identifier: Apache-2.0
"""Small rooms, a small model and a tower with random weights: everything that training needs, in seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from adatoken3d_ros.lab.training.data import Scene, SceneConfig, build_scene
from adatoken3d_ros.lab.training.language import config_content
from adatoken3d_ros.lab.training.pretrained import fingerprint
from adatoken3d_ros.lab.training.recipe import TrainConfig
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.untrained import ModelSize
from adatoken3d_ros.lmm.vision.tower import VisionTower

SIZE = ModelSize(
    layers=4, width=48, heads=2, intermediate=64, image_size=96, taps=(0, 3), voxel_size=0.4, views=3, max_tokens=200
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on several, and how sums are split among them would show in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def vision() -> VisionTower:
    torch.manual_seed(0)
    return Llava3DConfig.from_dict(config_content(SIZE, 512)).make_tower().requires_grad_(False).eval()


@pytest.fixture(scope="session")
def scene_config(vision: VisionTower) -> SceneConfig:
    return SceneConfig(SIZE.views, SIZE.image_size, 6, SIZE.voxel_size, SIZE.max_tokens, fingerprint(vision))


@pytest.fixture(scope="session")
def scenes(vision: VisionTower, scene_config: SceneConfig) -> list[Scene]:
    return [build_scene(seed, "train", vision, scene_config) for seed in range(4)]


def new_trainer(vision: VisionTower, scenes: list[Scene], **settings: object) -> Trainer:
    config = TrainConfig(
        **{
            **{"steps": 20, "warmup": 2, "align": 0, "early": 10, "noise": 0.1, "sizes": ((226, 1),), "mix": (1.0,)},
            **settings,
        }
    )  # type: ignore[arg-type]
    return Trainer(config, SIZE, vision, scenes)


@pytest.fixture
def make_trainer(vision: VisionTower, scenes: list[Scene]) -> Callable[..., Trainer]:
    return functools.partial(new_trainer, vision, scenes)
