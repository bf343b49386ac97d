# SPDX-License-Identifier: Apache-2.0
"""A checkpoint and a folder of posed frames for the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint."""
    from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four 64x48 views of a coloured wall 2 m in front of a camera that moves 0.5 m sideways each time."""
    root = tmp_path_factory.mktemp("frames")
    for name in ("color", "depth", "pose"):
        (root / name).mkdir()
    intrinsics = {"width": 64, "height": 48, "fx": 50, "fy": 50, "cx": 31.5, "cy": 23.5, "depth_scale": 1000}
    (root / "intrinsics.json").write_text(json.dumps(intrinsics))
    (root / "times.txt").write_text("1.0\n1.1\n1.2\n1.3\n")
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(root / "color" / f"{index:03}.png")
        depth = np.full((48, 64), 2000, dtype=np.uint16)
        Image.fromarray(depth).save(root / "depth" / f"{index:03}.png")
        pose = np.eye(4)
        pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
        pose[:3, 3] = (0, 0.5 * index, 1)
        np.savetxt(root / "pose" / f"{index:03}.txt", pose)
    return root
