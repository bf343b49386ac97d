# SPDX-License-Identifier: Apache-2.0
"""Places in words: a point of the room as a pixel of a view, and boxes that the model writes as boxes in the room.

A token knows its view, its cell there and its place, so neither needs the cameras' intrinsics: a point is told at the
token that lies nearest to it, in the view that shows it there, and a box of pixels is where the tokens inside it are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lmm.interface import SeenViews
from adatoken3d_ros.lmm.text_places import CLICK_MARK

SCALE = 1000  # the model writes and reads pixels as thousandths of the image's edges
NEAR = 0.25  # share of the distance within which what a box shows counts as the same thing

_OBJECT = re.compile(r"\{[^{}]*\}")
_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BOX = re.compile(r'"bbox_([23])d"\s*:\s*\[([^\[\]]*)\]')  # each part of it is looked at by itself
_IMAGE = re.compile(r'"image"\s*:\s*"?([0-9]{1,4})')


def write_clicks(text: str, clicks: NDArray[np.float64], seen: SeenViews | None) -> str:
    """A question whose points (n, 3), scene frame, stand as pixels of views; those that it does not mention come first.

    Before anything has been seen the numbers are made up: how long the text becomes is all that is asked then.
    """
    words = [_words(click, seen) for click in clicks]
    written = text.count(CLICK_MARK)
    for word in words[:written]:
        text = text.replace(CLICK_MARK, word, 1)
    added = words[written:]
    return f"The question is about {' and '.join(added)}. {text}" if added else text


def _words(click: NDArray[np.float64], seen: SeenViews | None) -> str:
    if seen is None or not len(seen.xyz):
        return "the point [500, 500] in image 1"
    token = int(np.linalg.norm(seen.xyz - click, axis=1).argmin())
    x, y = _middles(seen)[token].round().astype(int)
    return f"the point [{x}, {y}] in image {int(seen.view[token]) + 1}"


def lift_boxes(text: str, seen: SeenViews) -> list[tuple[float, ...]]:
    """The boxes of an answer: centre and size, metres, in the scene frame.

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
    if not mine.any():
        return None
    points, at = seen.xyz[mine], _middles(seen)[mine]
    low, high = np.minimum(corners[:2], corners[2:]), np.maximum(corners[:2], corners[2:])
    inside = ((at >= low) & (at <= high)).all(axis=1)
    middle = np.linalg.norm(at - (low + high) / 2, axis=1)
    if not inside.any():  # smaller than a token
        inside = middle == middle.min()
    away = np.linalg.norm(points - seen.poses[view][:3, 3], axis=1)
    distance = away[inside][middle[inside].argmin()]
    box = points[inside & (np.abs(away - distance) <= NEAR * distance)]
    return (*((box.min(axis=0) + box.max(axis=0)) / 2).tolist(), *np.ptp(box, axis=0).tolist())


def _turned(numbers: NDArray[np.float64], pose: NDArray[np.float64]) -> tuple[float, ...] | None:
    """A turned box of the camera's frame as the box along the scene's axes around it."""
    if (numbers[3:6] < 0).any():
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
