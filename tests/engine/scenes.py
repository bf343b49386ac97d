# SPDX-License-Identifier: Apache-2.0
"""Scenes on an engine of their own, for tests that need one."""

from __future__ import annotations

from typing import Any

from adatoken3d_ros.engine.answer import Answer
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.settings import Settings


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
