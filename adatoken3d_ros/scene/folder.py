# SPDX-License-Identifier: Apache-2.0
"""A folder of posed RGB-D images, read as frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from adatoken3d_ros.files import UnusableFile, open_regular, parse_json, read_file
from adatoken3d_ros.scene.frames import (
    FrameError,
    PosedFrame,
    check_intrinsics,
    check_position,
    check_rigid,
    check_size,
)
from adatoken3d_ros.text import described, quoted, shown

MAX_TEXT, MAX_TIMES = 2**16, 2**24  # bytes of intrinsics.json or a pose, and of times.txt
PARTS = ("color", "depth", "pose", "intrinsics.json")
HOLDS = "a folder of posed frames holds color/, depth/, pose/ and intrinsics.json, see docs/data.md"
_FRAME_PERIOD_NS = 100_000_000  # of folders without times.txt: 10 Hz


class FolderError(ValueError):
    """A folder that is not a posed RGB-D sequence; the message names the file and the offending value."""


@dataclass(frozen=True, eq=False)
class FolderIntrinsics:
    """Content of intrinsics.json: size in pixels, K (3, 3), stored depth units per metre, distortion k1 k2 p1 p2 k3."""

    width: int
    height: int
    K: NDArray[np.float64]
    depth_scale: float
    distortion: NDArray[np.float64]


def read_folder(path: str | Path, *, stride: int = 1) -> Iterator[PosedFrame]:
    """Every `stride`-th frame of a folder, in the order of the names.

    The folder holds color/NAME.jpg or .png, depth/NAME.png (uint16, 0 = no measurement), pose/NAME.txt (4x4, camera
    optical frame to a world with z up) and intrinsics.json (width, height, fx, fy, cx, cy, depth_scale: stored units
    per metre, optional distortion: k1 k2 p1 p2 k3 of both images). Stamps come from times.txt (one time in seconds a
    line, one line a frame); without it they are index / 10 s.

    A distortion that is not zero is taken out of both images (colour bilinearly, depth by the nearest pixel, same K):
    depth that is registered to a distorted colour image carries its distortion, as in the TUM RGB-D sequences, where
    undistorting both makes frames agree better than undistorting one or none.

    Names, intrinsics and times are checked at the call, images and poses as they are read.

    Raises:
        OSError: for a file that is missing or cannot be read.
        FolderError: for content that does not fit; the message names the file.
    """
    folder = Path(path)
    if stride < 1:
        raise FolderError(f"stride {stride} must be at least 1")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if missing := [name for name in PARTS if not (folder / name).exists()]:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}; {HOLDS}")
    intrinsics = read_intrinsics(folder / "intrinsics.json")
    colors = sorted(p for p in (folder / "color").glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not colors:
        raise FolderError(f"{folder / 'color'} holds no .jpg or .png image")
    for color in colors:
        for other in (folder / "depth" / f"{color.stem}.png", folder / "pose" / f"{color.stem}.txt"):
            if not other.is_file():
                raise FileNotFoundError(f"{color} has no {other}")
    stamps = _read_stamps(folder / "times.txt", len(colors))
    return _frames(folder, colors[::stride], stamps[::stride], intrinsics)


def read_intrinsics(path: Path) -> FolderIntrinsics:
    """Read and check intrinsics.json.

    Raises:
        OSError: if it cannot be read.
        FolderError: for a key that is missing or a value that is not usable.
    """
    try:
        content = parse_json(read_file(path, MAX_TEXT))
        width, height = int(content["width"]), int(content["height"])
        fx, fy, cx, cy = (float(content[name]) for name in ("fx", "fy", "cx", "cy"))
        depth_scale = float(content.get("depth_scale", 1000.0))
        distortion = np.array(content.get("distortion", [0.0] * 5), dtype=np.float64)
    except KeyError as error:
        raise FolderError(f"{path} lacks {error} (docs/data.md has every key)") from error
    except UnusableFile as error:
        raise FolderError(str(error)) from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise FolderError(f"{path} is not valid: {shown(error, 300)}") from error
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    try:
        check_size(width, height)
        check_intrinsics(K, width, height)
    except FrameError as error:
        raise FolderError(f"{path}: {error}") from error
    if not 0 < depth_scale < float("inf"):
        raise FolderError(f"{path}: depth_scale {depth_scale} must be positive and finite")
    if distortion.shape != (5,) or not np.isfinite(distortion).all():
        raise FolderError(f"{path}: distortion {distortion.tolist()} must be five finite numbers k1 k2 p1 p2 k3")
    return FolderIntrinsics(width, height, K, depth_scale, distortion)


def _frames(folder: Path, colors: list[Path], stamps: list[int], intrinsics: FolderIntrinsics) -> Iterator[PosedFrame]:
    maps = None
    if intrinsics.distortion.any():
        size = (intrinsics.width, intrinsics.height)
        maps = cv2.initUndistortRectifyMap(
            intrinsics.K, intrinsics.distortion, np.eye(3), intrinsics.K, size, cv2.CV_32FC1
        )
    for color, stamp in zip(colors, stamps, strict=True):
        rgb = _read_image(color, intrinsics, ("RGB", "L", "RGBA", "P")).convert("RGB")
        stored = _read_image(folder / "depth" / f"{color.stem}.png", intrinsics, ("I;16", "I"))
        depth = np.asarray(stored).astype(np.float32) / np.float32(intrinsics.depth_scale)
        depth[depth <= 0] = np.nan
        pixels = np.asarray(rgb)
        if maps is not None:
            pixels = np.asarray(cv2.remap(pixels, *maps, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
            border = (float("nan"),) * 4
            depth = np.asarray(cv2.remap(depth, *maps, interpolation=cv2.INTER_NEAREST, borderValue=border), np.float32)
        yield PosedFrame(pixels, depth, intrinsics.K, _read_pose(folder / "pose" / f"{color.stem}.txt"), stamp)


def _read_image(path: Path, intrinsics: FolderIntrinsics, modes: tuple[str, ...]) -> Image.Image:
    """A decoded image of the size that the intrinsics say, in one of Pillow's `modes`."""
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.size != (intrinsics.width, intrinsics.height):
                raise FolderError(
                    f"{path} has {image.width}x{image.height} pixels, "
                    f"intrinsics.json says {intrinsics.width}x{intrinsics.height}"
                )
            if image.mode not in modes:
                raise FolderError(f"{path} has pixels of kind {image.mode}, expected one of {', '.join(modes)}")
            image.load()
            return image
    except FolderError:
        raise
    except UnusableFile as error:
        raise FolderError(str(error)) from error
    except UnidentifiedImageError as error:
        raise FolderError(f"{path} is not an image") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise FolderError(f"{path} cannot be decoded: {shown(error, 300)}") from error
    except Exception as error:  # whatever damaged bytes lead the decoders to raise
        raise FolderError(f"{path} cannot be decoded: {described(error, 300)}") from error


