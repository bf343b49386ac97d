# SPDX-License-Identifier: Apache-2.0
"""A scene memory as one file: safetensors with what each view adds, JSON that says for which model and frame, and a
checksum over every byte of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.files import UnusableFile, parse_json, read_file, replacing
from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.frames import FrameError, check_rigid
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.view_blocks import ViewTokenMap
from adatoken3d_ros.scene.view_storage import BlockError, Shapes, block_parts, block_shapes, read_blocks
from adatoken3d_ros.scene.voxels import voxel_indices
from adatoken3d_ros.text import quoted, shown

FORMAT = 3  # 2 had no checksum
MAX_BYTES = 8 * 2**30  # a larger file is refused before it is read
MAX_VIEWS = 10_000
MOST_SHIFT = 2**20  # voxels
MOST_METRES = 1e6  # no scene reaches so far from its frame's origin
MOST_STAMP = 2**31 * 10**9  # nanoseconds; what a message's header can say
# Larger numbers could not be added up, or are no places.
_MOST = {"features": 1e9, "xyz": 1e15, "rgb": 1e15, "points": MOST_METRES, "poses": MOST_METRES}

_OF_ROWS = ("keys", "features", "count", "xyz", "rgb")
_OF_PATCHES = ("points", "level")
_NAMES = (*_OF_ROWS, *_OF_PATCHES, "stamps", "rows", "poses")
_KINDS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}
_CONTENT, _CHECKSUM = "adatoken3d_scene", "sha256"
_UNSEALED = "0" * 64  # stands in the checksum's place while the checksum is taken
_MAX_HEADER = 64 * 1024


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
    parts: dict[str, list[Tensor]] = {
        name: [getattr(view, name) for view in ordered] for name in (*_OF_ROWS, *_OF_PATCHES)
    }
    parts["stamps"] = [torch.tensor(stamps, dtype=torch.int64)]
    parts["rows"] = [torch.tensor([len(view.keys) for view in ordered], dtype=torch.int64)]
    parts["poses"] = [torch.from_numpy(np.stack([poses[stamp] for stamp in stamps]).astype(np.float64))]
    content = {**_identity(token_map, model_hash, frame_id), "shift": token_map.shift.tolist()}
    parts |= block_parts(token_map)
    # Wide numbers first, so that each lies where its kind may.
    parts = dict(sorted(parts.items(), key=lambda item: -item[1][0].element_size()))
    header = _header(parts, {_CONTENT: json.dumps(content, sort_keys=True), _CHECKSUM: _UNSEALED})
    seal = hashlib.sha256(header)
    with replacing(path) as file:
        file.write(header)
        for chunk in _bytes(parts):
            seal.update(chunk)
            file.write(chunk)
        file.seek(header.index(_UNSEALED.encode()))
        file.write(seal.hexdigest().encode())


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

    The file is read once and copied: what becomes of it afterwards does not matter.

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
    try:
        # A sparse file has any size for nothing: what would not leave room for itself as a scene is not read.
        data = read_file(path, min(MAX_BYTES, psutil.virtual_memory().available // 2))
    except UnusableFile as error:
        raise SceneFileError(str(error)) from error
    header, content, at = _opened(path, data)
    wanted = _identity(token_map, model_hash, frame_id)
    if adopt_origin:
        del wanted["origin"]
    _check_identity(path, content, wanted)
    origin, shift = _origins(path, content) if adopt_origin else (None, None)
    shapes = block_shapes(token_map, channels)
    tensors = _tensors(path, header, data, at, 1 if shapes else channels, shapes)
    where = token_map.origin if origin is None else torch.tensor(origin, dtype=torch.float64)
    _check_tensors(path, tensors, token_map, where)
    rows = tensors["rows"].tolist()
    parts = {name: torch.split(tensors[name], rows) for name in _OF_ROWS}
    patches = [int(count.sum()) for count in parts["count"]]
    parts.update({name: torch.split(tensors[name], patches) for name in _OF_PATCHES})
    views = {}
    for i, stamp in enumerate(tensors["stamps"].tolist()):
        # Of each view a copy of its own: the memory of one that is dropped is free again.
        part = {name: parts[name][i].clone() for name in parts if name != "features"}
        part["features"] = parts["features"][i].to(device, copy=True)
        nothing = part["features"].new_zeros(rows[i], 0, dtype=torch.float32)
        views[stamp] = Contribution(**part, position=nothing, order=i)
    if isinstance(token_map, ViewTokenMap):
        keys = {stamp: view.keys for stamp, view in views.items()}
        try:
            blocks = read_blocks(path, tensors, keys, token_map, where, device)
        except BlockError as error:
            raise SceneFileError(str(error)) from error
        token_map.restore(views, origin, shift, blocks)
    else:
        token_map.restore(views, origin, shift)
    return dict(zip(views, tensors["poses"].numpy().copy(), strict=True))


# --- the file ---------------------------------------------------------------------------------------------------------


def _header(parts: dict[str, list[Tensor]], metadata: dict[str, str]) -> bytes:
    """The length and the JSON that a safetensors file begins with."""
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensors in parts.items():
        first, begin = tensors[0], end
        end += sum(tensor.numel() for tensor in tensors) * first.element_size()
        shape = [sum(len(tensor) for tensor in tensors), *first.shape[1:]]
        described[name] = {"dtype": _KINDS[first.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(parts: dict[str, list[Tensor]]) -> Iterator[memoryview]:
    for tensors in parts.values():
        for tensor in tensors:
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(data: bytes | bytearray, written: str) -> str:
    """The checksum of a scene's bytes, in which `written` stands in its place."""
    at = bytes(data[: 8 + _MAX_HEADER]).index(written.encode())
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(_UNSEALED.encode())
    digest.update(memoryview(data)[at + len(written) :])
    return digest.hexdigest()


