# SPDX-License-Identifier: Apache-2.0
"""What a robot sends of one view, once: its features in 16 bits, or its picture, with the places of its patches.

A body is a safetensors file in memory that says of itself which format and which model it is of. It is called by its
digest, so a view that was moved has another body, and what somebody has already is not sent again. What a view has lost
since (`Contribution.rows`) is not in its body.

    tokens are means over voxels   points, colours, level (P patches, voxel after voxel), and
                                   features (R voxels, C): means, or picture and the number (P,) of each patch
    tokens are those of views      the same places, and of the n tokens cell, xyz, rgb, parts, and
                                   features (n, C), or picture

Features are two tensors, `high` and `low`: the bytes of all numbers, coded by how often each comes (`halves.coded`).
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adatoken3d_ros.files import parse_json
from adatoken3d_ros.fleet.halves import HALVES, BodyError, coded, decoded, halved
from adatoken3d_ros.lmm.interface import ModelSizes
from adatoken3d_ros.scene.contributions import Contribution, nothing, reduced
from adatoken3d_ros.scene.frames import FrameError, check_size
from adatoken3d_ros.scene.tombstone_storage import ThingError, read_things, thing_parts, thing_shapes
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.view_blocks import Block
from adatoken3d_ros.scene.view_storage import MOST_METRES, MOST_SIDE
from adatoken3d_ros.scene.voxels import voxel_keys
from adatoken3d_ros.text import quoted, shown

FORMAT = 2
MOST_BYTES = 32 * 2**20  # of a body
MOST_PICTURE = 8 * 2**20
MOST_PATCHES = 2**16  # of a view
QUALITY = 95  # of a JPEG
_MOST_HEADER = 64 * 2**10
_ABOUT = "adatoken3d"
_KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.bool: "BOOL",
          torch.int32: "I32", torch.int64: "I64", torch.float64: "F64"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Whose:
    """Of which model bodies are: what is of another one is refused.

    Attributes:
        model: its identity. sizes: of it.
    """

    model: str
    sizes: ModelSizes

    @property
    def of_views(self) -> bool:
        """Whether its tokens are those of views."""
        return self.sizes.tokens == "views"


@dataclass(frozen=True, eq=False)
class Body:
    """One view; all tensors on the CPU.

    Attributes:
        points: (P, 3) float32, scene frame, metres, voxel after voxel. colours: (P, 3) uint8. level: (P,) bool.
        features: (R, C) or (n, C) in 16 bits, see the module; None with a picture.
        picture: a JPEG, empty with features. number: (P,) int32, of which of the encoder's patches each is.
        block: where tokens are those of views, without features (n, 0); else None.
    """

    points: Tensor
    colours: Tensor
    level: Tensor
    features: Tensor | None = None
    picture: bytes = b""
    number: Tensor | None = None
    block: Block | None = None

    @property
    def nbytes(self) -> int:
        """Of its tensors, its block's included, and its picture."""
        own = (self.points, self.colours, self.level, self.features, self.number)
        tensors = (*own, *(() if self.block is None else vars(self.block).values()))
        return len(self.picture) + sum(one.nbytes for one in tensors if isinstance(one, Tensor))


def body_of(view: Contribution, block: Block | None = None, picture: bytes = b"") -> Body:
    """What is sent of a view.

    Args:
        view: what it adds; with a picture its patches' features are their numbers. block: of a map of views.
        picture: a JPEG, sent in place of features.
    """
    given: dict[str, Any] = {"points": view.points, "colours": view.colours, "level": view.level}
    if block is not None:
        given["block"] = replace(block, features=block.features.new_zeros(len(block.cell), 0).cpu())
    if picture:
        number = view.patches[:, 0].round().to(torch.int32) if block is None else None
        return Body(**given, picture=picture, number=number)
    features = view.features / view.count.to(view.features.device)[:, None] if block is None else block.features
    return Body(**given, features=halved(features.cpu()))


