# SPDX-License-Identifier: Apache-2.0
"""Places in words: points of the room as pixels of a view, where the views are, boxes that the model writes.

A token knows its view, its cell there and its place, so none of it needs the cameras' intrinsics.

Conventions are those of the publisher's notebooks (QwenLM/Qwen3-VL, `cookbooks/`): pixels are thousandths of the
image's edges (`spatial_understanding.ipynb` draws x / 1000 * width), `bbox_2d` two corners of them. Of the nine numbers
of a `bbox_3d` the text of `3d_grounding.ipynb` calls the last three roll, pitch and yaw in radians. Its code, which
draws what the model wrote onto the right places, takes them times 180 as degrees, the first about x, the second about
y, the third about z, turned in this order: the code counts here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lmm.interface import SeenViews
from adatoken3d_ros.lmm.text_places import CLICK_MARK

SCALE = 1000  # the model writes and reads pixels as thousandths of the image's edges
NEAR = 0.25  # share of the distance within which what a box shows counts as the same thing
_FRAME = (
    "Places are (x, y, z) in metres, z up; directions are degrees from the x axis towards the y axis, seen from above."
)

_OBJECT = re.compile(r"\{[^{}]*\}")
_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BOX = re.compile(r'"bbox_([23])d"\s*:\s*\[([^\[\]]*)\]')  # each part of it is looked at by itself
_IMAGE = re.compile(r'"image"\s*:\s*"?([0-9]{1,4})')


def write_clicks(text: str, clicks: NDArray[np.float64], seen: SeenViews | None, *, coordinates: bool = False) -> str:
    """A question whose points (n, 3), scene frame, stand as pixels of views; those that it does not mention come first.

    A point is told in the nearest of the views that show it; where it is hidden in all, at the token nearest to it.
    With `coordinates` it is told in metres, too, for who knows where the views are.
    Before anything has been seen the numbers are made up: how long the text becomes is all that is asked then.
    """
    words = [_words(click, seen, coordinates) for click in clicks]
    written = text.count(CLICK_MARK)
    for word in words[:written]:
        text = text.replace(CLICK_MARK, word, 1)
    added = words[written:]
    return f"The question is about {' and '.join(added)}. {text}" if added else text


def _words(click: NDArray[np.float64], seen: SeenViews | None, coordinates: bool) -> str:
    view, x, y = 0, SCALE / 2, SCALE / 2
    if seen is not None and len(seen.xyz):
        shown = [sight for one in range(len(seen.poses)) if (sight := _sight(click, seen, one)) is not None]
        if shown:
            _, view, x, y = min(shown)
        else:
            token = int(np.linalg.norm(seen.xyz - click, axis=1).argmin())
            view, (x, y) = int(seen.view[token]), _middles(seen)[token]
    words = f"the point [{round(x)}, {round(y)}] in image {view + 1}"
    return f"{words} at {position(click)}" if coordinates else words


def _sight(click: NDArray[np.float64], seen: SeenViews, view: int) -> tuple[float, int, float, float] | None:
    """How far away a view shows a point, the view, and its pixel in thousandths; None: it does not show it.

    Where a pixel looks is fitted to the tokens' places. The point is shown if a token lies not farther from it than a
    token reaches there from corner to corner: else something hides it, or nothing was seen.
    """
    mine, pose = seen.view == view, seen.poses[view]
    local = (seen.xyz[mine] - pose[:3, 3]) @ pose[:3, :3]
    point = (click - pose[:3, 3]) @ pose[:3, :3]
    ahead = local[:, 2] > 0
    if not ahead.any() or point[2] <= 0:
        return None
    rays, at = local[ahead, :2] / local[ahead, 2:], _middles(seen)[mine][ahead]
    off, middle = rays - rays.mean(axis=0), at.mean(axis=0)
    spread = (off**2).sum(axis=0)
    if not spread.all():
        return None  # a single row or column
    scale = (off * (at - middle)).sum(axis=0) / spread
    x, y = middle + scale * (point[:2] / point[2] - rays.mean(axis=0))
    rows, columns = seen.grids[view]
    reach = float(np.linalg.norm(SCALE / np.array([columns, rows]) / scale) * point[2])
    inside = 0 <= x <= SCALE and 0 <= y <= SCALE
    if not inside or np.linalg.norm(local - point, axis=1).min() > reach:
        return None
    return float(point[2]), view, float(x), float(y)


def tell_poses(poses: Sequence[NDArray[np.float64]]) -> str:
    """Where each view was taken from and where it looked, T_world_camera (4, 4) of each, in plain words.

    Places are in the scene frame, as in a question; a direction is that of the optical axis, whole degrees.
    """
    if not poses:
        return ""
    lines = [f"Image {k}: from {position(pose[:3, 3])}, looking {_direction(pose)}." for k, pose in enumerate(poses, 1)]
    return " ".join([_FRAME, *lines]) + "\n"


def _direction(pose: NDArray[np.float64]) -> str:
    x, y, z = pose[:3, 2]
    up = round(math.degrees(math.atan2(z, math.hypot(x, y))))
    if abs(up) == 90:
        return "straight up" if up > 0 else "straight down"
    level = f"towards {round(math.degrees(math.atan2(y, x))) % 360} degrees"
    return f"{level}, {abs(up)} degrees {'up' if up > 0 else 'down'}" if up else level


def position(xyz: NDArray[np.float64]) -> str:
    """A place (3,) in metres, to the centimetre; never minus zero."""
    return "(" + ", ".join(f"{round(float(value), 2) + 0.0:.2f}" for value in xyz) + ")"


def lift_boxes(text: str, seen: SeenViews) -> list[tuple[float, ...]]:
    """The boxes of an answer: centre and size, metres, in the scene frame; what is no box in a view gives none.

    Read are objects as the model writes them: `bbox_2d`, two corners in thousandths, and `bbox_3d`, nine numbers in the
    frame of the camera (x to the right, y down): centre, size, and angles about x, y and z in half turns (1 is pi).
    `image` says which view, from 1 on; without it, it is the last.
    """
    found = []
    for view, kind, numbers in _written(text, len(seen.poses)):
        box = _lifted(view, numbers, seen) if kind == 2 else _turned(numbers, seen.poses[view])
        if box is not None:
            found.append(box)
    return found


def _written(text: str, views: int) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
    for one in _OBJECT.findall(text):
        box, image = _BOX.search(one), _IMAGE.search(one)
        view = int(image[1]) - 1 if image else views - 1
        if box is None or not 0 <= view < views:
            continue
        parts = [part.strip() for part in box[2].split(",")]
        if not all(_NUMBER.fullmatch(part) for part in parts):
            continue
        numbers, kind = np.array([float(part) for part in parts]), int(box[1])
        if len(numbers) == (4 if kind == 2 else 9) and (np.abs(numbers) < 1e5).all():
            yield view, kind, numbers


def _lifted(view: int, corners: NDArray[np.float64], seen: SeenViews) -> tuple[float, ...] | None:
    """What the view shows inside two corners, in thousandths: the tokens about as far away as its middle."""
    mine = seen.view == view
    points, at = seen.xyz[mine], _middles(seen)[mine]
    low, high = np.minimum(corners[:2], corners[2:]), np.maximum(corners[:2], corners[2:])
    if (high < 0).any() or (low > SCALE).any():  # beside the picture
        return None
    low, high = low.clip(0, SCALE), high.clip(0, SCALE)
    inside = ((at >= low) & (at <= high)).all(axis=1)
    middle = np.linalg.norm(at - (low + high) / 2, axis=1)
    if not inside.any():  # smaller than a token: the one that it lies in
        rows, columns = seen.grids[view]
        inside = (np.abs(at - (low + high) / 2) <= SCALE / 2 / np.array([columns, rows])).all(axis=1)
    if not inside.any():  # no depth there
        return None
    away = np.linalg.norm(points - seen.poses[view][:3, 3], axis=1)
    distance = away[inside][middle[inside].argmin()]
    box = points[inside & (np.abs(away - distance) <= NEAR * distance)]
    return (*((box.min(axis=0) + box.max(axis=0)) / 2).tolist(), *np.ptp(box, axis=0).tolist())


def _turned(numbers: NDArray[np.float64], pose: NDArray[np.float64]) -> tuple[float, ...] | None:
    """A turned box of the camera's frame as the box along the scene's axes around it; None for one behind it."""
    if (numbers[3:6] < 0).any() or numbers[2] <= 0:
        return None
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.pi * numbers[6:]), np.sin(np.pi * numbers[6:])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    axes = pose[:3, :3] @ about_z @ about_y @ about_x
    centre, size = pose[:3, :3] @ numbers[:3] + pose[:3, 3], np.abs(axes) @ numbers[3:6]
    return (*centre.tolist(), *size.tolist())


def _middles(seen: SeenViews) -> NDArray[np.float64]:
    """(M, 2) where the middle of each token is in its view, in thousandths of its width and height."""
    rows, columns = np.array(seen.grids)[seen.view].T
    found: NDArray[np.float64] = np.stack([(seen.cell % columns + 0.5) / columns, (seen.cell // columns + 0.5) / rows])
    return found.T * SCALE
