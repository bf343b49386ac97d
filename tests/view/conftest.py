# SPDX-License-Identifier: Apache-2.0
"""Scenes of tiny models with the pictures of their key frames, and a real browser where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.pictures import Pictures
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.strategy import default_strategy
from tests.architectures import NAMES
from tests.engine.scenes import new_scene, room_frame

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# WebGL is drawn by the CPU; as root, Chromium has no sandbox.
FLAGS = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")


def seen(name: str, tiny_of: Callable[[str], Path], views: int = 2) -> tuple[Scene, Pictures]:
    """A room as the tiny model of an architecture has seen it."""
    model, tokenizer, _ = registry.load(tiny_of(name))
    strategy = default_strategy("ours", len(model.decoder), model.decoder.first_gate)
    scene, pictures = new_scene(model, tokenizer, SessionConfig(max_new_tokens=4), strategy=strategy), Pictures()
    for index in range(views):
        frame = room_frame(index)
        scene.observe(frame)
        scene.encode_pending()
        pictures.add(frame, scene)
    return scene, pictures


@pytest.fixture(scope="session", params=NAMES)
def looked(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> tuple[Scene, Pictures]:
    return seen(request.param, tiny_of)


@pytest.fixture(scope="session")
def frames_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three frames of the room as a folder."""
    root = tmp_path_factory.mktemp("frames")
    for name in ("color", "depth", "pose"):
        (root / name).mkdir()
    for index in range(3):
        frame = room_frame(index)
        Image.fromarray(frame.rgb).save(root / "color" / f"{index}.png")
        Image.fromarray(np.rint(frame.depth * 1000).astype(np.uint16)).save(root / "depth" / f"{index}.png")
        np.savetxt(root / "pose" / f"{index}.txt", frame.T_world_camera)
        K = {"fx": frame.K[0, 0], "fy": frame.K[1, 1], "cx": frame.K[0, 2], "cy": frame.K[1, 2]}
        size = {"width": frame.rgb.shape[1], "height": frame.rgb.shape[0], "depth_scale": 1000}
        (root / "intrinsics.json").write_text(json.dumps({**K, **size}))
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that need it are skipped where it cannot be had."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose errors fail the test."""
    problems: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert problems == []