def _read_pose(path: Path) -> NDArray[np.float64]:
    try:
        T = np.loadtxt(io.StringIO(read_file(path, MAX_TEXT).decode()), dtype=np.float64, ndmin=2)
        check_rigid(T)
        check_position(T[:3, 3])
    except UnusableFile as error:
        raise FolderError(str(error)) from error
    except ValueError as error:
        raise FolderError(f"{path}: {shown(error, 500)}") from error
    return T


def _read_stamps(path: Path, n: int) -> list[int]:
    """Nanoseconds of n frames; decimal seconds are not passed through a float, which would round them."""
    if not path.exists():
        return [index * _FRAME_PERIOD_NS for index in range(n)]
    try:
        lines = read_file(path, MAX_TIMES).decode().split()
    except UnusableFile as error:
        raise FolderError(str(error)) from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} is no text: {error}") from error
    if len(lines) != n:
        raise FolderError(f"{path} has {len(lines)} times for {n} frames")
    stamps = []
    for line in lines:
        whole, _, fraction = line.partition(".")
        if not (whole.isdecimal() and len(whole) <= 10 and (fraction == "" or fraction.isdecimal())):
            raise FolderError(f"{path}: {quoted(line)} is not a time in decimal seconds")
        stamps.append(int(whole) * 10**9 + int(fraction[:9].ljust(9, "0")))
    return stamps