def packed(body: Body, whose: Whose) -> bytes:
    """The bytes of a body."""
    tensors = {"points": body.points, "colours": body.colours, "level": body.level}
    about: dict[str, Any] = {"what": "view"}
    if body.features is not None:
        tensors |= coded(body.features)
        about |= {"rows": len(body.features), "kind": HALVES[body.features.dtype]}
    if body.picture:
        tensors["picture"] = torch.frombuffer(bytearray(body.picture), dtype=torch.uint8)
    if body.number is not None:
        tensors["number"] = body.number
    if (block := body.block) is not None:
        about["grid"] = list(block.grid)
        tensors |= {"cell": block.cell.to(torch.int32), "xyz": block.xyz, "rgb": block.rgb}
        tensors |= {"parts": block.parts} if whose.sizes.parts else {}
    return _packed(tensors, about, whose)


def _packed(tensors: Mapping[str, Tensor], about: Mapping[str, Any], whose: Whose) -> bytes:
    text = json.dumps({"format": FORMAT, "model": whose.model, **about}, sort_keys=True)
    return bytes(save({name: one.contiguous() for name, one in tensors.items()}, {_ABOUT: text}))


def digest(data: bytes) -> str:
    """What a body is called."""
    return hashlib.sha256(data).hexdigest()[:32]


def unpacked(data: bytes, whose: Whose) -> Body:
    """The view of a body that came from elsewhere, checked.

    Raises:
        BodyError: for anything else than a view of this model in this format.
    """
    header, about = _opened(data, whose, "view")
    pictured = "picture" in header
    patches = _rows(header, "points")
    if not 0 < patches <= MOST_PATCHES:
        raise BodyError(f"a view of {patches} patches, not 1 to {MOST_PATCHES}")
    tokens = _rows(header, "cell") if whose.of_views else 0
    wanted: dict[str, tuple[str, list[int]]] = {
        "points": ("F32", [patches, 3]),
        "colours": ("U8", [patches, 3]),
        "level": ("BOOL", [patches]),
    }
    if pictured:
        wanted["picture"] = "U8", [min(_rows(header, "picture"), MOST_PICTURE)]
    else:
        wanted |= {name: ("U8", [_rows(header, name)]) for name in ("high", "low")}
    if whose.of_views:
        wanted |= {"cell": ("I32", [tokens]), "xyz": ("F32", [tokens, 3]), "rgb": ("U8", [tokens, 3])}
        wanted |= {"parts": ("F32", [tokens, whose.sizes.parts, 3])} if whose.sizes.parts else {}
    elif pictured:
        wanted["number"] = "I32", [patches]
    tensors = _tensors(data, header, wanted)
    features = None
    if not pictured:
        rows, kind = about.get("rows"), about.get("kind")
        most = tokens if whose.of_views else patches
        if type(rows) is not int or not 0 <= rows <= most or kind not in HALVES.values():
            raise BodyError(
                f"features of {quoted(rows)} rows of {quoted(kind)}, at most {most} of F16 or BF16 are here"
            )
        if whose.of_views and rows != tokens:
            raise BodyError(f"features of {rows} tokens, there are {tokens}")
        width = whose.sizes.feature_width
        if 2 * rows * width > MOST_BYTES:
            raise BodyError(f"features of {2 * rows * width} bytes, more than {MOST_BYTES}")
        features = decoded(tensors["high"], tensors["low"], str(kind), (rows, width))
        tensors["features"] = features
    _check_numbers(tensors)
    block = _block(tensors, about.get("grid"), whose) if whose.of_views else None
    number = tensors.get("number")
    if number is not None and (int(number.min()) < 0 or int(number.max()) >= whose.sizes.patches.patches):
        raise BodyError(f"patches {int(number.min())} to {int(number.max())} of {whose.sizes.patches.patches}")
    picture = tensors["picture"].numpy().tobytes() if pictured else b""
    if pictured:
        check_picture(picture)
    found = tensors["points"], tensors["colours"], tensors["level"]
    return Body(*found, features, picture, number, block)


