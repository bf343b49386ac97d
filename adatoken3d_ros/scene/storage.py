# SPDX-License-Identifier: Apache-2.0
"""A scene memory as one file: safetensors with what each view adds, and JSON that says for which model and frame."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adatoken3d_ros.scene.frames import FrameError, check_rigid
from adatoken3d_ros.scene.token_map import Contribution, TokenMap

FORMAT = 2
MAX_BYTES = 8 * 2**30  # a larger file is refused before it is read
MAX_VIEWS = 10_000
_OF_ROWS = ("keys", "features", "count", "xyz", "rgb")
_OF_PATCHES = ("points", "level")
_NAMES = (*_OF_ROWS, *_OF_PATCHES, "stamps", "rows", "poses")
MOST_SHIFT = 2**20  # voxels


class SceneFileError(ValueError):
    """A file that is no scene, or not one of this model and frame; the message names the offending value."""


def save_scene(
    path: str | Path, token_map: TokenMap, poses: dict[int, NDArray[np.float64]], *, model_hash: str, frame_id: str
) -> None:
    """Writes the map and the poses of its views; the file appears complete or not at all.

    Args:
        poses: {stamp: T_world_camera (4, 4)}, of each view of the map; others are left out.
        model_hash: of the model whose features these are. frame_id: name of the scene frame.

    Raises:
        OSError: if the file cannot be written.
        SceneFileError: if the map is empty or a view has no pose.
    """
    path = Path(path)
    views = token_map.contributions()
    stamps = list(token_map.keys())
    if not stamps:
        raise SceneFileError(f"{path}: there is no view to save")
    missing = [stamp for stamp in stamps if stamp not in poses]
    if missing:
        raise SceneFileError(f"{path}: the view at {missing[0]} ns has no pose")
    ordered = [views[stamp] for stamp in stamps]
    tensors = {
        name: torch.cat([getattr(view, name).cpu() for view in ordered]).contiguous()
        for name in (*_OF_ROWS, *_OF_PATCHES)
    }
    tensors["stamps"] = torch.tensor(stamps, dtype=torch.int64)
    tensors["rows"] = torch.tensor([len(view.keys) for view in ordered], dtype=torch.int64)
    tensors["poses"] = torch.from_numpy(np.stack([poses[stamp] for stamp in stamps]).astype(np.float64))
    content = {**_identity(token_map, model_hash, frame_id), "shift": token_map.shift.tolist()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"adatoken3d_scene": json.dumps(content, sort_keys=True)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_scene(
    path: str | Path,
    token_map: TokenMap,
    *,
    model_hash: str,
    frame_id: str,
    channels: int,
    device: torch.device | str = "cpu",
    adopt_origin: bool = False,
) -> dict[int, NDArray[np.float64]]:
    """Replaces the map's views by those of a file; on any error the map is as it was.

    Args:
        token_map: of the voxel size and origin that the file was written with.
        model_hash, frame_id: see `save_scene`. channels: of the model's features. device: where they are put.
        adopt_origin: the map takes over the origins of the file, its own and the model's, whatever they were; else its
            own must be the file's, and the model's stays.

    Returns:
        {stamp: T_world_camera (4, 4)} of the views, oldest first; their orders in the map are 0, 1, ...

    Raises:
        OSError: if the file cannot be read.
        SceneFileError: for a file that is damaged, too large, or of another model, frame, voxel size or origin.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SceneFileError(f"{path} has {size} bytes, more than {MAX_BYTES}")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get("adatoken3d_scene", "null"))
            names = set(file.keys())
            if not isinstance(content, dict) or names != set(_NAMES):
                raise SceneFileError(f"{path} is no scene: it holds {', '.join(sorted(names)) or 'nothing'}")
            wanted = _identity(token_map, model_hash, frame_id)
            if adopt_origin:
                del wanted["origin"]
            _check_identity(path, content, wanted)
            origin, shift = _origins(path, content) if adopt_origin else (None, None)
            tensors = {name: file.get_tensor(name) for name in _NAMES}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise SceneFileError(f"{path} is no scene: {error}") from error
    _check_tensors(path, tensors, channels, token_map.dtype)
    rows = tensors["rows"].tolist()
    parts = {name: torch.split(tensors[name], rows) for name in _OF_ROWS}
    patches = [int(count.sum()) for count in parts["count"]]
    parts.update({name: torch.split(tensors[name], patches) for name in _OF_PATCHES})
    views = {}
    for i, stamp in enumerate(tensors["stamps"].tolist()):
        part = {name: parts[name][i] for name in parts}
        part["features"] = part["features"].to(device)
        nothing = part["features"].new_zeros(rows[i], 0, dtype=torch.float32)
        views[stamp] = Contribution(**part, position=nothing, order=i)
    token_map.restore(views, origin, shift)
    return dict(zip(views, tensors["poses"].numpy(), strict=True))


