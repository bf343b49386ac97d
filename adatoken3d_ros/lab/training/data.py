# SPDX-License-Identifier: Apache-2.0
"""Rooms as the model sees them, rendered and encoded once and kept in files.

The vision tower is frozen, so all of a scene but the position embedding can be computed beforehand. Pooling is a mean,
and so (feature + position) pooled is feature pooled + position pooled: the file holds the former, and the points that
the latter is computed from.
"""

from __future__ import annotations

import hashlib
import json
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
from adatoken3d_ros.lab.synthetic.detections import simulated
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, Split, make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.sensor import sensed_views
from adatoken3d_ros.lab.synthetic.texture import TRAINED
from adatoken3d_ros.lab.synthetic.views import Sight, View, render_views, sights
from adatoken3d_ros.lmm.interface import ViewTokens
from adatoken3d_ros.lmm.untrained import trainable
from adatoken3d_ros.lmm.vision.ssd import CLASSES, EVIDENCE, painted
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.geometry import PatchGeometry, sample_pixels
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.voxels import voxel_pool

Progress = Callable[[int, int], None]
_FINE = 4  # points along the edge of a view's token
_DRAWS = 2  # of a detector's evidence
_SENSED = 7  # of ten rooms, seen through a real camera


class DataError(ValueError):
    """Kept scenes that cannot be used; the message names the file or setting."""


@dataclass(frozen=True)
class SceneConfig:
    """How rooms become scenes.

    Attributes:
        views: of each room. image_size, grid: of the vision tower. voxel_size: metres. max_tokens: of a scene.
        vision: identifies the tower's weights.
        tokens: what a spatial token is, see `ModelSizes`; of views, `grid` is that of their tokens.
        camera: "ideal", every second room with some noise; "real", seven of ten rooms textured and seen through a real
            camera (`synthetic.sensor`), the others as in "ideal"; "other", all of them, with textures that "real" does
            not have.
    """

    views: int
    image_size: int
    grid: int
    voxel_size: float
    max_tokens: int
    vision: str
    tokens: str = "voxels"
    camera: str = "ideal"


@dataclass(frozen=True, eq=False)
class Scene:
    """A room as M spatial tokens, without positions, and what is true of it.

    Attributes:
        room: with everything that stands in it.
        sights: what the views show of each item, by instance.
        features: (M, C) float32 (float16 while it is only kept), vision features pooled over voxels, in the order of
            `scene.token_map`; (M, n, C) of n patches where a token of a view is made of these.
        xyz: (P, 3) float32, points of the valid patches, room frame, metres; of finer ones where tokens are of views.
        voxel: (P,) int64, row of `features` that each point belongs to.
        instance: (P,) int64, what each point is of: an item's instance, or less than FIRST_ITEM for the room itself.
        evidence: (M, n, K) float32, what a detector might have said of photographs of the room, n times drawn; None
            where the vision tower has none, or tokens are of views. The last K channels of `features` are what it said
            of these views.
        place: (M, 3) float32, where each token is, and where: which of which views, where tokens are those of views.
    """

    room: FurnishedRoom
    sights: Mapping[int, Sight]
    features: Tensor
    xyz: Tensor
    voxel: Tensor
    instance: Tensor
    place: Tensor | None = None
    where: ViewTokens | None = None
    evidence: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that it takes in a prompt: each row of a view's grid ends with one of its own."""
        return len(self.features) + (0 if self.where is None else len(np.unique(grid_lines(self.where))))


def encode_views(room: FurnishedRoom, views: list[View], vision: VisionTower, config: SceneConfig) -> Scene:
    """The scene that the engine makes of these views, position embedding apart."""
    if config.tokens == "views":
        return _encode_grids(room, views, vision, config)
    patches = PatchConfig(PatchGeometry.square(config.image_size, config.grid))
    points = [patch_points(view.frame, patches) for view in views]
    xyz = torch.from_numpy(np.concatenate([p.xyz for p in points]))
    valid = torch.from_numpy(np.concatenate([p.valid for p in points]))
    ids = torch.from_numpy(np.concatenate([_shown(view, patches.geometry) for view in views]).astype(np.int64))
    features = vision([view.frame.rgb for view in views]).flatten(0, 1)
    width = features.shape[1]
    if detects(vision):
        features = torch.cat([features, _evidence(room, views, config)], dim=1)
    mean, voxel, count, _ = voxel_pool(features, xyz, config.voxel_size, valid=valid)
    xyz, ids, voxel = xyz[valid], ids[valid], voxel[valid]
    if len(mean) > config.max_tokens:  # the best covered voxels, in order: as TokenMap.tokens
        kept = torch.sort(count, descending=True, stable=True).indices[: config.max_tokens].sort().values
        place = torch.full((len(mean),), -1).index_copy_(0, kept, torch.arange(len(kept)))
        mean, inside = mean[kept], place[voxel] >= 0
        xyz, ids, voxel = xyz[inside], ids[inside], place[voxel[inside]]
    evidence = mean[:, width:].unflatten(1, (_DRAWS, -1)) if detects(vision) else None
    seen = sights(views, np.random.default_rng([room.seed, 1]))
    return Scene(room, seen, mean[:, :width], xyz, voxel, ids, evidence=evidence)


def detects(vision: VisionTower) -> bool:
    """Whether a detector's evidence is among the tower's features."""
    return getattr(vision.tower, "detector", None) is not None