def _opened(path: Path, data: bytearray) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The header, the content of its metadata, and where the numbers begin, of a file whose checksum is right."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes in {len(data)}")
        header = parse_json(data[8 : 8 + length])
        metadata = header["__metadata__"]
        content, written = parse_json(metadata[_CONTENT]), metadata.get(_CHECKSUM)
        if not isinstance(content, dict):
            raise ValueError(f"it describes itself by a {type(content).__name__}")
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SceneFileError(f"{path} is no scene: {error}") from error
    if content.get("format") != FORMAT:
        raise SceneFileError(f"{path} has format {quoted(content.get('format'))}, this program reads {FORMAT}")
    if not (isinstance(written, str) and re.fullmatch("[0-9a-f]{64}", written) and written.encode() in data[:length]):
        raise SceneFileError(f"{path} is damaged: it has no checksum")
    if (found := checksum(data, written)) != written:
        raise SceneFileError(f"{path} is damaged: its checksum is {found}, it says {written}")
    return header, content, 8 + length


def _tensors(
    path: Path, header: dict[str, Any], data: bytearray, at: int, channels: int, more: Shapes
) -> dict[str, Tensor]:
    """Views of the data, of the shapes and kinds that a scene has."""
    names = set(header) - {"__metadata__"}
    if names != {*_NAMES, *more}:
        raise SceneFileError(f"{path} is no scene: it holds {shown(', '.join(sorted(names)) or 'nothing', 200)}")
    views, rows, patches = (_length(header[name]) for name in ("stamps", "keys", "points"))
    if not 0 < views <= MAX_VIEWS:
        raise SceneFileError(f"{path} has {views} views, not 1 to {MAX_VIEWS}")
    wanted = {
        "points": ([patches, 3], torch.float32),
        "level": ([patches], torch.bool),
        "keys": ([rows], torch.int64),
        "features": ([rows, channels], torch.float32),
        "count": ([rows], torch.int64),
        "xyz": ([rows, 3], torch.float64),
        "rgb": ([rows, 3], torch.float64),
        "stamps": ([views], torch.int64),
        "rows": ([views], torch.int64),
        "poses": ([views, 4, 4], torch.float64),
        **{name: ([_length(header[by]), *shape], kind) for name, (by, shape, kind) in more.items()},
    }
    tensors = {}
    for name, (shape, kind) in wanted.items():
        size = int(np.prod(shape, dtype=object)) * kind.itemsize
        found, begin = header[name], _begin(header[name])
        if found != {"dtype": _KINDS[kind], "shape": shape, "data_offsets": [begin, begin + size]}:
            raise SceneFileError(f"{path}: {name} is {quoted(found)}, expected {_KINDS[kind]} {shape}")
        if at + begin + size > len(data) or (at + begin) % kind.itemsize:
            raise SceneFileError(
                f"{path}: {name} is at {at + begin} to {at + begin + size} of {len(data)} bytes, past the end or askew"
            )
        numbers = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=at + begin) if size else torch.empty(0)
        if kind == torch.bool and size and int(numbers.max()) > 1:
            raise SceneFileError(f"{path}: {name} holds {int(numbers.max())}, neither true nor false")
        tensors[name] = (numbers.view(kind) if size else numbers.to(kind)).reshape(shape)
    return tensors


def _length(described: Any) -> int:
    shape = described.get("shape") if isinstance(described, dict) else None
    first = shape[0] if isinstance(shape, list) and shape else 0
    return first if type(first) is int and 0 <= first <= MAX_BYTES else 0


def _begin(described: Any) -> int:
    offsets = described.get("data_offsets") if isinstance(described, dict) else None
    first = offsets[0] if isinstance(offsets, list) and offsets else 0
    return first if type(first) is int and 0 <= first <= MAX_BYTES else 0


# --- what it says -----------------------------------------------------------------------------------------------------


