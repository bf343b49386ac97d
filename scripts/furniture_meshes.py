# SPDX-License-Identifier: Apache-2.0
"""Makes a model compact: fewer faces, a colour a face out of a palette, only what can be seen, its flat top."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import open3d as o3d
from furniture_reading import Mesh
from numpy.typing import NDArray

COLOURS = 24  # palette entries a model
BARYCENTRIC = np.array(
    [[1, 1, 1], [4, 1, 1], [1, 4, 1], [1, 1, 4], [5, 5, 1], [1, 5, 5], [5, 1, 5], [3, 2, 1], [1, 3, 2], [2, 1, 3]],
    float,
)
BARYCENTRIC /= BARYCENTRIC.sum(axis=1, keepdims=True)


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
