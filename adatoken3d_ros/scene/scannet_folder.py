# SPDX-License-Identifier: Apache-2.0
"""A ScanNet scene as the usual scripts export it, read as frames.

Three forms are known: color/ depth/ pose/ intrinsic/ (ScanNet's SensReader), one folder of NAME.jpg NAME.png NAME.txt
(`posed_images` of mmdetection3d and EmbodiedScan), and one of NAME-rgb.png NAME-depth.png NAME.txt (OpenEQA).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.files import UnusableFile, read_file
from adatoken3d_ros.scene.folder import FolderError
from adatoken3d_ros.scene.frames import FrameError, PosedFrame, check_position, check_rigid, check_size
from adatoken3d_ros.text import described, shown

MAX_TEXT, MAX_IMAGE = 2**16, 2**26  # bytes of a pose, of intrinsics or of a scene's facts, and of an image
DEPTH_SCALE = 1000.0  # stored units per metre
_FRAME_PERIOD_NS = 100_000_000  # frames have no times in any of the forms


@dataclass(frozen=True)
class Layout:
    """Where things are; `*` is a frame's name. A file of intrinsics holds a 4x4 or 3x3 matrix, pixels."""

    color: tuple[str, ...]
    depth: str
    pose: str
    color_intrinsics: str
    depth_intrinsics: str


LAYOUTS = (
    Layout(
        ("color/*.jpg", "color/*.png"), "depth/*.png", "pose/*.txt",
        "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt",
    ),
    Layout(("*-rgb.png", "*-rgb.jpg"), "*-depth.png", "*.txt", "intrinsic_color.txt", "intrinsic_depth.txt"),
    Layout(("*.jpg",), "*.png", "*.txt", "intrinsic.txt", "depth_intrinsic.txt"),
)  # fmt: skip


def layout_of(folder: Path) -> Layout | None:
    """How a scene's folder is laid out; None if it is no ScanNet scene."""
    for layout in LAYOUTS:
        if (folder / layout.color_intrinsics).is_file() and _colors(folder, layout):
            return layout
    return None