def _block(tensors: Mapping[str, Tensor], grid: Any, whose: Whose) -> Block:
    sides = isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and 1 <= n <= MOST_SIDE for n in grid)
    if not sides:
        raise BodyError(f"a grid of {quoted(grid)}")
    cell = tensors["cell"].long()
    if len(cell) and (int(cell[0]) < 0 or int(cell[-1]) >= grid[0] * grid[1] or bool((cell.diff() < 1).any())):
        raise BodyError("the tokens of a view do not ascend in its grid")
    parts = tensors.get("parts", torch.zeros(len(cell), 0, 3))
    nowhere = torch.zeros(len(cell), dtype=torch.int64)
    rows, columns = grid
    return Block(torch.zeros(len(cell), 0), cell, (rows, columns), tensors["xyz"], tensors["rgb"], nowhere, parts)


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name in ("points", "xyz"):
        if name in tensors and not bool((tensors[name].abs() <= MOST_METRES).all()):
            raise BodyError(f"{name} holds a number that is not finite or more than {MOST_METRES:g}")
    if "features" in tensors and not bool(tensors["features"].isfinite().all()):
        raise BodyError("features holds a number that is not finite")
    if "parts" in tensors:
        parts = tensors["parts"]
        there = parts.isfinite()
        if not bool((there == there.all(dim=-1, keepdim=True)).all()) or bool((parts[there].abs() > MOST_METRES).any()):
            raise BodyError(f"parts holds a place that is none, or is farther than {MOST_METRES:g} m")


def built(
    body: Body, origin: Tensor, whose: Whose, device: torch.device, encoded: Tensor | None = None
) -> tuple[Contribution, Block | None]:
    """What a view adds to a map, and its block where tokens are those of views.

    Args:
        origin: (3,) float64, centre of the map's voxel (0, 0, 0), scene frame, metres.
        encoded: (P, C) what the encoder made of its picture, where it is one.

    Raises:
        BodyError: for features of another number of voxels or patches than there are.
        TokenMapError: for points that get no voxel.
    """
    size = whose.sizes.voxel_size
    if (block := body.block) is not None:
        features = body.features if encoded is None else _chosen(encoded, block.cell)
        assert features is not None
        keys = voxel_keys((block.xyz.double() - origin).float(), size)
        block = replace(block, features=features.to(device).float(), keys=keys)
        one = torch.zeros(len(body.points), 1, device=device)
        return _placeless(reduced(one, body.points, body.colours, None, body.level, origin, size)), block
    if encoded is not None:
        assert body.number is not None
        patches = _chosen(encoded, body.number.long())
        return _placeless(reduced(patches, body.points, body.colours, None, body.level, origin, size)), None
    assert body.features is not None
    # The patches' own features stay where they are: they are needed to move a view, which its robot does.
    none = torch.zeros(len(body.points), 0)
    view = reduced(none, body.points, body.colours, None, body.level, origin, size)
    if len(view.keys) != len(body.features):
        raise BodyError(f"features of {len(body.features)} voxels, the points lie in {len(view.keys)}")
    sums = body.features.to(device).float() * view.count.to(device)[:, None]
    return _placeless(replace(view, features=sums)), None


def _placeless(view: Contribution) -> Contribution:
    """Its places are embedded by the map that takes it in."""
    return replace(view, position=view.features.new_zeros(len(view.keys), 0))


def _chosen(encoded: Tensor, rows: Tensor) -> Tensor:
    if len(rows) and int(rows.max()) >= len(encoded):
        raise BodyError(f"patch {int(rows.max())} of a picture that has {len(encoded)}")
    return encoded.index_select(0, rows.to(encoded.device))


def left(view: Contribution, gone: tuple[int, ...]) -> Contribution:
    """What is left of a view without some of its rows. Raises BodyError for rows that it has not."""
    if not gone:
        return view
    if max(gone) >= len(view.keys):
        raise BodyError(f"row {max(gone)} of a view that has {len(view.keys)}")
    kept = torch.ones(len(view.keys), dtype=torch.bool)
    kept[list(gone)] = False
    return view.rows(kept) if bool(kept.any()) else replace(nothing(view.features[:0]), order=view.order)


# --- pictures ---------------------------------------------------------------------------------------------------------


