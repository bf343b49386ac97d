# SPDX-License-Identifier: Apache-2.0
"""What a detector trained on photographs would say of a view, by what is there: with misses, confusions and errors.

On rendered rooms the real detector says little. A model that is to use what it says of photographs learns it from this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.items import Item

# What a class of furniture is called among the detector's classes: (name, how often).
CALLED: Mapping[str, tuple[tuple[str, float], ...]] = {
    **{kind: (("chair", 0.9),) for kind in ("chair", "armchair", "office chair")},
    **{kind: ((kind, 0.85),) for kind in ("person", "bicycle", "cat", "dog", "bottle", "bowl", "bed", "toilet")},
    **{kind: ((kind, 0.85),) for kind in ("laptop", "microwave", "oven", "sink", "refrigerator", "book", "vase")},
    **{kind: ((kind, 0.7),) for kind in ("bench", "backpack", "suitcase", "toaster", "teddy bear")},
    "stool": (("chair", 0.3),),
    "wheelchair": (("chair", 0.4),),
    "sofa": (("couch", 0.85),),
    "table": (("dining table", 0.6),),
    "coffee table": (("dining table", 0.3),),
    "desk": (("dining table", 0.3),),
    "television": (("tv", 0.75), ("laptop", 0.1)),
    "computer": (("tv", 0.4), ("laptop", 0.25), ("keyboard", 0.2), ("mouse", 0.05)),
    "phone": (("cell phone", 0.4),),
    "ball": (("sports ball", 0.7),),
    "mug": (("cup", 0.8),),
    "teapot": (("cup", 0.2), ("vase", 0.2)),
    "plant": (("potted plant", 0.7), ("vase", 0.1)),
    "christmas tree": (("potted plant", 0.3),),
    "crib": (("bed", 0.4),),
    "printer": (("microwave", 0.15),),
}
_CONFUSED = 0.12
_HALF = 0.004  # part of the picture at which half of the things are missed that might be found
_WRONG = 0.8  # boxes around nothing in a view, on average
_OFTEN = ("book", "chair", "bottle", "laptop", "tv", "cup", "dining table", "person", "cell phone")  # said of nothing


def simulated(
    ids: NDArray[np.int16], items: Sequence[Item], names: Sequence[str], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (A, 4) as x0, y0, x1, y1 in parts of the picture, and scores (A, K).

    Args:
        ids: (H, W) what each pixel of the picture shows. items: of the room.
        names: K, what the detector calls its classes.
    """
    number = {name: k for k, name in enumerate(names)}
    height, width = ids.shape
    boxes: list[NDArray[np.float64]] = []
    rows: list[NDArray[np.float64]] = []

    def found(box: NDArray[np.float64], name: str, score: float) -> None:
        row = np.zeros(len(names))
        row[number[name]] = score
        if rng.random() < 2 * _CONFUSED:  # not quite sure of one
            row[int(rng.integers(len(names)))] = score * rng.uniform(0.2, 0.9)
        boxes.append(box)
        rows.append(row)

    for item in items:
        called = CALLED.get(item.kind)
        if called is None:
            continue
        v, u = np.nonzero(ids == item.instance)
        area = len(v) / ids.size
        draw = rng.random()
        if len(v) < 12 or rng.random() > 1 / (1 + (_HALF / area) ** 1.3):
            continue
        name = next((n for n, below in zip(*_cumulated(called), strict=True) if draw < below), None)
        if name is None:
            continue
        if rng.random() < _CONFUSED:
            name = names[int(rng.integers(len(names)))]
        box = np.array([u.min() / width, v.min() / height, (u.max() + 1) / width, (v.max() + 1) / height])
        size = np.tile(box[2:] - box[:2], 2)
        found(box + rng.normal(0, 0.06, 4) * size, name, float(np.clip(rng.beta(3.5, 1.6), 0.12, 0.99)))
    for _ in range(int(rng.poisson(_WRONG))):
        name = _OFTEN[int(rng.integers(len(_OFTEN)))] if rng.random() < 0.7 else names[int(rng.integers(len(names)))]
        size = math.exp(rng.uniform(math.log(0.08), math.log(0.7))) * np.exp(rng.normal(0, 0.3, 2))
        middle = rng.random(2)
        found(np.concatenate([middle - size / 2, middle + size / 2]), name, float(0.1 + 0.6 * rng.beta(1, 3)))
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(rows, np.float32).reshape(-1, len(names))


def _cumulated(called: Sequence[tuple[str, float]]) -> tuple[list[str], list[float]]:
    return [name for name, _ in called], np.cumsum([share for _, share in called]).tolist()