def _identity(token_map: TokenMap, model_hash: str, frame_id: str) -> dict[str, object]:
    return {
        "format": FORMAT,
        "model": model_hash,
        "frame": frame_id,
        "voxel_size": token_map.voxel_size,
        "origin": token_map.origin.tolist(),
        "numbers": "float32",
    }


def _origins(path: Path, content: dict[str, object]) -> tuple[list[float], Tensor]:
    origin, shift = content.get("origin"), content.get("shift")
    numbers = isinstance(origin, list) and all(isinstance(x, float) and abs(x) <= MOST_METRES for x in origin)
    if not (numbers and isinstance(origin, list) and len(origin) == 3):
        raise SceneFileError(f"{path} has origin {quoted(origin)}, not three numbers up to {MOST_METRES:g} m")
    whole = isinstance(shift, list) and all(type(n) is int and abs(n) <= MOST_SHIFT for n in shift)
    if not (whole and isinstance(shift, list) and len(shift) == 3):
        raise SceneFileError(f"{path} has shift {quoted(shift)}, not three whole numbers up to {MOST_SHIFT}")
    return origin, torch.tensor(shift, dtype=torch.int64)


def _check_identity(path: Path, content: dict[str, object], wanted: dict[str, object]) -> None:
    for name, value in wanted.items():
        if content.get(name) != value:
            raise SceneFileError(f"{path} has {name} {quoted(content.get(name))}, here it is {value!r}")


def _check_tensors(path: Path, tensors: dict[str, Tensor], token_map: TokenMap, origin: Tensor) -> None:
    for name, most in _MOST.items():
        low, high = (float(end) for end in torch.aminmax(tensors[name])) if tensors[name].numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SceneFileError(f"{path}: {name} holds a number that is not finite")
        if max(-low, high) > most:
            raise SceneFileError(f"{path}: {name} holds {low if -low > high else high:g}, more than {most:g}")
    keys, count, rows, n_rows = tensors["keys"], tensors["count"], tensors["rows"], len(tensors["keys"])
    patches = len(tensors["points"])
    if int(rows.min()) < 0 or int(rows.max()) > n_rows or int(rows.sum()) != n_rows:
        raise SceneFileError(f"{path}: its views have {quoted(rows.tolist())} rows, there are {n_rows}")
    if n_rows and int(count.min()) < 1:
        raise SceneFileError(f"{path}: a voxel of {int(count.min())} patches")
    if n_rows and int(count.max()) > patches or int(count.sum()) != patches:
        raise SceneFileError(f"{path}: its voxels have {int(count.sum())} patches, there are {patches}")
    stamps = tensors["stamps"].tolist()  # in the order of arrival: they go back where time did
    if len(set(stamps)) < len(stamps):
        raise SceneFileError(f"{path}: two of its views have the same stamp")
    if bad := [stamp for stamp in stamps if not 0 <= stamp <= MOST_STAMP]:
        raise SceneFileError(f"{path}: a view at {bad[0]} ns, not 0 to {MOST_STAMP}")
    for stamp, held in zip(stamps, torch.split(keys, rows.tolist()), strict=True):
        if bool((held.diff() <= 0).any()) or (len(held) and int(held[0]) < 0):
            raise SceneFileError(f"{path}: the voxels of the view at {stamp} ns do not ascend")
    _check_places(path, tensors, token_map, origin)
    for stamp, pose in zip(stamps, tensors["poses"].numpy(), strict=True):
        try:
            check_rigid(pose)
        except FrameError as error:
            raise SceneFileError(f"{path}: the view at {stamp} ns: {error}") from error


def _check_places(path: Path, tensors: dict[str, Tensor], token_map: TokenMap, origin: Tensor) -> None:
    """Patches lie in their voxels and have colours that there are."""
    count = tensors["count"][:, None]
    centres = voxel_indices(tensors["keys"]) * token_map.voxel_size + origin
    # Points are rounded to float32 where they are, and as seen from the origin.
    slack = token_map.voxel_size * 0.5001 + ((centres - origin).abs() + centres.abs()) * 1e-6
    patch_voxel = torch.repeat_interleave(torch.arange(len(count)), tensors["count"])
    for name, points, where, reach in (
        ("xyz", tensors["xyz"] / count, centres, slack),
        ("points", tensors["points"].double(), centres[patch_voxel], slack[patch_voxel]),
    ):
        outside = ((points - where).abs() > reach).any(dim=1)
        if bool(outside.any()):
            row = int(torch.nonzero(outside)[0])
            raise SceneFileError(
                f"{path}: {name} at {points[row].tolist()} m is not in its voxel at {where[row].tolist()} m"
            )
    if bool((tensors["rgb"] < 0).any()) or bool((tensors["rgb"] > 255 * count).any()):
        raise SceneFileError(f"{path}: rgb holds a colour that is none")
