# SPDX-License-Identifier: Apache-2.0
"""Rooms as the model sees them, rendered and encoded once and kept in files.

The vision tower is frozen, so all of a scene but the position embedding can be computed beforehand. Pooling is a mean,
and so (feature + position) pooled is feature pooled + position pooled: the file holds the former, and the points that
the latter is computed from.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.files import replacing
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, Split, make_room
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, Item
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import Sight, View, render_views, sights
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.geometry import PatchGeometry, sample_pixels
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.voxels import voxel_keys, voxel_pool

Progress = Callable[[int, int], None]


class DataError(ValueError):
    """Kept scenes that cannot be used; the message names the file or setting."""


@dataclass(frozen=True)
class SceneConfig:
    """How rooms become scenes.

    Attributes:
        views: of each room. image_size, grid: of the vision tower. voxel_size: metres. max_tokens: of a scene.
        vision: identifies the tower's weights.
    """

    views: int
    image_size: int
    grid: int
    voxel_size: float
    max_tokens: int
    vision: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A room as M spatial tokens, without positions, and what is true of it.

    Attributes:
        room: with everything that stands in it.
        sights: what the views show of each item, by instance.
        features: (M, C) float32 (float16 while it is only kept), vision features pooled over voxels, in the order of
            `scene.token_map`.
        xyz: (P, 3) float32, points of the valid patches, room frame, metres.
        voxel: (P,) int64, row of `features` that each point belongs to.
        instance: (P,) int64, what each point is of: an item's instance, or less than FIRST_ITEM for the room itself.
    """

    room: FurnishedRoom
    sights: Mapping[int, Sight]
    features: Tensor
    xyz: Tensor
    voxel: Tensor
    instance: Tensor


def encode_views(room: FurnishedRoom, views: list[View], vision: VisionTower, config: SceneConfig) -> Scene:
    """The scene that the engine makes of these views, position embedding apart."""
    patches = PatchConfig(PatchGeometry.square(config.image_size, config.grid))
    points = [patch_points(view.frame, patches) for view in views]
    xyz = torch.from_numpy(np.concatenate([p.xyz for p in points]))
    valid = torch.from_numpy(np.concatenate([p.valid for p in points]))
    shown = []
    for view in views:
        height, width = view.ids.shape
        rows, cols = sample_pixels(width, height, patches.geometry)
        shown.append(view.ids[np.ix_(rows, cols)].reshape(-1))
    ids = torch.from_numpy(np.concatenate(shown).astype(np.int64))
    features = vision([view.frame.rgb for view in views]).flatten(0, 1)
    mean, voxel, count, _ = voxel_pool(features, xyz, config.voxel_size, valid=valid)
    xyz, ids, voxel = xyz[valid], ids[valid], voxel[valid]
    if len(mean) > config.max_tokens:  # the best covered voxels, in order: as TokenMap.tokens
        kept = torch.sort(count, descending=True, stable=True).indices[: config.max_tokens].sort().values
        place = torch.full((len(mean),), -1).index_copy_(0, kept, torch.arange(len(kept)))
        mean, inside = mean[kept], place[voxel] >= 0
        xyz, ids, voxel = xyz[inside], ids[inside], place[voxel[inside]]
    return Scene(room, sights(views, np.random.default_rng([room.seed, 1])), mean, xyz, voxel, ids)


def build_scene(seed: int, split: Split, vision: VisionTower, config: SceneConfig) -> Scene:
    """Renders and encodes room `seed`; every second room is seen through a camera with noise."""
    room = make_room(seed, split)
    views = render_views(room, seed=seed, count=config.views, noise=seed % 2 == 1, renderer=Renderer(room))
    return encode_views(room, views, vision, config)


