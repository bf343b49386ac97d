# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the tiny checkpoint, a model loaded from it, and a rig that faults are put into."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ros"))  # messages and graphs for tests are there


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint, whose answers never end by themselves."""
    from safetensors.torch import load_file, save_file

    from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint

    path = Path(write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][2] = 0.0  # the end of the answer
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from adatoken3d_ros.lmm.registry import load

    model, tokenizer, _ = load(tiny_model)
    return model, tokenizer


@pytest.fixture
def make_rig_of() -> Iterator[Callable[..., Any]]:
    """Makes rigs (see `rig.Rig`) of a model and its tokenizer, which end with the test."""
    pytest.importorskip("rclpy")
    from rig import Rig

    rigs: list[Rig] = []

    def make(loaded: tuple[Any, Any], **parameters: Any) -> Rig:
        rigs.append(Rig(loaded, **parameters))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def make_rig(loaded: tuple[Any, Any], make_rig_of: Callable[..., Any]) -> Callable[..., Any]:
    """Makes rigs with the tiny model."""
    return partial(make_rig_of, loaded)
