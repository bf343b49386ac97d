# SPDX-License-Identifier: Apache-2.0
"""A camera in somebody's hand or on a robot: where it looks, and what its sensors make of colours and depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.camera import HEIGHT, WIDTH, intrinsics, look_at
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import View, choose_views, noisy_depth
from adatoken3d_ros.scene.frames import PosedFrame

# Metres over the floor: of a robot, of a hand, of the eyes.
_HEIGHTS = ((0.35, 0.9), (0.9, 1.4), (1.2, 1.8))
_PARTLY = 0.35  # part of the rooms of which fewer views are seen
_QUANTUM = 0.00285  # metres at one metre, between two depths that a structured-light camera tells apart
_DARK = 24  # mean level below which light that is projected often does not come back


def sensed_views(renderer: Renderer, seed: int, count: int) -> list[View]:
    """Up to `count` views of a room as somebody takes them who walks about, turns on one spot, or looks closely at
    what stands on furniture; of some rooms only a part. The same arguments give the same bytes."""
    room = renderer.room
    rng = np.random.default_rng([seed, room.seed, len(room.split), 1])
    count = seen_of(count, rng)
    K = intrinsics(WIDTH, HEIGHT, float(rng.uniform(55, 75)))
    views = []
    for k, T in enumerate(_poses(renderer, rng, count)):
        T = T @ motion(rng.normal(0, math.radians(4), 3) * (0.3, 0.3, 1.0), np.zeros(3))  # mostly about its own axis
        rgb, depth, ids = renderer.render(K, WIDTH, HEIGHT, T)
        sensed = kinect_depth(depth, rgb, rng)
        told = T @ motion(rng.normal(0, math.radians(0.5), 3), rng.normal(0, 0.01, 3))
        views.append(View(PosedFrame(photographed(rgb, rng), sensed, K, told, stamp_ns=k * 100_000_000), ids))
    return views


def seen_of(count: int, rng: np.random.Generator) -> int:
    """How many of so many views there are: of some rooms fewer, down to a quarter."""
    return int(rng.integers(max(1, count // 4), count)) if count > 1 and rng.random() < _PARTLY else count


def _poses(renderer: Renderer, rng: np.random.Generator, count: int) -> list[NDArray[np.float64]]:
    room = renderer.room
    way = int(rng.integers(3))
    heights = _HEIGHTS[int(rng.integers(len(_HEIGHTS)))]
    if way == 1:  # about one spot, an arc of a half to the whole circle
        first = choose_views(renderer, rng, 1, heights=_HEIGHTS[2])[0]
        heading, arc = math.atan2(first[1, 2], first[0, 2]), float(rng.uniform(math.pi, 2 * math.pi))
        found = []
        for k in range(count):
            eye = first[:3, 3] + rng.normal(0, 0.08, 3)
            yaw = heading + arc * (k / max(1, count - 1) - 0.5)
            down = math.tan(math.radians(float(rng.uniform(5, 40))))
            found.append(look_at(eye, eye + (math.cos(yaw), math.sin(yaw), -down)))
        return found
    close = [i for i in room.items if i.supported_by >= 3] if way == 2 else []
    found = []
    for _ in range(min(count // 2, len(close))):
        item = close[int(rng.integers(len(close)))]
        away, yaw = float(rng.uniform(0.45, 1.1)), float(rng.uniform(-math.pi, math.pi))
        eye = item.centre + (away * math.cos(yaw), away * math.sin(yaw), float(rng.uniform(0.25, 0.7)))
        inside = (np.abs(eye[:2]) < np.array(room.size[:2]) / 2 - 0.1).all()
        if inside and renderer.distance(eye[None].astype(np.float32))[0] > 0.2:
            found.append(look_at(eye, item.centre + rng.normal(0, 0.08, 3)))
    return [*choose_views(renderer, rng, max(1, count - len(found)), heights=heights), *found][:count]


def motion(turn: NDArray[np.float64] | Sequence[float], shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) a turn by a vector of radians (Rodrigues) and a shift, metres."""
    T = np.eye(4)
    T[:3, :3] = cv2.Rodrigues(np.asarray(turn, np.float64))[0]
    T[:3, 3] = shift
    return T


def photographed(rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colours (H, W, 3) as a cheap camera gives them: exposure, white balance, tone, darker corners, a lens that is
    not quite in focus, a hand that moves, a shutter that reads line by line, noise, and JPEG."""
    height, width = rgb.shape[:2]
    image: Any = rgb.astype(np.float32) / 255
    gain = np.exp(rng.normal(0, 0.25)) * np.exp(rng.normal(0, 0.07, 3))
    image = np.clip(image * gain.astype(np.float32), 0, 1) ** np.float32(np.exp(rng.normal(0, 0.15)))
    v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    image *= (1 - np.float32(rng.uniform(0, 0.3)) * (u * u + v * v) / 2)[..., None]
    if rng.random() < 0.3:
        image = sheared(image, float(rng.normal(0, 0.01)) * width)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 1.3)))
    if rng.random() < 0.4:
        image = cv2.filter2D(image, -1, streak(float(rng.uniform(2, 8)), float(rng.uniform(0, math.pi))))
    level = rng.uniform(0.004, 0.03)
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * (level * np.sqrt(0.3 + image))
    levels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    _, packed = cv2.imencode(".jpg", levels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(45, 96))])
    read: Any = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    return np.ascontiguousarray(read[..., ::-1])


def sheared(image: NDArray[np.float32], pixels: float) -> NDArray[np.float32]:
    """The last line moved so far to the right against the first, as by a rolling shutter; edges are repeated."""
    height, width = image.shape[:2]
    A = np.array([[1, pixels / height, -pixels / 2], [0, 1, 0]])
    moved: Any = cv2.warpAffine(image, A, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.float32)


def streak(length: float, angle: float) -> NDArray[np.float32]:
    """A kernel that smears along a line of so many pixels; it adds up to 1."""
    side = 2 * math.ceil(length / 2) + 1
    kernel = np.zeros((side, side), np.float32)
    for t in np.linspace(-length / 2, length / 2, 4 * side):
        kernel[round(side // 2 + t * math.sin(angle)), round(side // 2 + t * math.cos(angle))] += 1
    return kernel / kernel.sum()


def kinect_depth(depth: NDArray[np.float32], rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """Depth (H, W), metres, as a structured-light camera measures it: `noisy_depth`, in steps that grow with the square
    of the distance, with holes in patches, on dark things, at wider edges, and beyond its range."""
    reach = float(rng.uniform(3.5, 8.0))
    measured = noisy_depth(depth, rng, max_range=reach, dropout=float(rng.uniform(0.5, 0.95)))
    step = _QUANTUM * np.maximum(np.nan_to_num(measured), 0.4) ** 2
    measured = (np.rint(measured / step) * step).astype(np.float32)
    height, width = depth.shape
    rough = cv2.resize(rng.random((height // 16, width // 16), dtype=np.float32), (width, height))
    lost = (rough < rng.uniform(0.0, 0.25)) & (rng.random(depth.shape, dtype=np.float32) < 0.7)
    lost |= (rgb.mean(axis=2) < _DARK) & (rough < rng.uniform(0.2, 0.7))
    lost |= measured < 0.4
    return np.where(lost, np.float32(np.nan), measured).astype(np.float32)