def read_scannet(folder: Path, frames: int = 0) -> Iterator[PosedFrame]:
    """Frames of a scene: colour as the depth camera sees it, poses turned by the scene's axis alignment where it is.

    Depth has another resolution than colour; both cameras are taken to be in one place, as all that is published on
    these scenes does. A pose that is not finite (lost tracking) has no frame. The alignment is a 4x4 matrix in
    axis_align_matrix.txt or ScanNet's NAME.txt with its line axisAlignment; without one poses are as stored.

    Args:
        folder: of the scene.
        frames: how many, by the published rule: of n frames every (n // frames)-th from the first; 0: all.

    Raises:
        FolderError: for content that does not fit; the message names the file.
        OSError: for a file that is missing or cannot be read.
    """
    layout = layout_of(folder)
    if layout is None:
        raise FolderError(f"{folder} is no ScanNet scene: it has no colour images beside their intrinsics")
    colors = [(index, *found) for index, found in enumerate(_colors(folder, layout))]
    chosen = colors[:: max(1, len(colors) // frames)][:frames] if frames else colors
    K_color = _matrix(folder / layout.color_intrinsics)[:3, :3]
    depth_file = folder / layout.depth_intrinsics
    K_depth = _matrix(depth_file)[:3, :3] if depth_file.is_file() else K_color
    turned = _alignment(folder)
    for index, name, color in chosen:
        pose = _matrix(folder / layout.pose.replace("*", name))
        if not np.isfinite(pose).all():
            continue
        T = turned @ pose
        # What single precision left of the rotation.
        U, _, V = np.linalg.svd(T[:3, :3])
        T[:3, :3] = U @ V
        try:
            check_rigid(T)
            check_position(T[:3, 3])
            rgb = _image(color, cv2.IMREAD_COLOR)[..., ::-1]
            depth = _image(folder / layout.depth.replace("*", name), cv2.IMREAD_UNCHANGED)
            if depth.ndim != 2 or depth.dtype != np.uint16:
                raise FolderError(f"{folder / layout.depth.replace('*', name)} is no 16 bit depth image")
            if depth.shape != rgb.shape[:2] or not np.allclose(K_color, K_depth):
                rgb = _seen_by(rgb, K_color, K_depth, depth.shape)
            metres = depth.astype(np.float32) / np.float32(DEPTH_SCALE)
            metres[metres <= 0] = np.nan
            yield PosedFrame(np.ascontiguousarray(rgb), metres, K_depth, T, index * _FRAME_PERIOD_NS)
        except FrameError as error:
            raise FolderError(f"{color}: {shown(error, 500)}") from error


def _colors(folder: Path, layout: Layout) -> list[tuple[str, Path]]:
    """(name, file) of each colour image, in the order of their numbers."""
    found = []
    for pattern in layout.color:
        before, after = Path(pattern).name.split("*")
        found += [(file.name[len(before) : len(file.name) - len(after)], file) for file in folder.glob(pattern)]
    return sorted(found, key=lambda item: (int(item[0]) if item[0].isdecimal() else 0, item[0]))


def _matrix(path: Path) -> NDArray[np.float64]:
    """A 4x4 matrix (or 3x3, for intrinsics) that a text file holds."""
    try:
        numbers = np.array(read_file(path, MAX_TEXT).decode().split(), dtype=np.float64)
    except UnusableFile as error:
        raise FolderError(str(error)) from error
    except ValueError as error:
        raise FolderError(f"{path}: {shown(error, 300)}") from error
    if numbers.size not in (9, 16):
        raise FolderError(f"{path} has {numbers.size} numbers, a matrix has 9 or 16")
    side = 4 if numbers.size == 16 else 3
    return numbers.reshape(side, side)


def _alignment(folder: Path) -> NDArray[np.float64]:
    if (own := folder / "axis_align_matrix.txt").is_file():
        matrix = _matrix(own)
    elif (facts := folder / f"{folder.name}.txt").is_file():
        match = re.search(r"axisAlignment\s*=\s*([^\n]*)", read_file(facts, MAX_TEXT).decode(errors="replace"))
        words = match[1].split() if match else []
        try:
            matrix = np.array(words, np.float64).reshape(4, 4) if words else np.eye(4)
        except ValueError as error:
            raise FolderError(f"{facts}: axisAlignment is no 4x4 matrix") from error
    else:
        return np.eye(4)
    if matrix.shape != (4, 4):
        raise FolderError(f"{own} is no 4x4 matrix")
    return matrix


def _seen_by(
    rgb: NDArray[np.uint8], K_color: NDArray[np.float64], K_depth: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """A colour image (H, W, 3) as a camera with another matrix in the same place sees it, of size `shape` (h, w)."""
    scale = K_color[[0, 1], [0, 1]] / K_depth[[0, 1], [0, 1]]
    # Averaged first: a pixel of the smaller image stands for several.
    blurred = cv2.blur(rgb, (max(1, round(scale[0])), max(1, round(scale[1]))))
    to_color = (K_color @ np.linalg.inv(K_depth))[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(blurred, to_color, (shape[1], shape[0]), flags=flags), np.uint8)


def _image(path: Path, flags: int) -> NDArray[np.uint8]:
    try:
        content = np.frombuffer(read_file(path, MAX_IMAGE), np.uint8)
        decoded = cv2.imdecode(content, flags)
    except UnusableFile as error:
        raise FolderError(str(error)) from error
    except cv2.error as error:
        raise FolderError(f"{path} cannot be decoded: {described(error, 300)}") from error
    if decoded is None:
        raise FolderError(f"{path} is not an image")
    check_size(decoded.shape[1], decoded.shape[0])
    return np.asarray(decoded)
