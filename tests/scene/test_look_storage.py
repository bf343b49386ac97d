# SPDX-License-Identifier: Apache-2.0
"""What a file says of where a scene was looked at: tampered with, and of the format that did not say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adatoken3d_ros.scene import look_storage
from adatoken3d_ros.scene.occupancy import REMEMBERED
from adatoken3d_ros.scene.storage import load_scene, save_scene
from tests.scene.test_storage import ABOUT, IDENTITY, SKETCHES, content_of, refused, scene, sealed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_scene(tmp_path / "scene.safetensors", *scene(), about=ABOUT, **IDENTITY)
    return tmp_path / "scene.safetensors"


def test_a_file_of_the_format_before_is_read(saved: Path) -> None:
    """It does not say where the scene was looked at."""
    tensors, content = content_of(saved)
    del content["confirmed_ns"]
    old = {name: tensor for name, tensor in tensors.items() if not name.startswith("looked_")}
    sealed(old, {**content, "format": 4}, saved)
    poses, about = load_scene(saved, scene(1)[0], channels=5, **IDENTITY)
    assert len(poses) == 3 and about.sketches.keys() == SKETCHES.keys()
    assert about.looked is None and about.confirmed_ns == 0
    sealed(tensors, {**content, "format": 4}, saved)
    refused(saved, "no scene: it holds colours, level, looked_blocks")
    sealed(tensors, content, saved)
    refused(saved, "it was confirmed at None ns")
    sealed(tensors, {**content, "format": 5.0}, saved)
    refused(saved, "format 5.0, this program reads 4 and 5")


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("looked_origin", lambda t: t[:0], "2 blocks that were looked at, with no origin"),
        ("looked_origin", lambda t: t * float("nan"), "looked_origin is .*, not one point"),
        ("looked_blocks", lambda t: t + 2**20, "a block that is too far away"),
        ("looked_blocks", lambda t: t.where(t < 5, torch.tensor(-(2**63))), "a block that is too far away"),
        ("looked_blocks", lambda t: t * 0, "a block twice"),
        ("looked_stamps", lambda t: t.new_zeros(REMEMBERED + 1), "2 blocks and 65537 looks, more than 4096 and 65536"),
        ("looked_stamps", lambda t: t - 5, "a time that is not 0 to"),
        ("looked_numbers", lambda t: t + 1, "a look that is none of 2"),
        ("looked_numbers", lambda t: t.long(), "looked_numbers is .*I64"),
    ],
)
def test_looks_that_are_none_are_named(saved: Path, name: str, change: Any, named: str) -> None:
    tensors, content = content_of(saved)
    tensors[name] = change(tensors[name]).contiguous()
    sealed(tensors, content, saved)
    refused(saved, named)


def test_no_more_blocks_are_read_than_a_scene_has(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_storage, "MOST_BLOCKS", 1)
    refused(saved, "2 blocks and 2 looks, more than 1 and")
