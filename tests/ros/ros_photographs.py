# SPDX-License-Identifier: Apache-2.0
"""The photographs of an office desk, read with nothing but OpenCV: 39 frames with depth in mm and camera poses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

DESK = Path(__file__).resolve().parents[3] / "shared" / "data" / "tum_fr1_desk"
FIRST_NS = 1_305_031_102_000_000_000  # the day they were taken; ten a second from then on
STEP_NS = 100_000_000

Photograph = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def distortion(folder: Path) -> list[float]:
    """k1 k2 p1 p2 k3 of both images."""
    return [float(value) for value in json.loads((folder / "intrinsics.json").read_text())["distortion"]]


def read_photographs(folder: Path) -> Iterator[Photograph]:
    """(stamp_ns, rgb (H, W, 3) u8, depth (H, W) u16 mm, K (3, 3), T_world_camera (4, 4)) in order, lens and all."""
    camera = json.loads((folder / "intrinsics.json").read_text())
    K = np.array([[camera["fx"], 0.0, camera["cx"]], [0.0, camera["fy"], camera["cy"]], [0.0, 0.0, 1.0]])
    for i, colour in enumerate(sorted((folder / "color").iterdir())):
        rgb = cv2.cvtColor(cv2.imread(str(colour)), cv2.COLOR_BGR2RGB)
        depth = cv2.imread(str(folder / "depth" / f"{colour.stem}.png"), cv2.IMREAD_UNCHANGED)
        T = np.loadtxt(folder / "pose" / f"{colour.stem}.txt")
        yield FIRST_NS + i * STEP_NS, rgb, depth, K, T