def jpeg(rgb: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) as it is sent: a JPEG with its colours in full."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def check_picture(data: bytes) -> None:
    """Raises BodyError for what is no JPEG, or larger than a camera's; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            check_size(*image.size)
    except (OSError, ValueError, FrameError, Image.DecompressionBombError) as error:
        raise BodyError(f"a picture that cannot be used: {shown(error, 200)}") from error


def picture_of(data: bytes) -> NDArray[np.uint8]:
    """The picture (H, W, 3) of a JPEG; raises BodyError."""
    check_picture(data)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8).copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BodyError(f"a picture that cannot be decoded: {shown(error, 200)}") from error


# --- what has gone ----------------------------------------------------------------------------------------------------


def packed_things(things: list[Thing], whose: Whose) -> bytes:
    """What has gone from a scene, as bytes."""
    width = whose.sizes.feature_width
    tensors = {name: torch.cat(parts) for name, parts in thing_parts(things, width).items()}
    tensors["thing_features"] = halved(tensors["thing_features"])
    return _packed(tensors, {"what": "gone"}, whose)


def unpacked_things(data: bytes, whose: Whose) -> list[Thing]:
    """As `unpacked`, for what has gone."""
    header, _ = _opened(data, whose, "gone")
    half = header.get("thing_features", {}).get("dtype")
    wanted = {}
    for name, (by, shape, kind) in thing_shapes(whose.sizes.feature_width).items():
        dtype = half if name == "thing_features" and half in ("F16", "BF16") else _KINDS[kind]
        wanted[name] = dtype, [_rows(header, by), *shape]
    tensors = _tensors(data, header, wanted)
    try:
        return read_things({**tensors, "thing_features": tensors["thing_features"].float()})
    except ThingError as error:
        raise BodyError(str(error)) from error


# --- safetensors ------------------------------------------------------------------------------------------------------


def kind_of(data: bytes) -> str:
    """What a body is, `view` or `gone`; raises BodyError for what is none."""
    return str(_about(_header(data)).get("what"))


def _opened(data: bytes, whose: Whose, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    header = _header(data)
    about = _about(header)
    for name, value in (("format", FORMAT), ("model", whose.model), ("what", what)):
        if about.get(name) != value:
            raise BodyError(f"a body of {name} {quoted(about.get(name))}, here it is {value!r}")
    del header["__metadata__"]
    return header, about


def _header(data: bytes) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        raise BodyError(f"a body of {len(data)} bytes, more than {MOST_BYTES}")
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(_MOST_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes in {len(data)}")
        header = parse_json(data[8 : 8 + length])
        if not isinstance(header, dict) or not all(isinstance(one, dict) for one in header.values()):
            raise ValueError("its header is no object of objects")
    except (struct.error, ValueError) as error:
        raise BodyError(f"no body: {shown(error, 200)}") from error
    return header


def _about(header: Mapping[str, Any]) -> dict[str, Any]:
    try:
        about = parse_json(header["__metadata__"][_ABOUT])
        if not isinstance(about, dict):
            raise ValueError("it describes itself by no object")
    except (ValueError, LookupError, TypeError) as error:
        raise BodyError(f"no body: {shown(error, 200)}") from error
    return about


def _rows(header: Mapping[str, Any], name: str) -> int:
    shape = header.get(name, {}).get("shape")
    first = shape[0] if isinstance(shape, list) and shape else 0
    return first if type(first) is int and 0 <= first <= MOST_BYTES else 0


def _tensors(data: bytes, header: Mapping[str, Any], wanted: Mapping[str, tuple[str, list[int]]]) -> dict[str, Tensor]:
    if header.keys() != wanted.keys():
        raise BodyError(f"a body that holds {shown(', '.join(sorted(header)) or 'nothing', 200)}")
    for name, (kind, shape) in wanted.items():
        if (header[name].get("dtype"), header[name].get("shape")) != (kind, shape):
            raise BodyError(f"{name} is {quoted(header[name])}, expected {kind} {shape}")
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise BodyError(f"no body: {shown(error, 200)}") from error
    return tensors
