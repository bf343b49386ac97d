# SPDX-License-Identifier: Apache-2.0
"""The same room with fewer tokens, and turned: what a step of training makes of a scene."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom
from adatoken3d_ros.lab.synthetic.furniture import KINDS, models_of
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, Item
from adatoken3d_ros.lab.synthetic.views import Sight
from adatoken3d_ros.lab.training.data import Scene, grid_lines
from adatoken3d_ros.lmm.interface import ViewTokens
from adatoken3d_ros.scene.voxels import voxel_keys

_PIXEL_CHANNELS = 3  # the first of a patch's feature


def thinned(scene: Scene, items: float, rest: float, rng: np.random.Generator, most: int | None = None) -> Scene:
    """The scene with a random part `items` of the tokens that show something, and `rest` of those that show only the
    room itself, at most `most` rows of a prompt (and items); of each item at least one token stays, and one of all."""
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
    if not kept.any():  # nothing but the room is seen, and little of it
        kept[rng.integers(m)] = True
    line = None if scene.where is None else grid_lines(scene.where)
    if most is not None and kept.sum() + (0 if line is None else len(np.unique(line[kept]))) > most:
        spare = rng.permutation(np.flatnonzero(kept & ~needed))
        order = np.concatenate([np.flatnonzero(needed), spare])
        cost = np.ones(len(order), np.int64)
        if line is not None:  # the first token of a line brings the row that ends it
            cost[np.unique(line[order], return_index=True)[1]] += 1
        kept[order[(np.cumsum(cost) > most) & ~needed[order]]] = False
    return _with(scene, kept)


def looked_away(scene: Scene, item: Item, around: float) -> Scene:
    """The scene as if no view had shown an item: without the tokens of which a part lies in its box or less than
    `around` metres from it, and without what was seen of things there alone."""
    xyz = scene.xyz.numpy()
    apart = np.maximum(np.maximum(np.array(item.low) - xyz, xyz - np.array(item.high)), 0.0)
    kept = np.ones(len(scene.features), bool)
    kept[scene.voxel.numpy()[np.linalg.norm(apart, axis=1) < around]] = False
    left = _with(scene, kept)
    shown = set(left.instance.unique().tolist()) - {item.instance}
    return replace(left, sights={one: sight for one, sight in scene.sights.items() if one in shown})


@lru_cache(maxsize=4)
def model_parts(turns: int) -> Mapping[str, int]:
    """Of each model of training rooms, by its id, in which of so many parts it is: models of one class are in different
    ones, so that whichever part is left out, its classes stay; the only model of a class is in none."""
    parts: dict[str, int] = {}
    for number, kind in enumerate(KINDS):
        models = models_of(kind, held_out=False)
        if len(models) > 1:
            parts |= {model.id: (number + k) % turns for k, model in enumerate(models)}
    return parts


def without_models(scene: Scene, part: int, turns: int) -> Scene:
    """The scene as if no view had shown an item of the furniture models of a part: without the tokens that show any of
    it, and without what was seen of these items. The scene itself where nothing else would be left."""
    parts = model_parts(turns)
    gone = [item.instance for item in scene.room.items if parts.get(item.model.id) == part]
    kept = np.ones(len(scene.features), bool)
    kept[scene.voxel.numpy()[np.isin(scene.instance.numpy(), gone)]] = False
    if not kept.any():
        return scene
    return replace(_with(scene, kept), sights={i: sight for i, sight in scene.sights.items() if i not in gone})


def _with(scene: Scene, kept: NDArray[np.bool_]) -> Scene:
    """The scene with these of its tokens (M,)."""
    voxel = scene.voxel.numpy()
    place, inside = torch.from_numpy(np.cumsum(kept) - 1), torch.from_numpy(kept[voxel])
    staying, where = torch.from_numpy(kept), scene.where
    if where is not None:
        where = replace(where, view=where.view[staying], cell=where.cell[staying])
    return replace(
        scene,
        features=scene.features[staying],
        evidence=None if scene.evidence is None else scene.evidence[staying],
        place=None if scene.place is None else scene.place[staying],
        where=where,
        xyz=scene.xyz[inside],
        voxel=place[scene.voxel[inside]],
        instance=scene.instance[inside],
    )


def turned(scene: Scene, quarters: int, mirror: bool, voxel_size: float) -> Scene:
    """The scene mirrored (x -> -x) and then turned about the z axis by quarters of a circle, counter-clockwise.

    Voxels are taken over whole, because rounding to them is symmetric, and come in their new order. In a mirror the
    rows of views run the other way.
    """
    matrix = turn_matrix(quarters, mirror)
    xyz, where = _moved(scene.xyz, matrix), scene.where
    if where is None:
        keys = torch.empty(len(scene.features), dtype=torch.int64)
        keys[scene.voxel] = voxel_keys(xyz, voxel_size)
    else:
        cell = _mirrored(where) if mirror else where.cell
        keys = where.view * (int(cell.max()) + 1) + cell
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
        None if scene.place is None else _moved(scene.place, matrix)[order],
        None if where is None else replace(where, view=where.view[order], cell=cell[order]),
        None if scene.evidence is None else scene.evidence[order],
    )


def detected(scene: Scene, simulated: float, strange: float, rng: np.random.Generator) -> Scene:
    """The scene with some other evidence than what the detector said of its renders.

    In a part `simulated` of all cases it is what a detector might have said of photographs; in a part `strange` also
    the network's features say nothing that training rooms could teach (but for the pixels, which show colours): things
    differ from each other and from the room, each in its own way, as they do to a network that has only seen renders.
    """
    if scene.evidence is None:
        return scene
    draw, number = float(rng.random()), int(rng.integers(scene.evidence.shape[1]))
    if draw >= simulated + strange:
        return replace(scene, evidence=None)
    own, evidence = scene.features.float(), scene.evidence[:, number].float()
    own = own[:, : -evidence.shape[1]]
    if draw < strange:
        m, width = len(own), own.shape[1] - _PIXEL_CHANNELS
        # A direction for each thing, one for each of the room's surfaces, and one of all of them.
        kinds = int(scene.instance.max()) + 1
        looks = torch.from_numpy(rng.standard_normal((kinds, width), dtype=np.float32))
        share = torch.zeros(m, kinds).index_put_(
            (scene.voxel, scene.instance.clamp(min=0)), torch.ones(len(scene.voxel)), accumulate=True
        )
        share /= share.sum(dim=1, keepdim=True).clamp(min=1)
        noise = torch.from_numpy(rng.standard_normal((m, width), dtype=np.float32))
        shift = torch.from_numpy(rng.standard_normal(width, dtype=np.float32))
        kept = float(rng.uniform(0, 0.3))
        strange_looks = 0.6 * (share @ looks) + 0.4 * noise + 0.3 * shift + kept * own[:, _PIXEL_CHANNELS:]
        own = torch.cat([own[:, :_PIXEL_CHANNELS], strange_looks], dim=1)
    return replace(scene, features=torch.cat([own, evidence], dim=1), evidence=None)


def _moved(xyz: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    return (xyz.double() @ torch.from_numpy(matrix).T).float()


def _mirrored(where: ViewTokens) -> Tensor:
    """(M,) cells of views whose left is their right."""
    columns = torch.tensor([grid[1] for grid in where.grids])[where.view]
    return where.cell // columns * columns + columns - 1 - where.cell % columns


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