def _identity(token_map: TokenMap, model_hash: str, frame_id: str) -> dict[str, object]:
    return {
        "format": FORMAT,
        "model": model_hash,
        "frame": frame_id,
        "voxel_size": token_map.voxel_size,
        "origin": token_map.origin.tolist(),
        "numbers": str(token_map.dtype).removeprefix("torch."),
    }


def _origins(path: Path, content: dict[str, object]) -> tuple[list[float], Tensor]:
    origin, shift = content.get("origin"), content.get("shift")
    numbers = isinstance(origin, list) and all(isinstance(x, float) and np.isfinite(x) for x in origin)
    if not (numbers and isinstance(origin, list) and len(origin) == 3):
        raise SceneFileError(f"{path} has origin {origin!r}, not three numbers")
    whole = isinstance(shift, list) and all(type(n) is int and abs(n) <= MOST_SHIFT for n in shift)
    if not (whole and isinstance(shift, list) and len(shift) == 3):
        raise SceneFileError(f"{path} has shift {shift!r}, not three whole numbers up to {MOST_SHIFT}")
    return origin, torch.tensor(shift, dtype=torch.int64)


def _check_identity(path: Path, content: dict[str, object], wanted: dict[str, object]) -> None:
    for name, value in wanted.items():
        if content.get(name) != value:
            raise SceneFileError(f"{path} has {name} {content.get(name)!r}, here it is {value!r}")


def _check_tensors(path: Path, tensors: dict[str, Tensor], channels: int, dtype: torch.dtype) -> None:
    views, rows = len(tensors["stamps"]), len(tensors["keys"])
    if not 0 < views <= MAX_VIEWS:
        raise SceneFileError(f"{path} has {views} views, not 1 to {MAX_VIEWS}")
    patches = len(tensors["points"])
    wanted = {
        "points": ((patches, 3), torch.float32),
        "level": ((patches,), torch.bool),
        "keys": ((rows,), torch.int64),
        "features": ((rows, channels), dtype),
        "count": ((rows,), torch.int64),
        "xyz": ((rows, 3), torch.float64),
        "rgb": ((rows, 3), torch.float64),
        "stamps": ((views,), torch.int64),
        "rows": ((views,), torch.int64),
        "poses": ((views, 4, 4), torch.float64),
    }
    for name, (shape, kind) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != kind:
            raise SceneFileError(f"{path}: {name} is {tuple(found.shape)} {found.dtype}, expected {shape} {kind}")
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise SceneFileError(f"{path}: {name} holds a number that is not finite")
    if int(tensors["rows"].min()) < 0 or int(tensors["rows"].sum()) != rows:
        raise SceneFileError(f"{path}: its views have {tensors['rows'].tolist()} rows, there are {rows}")
    if rows and int(tensors["count"].min()) < 1:
        raise SceneFileError(f"{path}: a voxel of {int(tensors['count'].min())} patches")
    if rows and int(tensors["count"].max()) > patches or int(tensors["count"].sum()) != patches:
        raise SceneFileError(f"{path}: its voxels have {int(tensors['count'].sum())} patches, there are {patches}")
    stamps = tensors["stamps"].tolist()  # in the order of arrival: they go back where time did
    if len(set(stamps)) < views:
        raise SceneFileError(f"{path}: two of its views have the same stamp")
    repeated = dtype != torch.float32  # upstream's numbers keep a row per patch
    for stamp, keys in zip(stamps, torch.split(tensors["keys"], tensors["rows"].tolist()), strict=True):
        steps = keys.diff()
        if bool((steps < 0).any() if repeated else (steps <= 0).any()) or (len(keys) and int(keys[0]) < 0):
            raise SceneFileError(f"{path}: the voxels of the view at {stamp} ns do not ascend")
    for stamp, pose in zip(stamps, tensors["poses"].numpy(), strict=True):
        try:
            check_rigid(pose)
        except FrameError as error:
            raise SceneFileError(f"{path}: the view at {stamp} ns: {error}") from error
