# SPDX-License-Identifier: Apache-2.0
"""Build the furniture pack that the synthetic rooms are furnished with.

Nobody who uses the project needs this script: its two results are committed. It reads the catalogues of Debian's
package `sweethome3d-furniture` (`apt-get download sweethome3d-furniture`, then `dpkg-deb -x *.deb DIR`), takes the
models listed below, all CC0 or CC BY, and writes

* `furniture.npz`: meshes in metres (x forward, y left, z up, the origin at the footprint's centre on the floor),
  decimated, with one colour a face out of a palette a model. No pickle.
* `FURNITURE_ATTRIBUTION.md`: name, creator, licence and source of every model, and what was changed.

    python scripts/build_furniture_pack.py DIR/usr/share/sweethome3d/furniture
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import open3d as o3d
from numpy.typing import NDArray

OUT = Path(__file__).resolve().parents[1] / "adatoken3d_ros" / "lab" / "synthetic" / "assets"
LIBRARIES = {
    "K": "KatorLegaz",
    "0": "BlendSwap-CC-0",
    "B": "BlendSwap-CC-BY",
    "R": "Reallusion",
    "S": "Scopia",
}
LICENCES = {
    "K": ("CC BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/"),
    "0": ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "B": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
    "R": ("CC BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/"),
    "S": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
}
# The class is our own plain word for the thing; the models are LIBRARY:identifier in the catalogue.
MODELS = {
    "chair": "K:dining-chair K:cafe-chair 0:oakChair 0:plasticChair 0:chairWithCushion 0:chair2 0:osakaChair "
    "B:cafe_set_tonon_chair B:ella_chair_f B:plaidChair B:kitchenChair B:chair3 S:chair3 S:chair S:plastic_chair "
    "S:white_kitchen_chair",
    "armchair": "0:armchair2 0:winchesterArmchair B:armchair1 B:fotel S:armchair S:armchair2 K:mid-century-chair "
    "S:rattanArmchair S:armchair3 B:armChair2",
    "office chair": "K:office-chair S:office_chair S:kids_desk_chair",
    "stool": "K:bar-stool 0:silla2 0:stool2 B:green_stool S:kitchen_stool S:bar_chair",
    "sofa": "K:futon-couch K:mid-century-sofa 0:couch 0:sofa2 0:winchesterSofa B:sofa2 B:sofa3 B:couch3 S:simple_sofa "
    "S:beige_sofa S:burlap_sofa S:leather_sofa",
    "bench": "K:bench 0:bench K:painted-bench K:concrete-bench",
    "table": "K:glass-dining-table K:folding-table 0:oakTable 0:tableWithTablecloth 0:table B:table S:black_table "
    "S:table4 S:round-table S:table-on-trestles B:cafe_set_mota_table S:white_kitchen_table",
    "coffee table": "B:coffeeTable S:saloon_table S:living_room_table S:table_wood_and_iron S:coffee-table2",
    "desk": "0:desk B:biurko3 B:simpleDesk B:officeTable S:kids_wooden_desk S:kids_desk_table",
    "bed": "0:bed1 0:bed2 0:bed3 0:bedWithTexture B:lettoCloud B:juniorBed S:bed1 S:children_bed "
    "S:captains-bed S:iron_bed",
    "crib": "S:crib 0:babyRockingBed",
    "wardrobe": "0:wardrobeWithSlidingDoors B:wardrobe B:wardrobe2 S:wardrobe1",
    "bookshelf": "K:full-bookcase 0:bookcase B:bookcase S:kids_shelves 0:verticalShelves 0:shelves K:utility-shelving",
    "cabinet": "0:lowerCabinet 0:drawersCabinet B:kitchenLowerCabinet B:kitchenDrawersCabinet B:dresserWithDrawers "
    "K:filing-cabinet 0:highCabinet",
    "nightstand": "0:bedsideTable2 B:bedsideTable",
    "tv stand": "B:tvStand",
    "television": "0:led_tv S:tv S:wall-flat-tv",
    "refrigerator": "K:fridge 0:refrigerator 0:largeFridge",
    "washing machine": "B:washing_machine S:clothes_washing_machine",
    "oven": "0:oven 0:doubleOven B:largeStove",
    "sink": "B:kitchenSink 0:sinkCabinet 0:washbasin B:washbasin_jay_hardy 0:modernVanity",
    "toilet": "0:toiletsUnit B:toilets_unit_jay_hardy B:modernToilet",
    "bathtub": "B:bath_jay_hardy S:islandBath S:corner_bathtub",
    "piano": "0:pianoAQueue B:piano",
    "fireplace": "S:fireplace1 S:fireplace2",
    "radiator": "0:radiator 0:radiator1 0:radiator3 B:modernRadiator",
    "trash can": "K:bullet-trash-can K:residential-trashcan 0:dustbin K:park-trashcan",
    "lamp": "0:desklamp K:pedestal-vase-lamp S:desk_lamp1 S:desk_lamp2 S:little_lamp1 S:little_lamp2 S:little_lamp3 "
    "S:livingroom_lamp1 B:lamp S:living_lamp",
    "plant": "0:decorativePlant 0:plant B:mediumIndoorPlant B:spatifilum B:yuccaPlant S:maceta S:ficus 0:littlePlant "
    "B:succulentPlant S:bonsai-tree 0:cactus B:decorativePlant",
    "christmas tree": "S:christmas_tree",
    "vase": "S:vase1 S:vase2 S:vase3 S:jar S:old_jar",
    "mug": "K:coffee-mug 0:beerGlass S:cup",
    "book": "B:book",
    "laptop": "B:laptop K:apple-ibook-2001",
    "computer": "K:apple-imac-1998 S:apple_pc",
    "printer": "S:inkjet_and_scanner_printer",
    "phone": "S:phone B:wirelessOfficePhone3",
    "microwave": "B:microwave",
    "toaster": "S:toaster",
    "coffee maker": "K:coffee-maker 0:coffeeBrewer S:coffee_machine",
    "mixer": "0:kitchenaid",
    "teapot": "S:teapot B:boiler B:espressokettle",
    "bowl": "K:bowl S:bowl S:bowlWithFruits S:bowlWithSalad S:apples",
    "bottle": "S:wine_bottle K:red-wine-bottle-01 B:beer_bottle 0:yogurtBottle",
    "fan": "0:tableFan",
    "teddy bear": "0:teddyBear",
    "ball": "0:basketball B:ballonFoot",
    "guitar": "0:electricGuitar",
    "speaker": "0:speaker2 0:speaker3",
    "radio": "B:radio",
    "aquarium": "S:aquarium",
    "backpack": "B:backpack",
    "suitcase": "B:suitcase",
    "box": "0:crate S:cardboard-box S:open-cardboard-box 0:box",
    "bicycle": "B:bike S:bicycle",
    "fire extinguisher": "0:fireExtinguisher",
    "water cooler": "S:water_cooler",
    "ladder": "S:step-ladder-metal S:step-ladder-wood",
    "stroller": "S:stroller",
    "wheelchair": "B:wheelchair",
    "barrel": "0:barrel",
    "cat": "S:cat B:siameseCat",
    "dog": "S:dog B:bulldog",
    "person": "K:male-01-suit K:female-01-casual-clothing R:female01 R:female02 R:male01 R:male03",
    "door": "S:door S:puerta K:exterior-door-01 K:exterior-door-02 K:exterior-door-05 K:exterior-door-07",
    "window": "K:window-01 K:window-08 S:turn-window S:window_2x3_regular S:window_2x1_medium_with_large_pane",
}
# Things whose flat top carries small objects.
SUPPORTS = {
    "table",
    "coffee table",
    "desk",
    "nightstand",
    "cabinet",
    "tv stand",
    "washing machine",
    "bookshelf",
    "bench",
    "wardrobe",
}
SMALL_FACES = 1400  # for what stands on tables
LARGE_FACES = 2400
LEAFY_FACES = 3000
COLOURS = 24  # palette entries a model


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


def scene_of(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> o3d.t.geometry.RaycastingScene:
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(
        o3d.core.Tensor.from_numpy(vertices.astype(np.float32)),
        o3d.core.Tensor.from_numpy(np.ascontiguousarray(faces.astype(np.uint32))),
    )
    return scene


def colours_at(mesh: Mesh, scene: o3d.t.geometry.RaycastingScene, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3) colours of the original surface nearest to the points (N, 3)."""
    nearest = scene.compute_closest_points(o3d.core.Tensor.from_numpy(points.astype(np.float32)))
    face = nearest["primitive_ids"].numpy().astype(np.int64)
    v, w = nearest["primitive_uvs"].numpy().astype(np.float64).T
    corner = mesh.uv[face]
    uv = corner[:, 0] * (1 - v - w)[:, None] + corner[:, 1] * v[:, None] + corner[:, 2] * w[:, None]
    colour = mesh.colours[mesh.material[face]].copy()
    for index, texture in enumerate(mesh.textures):
        chosen = (mesh.material[face] == index) & np.isfinite(uv).all(axis=1)
        if texture is None or not chosen.any():
            continue
        height, width = texture.shape[:2]
        column = (np.mod(uv[chosen, 0], 1) * width).astype(np.int64).clip(0, width - 1)
        row = (np.mod(1 - uv[chosen, 1], 1) * height).astype(np.int64).clip(0, height - 1)
        colour[chosen] = texture[row, column]
    return colour


