# SPDX-License-Identifier: Apache-2.0
"""The commands with each architecture, and with one that is registered from outside the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.scene.frames import PosedFrame
from tests.architectures import NAMES, write_tiny
from tests.engine.scenes import room_frame
from tests.lmm import fake


@pytest.fixture(scope="module", params=[*NAMES, "fake"])
def model(
    request: pytest.FixtureRequest, tiny_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    if request.param != "fake":
        yield tiny_of(request.param)
        return
    with pytest.MonkeyPatch.context() as patch:
        fake.register(patch)
        yield fake.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny-fake")


def write_folder(path: Path, frames: list[PosedFrame]) -> Path:
    """As `adatoken3d ask` reads it."""
    for name in ("color", "depth", "pose"):
        (path / name).mkdir(parents=True)
    K, (height, width) = frames[0].K, frames[0].depth.shape
    lens = {"fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2], "depth_scale": 1000}
    (path / "intrinsics.json").write_text(json.dumps({"width": width, "height": height, **lens}))
    (path / "times.txt").write_text("".join(f"{frame.stamp_ns / 1e9}\n" for frame in frames))
    for index, frame in enumerate(frames):
        Image.fromarray(frame.rgb).save(path / "color" / f"{index:03}.png")
        Image.fromarray((frame.depth * 1000).round().astype(np.uint16)).save(path / "depth" / f"{index:03}.png")
        np.savetxt(path / "pose" / f"{index:03}.txt", frame.T_world_camera)
    return path


def ask(model: Path, folder: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    """The JSON record of an answer."""
    record = tmp_path / "record.json"
    words = ("ask", "--model", str(model), "--folder", str(folder), "--max-new-tokens", "4", "--json", str(record))
    assert main([*words, *more]) == 0
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def test_info(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["info", "--model", str(model)]) == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines()
            if line.count("│") == 3}  # fmt: skip
    loaded, _, report = registry.load(model)
    assert rows["architecture"] == json.loads((model / "config.json").read_text())["model_type"]
    assert rows["parameters"].startswith(f"{report.parameters:,} (vision ")
    assert rows["shape"].startswith(f"{len(loaded.decoder)} layers of {loaded.decoder.size.hidden}, hash ")
    assert rows["context"] == f"{loaded.sizes.context_length} tokens"
    assert ("voxels of" in rows["spatial tokens"]) == (loaded.sizes.tokens == "voxels")


def test_ask_within_a_budget(model: Path, folder: Path, tmp_path: Path) -> None:
    """Which makes the command measure the machine first."""
    found = ask(model, folder, tmp_path, "What is there?", "--budget-ms", "60000")
    assert found["status"] in ("OK", "TRUNCATED") and found["budget_met"]
    assert found["model_id"] == f"{model.name}@{registry.load(model).model.identity}"


def test_ask_which_thing_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    path = write_tiny("video3d", tmp_path / "tiny", seed=2, image_size=480, grounds=True)
    room = write_folder(tmp_path / "room", [room_frame(index) for index in range(2)])
    found = ask(path, room, tmp_path, "Locate: the red chair")
    assert found["status"] == "OK" and " boxes" in found["text"]
    assert len(found["boxes"]) == found["text"].count("[") and found["spatial_tokens"] > found["retained_tokens"]
    capsys.readouterr()
    assert main(["ask", "--model", str(path), "--folder", str(folder), "Locate: the red chair"]) == 1
    assert "nothing to point at stands out in the scene" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("kind", "more"), [("adatoken", ()), ("mined", ("--flops-reduction", "0.2"))])
def test_a_strategy_is_fitted_used_and_refused_by_another_model(
    kind: str,
    more: tuple[str, ...],
    model: Path,
    folder: Path,
    tmp_path: Path,
    tiny_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    strategy, questions = tmp_path / "fitted.yaml", tmp_path / "questions.txt"
    questions.write_text("What is here?")
    words = ("calibrate", "--model", str(model), "--folder", str(folder), "--questions", str(questions))
    places = ("--out", str(strategy), "--report", str(tmp_path / "report"))
    assert main([*words, *places, "--kind", kind, *more, "--answer-tokens", "1"]) == 0
    found = ask(model, folder, tmp_path, "What is here?", "--strategy", str(strategy))
    assert found["strategy"] == f"{kind}-ours" and found["retained_tokens"] < found["spatial_tokens"]
    other = next(tiny_of(name) for name in NAMES if tiny_of(name) != model)
    capsys.readouterr()
    assert main(["ask", "--model", str(other), "--folder", str(folder), "--strategy", str(strategy), "What?"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"made for the model {registry.load(model).model.identity}" in error
