# SPDX-License-Identifier: Apache-2.0
"""A tiny random model and a corner of a room, small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.scene.frames import PosedFrame
from tests.engine.gated import LIMIT, GatedScene
from tests.engine.scenes import new_scene, working


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> tuple[Any, Any]:
    model, tokenizer, _ = registry.load(tiny_directory)
    return model, tokenizer


@pytest.fixture
def make_session(tiny: tuple[Any, Any]) -> Callable[..., Scene]:
    def make(config: SessionConfig | None = None, **options: Any) -> Scene:
        return new_scene(*tiny, config, **options)

    return make


def _wall_frame(index: int, *, depth: float = 2.0) -> PosedFrame:
    """A camera at x = 0.5 * index, 1 m high, looking along +y at a wall `depth` metres away."""
    rgb = np.random.default_rng(index).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    T = np.eye(4)
    T[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # optical x -> world x, y (down) -> -z, z -> y
    T[:3, 3] = [0.5 * index, 0.0, 1.0]
    K = np.array([[120.0, 0, 80], [0, 120, 60], [0, 0, 1]])
    return PosedFrame(rgb, np.full((120, 160), depth, np.float32), K, T, stamp_ns=(index + 1) * 100_000_000)


@pytest.fixture(scope="session")
def wall_frame() -> Callable[..., PosedFrame]:
    return _wall_frame


@pytest.fixture
def frames() -> list[PosedFrame]:
    return [_wall_frame(i) for i in range(3)]


@pytest.fixture
def scene() -> GatedScene:
    return GatedScene()


@pytest.fixture
def make_queue(scene: GatedScene) -> Iterator[Callable[..., SceneQueue]]:
    workers: list[Worker] = []

    def make(**options: Any) -> SceneQueue:
        worker, queue = working(scene, **options)
        worker.start()
        queue.ready.result(LIMIT)
        workers.append(worker)
        return queue

    yield make
    for worker in workers:
        scene.release.release(100)
        assert worker.stop(LIMIT)
