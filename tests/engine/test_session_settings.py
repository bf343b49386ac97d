# SPDX-License-Identifier: Apache-2.0
"""What a session makes of every setting that it is made of: with another value, it does something else."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.decoder import fixed
from adatoken3d_ros.engine import runtime
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import CONFIGURE, SETTINGS, Settings
from tests.engine.scenes import ask, load_scene

STAMP = 1_700_000_000_000_000_000


def synthetic_frame(index: int) -> tuple[Any, Any, Any]:
    """(rgb, K, T_world_camera) of a camera that looks along x."""
    rgb = np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    T = np.eye(4)
    T[:3, :3] = [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
    return rgb, np.array([[50.0, 0.0, 31.5], [0.0, 50.0, 23.5], [0.0, 0.0, 1.0]]), T


def drive() -> list[PosedFrame]:
    """A walk along a wall, a turn, a look at the floor, a blurred frame, a box that comes and goes."""
    frames = []

    def add(seconds: float, y: float, *, turn: float = 0.0, floor: bool = False, blur: bool = False, box: bool = False):
        rgb, K, T = synthetic_frame(len(frames))
        c, s = math.cos(turn), math.sin(turn)
        T[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ T[:3, :3]
        if floor:
            T[:3, :3] = np.array([[0.0, -1, 0], [-1, 0, 0], [0, 0, -1]])  # straight down
        T[:3, 3] = (0.0, y, 1.0)
        metres = np.full((48, 64), 1.6 if floor else 2.0, np.float32)
        if box:
            metres[12:36, 20:44] = 1.0
        rgb = np.full_like(rgb, 90) + (np.arange(64) % 40).astype(np.uint8)[:, None] if blur else rgb
        frames.append(PosedFrame(rgb, metres, K, T, STAMP + round(seconds * 1e9)))

    for i in range(4):
        add(0.1 * i, 0.5 * i)
    add(0.4, 1.5, turn=0.6)
    add(0.5, 1.5, floor=True)
    add(0.6, 3.0, blur=True)
    add(0.65, 3.1)
    add(1.8, 3.1, box=True)
    add(3.0, 3.1)
    return frames


def behaviour(settings: Settings, cache: Path) -> dict[str, Any]:
    """What a session that is made of these settings does."""
    session = load_scene(settings)
    verdicts = []
    for frame in drive():
        verdicts.append(session.observe(frame).value)
        session.encode_pending()
    found: dict[str, Any] = {"verdicts": verdicts, "latency": session.controller.latency is not None}
    found["map"] = session.memory.map_id
    found["decoding"] = session.runtime.model.decoder.stepping
    found["cache"] = sorted(path.name for path in cache.iterdir())
    if session.poses:
        tokens = session.memory.question_tokens(10_000)
        found.update(
            views=sorted(session.poses),
            voxels=len(session.tokens() or ()),
            asked=session.memory.asked.keys(),
            origin=session.memory.origin.round(6).tolist(),
            tokens=float(tokens.features.double().abs().sum() + tokens.position.double().abs().sum()),
            prompt=session.prompt(Question("What?"))[0].pieces,
        )
    past = session.memory.past
    found["gone"] = len(past.tombstones.gone)
    past.tombstones.forget(STAMP + 10**10)
    found["remembered"] = len(past.tombstones.gone)
    answer = ask(session, Question("What?", max_new_tokens=4))
    found.update(strategy=answer.strategy, seed=answer.seed)
    found["hurried"] = ask(session, Question("What?", max_new_tokens=4, latency_budget_ms=1e-3)).status.name
    session.clear()
    floor = drive()[5]
    for i in range(6):
        T = floor.T_world_camera.copy()
        T[1, 3] = 0.5 * i
        session.observe(replace(floor, T_world_camera=T, stamp_ns=STAMP + i))
    found["problem"] = session.memory.contradiction
    return found


# Setting: another value, what it changes, and what else is set for both.
SESSION: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "model.decoding": ("graph", "decoding", {}),
    "model.template": ("vicuna_v1", "prompt", {}),
    "seed": (7, "seed", {}),
    "budget.warm_up": (True, "latency", {}),
    "budget.cache": ("CACHE", "cache", {"budget.warm_up": True}),
    "budget.infeasible": ("refuse", "hurried", {"budget.warm_up": True}),
    "budget.reuse": ("prefix", "strategy", {}),
    "scene.map_id": ("cellar", "map", {}),
    "scene.max_views": (2, "views", {}),
    "scene.max_voxels": (150, "views", {}),
    "scene.near": (0.01, "views", {"scene.max_views": 4, "scene.max_disagreement": 0.0}),
    "scene.far": (1.0, "views", {}),
    "scene.max_age": (0.35, "views", {}),
    "scene.question_views": (2, "asked", {}),
    "scene.min_translation": (0.7, "verdicts", {}),
    "scene.min_rotation": (120.0, "verdicts", {"scene.min_translation": 2.0}),
    "scene.min_gain": (0.9, "verdicts", {}),
    "scene.min_sharpness": (0.0, "verdicts", {}),
    "scene.sharpness_wait": (0.0, "verdicts", {}),
    "scene.change_interval": (1000.0, "verdicts", {}),
    "scene.min_change": (1_000_000, "verdicts", {}),
    "scene.max_disagreement": (0.0, "views", {}),
    "scene.max_height": (1.5, "problem", {"scene.min_sharpness": 0.0}),
    "scene.carving": (False, "voxels", {}),
    "scene.max_depth": (0.5, "verdicts", {}),
    "memory.limit_mb": (0.3, "views", {}),
    "memory.tombstones": (0, "gone", {}),
    "memory.tombstone_age": (0.0, "remembered", {}),
    "scene.origin": ([1.0, 2.0, 0.5], "origin", {"scene.origin_mode": "fixed"}),
    "scene.origin_mode": ("fixed", "origin", {}),
}


@pytest.fixture(scope="module")
def loaded(tiny_directory: Path) -> Any:
    return registry.load(tiny_directory)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    """The model is read once; how fast it runs is made up, so slow that no budget can be kept."""

    def made_up(model: Any, tokenizer: Any, strategy: Any, cache: Path | None, progress: Any) -> tuple[Any, bool]:
        if cache is not None:
            (cache / "speed").write_text("")
        seconds = {"encode": [1.0], "tokens": [1.0, 0.0, 0.0], "prefill": [1.0, 0, 0, 0, 0], "decode": [1.0, 0.0]}
        return LatencyModel(seconds), False

    def prepared(decoder: Any) -> str:
        monkeypatch.setattr(decoder, "stepping", fixed.eager)
        return ""

    monkeypatch.setattr(runtime, "prepare", prepared)
    monkeypatch.setattr(registry, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(runtime, "latency_model", made_up)


@pytest.fixture(scope="module")
def behaved() -> dict[str, dict[str, Any]]:
    """By what else was set."""
    return {}


@pytest.mark.parametrize("name", SESSION)
def test_another_value_changes_what_the_session_does(
    tiny_directory: Path, quick: None, tmp_path: Path, behaved: dict[str, dict[str, Any]], name: str
) -> None:
    value, changed, also = SESSION[name]
    base = Settings({"model.path": str(tiny_directory), "budget.warm_up": False, **also})
    if str(also) not in behaved:
        behaved[str(also)] = behaviour(base, tmp_path)
    before = behaved[str(also)]
    after = behaviour(base | {name: str(tmp_path) if value == "CACHE" else value}, tmp_path)
    assert before[changed] != after.get(changed), before[changed]


OF_SOME_MODELS = {"model.tell_poses", "unsure_below"}  # test_scene_of_views.py, test_understanding.py
OF_WHAT_IS_KNOWN = {"memory.moved_within", "goal.distance", "goal.clearance", "goal.height"}  # test_knowing.py
# What the node makes of these, tests/ros/test_parameter_effects.py and tests/ros/test_parameters.py tell.
OF_A_SHARED_ENGINE = {  # tests/fleet/test_link.py
    "engine.url",
    "engine.token",
    "engine.ca_file",
    "engine.robot",
    "engine.encode",
    "engine.fallback",
}
OF_THE_NODE = {
    "model.path",
    "model.vision_path",
    "model.dtype",
    "model.quantization",
    "model.self_test",
    "model.device",
    "budget.background",
    "scene.frame_id",
    "scene.restore",
}


def test_no_setting_that_is_read_by_configure_is_left_out() -> None:
    assert SESSION.keys() | OF_THE_NODE | OF_A_SHARED_ENGINE | OF_SOME_MODELS | OF_WHAT_IS_KNOWN == {
        setting.name for setting in SETTINGS if setting.read == CONFIGURE
    }