BARYCENTRIC = np.array(
    [[1, 1, 1], [4, 1, 1], [1, 4, 1], [1, 1, 4], [5, 5, 1], [1, 5, 5], [5, 1, 5], [3, 2, 1], [1, 3, 2], [2, 1, 3]],
    float,
)
BARYCENTRIC /= BARYCENTRIC.sum(axis=1, keepdims=True)


def sampled_colours(
    mesh: Mesh, scene: o3d.t.geometry.RaycastingScene, vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean colour (F, 3) of each face and how much it varies over the face (F,)."""
    points = np.einsum("sk,fkd->fsd", BARYCENTRIC, vertices[faces])
    colours = colours_at(mesh, scene, points.reshape(-1, 3)).reshape(len(faces), len(BARYCENTRIC), 3)
    return colours.mean(axis=1), colours.std(axis=1).max(axis=1)


def split(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> tuple[NDArray, NDArray]:
    """Replace each chosen triangle by four (T-junctions do no harm to a ray caster)."""
    a, b, c = (vertices[faces[chosen, k]] for k in range(3))
    middle = np.concatenate([(a + b) / 2, (b + c) / 2, (c + a) / 2])
    n = int(chosen.sum())
    ab, bc, ca = (len(vertices) + n * k + np.arange(n) for k in range(3))
    i, j, k = faces[chosen].T
    added = np.concatenate([np.stack(t, 1) for t in ((i, ab, ca), (ab, j, bc), (ca, bc, k), (ab, bc, ca))])
    return np.concatenate([vertices, middle]), np.concatenate([faces[~chosen], added])


def decimated(mesh: Mesh, target: int, leafy: bool) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices and faces (at most `target`) of a simpler mesh, in the way that stays nearest to the original.

    Edge collapses are best on sound meshes, but seams (split vertices) stop them and loose parts collapse to nothing;
    then a mesh welded coarser, or vertices snapped to a grid, come out better.
    """
    source = o3d.geometry.TriangleMesh(
        o3d.utility.Vector3dVector(mesh.vertices), o3d.utility.Vector3iVector(mesh.faces)
    )
    source.remove_unreferenced_vertices()
    source.remove_duplicated_vertices()
    source.remove_degenerate_triangles()
    source.remove_duplicated_triangles()
    if len(source.triangles) > target:
        # Of a crown of thousands of loose leaves edge collapses alone leave nothing: first thin the leaves.
        original = thinned(source, target) if leafy else source
        extent = float(np.linalg.norm(original.get_max_bound() - original.get_min_bound()))
        o3d.utility.random.seed(0)
        samples = np.asarray(original.sample_points_uniformly(6000).points)
        best = np.inf
        for candidate in candidates(original, target, extent):
            candidate.remove_unreferenced_vertices()
            candidate.remove_degenerate_triangles()
            if not 0 < len(candidate.triangles) <= target:
                continue
            scene = scene_of(np.asarray(candidate.vertices), np.asarray(candidate.triangles))
            distance = scene.compute_distance(o3d.core.Tensor.from_numpy(samples.astype(np.float32))).numpy()
            error = float(np.sqrt((distance**2).mean())) / extent
            if error < 0.9 * best:  # the earlier ways keep edges sharper: they win unless clearly worse
                best, source = error, candidate
        if best > 0.012:
            print(f"    coarse: {100 * best:.1f} % off", file=sys.stderr)
    return np.asarray(source.vertices).copy(), np.asarray(source.triangles).astype(np.int64)


def candidates(mesh: o3d.geometry.TriangleMesh, target: int, extent: float) -> Iterator[o3d.geometry.TriangleMesh]:
    """Simpler copies of the mesh, not all of them small enough."""
    welds = ((0.0, 0.3), (0.0, 1.0), (0.0005, 0.1), (0.0005, 1.0), (0.002, 0.3), (0.005, 0.3), (0.01, 0.1))
    for weld, boundary in welds:
        copy = o3d.geometry.TriangleMesh(mesh)
        if weld:
            copy.merge_close_vertices(weld * extent)
            copy.remove_degenerate_triangles()
            copy.remove_duplicated_triangles()
        yield copy.simplify_quadric_decimation(target, boundary_weight=boundary)
    for cells in (128, 96, 72, 56, 44, 36, 28, 22, 16):
        contraction = o3d.geometry.SimplificationContraction.Average
        snapped = mesh.simplify_vertex_clustering(extent / cells, contraction)
        yield snapped
        # A grid finer than the budget allows, then collapses: keeps loose parts that collapses alone would lose.
        if target < len(snapped.triangles) <= 4 * target:
            yield snapped.simplify_quadric_decimation(target, boundary_weight=0.3)


def thinned(mesh: o3d.geometry.TriangleMesh, target: int) -> o3d.geometry.TriangleMesh:
    """Keep every k-th small component (leaf), grown about its centre so that the crown stays as full."""
    label, count, _ = (np.asarray(a) for a in mesh.cluster_connected_triangles())
    if len(count) < 40:
        return mesh
    faces, vertices = np.asarray(mesh.triangles), np.asarray(mesh.vertices).copy()
    small = count <= max(64, int(np.median(count) * 2))
    share = float(np.clip(1.5 * target / max(len(faces), 1), 0.05, 1.0))
    order = np.cumsum(small)
    kept = ~small | (np.floor(order * share) > np.floor((order - 1) * share))
    growth = min(share**-0.4, 2.2)
    chosen = kept[label]
    for component in np.flatnonzero(kept & small):
        index = np.unique(faces[label == component])
        centre = vertices[index].mean(axis=0)
        vertices[index] = centre + (vertices[index] - centre) * growth
    return o3d.geometry.TriangleMesh(o3d.utility.Vector3dVector(vertices), o3d.utility.Vector3iVector(faces[chosen]))


def palette_of(colours: NDArray[np.float64], areas: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(P, 3) uint8 palette and (F,) uint8 index: at most COLOURS colours by a deterministic weighted k-means."""
    rounded, inverse = np.unique(np.round(colours * 255).astype(np.int64), axis=0, return_inverse=True)
    weight = np.bincount(inverse, areas, len(rounded)) + 1e-9
    if len(rounded) <= COLOURS:
        return rounded.astype(np.uint8), inverse.astype(np.uint8)
    centres = rounded[[int(weight.argmax())]].astype(np.float64)
    while len(centres) < COLOURS:
        distance = ((rounded[:, None] - centres[None]) ** 2).sum(axis=2).min(axis=1)
        centres = np.concatenate([centres, rounded[[int((distance * weight**0.5).argmax())]]])
    for _ in range(20):
        nearest = ((rounded[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        for k in range(COLOURS):
            if (nearest == k).any():
                centres[k] = np.average(rounded[nearest == k], axis=0, weights=weight[nearest == k])
    nearest = ((rounded[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    return np.round(centres).clip(0, 255).astype(np.uint8), nearest[inverse].astype(np.uint8)


def largest_rectangle(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(row0, row1, column0, column1), half open, of the largest all-true rectangle."""
    best, area = (0, 0, 0, 0), 0
    height = np.zeros(mask.shape[1], np.int64)
    for row in range(mask.shape[0]):
        height = np.where(mask[row], height + 1, 0)
        for start in range(mask.shape[1]):
            low = height[start]
            for end in range(start, mask.shape[1]):
                low = min(low, height[end])
                if low == 0:
                    break
                if low * (end - start + 1) > area:
                    area = int(low * (end - start + 1))
                    best = (row + 1 - int(low), row + 1, start, end + 1)
    return best


def support_of(vertices: NDArray[np.float64], faces: NDArray[np.int64], cell: float = 0.02) -> list[float] | None:
    """[height, x0, x1, y0, y1] of the highest large flat rectangle that is free above, or None if there is none."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    xs = np.arange(low[0] + cell / 2, high[0], cell)
    ys = np.arange(low[1] + cell / 2, high[1], cell)
    grid = np.stack(np.meshgrid(xs, ys, indexing="ij"), -1)
    rays = np.zeros((*grid.shape[:2], 6), np.float32)
    rays[..., :2], rays[..., 2], rays[..., 5] = grid, high[2] + 1, -1
    top = high[2] + 1 - scene_of(vertices, faces).cast_rays(o3d.core.Tensor.from_numpy(rays))["t_hit"].numpy()
    finite = np.where(np.isfinite(top), top, -1.0)
    level = np.round(finite / 0.01).astype(np.int64)
    candidates = []
    for z in np.unique(level[level > 25]):
        flat = np.abs(finite - z * 0.01) < 0.012
        if flat.sum() * cell * cell < 0.03:
            continue
        r0, r1, c0, c1 = largest_rectangle(flat)
        candidates.append(((r1 - r0) * (c1 - c0) * cell * cell, z, (r0, r1, c0, c1)))
    if not candidates or max(candidates)[0] < 0.03:
        return None
    largest = max(candidates)[0]
    _, z, (r0, r1, c0, c1) = max((c for c in candidates if c[0] >= 0.6 * largest), key=lambda c: c[1])
    height = float(np.median(finite[r0:r1, c0:c1]))
    box = [height, xs[r0] - cell / 2, xs[r1 - 1] + cell / 2, ys[c0] - cell / 2, ys[c1 - 1] + cell / 2]
    return [round(float(b), 4) for b in box]


def build(mesh: Mesh, target: int, leafy: bool) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """(vertices, faces, colour index, palette, share of each palette entry in what is seen) of the compact model."""
    low, high = mesh.vertices[np.unique(mesh.faces)].min(axis=0), mesh.vertices[np.unique(mesh.faces)].max(axis=0)
    original = scene_of(mesh.vertices, mesh.faces)
    vertices, faces = decimated(mesh, target, leafy)
    # Decimation moves the box by millimetres; the catalogue's size is the truth.
    now_low, now_high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = low + (vertices - now_low) * (high - low) / np.maximum(now_high - now_low, 1e-9)
    for _ in range(5):  # textures with detail (book spines, tiles) get more faces while the budget lasts
        colours, spread = sampled_colours(mesh, original, vertices, faces)
        corners = vertices[faces]
        areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
        wish = np.where((spread > 0.1) & (areas > 0.0006), areas * spread, 0)
        room = (target - len(faces)) // 3
        chosen = np.zeros(len(faces), bool)
        chosen[np.argsort(-wish, kind="stable")[: max(room, 0)]] = True
        chosen &= wish > 0
        if not chosen.any():
            break
        vertices, faces = split(vertices, faces, chosen)
    colours, _ = sampled_colours(mesh, original, vertices, faces)
    corners = vertices[faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    # What nobody can see goes, and only what is seen from above the floor counts as the look of the thing.
    kept = exposure(vertices, faces, -0.6) > 0
    faces, colours, areas = faces[kept], colours[kept], areas[kept]
    palette, index = palette_of(colours, areas)
    looks = np.bincount(index, areas * exposure(vertices, faces, -0.1), len(palette))
    return vertices, faces, index, palette, looks / looks.sum()


def exposure(vertices: NDArray[np.float64], faces: NDArray[np.int64], lowest: float) -> NDArray[np.float64]:
    """(F,) share of the directions with z >= `lowest` from which a face is seen from outside, from its better side."""
    count = 96
    k = np.arange(count) + 0.5
    z = lowest + (1 - lowest) * k / count
    angle = k * np.pi * (3 - 5**0.5)  # a Fibonacci spiral: even and always the same
    directions = np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], 1)
    corners = vertices[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    scene = scene_of(vertices, faces)
    seen = np.zeros(len(faces))
    extent = float(np.linalg.norm(np.ptp(vertices, axis=0)))
    for weights in BARYCENTRIC[:4]:
        origin = np.einsum("k,fkd->fd", weights, corners)
        side = np.sign(np.einsum("fd,nd->fn", normal, directions))
        rays = np.empty((len(faces), count, 6), np.float32)
        rays[..., :3] = origin[:, None] + side[..., None] * normal[:, None] * 1e-4 * extent
        rays[..., 3:] = directions
        free = ~scene.test_occlusions(o3d.core.Tensor.from_numpy(rays)).numpy()
        outside, inside = (free & (side > 0)).mean(axis=1), (free & (side < 0)).mean(axis=1)
        seen = np.maximum(seen, np.maximum(outside, inside))
    return seen


def compact_order(vertices: NDArray, faces: NDArray, index: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Reorder so that neighbours in memory are neighbours in space: the archive's compression lives on that."""
    centre = vertices[faces].mean(axis=1)
    low, high = centre.min(axis=0), centre.max(axis=0)
    cell = ((centre - low) / np.maximum(high - low, 1e-9) * 63).astype(np.int64)
    code = np.zeros(len(cell), np.int64)
    for bit in range(6):
        for axis in range(3):
            code |= ((cell[:, axis] >> bit) & 1) << (3 * bit + axis)
    order = np.lexsort((code, index))
    faces, index = faces[order], index[order]
    _, first, inverse = np.unique(faces.ravel(), return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    used = np.unique(faces.ravel())
    reordered = np.empty((len(used), 3))
    reordered[rank] = vertices[used]
    return reordered, rank[inverse].reshape(faces.shape), index


def held_out(identifiers: list[str]) -> set[str]:
    """About a fifth of the models of a class with three or more, by a hash of the name: never in training rooms."""
    if len(identifiers) < 3:
        return set()
    order = sorted(identifiers, key=lambda i: hashlib.sha256(f"held out {i}".encode()).hexdigest())
    return set(order[: max(1, round(0.2 * len(identifiers)))])


def items() -> Iterator[tuple[str, str, str]]:
    for name, models in MODELS.items():
        for model in models.split():
            library, identifier = model.split(":")
            yield name, library, identifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("furniture", type=Path, help="folder with the .sh3f files of sweethome3d-furniture")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    archives = {k: zipfile.ZipFile(arguments.furniture / f"{n}.sh3f") for k, n in LIBRARIES.items()}
    catalogues = {k: catalogue(a) for k, a in archives.items()}
    unseen = {n: held_out(m.split()) for n, m in MODELS.items()}
    meta, parts = [], []
    for name, library, identifier in items():
        entry = catalogues[library][identifier]
        path = entry["model"].lstrip("/")
        licence, address, source = licence_of(archives[library], path.rsplit("/", 1)[0], library)
        mesh = placed(read_obj(archives[library], path), entry)
        size = [float(entry[k]) / 100 for k in ("depth", "width", "height")]
        leafy = name in ("plant", "christmas tree")
        target = LEAFY_FACES if leafy or name == "person" else LARGE_FACES if max(size) > 0.6 else SMALL_FACES
        vertices, faces, index, palette, looks = build(mesh, target, leafy)
        support = support_of(vertices, faces) if name in SUPPORTS else None
        vertices, faces, index = compact_order(vertices, faces, index)
        half = np.array([size[0] / 2, size[1] / 2, 0])
        parts.append(
            (np.round((vertices + half) / size * 65535).clip(0, 65535).astype(np.uint16), faces, index, palette)
        )
        meta.append(
            {
                "id": f"{LIBRARIES[library]}/{identifier}",
                "class": name,
                "name": entry["name"],
                "creator": entry["creator"],
                "licence": licence,
                "source": source,
                "size": size,
                "elevation": float(entry.get("elevation", 0)) / 100,
                "support": support,
                "held_out": f"{library}:{identifier}" in unseen[name],
                "shares": [round(float(share), 4) for share in looks],
                "counts": [len(vertices), len(faces), len(palette)],
            }
        )
        print(f"{name:18} {identifier:34} {len(mesh.faces):7} -> {len(faces):5} faces, {licence}", file=sys.stderr)
    write(arguments.out, meta, parts)


def write(out: Path, meta: list[dict], parts: list[tuple[NDArray, NDArray, NDArray, NDArray]]) -> None:
    """Write the archive and the attribution."""
    out.mkdir(parents=True, exist_ok=True)
    deltas = [np.diff(f.astype(np.int64), axis=0, prepend=0).astype(np.int16) for _, f, _, _ in parts]
    arrays = {
        "meta": np.frombuffer(json.dumps(meta, separators=(",", ":"), ensure_ascii=False).encode(), np.uint8),
        # Columns apart and differences instead of values: the same numbers in two thirds of the bytes.
        "vertices": np.concatenate([p[0] for p in parts]).T.copy(),
        "faces": np.concatenate(deltas).T.copy(),
        "colour": np.concatenate([p[2] for p in parts]),
        "palette": np.concatenate([p[3] for p in parts]),
    }
    path = out / "furniture.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            # A fixed date keeps the bytes the same from build to build.
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    classes = len({m["class"] for m in meta})
    print(f"{len(meta)} models in {classes} classes, {path.stat().st_size / 1e6:.2f} MB -> {path}", file=sys.stderr)
    write_attribution(out, meta)


def write_attribution(out: Path, meta: list[dict]) -> None:
    """Write who made the models."""
    addresses = dict(LICENCES.values())
    lines = [
        "# Furniture models: who made them and under which licence",
        "",
        "`furniture.npz` holds simplified copies of the models below. They come from the furniture libraries for",
        "Sweet Home 3D (https://www.sweethome3d.com), as Debian packages them in `sweethome3d-furniture` 1.8.",
        "**Changes made:** reduced to at most 3,000 faces, materials and textures averaged to one colour a face, faces",
        "that nobody can see removed, scaled to the catalogue's size in metres, turned to x forward and z up; the",
        "rooms made of them recolour and scale them further. No creator endorses this project or its use of the",
        "models.",
        "",
        *(f"* {name}: {address}" for name, address in sorted(addresses.items())),
        "",
        "The Scopia library is (C) 2006-2020 Scopia Visual Interfaces Systems, s.l. (http://www.scopia.es) and, in",
        "part, (C) 2014-2020 Emmanuel Puybaret / eTeks <info@eteks.com>; the KatorLegaz library is (C) 2003-2008",
        "Andrew Kator & Jennifer Legaz; the Reallusion library is (C) 2008-2011 Reallusion",
        "(http://www.reallusion.com); the Blend Swap models are by the contributors named",
        "(http://www.blendswap.com).",
        "",
        "| class here | model | name | creator | licence | source |",
        "|---|---|---|---|---|---|",
    ]
    for m in sorted(meta, key=lambda m: (m["class"], m["id"])):
        source = m["source"] or "library"
        lines.append(f"| {m['class']} | `{m['id']}` | {m['name']} | {m['creator']} | {m['licence']} | {source} |")
    (out / "FURNITURE_ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
