# SPDX-License-Identifier: Apache-2.0
"""The furniture pack: real models, CC0 and CC BY, as small coloured meshes, and how a model is given a named colour.

`assets/furniture.npz` is made by `scripts/build_furniture_pack.py`; who made the models stands in
`assets/FURNITURE_ATTRIBUTION.md`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ASSETS = Path(__file__).parent / "assets"

# Far enough apart to be told from each other under any light of the rooms; sRGB.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (196, 30, 34),
    "orange": (240, 128, 20),
    "yellow": (244, 214, 40),
    "green": (44, 146, 62),
    "blue": (36, 84, 196),
    "purple": (122, 48, 160),
    "pink": (244, 150, 190),
    "brown": (108, 66, 34),
    "black": (30, 30, 32),
    "white": (238, 238, 236),
    "gray": (130, 131, 134),
}
_MAIN_SHARE = 0.7  # of what is seen of a model is given the colour, the rest (screens, handles, legs) keeps its own
_CREASE = np.cos(np.radians(40.0))

Place = Literal["wall", "free", "top", "door", "window"]


@dataclass(frozen=True)
class Kind:
    """How a class of furniture is used in a room.

    Attributes:
        place: with its back to a wall, anywhere on the floor, on top of other furniture, or in a wall.
        tint: whether it can be of any named colour.
        group: classes of one group can be taken for each other ("chair", "armchair"); questions avoid that.
    """

    place: Place
    tint: bool = True
    group: str = ""


KINDS: dict[str, Kind] = {
    "chair": Kind("free", group="seat"),
    "armchair": Kind("free", group="seat"),
    "office chair": Kind("free", group="seat"),
    "stool": Kind("free", group="seat"),
    "sofa": Kind("wall", group="long seat"),
    "bench": Kind("wall", group="long seat"),
    "table": Kind("free", group="table"),
    "coffee table": Kind("free", group="table"),
    "desk": Kind("wall", group="table"),
    "bed": Kind("wall", group="bed"),
    "crib": Kind("wall", group="bed"),
    "wardrobe": Kind("wall", group="cupboard"),
    "bookshelf": Kind("wall"),
    "cabinet": Kind("wall", group="cupboard"),
    "nightstand": Kind("wall", group="cupboard"),
    "tv stand": Kind("wall", group="cupboard"),
    "television": Kind("top", tint=False, group="screen"),
    "refrigerator": Kind("wall"),
    "washing machine": Kind("wall"),
    "oven": Kind("wall", tint=False),
    "sink": Kind("wall", tint=False, group="basin"),
    "toilet": Kind("wall", tint=False),
    "bathtub": Kind("wall", tint=False, group="basin"),
    "piano": Kind("wall"),
    "fireplace": Kind("wall", tint=False),
    "radiator": Kind("wall", tint=False),
    "trash can": Kind("free", group="bin"),
    "lamp": Kind("top"),
    "plant": Kind("top", tint=False, group="plant"),
    "christmas tree": Kind("free", tint=False, group="plant"),
    "vase": Kind("top", group="vessel"),
    "mug": Kind("top", group="vessel"),
    "book": Kind("top", tint=False),
    "laptop": Kind("top", group="screen"),
    "computer": Kind("top", tint=False, group="screen"),
    "printer": Kind("top"),
    "phone": Kind("top"),
    "microwave": Kind("top"),
    "toaster": Kind("top"),
    "coffee maker": Kind("top"),
    "mixer": Kind("top"),
    "teapot": Kind("top", group="vessel"),
    "bowl": Kind("top", tint=False, group="vessel"),
    "bottle": Kind("top", group="vessel"),
    "fan": Kind("top"),
    "teddy bear": Kind("top"),
    "ball": Kind("free"),
    "guitar": Kind("free"),
    "speaker": Kind("free"),
    "radio": Kind("top"),
    "aquarium": Kind("top", tint=False),
    "backpack": Kind("free"),
    "suitcase": Kind("free"),
    "box": Kind("free", group="bin"),
    "bicycle": Kind("free"),
    "fire extinguisher": Kind("free", tint=False),
    "water cooler": Kind("wall", tint=False),
    "ladder": Kind("free"),
    "stroller": Kind("free"),
    "wheelchair": Kind("free", tint=False),
    "barrel": Kind("free", group="bin"),
    "cat": Kind("free", tint=False),
    "dog": Kind("free", tint=False),
    "person": Kind("free", tint=False),
    "door": Kind("door"),
    "window": Kind("window", tint=False),
}


class PackError(ValueError):
    """A furniture pack that cannot be read; the message says what is wrong with it."""


@dataclass(frozen=True)
class Surface:
    """A flat, free rectangle on top of a model: height, x0, x1, y0, y1 in metres, model frame."""

    height: float
    x0: float
    x1: float
    y0: float
    y1: float


@dataclass(frozen=True, eq=False)
class Model:
    """One piece of furniture, in its own frame: x forward, y left, z up, metres; the origin under it, on the floor.

    Attributes:
        id: library and identifier. kind: its class, a key of `KINDS`. name, creator, licence: for the attribution.
        size: (3,) extent along x, y, z. elevation: of its lower edge over the floor where it hangs on a wall, metres.
        surface: what other things can stand on, if any.
        held_out: never in a training room.
        vertices: (V, 3) float32. faces: (F, 3) uint32. colour: (F,) uint8, row of `palette` (P, 3) uint8, sRGB.
        shares: (P,) float64, of each colour in what can be seen of it from outside; they add up to 1.
    """

    id: str
    kind: str
    name: str
    creator: str
    licence: str
    size: tuple[float, float, float]
    elevation: float
    surface: Surface | None
    held_out: bool
    vertices: NDArray[np.float32]
    faces: NDArray[np.uint32]
    colour: NDArray[np.uint8]
    palette: NDArray[np.uint8]
    shares: NDArray[np.float64]

    @functools.cached_property
    def corner_normals(self) -> NDArray[np.float32]:
        """(F, 3, 3) unit normals of the faces' corners, smooth over edges of less than 40 degrees."""
        corners = self.vertices[self.faces].astype(np.float64)
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        flat = cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-12)
        # Average of the neighbours' normals (area weighted), back to the face's own where they differ too much.
        total = np.zeros((len(self.vertices), 3))
        for k in range(3):
            np.add.at(total, self.faces[:, k], cross)
        total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        smooth = total[self.faces]
        keep = (smooth * flat[:, None]).sum(axis=2) > _CREASE
        return np.where(keep[..., None], smooth, flat[:, None]).astype(np.float32)

    @functools.cached_property
    def areas(self) -> NDArray[np.float64]:
        """(F,) area of each face, square metres."""
        corners = self.vertices[self.faces].astype(np.float64)
        return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2

    @functools.cached_property
    def main(self) -> NDArray[np.bool_]:
        """(P,) the palette's entries that make up most of the surface: those a named colour replaces."""
        share = self.shares
        order = np.argsort(-share, kind="stable")
        needed = int(np.searchsorted(np.cumsum(share[order]), _MAIN_SHARE)) + 1
        chosen = np.zeros(len(self.palette), bool)
        chosen[order[:needed]] = True
        # Shades of the same material belong to it, however small.
        palette = self.palette.astype(np.float64)
        distance = np.linalg.norm(palette[:, None] - palette[None, chosen], axis=2).min(axis=1)
        return chosen | (distance < 40)

    def tinted(self, rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
        """(P, 3) palette with the main surfaces in the colour `rgb`; light and dark shades stay visible."""
        palette = self.palette.astype(np.float64)
        light = palette @ (0.299, 0.587, 0.114)
        share = self.shares * self.main
        mean = float((light * share).sum() / max(share.sum(), 1e-12))
        factor = np.clip(1 + 0.35 * (light / max(mean, 1.0) - 1), 0.82, 1.12)
        painted = np.asarray(rgb, np.float64)[None] * factor[:, None]
        return np.where(self.main[:, None], np.clip(painted, 0, 255), palette).round().astype(np.uint8)

    def look(self, palette: NDArray[np.uint8]) -> frozenset[str]:
        """All colour names that somebody might give the model with this palette (P, 3)."""
        names: set[str] = set()
        for rgb, part in zip(palette, self.shares, strict=True):
            if part > 0.08:
                names |= colour_names(rgb)
        return frozenset(names)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of sRGB colours (..., 3) in 0..255 (IEC 61966-2-1, CIE 15)."""
    scaled = np.asarray(rgb, np.float64) / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    ratio = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def colour_names(rgb: NDArray[np.uint8]) -> frozenset[str]:
    """The names that fit an sRGB colour (3,): the nearest in L*a*b*, and those about as near."""
    distance = np.linalg.norm(_LAB - lab(np.asarray(rgb, np.float64)), axis=1)
    near = distance <= max(1.6 * distance.min(), 12.0)
    return frozenset(name for name, is_near in zip(COLOURS, near, strict=True) if is_near)


_LAB = lab(np.array(list(COLOURS.values()), np.float64))


@functools.lru_cache(maxsize=4)
def load_pack(path: Path = ASSETS / "furniture.npz") -> Mapping[str, Model]:
    """The pack's models by id, in a fixed order; read once a process (about 30 ms).

    Raises:
        PackError: if the file is not such a pack. OSError: if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {k: archive[k] for k in ("meta", "vertices", "faces", "colour", "palette")}
        entries = json.loads(arrays["meta"].tobytes().decode())
    except (KeyError, ValueError) as error:
        raise PackError(f"{path} is not a furniture pack: {error}") from error
    models: dict[str, Model] = {}
    at = [0, 0, 0]
    for entry in entries:
        n_vertices, n_faces, n_colours = entry["counts"]
        size = np.array(entry["size"])
        quantised = arrays["vertices"][:, at[0] : at[0] + n_vertices].T
        vertices = quantised * (size / 65535) - np.array([size[0] / 2, size[1] / 2, 0])
        deltas = arrays["faces"][:, at[1] : at[1] + n_faces].T.astype(np.int64)
        faces = np.cumsum(deltas, axis=0) % 65536
        if entry["class"] not in KINDS or faces.max(initial=0) >= n_vertices:
            raise PackError(f"{path}: model {entry['id']!r} (class {entry['class']!r}) is damaged or unknown")
        models[entry["id"]] = Model(
            id=entry["id"],
            kind=entry["class"],
            name=entry["name"],
            creator=entry["creator"],
            licence=entry["licence"],
            size=(float(size[0]), float(size[1]), float(size[2])),
            elevation=entry["elevation"],
            surface=Surface(*entry["support"]) if entry["support"] else None,
            held_out=entry["held_out"],
            vertices=np.ascontiguousarray(vertices, np.float32),
            faces=np.ascontiguousarray(faces, np.uint32),
            colour=arrays["colour"][at[1] : at[1] + n_faces],
            palette=arrays["palette"][at[2] : at[2] + n_colours],
            shares=np.array(entry["shares"]),
        )
        at = [at[0] + n_vertices, at[1] + n_faces, at[2] + n_colours]
    return models


def models_of(kind: str, *, held_out: bool) -> list[Model]:
    """The pack's models of a class: those for training rooms, or those held out of them."""
    return [m for m in load_pack().values() if m.kind == kind and m.held_out == held_out]
