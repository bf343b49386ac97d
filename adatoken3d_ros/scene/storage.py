# SPDX-License-Identifier: Apache-2.0
"""A scene memory as one file: its views' patches, for which model, frame and map, and what else is known of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.files import UnusableFile, parse_json, read_file
from adatoken3d_ros.scene.agreement import Sketch
from adatoken3d_ros.scene.contributions import Contribution, nothing, reduced
from adatoken3d_ros.scene.frames import FrameError, check_rigid
from adatoken3d_ros.scene.look_storage import SHAPES as LOOK_SHAPES
from adatoken3d_ros.scene.look_storage import LookError, look_parts, read_looks
from adatoken3d_ros.scene.looked import Looked
from adatoken3d_ros.scene.sealed_file import AnotherSceneError, SceneFileError, SealedFile, write_sealed
from adatoken3d_ros.scene.sketch_storage import SHAPES, SketchError, read_sketches, sketch_parts
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.tombstone_storage import ThingError, read_things, thing_parts, thing_shapes
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.view_blocks import ViewTokenMap
from adatoken3d_ros.scene.view_storage import BlockError, block_parts, block_shapes, read_blocks
from adatoken3d_ros.scene.voxels import TokenMapError
from adatoken3d_ros.text import quoted

FORMAT = 5  # 4 did not say where frames that are no views had looked, and when
READ = (4, FORMAT)  # 3 had sums over voxels, whose views could not be moved, and no map; 2 no checksum
MAX_BYTES = 8 * 2**30  # a larger file is refused before it is read
MAX_VIEWS = 10_000
MOST_SHIFT = 2**20  # voxels
MOST_METRES = 1e6  # no scene reaches so far from its frame's origin
MOST_STAMP = 2**31 * 10**9  # nanoseconds; what a message's header can say
LONGEST_MAP_ID = 128  # characters
MOST_NOTES = 2**20  # bytes
# Larger numbers could not be added up, or are no places.
_MOST = {"patches": 1e9, "points": MOST_METRES, "poses": MOST_METRES}
_OF_PATCHES = ("points", "level", "patches", "colours")


@dataclass(frozen=True, eq=False)
class About:
    """What a file says of a scene beside its views.

    Attributes:
        map_id: which map its places belong to.
        sketches: of views, by their stamps, see `scene.agreement`.
        things: what has gone from it and what has appeared, see `scene.tombstones`.
        notes: whatever else is kept with it, as JSON takes it.
        saved_ns: the system's time of saving, nanoseconds.
        looked: where it was looked at, and when; None where nobody knows.
        confirmed_ns: acquisition time of the newest frame that is no view and agreed with it; 0: of none.
    """

    map_id: str = ""
    sketches: Mapping[int, Sketch] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    things: Sequence[Thing] = ()
    saved_ns: int = 0
    looked: Looked | None = None
    confirmed_ns: int = 0


@dataclass(frozen=True, eq=False)
class Packed:
    """A scene as it was, ready to be written, in another thread, too."""

    parts: Mapping[str, list[Tensor]]
    content: Mapping[str, Any]

    @property
    def views(self) -> int:
        return len(self.parts["stamps"][0])

    def write(self, path: str | Path) -> None:
        """The file appears complete or not at all. Raises OSError if it cannot be written."""
        write_sealed(Path(path), self.parts, self.content)


def pack_scene(
    token_map: TokenMap,
    poses: Mapping[int, NDArray[np.float64]],
    *,
    model_hash: str,
    frame_id: str,
    about: About | None = None,
) -> Packed:
    """The map and the poses of its views as they are now; they may change afterwards.

    Args:
        poses: {stamp: T_world_camera (4, 4)}, of each view of the map; others are left out.
        model_hash: of the model whose features these are. frame_id: name of the scene frame.

    Raises:
        SceneFileError: if the map is empty or a view has no pose, and for notes that are too long.
    """
    about = about or About()
    views, stamps = token_map.contributions(), list(token_map.keys())
    if not stamps:
        raise SceneFileError("there is no view to save")
    if missing := [stamp for stamp in stamps if stamp not in poses]:
        raise SceneFileError(f"the view at {missing[0]} ns has no pose")
    notes = json.dumps(about.notes, sort_keys=True).encode()
    if len(notes) > MOST_NOTES:
        raise SceneFileError(f"what is kept with the scene has {len(notes)} bytes, more than {MOST_NOTES}")
    ordered = [views[stamp] for stamp in stamps]
    parts: dict[str, list[Tensor]] = {name: [getattr(view, name) for view in ordered] for name in _OF_PATCHES}
    parts["patches"] = [part.float() for part in parts["patches"]]
    parts["stamps"] = [torch.tensor(stamps, dtype=torch.int64)]
    parts["rows"] = [torch.tensor([len(view.points) for view in ordered], dtype=torch.int64)]
    parts["poses"] = [torch.from_numpy(np.stack([poses[stamp] for stamp in stamps]).astype(np.float64))]
    parts["notes"] = [torch.frombuffer(bytearray(notes), dtype=torch.uint8)]
    blocks = block_parts(token_map)
    width = blocks.get("block_features", parts["patches"])[0].shape[1]
    parts |= sketch_parts(stamps, about.sketches) | thing_parts(about.things, width) | blocks
    parts |= look_parts(about.looked)
    centres, half = token_map.centres(), token_map.voxel_size / 2
    extent = [(centres.min(axis=0) - half).tolist(), (centres.max(axis=0) + half).tolist()] if len(centres) else []
    content = {
        **_identity(token_map, model_hash, frame_id),
        "shift": token_map.shift.tolist(),
        "map": about.map_id,
        "saved_ns": about.saved_ns or time.time_ns(),
        "newest_ns": stamps[-1],
        "confirmed_ns": about.confirmed_ns,
        "extent": extent,
    }
    return Packed(parts, content)


def save_scene(path: str | Path, token_map: TokenMap, poses: Mapping[int, NDArray[np.float64]], **given: Any) -> None:
    """Writes what `pack_scene` makes of the map; raises as it and `Packed.write`, with the path."""
    try:
        packed = pack_scene(token_map, poses, **given)
    except SceneFileError as error:
        raise SceneFileError(f"{path}: {error}") from error
    packed.write(path)


def load_scene(
    path: str | Path,
    token_map: TokenMap,
    *,
    model_hash: str,
    frame_id: str,
    channels: int,
    device: torch.device | str = "cpu",
    adopt_origin: bool = False,
    map_id: str = "",
) -> tuple[dict[int, NDArray[np.float64]], About]:
    """Replaces the map's views by those of a file; on any error the map is as it was.

    The file is read once and copied: what becomes of it afterwards does not matter.

    Args:
        token_map: of the voxel size and origin that the file was written with.
        model_hash, frame_id: see `pack_scene`. channels: of the model's features. device: where they are put.
        adopt_origin: the map takes over the origins of the file, its own and the model's, whatever they were; else its
            own must be the file's, and the model's stays.
        map_id: the file must be of that map; empty: of any.

    Returns:
        {stamp: T_world_camera (4, 4)} of the views, oldest first, whose orders in the map are 0, 1, ...; and the rest.

    Raises:
        OSError: if the file cannot be read.
        SceneFileError: for a file that is damaged or too large.
        AnotherSceneError: for one of another model, frame, map, voxel size, origin or format.
    """
    path = Path(path)
    try:
        # A sparse file has any size for nothing: what would not leave room for itself as a scene is not read.
        data = read_file(path, min(MAX_BYTES, psutil.virtual_memory().available // 2))
    except UnusableFile as error:
        raise SceneFileError(str(error)) from error
    file = SealedFile(path, data, READ)
    wanted = _identity(token_map, model_hash, frame_id) | ({"map": map_id} if map_id else {})
    del wanted["format"]  # it is one of those that can be read
    if adopt_origin:
        del wanted["origin"]
    for name, value in wanted.items():
        if file.content.get(name) != value:
            raise AnotherSceneError(f"{path} has {name} {quoted(file.content.get(name))}, here it is {value!r}")
    origin, shift = _origins(path, file.content) if adopt_origin else (None, None)
    where = token_map.origin if origin is None else torch.tensor(origin, dtype=torch.float64)
    try:
        tensors = _tensors(file, token_map, channels)
        _check_tensors(tensors)
        stamps, rows = tensors["stamps"].tolist(), tensors["rows"].tolist()
        poses = dict(zip(stamps, tensors["poses"].numpy().copy(), strict=True))
        views = _views(tensors, stamps, rows, where, token_map.voxel_size, device)
        about = _about(file.content, tensors, poses)
        if isinstance(token_map, ViewTokenMap):
            keys = {stamp: view.keys for stamp, view in views.items()}
            blocks = read_blocks(path, tensors, keys, token_map, where, device)
            token_map.restore(views, origin, shift, blocks)
        else:
            token_map.restore(views, origin, shift)
    except BlockError as error:
        raise SceneFileError(str(error)) from error
    except (_Refused, LookError, SketchError, ThingError, TokenMapError) as error:
        raise SceneFileError(f"{path}: {error}") from error
    return poses, about


class _Refused(ValueError):
    """What the file holds cannot be; the message says why, without the path."""


def _views(
    tensors: Mapping[str, Tensor],
    stamps: list[int],
    rows: list[int],
    origin: Tensor,
    voxel_size: float,
    device: torch.device | str,
) -> dict[int, Contribution]:
    """Each view added up anew; of each a copy of its own: the memory of one that is dropped is free again."""
    views = {}
    parts = zip(*(torch.split(tensors[name], rows) for name in _OF_PATCHES), strict=True)
    for order, (stamp, (points, level, patches, colours)) in enumerate(zip(stamps, parts, strict=True)):
        features = patches.to(device, copy=True)
        if len(points):
            view = reduced(features, points.clone(), colours.clone(), None, level.clone(), origin, voxel_size)
        else:
            view = nothing(features)
        views[stamp] = replace(view, order=order)
    return views


def _identity(token_map: TokenMap, model_hash: str, frame_id: str) -> dict[str, object]:
    return {
        "model": model_hash,
        "frame": frame_id,
        "voxel_size": token_map.voxel_size,
        "origin": token_map.origin.tolist(),
        "numbers": "float32",
        "format": FORMAT,
    }


def _origins(path: Path, content: Mapping[str, object]) -> tuple[list[float], Tensor]:
    origin, shift = content.get("origin"), content.get("shift")
    numbers = isinstance(origin, list) and all(isinstance(x, float) and abs(x) <= MOST_METRES for x in origin)
    if not (numbers and isinstance(origin, list) and len(origin) == 3):
        raise SceneFileError(f"{path} has origin {quoted(origin)}, not three numbers up to {MOST_METRES:g} m")
    whole = isinstance(shift, list) and all(type(n) is int and abs(n) <= MOST_SHIFT for n in shift)
    if not (whole and isinstance(shift, list) and len(shift) == 3):
        raise SceneFileError(f"{path} has shift {quoted(shift)}, not three whole numbers up to {MOST_SHIFT}")
    return origin, torch.tensor(shift, dtype=torch.int64)


def _tensors(file: SealedFile, token_map: TokenMap, channels: int) -> dict[str, Tensor]:
    blocks = block_shapes(token_map, channels)
    more = {**SHAPES, **thing_shapes(channels), **blocks, **(LOOK_SHAPES if _has_looks(file.content) else {})}
    file.check_names({*_OF_PATCHES, "stamps", "rows", "poses", "notes", *more})
    views, patches = file.length("stamps"), file.length("points")
    if not 0 < views <= MAX_VIEWS:
        raise _Refused(f"{views} views, not 1 to {MAX_VIEWS}")
    return file.tensors(
        {
            "points": ([patches, 3], torch.float32),
            "level": ([patches], torch.bool),
            "patches": ([patches, 1 if blocks else channels], torch.float32),
            "colours": ([patches, 3], torch.uint8),
            "stamps": ([views], torch.int64),
            "rows": ([views], torch.int64),
            "poses": ([views, 4, 4], torch.float64),
            "notes": ([file.length("notes")], torch.uint8),
            **{name: ([file.length(by), *shape], kind) for name, (by, shape, kind) in more.items()},
        }
    )


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    for name, most in _MOST.items():
        low, high = (float(end) for end in torch.aminmax(tensors[name])) if tensors[name].numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _Refused(f"{name} holds a number that is not finite")
        if max(-low, high) > most:
            raise _Refused(f"{name} holds {low if -low > high else high:g}, more than {most:g}")
    rows, patches = tensors["rows"], len(tensors["points"])
    if int(rows.min()) < 0 or int(rows.max()) > patches or int(rows.sum()) != patches:
        raise _Refused(f"its views have {quoted(rows.tolist())} patches, there are {patches}")
    stamps = tensors["stamps"].tolist()  # in the order of arrival: they go back where time did
    if len(set(stamps)) < len(stamps):
        raise _Refused("two of its views have the same stamp")
    if bad := [stamp for stamp in stamps if not 0 <= stamp <= MOST_STAMP]:
        raise _Refused(f"a view at {bad[0]} ns, not 0 to {MOST_STAMP}")
    for stamp, pose in zip(stamps, tensors["poses"].numpy(), strict=True):
        try:
            check_rigid(pose)
        except FrameError as error:
            raise _Refused(f"the view at {stamp} ns: {error}") from error


def _about(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], poses: Mapping[int, NDArray[np.float64]]
) -> About:
    map_id, saved_ns = content.get("map"), content.get("saved_ns")
    if not isinstance(map_id, str) or len(map_id) > LONGEST_MAP_ID:
        raise _Refused(f"its map is {quoted(map_id)}, not a text of at most {LONGEST_MAP_ID} characters")
    if type(saved_ns) is not int:
        raise _Refused(f"it was saved at {quoted(saved_ns)} ns")
    looks = _has_looks(content)
    confirmed_ns = content.get("confirmed_ns") if looks else 0
    if type(confirmed_ns) is not int or not 0 <= confirmed_ns <= MOST_STAMP:
        raise _Refused(f"it was confirmed at {quoted(confirmed_ns)} ns")
    text = tensors["notes"].numpy().tobytes()
    try:
        if len(text) > MOST_NOTES:
            raise ValueError(f"{len(text)} bytes, more than {MOST_NOTES}")
        notes = parse_json(text)
        if not isinstance(notes, dict):
            raise ValueError(f"a {type(notes).__name__}")
    except ValueError as error:
        raise _Refused(f"its notes are of no use: {error}") from error
    looked = read_looks(tensors) if looks else None
    return About(map_id, read_sketches(tensors, poses), notes, read_things(tensors), saved_ns, looked, confirmed_ns)


def _has_looks(content: Mapping[str, Any]) -> bool:
    return content.get("format") != 4
