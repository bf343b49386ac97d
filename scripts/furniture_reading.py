# SPDX-License-Identifier: Apache-2.0
"""Reads models out of Sweet Home 3D's furniture libraries: catalogue, licence, OBJ, MTL and textures."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass

import cv2
import numpy as np
from furniture_models import LICENCES
from numpy.typing import NDArray


@dataclass
class Mesh:
    """Triangles with a colour or texture each.

    Attributes:
        vertices: (V, 3) float64.
        faces: (F, 3) int64.
        uv: (F, 3, 2) float64 texture coordinates of the corners, NaN where there are none.
        material: (F,) int64 into `colours` and `textures`.
        colours: (M, 3) float64 in 0..1 (sRGB as in the file).
        textures: one (h, w, 3) float64 image or None a material.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    uv: NDArray[np.float64]
    material: NDArray[np.int64]
    colours: NDArray[np.float64]
    textures: list[NDArray[np.float64] | None]


def catalogue(archive: zipfile.ZipFile) -> dict[str, dict[str, str]]:
    """Entries of the library's catalogue by the identifier after '#'."""
    entries: dict[int, dict[str, str]] = {}
    for line in archive.read("PluginFurnitureCatalog.properties").decode("latin-1").splitlines():
        found = re.match(r"(\w+)#(\d+)=(.*)", line)
        if found:
            entries.setdefault(int(found[2]), {})[found[1]] = found[3].strip()
    return {entry["id"].split("#")[1]: entry for entry in entries.values()}


def licence_of(archive: zipfile.ZipFile, folder: str, library: str) -> tuple[str, str, str]:
    """(licence, its address, the model's source page) of one model: its own licence file wins over the library's.

    Raises:
        ValueError: if the model's own licence file is neither CC0 nor CC BY 3.0.
    """
    own = [n for n in archive.namelist() if n.startswith(folder + "/") and "licen" in n.lower()]
    if not own:
        return (*LICENCES[library], "")
    text = "\n".join(archive.read(n).decode("latin-1") for n in own)
    page = re.search(r"https?://www\.blendswap\.com/blends?(?:/view)?/\d+", text)
    source = page[0] if page else ""
    low = re.sub(r"\s+", " ", text.lower())
    if any(word in low for word in ("noncommercial", "non-commercial", "sharealike", "share-alike", "gnu general")):
        raise ValueError(f"{folder}: licence file is neither CC0 nor CC BY: {own}")
    if "attribution 3.0" in low or "by/3.0" in low:
        return (*LICENCES["B"], source)
    if "zero" in low or "cc0" in low:
        return (*LICENCES["0"], source)
    raise ValueError(f"{folder}: licence file is neither CC0 nor CC BY: {own}")


def read_texture(archive: zipfile.ZipFile, path: str) -> NDArray[np.float64] | None:
    """The image as (h, w, 3) RGB in 0..1, averaged down to at most 128 pixels a side, or None if it is not there."""
    names = {n.lower(): n for n in archive.namelist()}
    name = names.get(path.lower())
    if name is None:
        return None
    image = cv2.imdecode(np.frombuffer(archive.read(name), np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        return None
    scale = min(1.0, 128 / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)[:, :, ::-1].astype(np.float64) / 255


def read_materials(archive: zipfile.ZipFile, folder: str, name: str) -> dict[str, tuple[NDArray, NDArray | None]]:
    """Colour and texture of each material of an MTL file."""
    found: dict[str, tuple[NDArray, NDArray | None]] = {}
    current = ""
    try:
        text = archive.read(f"{folder}/{name}").decode("latin-1")
    except KeyError:
        return found
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "newmtl":
            current = " ".join(words[1:])
            found[current] = (np.full(3, 0.7), None)
        elif words[0] == "Kd":
            found[current] = (np.array([float(w) for w in words[1:4]]).clip(0, 1), found[current][1])
        elif words[0] == "map_Kd":
            path = f"{folder}/{words[-1]}".replace("\\", "/")
            found[current] = (found[current][0], read_texture(archive, path))
    return found


def read_obj(archive: zipfile.ZipFile, path: str) -> Mesh:
    """Parse a Wavefront OBJ with its materials; polygons become fans of triangles."""
    folder = path.rsplit("/", 1)[0]
    vertices: list[list[float]] = []
    texture_uv: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    uvs: list[tuple[int, int, int]] = []
    material: list[int] = []
    names: list[str] = ["default"]
    materials: dict[str, tuple[NDArray, NDArray | None]] = {"default": (np.full(3, 0.7), None)}
    current = 0
    for line in archive.read(path).decode("latin-1").splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            vertices.append([float(w) for w in words[1:4]])
        elif words[0] == "vt":
            texture_uv.append([float(w) for w in words[1:3]])
        elif words[0] == "f":
            corners = [w.split("/") for w in words[1:]]
            index = [int(c[0]) - 1 if int(c[0]) > 0 else len(vertices) + int(c[0]) for c in corners]
            coordinate = [
                (int(c[1]) - 1 if int(c[1]) > 0 else len(texture_uv) + int(c[1])) if len(c) > 1 and c[1] else -1
                for c in corners
            ]
            for i in range(1, len(index) - 1):
                faces.append((index[0], index[i], index[i + 1]))
                uvs.append((coordinate[0], coordinate[i], coordinate[i + 1]))
                material.append(current)
        elif words[0] == "usemtl":
            name = " ".join(words[1:])
            if name not in names:
                names.append(name)
            current = names.index(name)
        elif words[0] == "mtllib":
            materials.update(read_materials(archive, folder, " ".join(words[1:])))
    uv_table = np.array([*texture_uv, [np.nan, np.nan]])
    looks = [materials.get(n, materials["default"]) for n in names]
    return Mesh(
        np.array(vertices),
        np.array(faces),
        uv_table[np.array(uvs)],
        np.array(material),
        np.array([c for c, _ in looks]),
        [t for _, t in looks],
    )


def placed(mesh: Mesh, entry: dict[str, str]) -> Mesh:
    """The mesh turned and scaled as the catalogue says, metres: x forward, y left, z up, on the floor at the origin."""
    vertices = mesh.vertices
    used = np.unique(mesh.faces)
    if "modelRotation" in entry:
        vertices = vertices @ np.array([float(w) for w in entry["modelRotation"].split()]).reshape(3, 3).T
    low, high = vertices[used].min(axis=0), vertices[used].max(axis=0)
    size = np.array([float(entry[k]) for k in ("width", "height", "depth")]) / 100
    vertices = (vertices - (low + high) / 2) * size / np.maximum(high - low, 1e-9)
    # The catalogue's axes are x to the viewer's right, y up, z to the viewer, who looks at the front: z is forward.
    vertices = vertices[:, [2, 0, 1]]
    vertices[:, 2] += size[1] / 2
    return Mesh(vertices, mesh.faces, mesh.uv, mesh.material, mesh.colours, mesh.textures)
