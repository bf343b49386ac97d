# SPDX-License-Identifier: Apache-2.0
"""Every fault of a model's files: configure fails with the value, questions say why, and a good model loads next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.lmm import safetensors_files
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import Settings
from tests.engine.scenes import load_scene, working

LIMIT = 60.0
GOOD = Settings({"budget.warm_up": False})


def truncated(path: Path) -> dict[str, Any]:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {}


def wrong_shape(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return {}


def another_architecture(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2"]}))
    return {}


def another_models_strategy(path: Path) -> dict[str, Any]:
    replace(default_strategy("ours", 8), model_hash="0123abcd").save(path / "mine.yaml")
    return {"strategy": str(path / "mine.yaml")}


def no_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(safetensors_files, "free_bytes", lambda device: 1000)
    return {}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(
            lambda path: {"model.path": "/no/such/model"}, "/no/such/model is no directory", id="unknown-model"
        ),
        pytest.param(another_architecture, "gpt2", id="another-architecture"),
        pytest.param(truncated, "model.safetensors is truncated or damaged", id="truncated-weights"),
        pytest.param(wrong_shape, "lm_head.weight in", id="wrong-shape-weights"),
        pytest.param(another_models_strategy, "0123abcd", id="strategy-for-another-model"),
        pytest.param(no_memory, "0.00 GB are free", id="no-memory-for-the-model"),
    ],
)
def test_a_bad_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any], named: str
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model, path)
    with monkeypatch.context() as patch:
        changes = spoil(path, patch) if spoil is no_memory else spoil(path)
        bad = GOOD | {"model.path": str(path), **changes}
        worker = Worker(lambda: load_engine(bad))
        queue = worker.open(lambda engine: open_scene(engine, bad))
        early = queue.submit(Question("What?"))
        worker.start()
        with pytest.raises((ValueError, OSError)) as caught:
            queue.ready.result(LIMIT)
    assert named in str(caught.value), caught.value
    answer = early.result.result(LIMIT)
    assert answer.status == Status.ERROR and "could not be loaded" in answer.status_message
    assert named in answer.status_message and worker.stop(LIMIT)

    worker, queue = working(load_scene(GOOD | {"model.path": str(tiny_model)}))
    worker.start()
    assert queue.submit(Question("What?")).result.result(LIMIT).status == Status.NO_SCENE
    assert worker.stop(LIMIT)


def test_folders_that_cannot_be_written(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that cannot be written is logged and costs nothing else; saving the scene there says why it failed."""
    from adatoken3d_ros.engine.budget import warmup

    monkeypatch.setattr(warmup, "SIZES", (1 / 64, 1 / 48, 1 / 32))
    (tmp_path / "file").touch()
    changes = {"model.path": str(tiny_model), "model.decoding": "eager"}
    changes |= {"budget.warm_up": True, "budget.cache": str(tmp_path / "file")}
    session = load_scene(GOOD | changes)
    assert "could not be kept" in caplog.text and str(tmp_path / "file") in caplog.text
    assert session.controller.latency is not None
    rgb, K = np.zeros((48, 64, 3), np.uint8), np.array([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])
    session.observe(PosedFrame(rgb, np.full((48, 64), 2.0, np.float32), K, np.eye(4), 1_000_000_000))
    with pytest.raises(OSError, match="file"):
        session.save(tmp_path / "file" / "scene.safetensors")
    session.save(tmp_path / "scene.safetensors")
    assert (tmp_path / "scene.safetensors").stat().st_size > 0
