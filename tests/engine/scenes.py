# SPDX-License-Identifier: Apache-2.0
"""Scenes on an engine of their own, and a room with two things in it, for tests that need one."""

from __future__ import annotations

from typing import Any

import numpy as np

from adatoken3d_ros.engine.answer import Answer
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import Settings

_K = np.array([[80.0, 0, 80], [0, 80, 60], [0, 0, 1]])
THINGS = (((0.05, 1.35, 0.5), (0.5, 0.3, 1.0)), ((-0.65, 1.3, 0.2), (0.3, 0.2, 0.4)))  # centre and size


def room_frame(index: int = 0, boxes: Any = THINGS) -> PosedFrame:
    """From x = 0.6 * index, 1 m high, along +y at a wall 2 m away, a floor at z = 0 and boxes, centre and size."""
    v, u = np.mgrid[:120, :160]
    rays = np.stack([(u - 80) / 80, np.ones(u.shape), -(v - 60) / 80], axis=-1)
    eye = np.array([0.6 * index, 0.0, 1.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.minimum(2.0, np.where(rays[..., 2] < 0, -1.0 / rays[..., 2], np.inf))
        for centre, size in boxes:
            near, far = ((np.array(centre) + s * np.array(size) / 2 - eye) / rays for s in (-1, 1))
            enter, leave = np.minimum(near, far).max(axis=-1), np.maximum(near, far).min(axis=-1)
            depth = np.where((enter < leave) & (enter > 0), np.minimum(depth, enter), depth)
    rgb = np.random.default_rng(index).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]], eye
    return PosedFrame(rgb, depth.astype(np.float32), _K, T, stamp_ns=(index + 1) * 100_000_000)


def new_scene(
    model: Any, tokenizer: Any, config: SessionConfig | None = None, *, strategy: Strategy | None = None, **engine: Any
) -> Scene:
    """An empty one; `engine`: options of Engine."""
    return Engine(model, tokenizer, **engine).open(config, strategy)


def ask(scene: Any, *args: Any, **options: Any) -> Answer:
    """Asks the scene's own engine."""
    answer: Answer = scene.runtime.ask(scene, *args, **options)
    return answer


def load_scene(settings: Settings) -> Scene:
    """An empty one on the model that the settings name."""
    return open_scene(load_engine(settings), settings)


def working(scene: Any, **options: Any) -> tuple[Worker, SceneQueue]:
    """A worker that is not started yet and owns the scene's engine, and the scene's queue."""
    own = {name: options.pop(name) for name in ("ahead", "clock", "changed") if name in options}
    worker = Worker(lambda: scene.runtime, **own)
    return worker, worker.open(lambda _: scene, **options)