def save_scene(scene: Scene, path: Path) -> None:
    """Writes everything but the room, which its seed gives; complete or not at all."""
    seen = sorted(scene.sights)
    arrays: dict[str, Any] = {
        "features": scene.features.half().numpy(),
        "xyz": scene.xyz.numpy(),
        "voxel": scene.voxel.numpy().astype(np.int16),
        "instance": scene.instance.numpy().astype(np.int16),
        "room": np.frombuffer(room_digest(scene.room).encode(), np.uint8),
        "seen": np.array(seen, np.int16),
        "pixels": np.array([scene.sights[i].pixels for i in seen], np.int32),
        "bounds": np.array([(scene.sights[i].low, scene.sights[i].high) for i in seen]).reshape(-1, 2, 3),
        "n_points": np.array([len(scene.sights[i].points) for i in seen], np.int16),
        "points": np.concatenate([np.zeros((0, 3), np.float32), *(scene.sights[i].points for i in seen)]),
    }
    with replacing(path) as file:
        np.savez(file, **arrays)


def read_scene(path: Path, split: Split) -> Scene:
    """Reads what `save_scene` wrote.

    Raises:
        DataError: if the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        ends = np.cumsum(arrays["n_points"].astype(int))
        points = np.split(arrays["points"], ends[:-1])
        found = {
            int(instance): Sight(int(pixels), bounds[0], bounds[1], own)
            for instance, pixels, bounds, own in zip(
                arrays["seen"], arrays["pixels"], arrays["bounds"], points, strict=False
            )
        }
        room = make_room(int(path.stem), split)
        if arrays["room"].tobytes().decode() != room_digest(room):
            raise DataError(f"{path} shows another room than seed {path.stem} gives now: delete it")
        return Scene(
            room,
            found,
            torch.from_numpy(arrays["features"]).float(),
            torch.from_numpy(arrays["xyz"]),
            torch.from_numpy(arrays["voxel"].astype(np.int64)),
            torch.from_numpy(arrays["instance"].astype(np.int64)),
        )
    except DataError:
        raise
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no scene: {error}") from error


def room_digest(room: FurnishedRoom) -> str:
    """16 hexadecimal digits of what stands where in a room; other generators give other rooms for a seed."""
    facts = [(i.model.id, i.colour, [round(v, 4) for v in (*i.low, *i.high)], i.supported_by) for i in room.items]
    return hashlib.sha256(json.dumps([room.size, facts]).encode()).hexdigest()[:16]


def prepare(
    folder: Path,
    split: Split,
    seeds: range,
    vision: VisionTower,
    config: SceneConfig,
    progress: Progress = lambda done, total: None,
    *,
    workers: int = 1,
) -> list[Path]:
    """Makes the scenes that are not there yet, in so many processes; returns their files, in the order of the seeds.

    Raises:
        DataError: if the folder holds scenes that were made otherwise.
    """
    target = folder / split
    target.mkdir(parents=True, exist_ok=True)
    settings = folder / "scenes.json"
    wanted = {name: getattr(config, name) for name in SceneConfig.__dataclass_fields__}
    if settings.is_file():
        found = json.loads(settings.read_text(encoding="utf-8"))
        if found != wanted:
            raise DataError(f"{folder} holds scenes made with {found}, wanted are {wanted}: choose another folder")
    else:
        settings.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    paths = [target / f"{seed:08d}.npz" for seed in seeds]
    missing = [path for path in paths if not path.is_file()]
    there = len(paths) - len(missing)
    progress(there, len(paths))
    make = partial(_make, split, vision, config)
    if workers > 1 and missing:
        # Not forked: Open3D and torch have threads of their own.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            for done, _ in enumerate(pool.map(make, missing, chunksize=4), there + 1):
                progress(done, len(paths))
    else:
        for done, path in enumerate(missing, there + 1):
            make(path)
            progress(done, len(paths))
    return paths


def _make(split: Split, vision: VisionTower, config: SceneConfig, path: Path) -> None:
    save_scene(build_scene(int(path.stem), split, vision, config), path)


# --- the same room with fewer tokens, and turned ---


def thinned(scene: Scene, items: float, rest: float, rng: np.random.Generator, most: int | None = None) -> Scene:
    """The scene with a random part `items` of the tokens that show something, and `rest` of those that show only the
    room itself, at most `most` (and items); of each item at least one token stays."""
    m = len(scene.features)
    shows = np.zeros(m, bool)
    is_item = scene.instance.numpy() >= FIRST_ITEM
    voxel = scene.voxel.numpy()
    shows[voxel[is_item]] = True
    kept = rng.random(m) < np.where(shows, items, rest)
    # The patch of each item that comes first in a random order keeps its token.
    order = rng.permutation(np.flatnonzero(is_item))
    _, first = np.unique(scene.instance.numpy()[order], return_index=True)
    needed = np.zeros(m, bool)
    needed[voxel[order[first]]] = True
    kept |= needed
    if most is not None and kept.sum() > most:
        spare = rng.permutation(np.flatnonzero(kept & ~needed))
        kept[spare[max(0, most - int(needed.sum())) :]] = False
    place, inside = torch.from_numpy(np.cumsum(kept) - 1), torch.from_numpy(kept[voxel])
    return replace(
        scene,
        features=scene.features[torch.from_numpy(kept)],
        xyz=scene.xyz[inside],
        voxel=place[scene.voxel[inside]],
        instance=scene.instance[inside],
    )


def turned(scene: Scene, quarters: int, mirror: bool, voxel_size: float) -> Scene:
    """The scene mirrored (x -> -x) and then turned about the z axis by quarters of a circle, counter-clockwise.

    Voxels are taken over whole, because rounding to them is symmetric, and come in their new order.
    """
    matrix = turn_matrix(quarters, mirror)
    xyz = (scene.xyz.double() @ torch.from_numpy(matrix).T).float()
    keys = torch.empty(len(scene.features), dtype=torch.int64)
    keys[scene.voxel] = voxel_keys(xyz, voxel_size)
    order = torch.argsort(keys, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return Scene(
        turned_room(scene.room, quarters, mirror),
        {instance: _turned_sight(sight, matrix) for instance, sight in scene.sights.items()},
        scene.features[order],
        xyz,
        place[scene.voxel],
        scene.instance,
    )


def turn_matrix(quarters: int, mirror: bool) -> NDArray[np.float64]:
    """(3, 3) float64 of zeros and ones: the mirror, then the turn."""
    c, s = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters % 4]
    m = -1.0 if mirror else 1.0
    return np.array([[c * m, -s, 0.0], [s * m, c, 0.0], [0.0, 0.0, 1.0]])


def turned_room(room: FurnishedRoom, quarters: int, mirror: bool) -> FurnishedRoom:
    """The room as in `turned`. The meshes are not mirrored, so it is for questions, not for rendering."""
    width, length, height = room.size
    size = (length, width, height) if quarters % 2 else room.size
    items = tuple(_turned_item(item, quarters, mirror) for item in room.items)
    return replace(room, size=size, items=items)


def _turned_item(item: Item, quarters: int, mirror: bool) -> Item:
    matrix = turn_matrix(quarters, mirror)
    low, high = _turned_box(np.array(item.low), np.array(item.high), matrix)
    x, y, z = (matrix @ np.array(item.position)).tolist()
    yaw = (math.pi - item.yaw if mirror else item.yaw) + quarters * math.pi / 2
    return replace(item, position=(x, y, z), yaw=yaw, low=tuple(low.tolist()), high=tuple(high.tolist()))


def _turned_sight(sight: Sight, matrix: NDArray[np.float64]) -> Sight:
    low, high = _turned_box(sight.low, sight.high, matrix)
    return Sight(sight.pixels, low, high, (sight.points @ matrix.T).astype(np.float32))


def _turned_box(
    low: NDArray[np.float64], high: NDArray[np.float64], matrix: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    corners = np.stack([matrix @ low, matrix @ high])
    return corners.min(axis=0) + 0.0, corners.max(axis=0) + 0.0