def _evidence(room: FurnishedRoom, views: list[View], config: SceneConfig) -> Tensor:
    """(P, n K) what a detector of photographs might say of each patch, drawn n times."""
    rng = np.random.default_rng([room.seed, 2])
    found = []
    for view in views:
        height, width = view.ids.shape
        edge = min(height, width)  # of the square that the tower sees
        top, left = (height - edge) // 2, (width - edge) // 2
        ids = view.ids[top : top + edge, left : left + edge]
        drawn = []
        for _ in range(_DRAWS):
            boxes, scores = (torch.from_numpy(a)[None] for a in simulated(ids, room.items, list(CLASSES), rng))
            drawn.append(EVIDENCE * painted(boxes, scores, config.grid)[0])
        found.append(torch.cat(drawn, dim=1))
    return torch.cat(found)


def _encode_grids(room: FurnishedRoom, views: list[View], vision: VisionTower, config: SceneConfig) -> Scene:
    """As `encode_views`, the tokens are the cells of each view, with the patches that each is made of."""
    side, geometry = config.grid, replace(vision.geometry, rows=config.grid, columns=config.grid)
    fine = PatchConfig(replace(geometry, rows=_FINE * side, columns=_FINE * side))
    form = trainable(config.tokens)
    tokens = [form.place_tokens(view.frame, geometry, fine.max_depth) for view in views]
    points = [patch_points(view.frame, fine) for view in views]
    ids = np.stack([_shown(view, fine.geometry) for view in views])
    number = np.arange(_FINE * side) // _FINE
    cells = len(tokens[0].valid)
    of_cell = (number[:, None] * side + number).reshape(-1) + np.arange(len(views))[:, None] * cells
    valid, seen = np.concatenate([t.valid for t in tokens]), np.stack([p.valid for p in points])
    # A token none of whose finer points was measured shows the room, as far as anybody can tell.
    lost = np.setdiff1d(np.flatnonzero(valid), of_cell[seen])
    place = np.concatenate([t.xyz for t in tokens])
    token = np.cumsum(valid) - 1
    part = vision.geometry.rows // side
    features = vision([view.frame.rgb for view in views]).unflatten(1, (side, part, side, part)).transpose(2, 3)
    kept = torch.from_numpy(np.flatnonzero(valid))
    inside = seen & valid[of_cell]
    return Scene(
        room,
        sights(views, np.random.default_rng([room.seed, 1])),
        features.reshape(len(valid), part * part, -1)[kept],
        torch.from_numpy(np.concatenate([np.stack([p.xyz for p in points])[inside], place[lost]])),
        torch.from_numpy(np.concatenate([token[of_cell[inside]], token[lost]])),
        torch.from_numpy(np.concatenate([ids[inside], np.zeros(len(lost), ids.dtype)]).astype(np.int64)),
        torch.from_numpy(place[valid]),
        ViewTokens(kept // cells, kept % cells, ((side, side),) * len(views)),
    )


def _shown(view: View, geometry: PatchGeometry) -> NDArray[np.int16]:
    """(P,) what the pixel of each patch shows."""
    height, width = view.ids.shape
    rows, cols = sample_pixels(width, height, geometry)
    shown: NDArray[np.int16] = view.ids[np.ix_(rows, cols)].reshape(-1)
    return shown


def grid_lines(where: ViewTokens) -> NDArray[np.int64]:
    """(M,) a number for each row of each view's grid."""
    rows, columns = np.array(where.grids).T
    view = where.view.numpy()
    lines: NDArray[np.int64] = view * rows.max() + where.cell.numpy() // columns[view]
    return lines


def build_scene(seed: int, split: Split, vision: VisionTower, config: SceneConfig) -> Scene:
    """Renders and encodes room `seed`, seen as `SceneConfig.camera` says."""
    room = make_room(seed, split)
    if config.camera == "other":
        views = sensed_views(Renderer(room, ("striped",)), seed, config.views)
    elif config.camera == "real" and seed % 10 < _SENSED:
        views = sensed_views(Renderer(room, TRAINED), seed, config.views)
    else:
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
    if scene.place is not None and scene.where is not None:
        arrays["place"] = scene.place.numpy()
        arrays["view"], arrays["cell"] = (t.numpy().astype(np.int16) for t in (scene.where.view, scene.where.cell))
        arrays["grids"] = np.array(scene.where.grids, np.int16)
    if scene.evidence is not None:
        arrays["evidence"] = scene.evidence.half().numpy()
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
        place, where = _read_grids(arrays)
        return Scene(
            room,
            found,
            torch.from_numpy(arrays["features"]).float(),
            torch.from_numpy(arrays["xyz"]),
            torch.from_numpy(arrays["voxel"].astype(np.int64)),
            torch.from_numpy(arrays["instance"].astype(np.int64)),
            place,
            where,
            torch.from_numpy(arrays["evidence"]).float() if "evidence" in arrays else None,
        )
    except DataError:
        raise
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no scene: {error}") from error


def _read_grids(arrays: Mapping[str, Any]) -> tuple[Tensor, ViewTokens] | tuple[None, None]:
    if "place" not in arrays:
        return None, None
    view, cell = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("view", "cell"))
    grids = tuple((int(rows), int(columns)) for rows, columns in arrays["grids"])
    return torch.from_numpy(arrays["place"]), ViewTokens(view, cell, grids)


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
    for name, usual in (("tokens", "voxels"), ("camera", "ideal")):
        if wanted[name] == usual:
            del wanted[name]  # what there was before there was a choice
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
