# SPDX-License-Identifier: Apache-2.0
"""Which voxels are free, occupied or were never looked at: what views have looked through, kept up as they come.

The newest look counts. A voxel is occupied where a measurement lay in it when it was last looked at, free where all
that was measured in its place lay clearly behind it, and seen without being either where a surface is too near to tell.
What is behind a surface, or where nothing was measured, is as unseen as before. Voxels are held in blocks, of which
there is a greatest number; the ones that are farthest from the camera go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.agreement import thinned
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import backproject
from adatoken3d_ros.scene.looked import LOOKS, Looked, without_first

VOXEL = 0.2  # metres
SIDE = 8  # voxels along an edge of a block
CELLS = SIDE**3
MOST_BLOCKS = 4096  # 33 MB, 17,000 cubic metres of what was looked at
DROPPED = 1 / 16  # of these go at a time
FARTHEST = 10.0  # metres; farther points say too little of so small voxels
RELATIVE_MARGIN = 0.02  # of the distance, by which what is seen behind a free voxel must be farther away, for noise
INNER = 0.35  # of a voxel's edge, from its middle, within which a measurement says that the voxel is not free
ENOUGH = 3  # measurements of a frame in a voxel that say that something is there
NEAREST = 0.1  # metres; what is nearer to the camera is not looked at
REMEMBERED = 65536  # looks whose times are known; older ones count as that old

PACKING = np.array([1 << 42, 1 << 21, 1])  # one number for a block
OFFSETS = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"), axis=-1).reshape(CELLS, 3)


class State(IntEnum):
    """What is known of a voxel."""

    UNSEEN = 0
    SEEN = 1  # at a surface, too near to it to tell
    FREE = 2
    OCCUPIED = 3


class Occupancy:
    """Voxels along the axes of the scene frame, and when each was last seen, free and hit.

    Args:
        origin: scene-frame point, metres, that is the centre of a voxel: best one on the floor, whose measurements
            then lie in one layer.
        most_blocks: of `CELLS` voxels, that are kept.

    Attributes:
        blocks: {(3,) index of a block: row of the tables}.
    """

    def __init__(self, origin: Sequence[float] | NDArray[np.floating] = (0, 0, 0), most_blocks: int = MOST_BLOCKS):
        self.most_blocks = most_blocks
        self.clear(origin)

    def clear(self, origin: Sequence[float] | NDArray[np.floating]) -> None:
        """Nothing has been seen."""
        self.origin = np.array(origin, np.float64)
        self.blocks: dict[tuple[int, int, int], int] = {}
        # Numbers of looks, from 1 on; 0: never.
        self._tables = {name: np.zeros((0, CELLS), np.int32) for name in LOOKS}
        self._unused: list[int] = []
        self._sorted: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self.looks = 0
        self._stamps: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def nbytes(self) -> int:
        """Of the tables."""
        return sum(table.nbytes for table in self._tables.values()) + 8 * len(self._stamps)

    # --- views in -----------------------------------------------------------------------------------------------------

    def look(self, frame: PosedFrame, max_depth: float = FARTHEST) -> None:
        """Takes in what a frame looks through, up to `max_depth` metres."""
        self.look_at(*thinned(frame), frame.T_world_camera, frame.stamp_ns, max_depth)

    def look_at(
        self,
        depth: NDArray[np.float32],
        K: NDArray[np.float64],
        T: NDArray[np.float64],
        stamp_ns: int,
        max_depth: float = FARTHEST,
    ) -> None:
        """As `look`, of a small depth image (h, w), metres, inf where nothing was measured, its matrix (3, 3), and its
        T_world_camera (4, 4)."""
        depth = np.where(depth > NEAREST, depth, np.float32(np.inf))
        known = np.isfinite(depth)
        reach = min(max_depth, FARTHEST, float(depth[known].max())) if known.any() else 0.0
        self.looks += 1
        self._stamps.append(stamp_ns)
        if not reach:
            return
        low, table, found = self._in_view(T, K, depth.shape, reach)
        if not len(found):
            return
        seen, free = self._looked(found, depth, K, T, reach)
        hit = self._hits(low, table, depth, K, T, reach)
        free[hit // CELLS, hit % CELLS] = False
        touched = np.asarray(seen.any(axis=1))
        touched[hit // CELLS] = True
        rows = np.zeros(len(found), np.int64)
        rows[touched] = self._rows(found[touched])
        for name, cells in (("seen", np.flatnonzero(seen)), ("free", np.flatnonzero(free)), ("hit", hit)):
            at = rows[cells // CELLS] * CELLS + cells % CELLS
            self._tables[name].reshape(-1)[at] = self.looks
            if name == "hit":
                first = self._tables["first"].reshape(-1)
                # What was free in between is another thing now.
                first[at[(first[at] == 0) | (self._tables["free"].reshape(-1)[at] > first[at])]] = self.looks
        if len(self.blocks) > self.most_blocks:
            self._drop_far(T[:3, 3])

    def _in_view(
        self, T: NDArray[np.float64], K: NDArray[np.float64], shape: tuple[int, ...], reach: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The lowest index of a block around the view, the number of each block from there on (-1: not in view), and
        the blocks (n, 3) in view."""
        height, width = shape
        edge = VOXEL * SIDE
        corners = [(u, v, 1.0) for u in (-0.5, width - 0.5) for v in (-0.5, height - 0.5)]
        rays = np.array(corners) @ np.linalg.inv(K).T
        ends = np.vstack([np.zeros(3), rays * reach]) @ T[:3, :3].T + T[:3, 3] - self.origin + VOXEL / 2
        low, high = (np.floor(end / edge).astype(np.int64) for end in (ends.min(axis=0), ends.max(axis=0)))
        grid = np.stack(np.meshgrid(*map(np.arange, low, high + 1), indexing="ij"), axis=-1).reshape(-1, 3)
        middle = ((grid + 0.5) * edge - VOXEL / 2 + self.origin - T[:3, 3]) @ T[:3, :3]
        radius = edge * 3**0.5 / 2
        inside = (middle[:, 2] > -radius) & (middle[:, 2] < reach + radius)
        for axis in (0, 1):  # between the planes through the edges of the picture
            for sign, slope in ((1, rays[:, axis].max()), (-1, -rays[:, axis].min())):
                away = sign * middle[:, axis] - slope * middle[:, 2]
                inside &= away < radius * (1 + slope**2) ** 0.5
        table = np.full(tuple(high - low + 1), -1)
        table.reshape(-1)[inside] = np.arange(np.count_nonzero(inside))
        return low, table, grid[inside]

    def _looked(
        self,
        found: NDArray[np.int64],
        depth: NDArray[np.float32],
        K: NDArray[np.float64],
        T: NDArray[np.float64],
        reach: float,
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which voxels (n, CELLS) of n blocks are not behind what was measured, and which clearly before it."""
        R = T[:3, :3].astype(np.float32)
        corner = ((found * (SIDE * VOXEL) + self.origin - T[:3, 3]) @ T[:3, :3]).astype(np.float32)
        step = (OFFSETS * VOXEL).astype(np.float32) @ R
        z = (corner[:, None, 2] + step[None, :, 2]).reshape(-1)
        before = np.flatnonzero((z > NEAREST) & (z < reach + VOXEL))
        block, cell = before // CELLS, before % CELLS
        z = z[before]
        u = (corner[block, 0] + step[cell, 0]) * np.float32(K[0, 0]) / z + np.float32(K[0, 2])
        v = (corner[block, 1] + step[cell, 1]) * np.float32(K[1, 1]) / z + np.float32(K[1, 2])
        height, width = depth.shape
        inside = (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)
        z, before = z[inside], before[inside]
        pixel = np.rint(v[inside]).astype(np.int64) * width + np.rint(u[inside]).astype(np.int64)
        measured = depth.reshape(-1)[pixel]
        near = np.asarray(cv2.erode(depth, np.ones((3, 3), np.uint8)), np.float32).reshape(-1)[pixel]
        half = np.float32(VOXEL / 2 * np.abs(R).sum(axis=0)[2])  # of a voxel, along the optical axis
        seen = np.zeros(len(found) * CELLS, bool)
        free = np.zeros(len(found) * CELLS, bool)
        seen[before] = np.isfinite(measured) & (z <= measured + np.float32(VOXEL / 2))
        free[before] = np.isfinite(measured) & (z * np.float32(1 + RELATIVE_MARGIN) + half < near)
        return seen.reshape(-1, CELLS), free.reshape(-1, CELLS)

    def _hits(
        self,
        low: NDArray[np.int64],
        table: NDArray[np.int64],
        depth: NDArray[np.float32],
        K: NDArray[np.float64],
        T: NDArray[np.float64],
        reach: float,
    ) -> NDArray[np.int64]:
        """Numbers of the voxels of the blocks in view in which measurements lie."""
        v, u = np.nonzero(depth[::2, ::2] <= reach)  # close enough for voxels of that size
        v, u = 2 * v, 2 * u
        points = backproject(depth[v, u], u, v, K, T)
        voxel = np.rint((points - self.origin) / VOXEL).astype(np.int64)
        block = voxel // SIDE
        place = block - low
        inside = ((place >= 0) & (place < table.shape)).all(axis=1)
        voxel, place = voxel[inside] - block[inside] * SIDE, place[inside]
        number = table[place[:, 0], place[:, 1], place[:, 2]]
        cells: NDArray[np.int64] = number * CELLS + (voxel[:, 0] * SIDE + voxel[:, 1]) * SIDE + voxel[:, 2]
        return cells[number >= 0]

    def _rows(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Their rows in the tables, which grow where there is none."""
        keys = [(i, j, k) for i, j, k in blocks.tolist()]
        new = [key for key in keys if key not in self.blocks]
        if len(new) > len(self._unused):
            size = len(self._tables["seen"])
            more = max(min(size, self.most_blocks - size), len(new) - len(self._unused))
            self._tables = {n: np.pad(t, ((0, more), (0, 0))) for n, t in self._tables.items()}
            self._unused += range(size + more - 1, size - 1, -1)
        for key in new:
            self.blocks[key] = self._unused.pop()
            self._sorted = None
        return np.array([self.blocks[key] for key in keys], np.int64)

    def _drop_far(self, camera: NDArray[np.float64]) -> None:
        keys, _ = self._all()
        away = self._away(keys, camera)
        n = len(keys) - int(self.most_blocks * (1 - DROPPED))
        for key in keys[np.argsort(-away, kind="stable")[:n]].tolist():
            row = self.blocks.pop(tuple(key))
            self._sorted = None
            for table in self._tables.values():
                table[row] = 0
            self._unused.append(row)

    def _away(self, blocks: NDArray[np.int64], camera: NDArray[np.float64]) -> NDArray[np.float64]:
        """Metres between the middles of blocks (n, 3) and a point (3,)."""
        return np.linalg.norm((blocks + 0.5) * (VOXEL * SIDE) + self.origin - camera, axis=1)

    def looked(self) -> Looked:
        """What is known, to be kept."""
        keys, rows = self._all()
        tables = np.stack([self._tables[name][rows] for name in LOOKS], axis=1)
        tables = without_first(tables, self.looks - len(self._stamps))
        return Looked(self.origin.copy(), keys, tables, np.array(self._stamps, np.int64))

    def restore(self, looked: Looked, camera: NDArray[np.float64]) -> None:
        """Knows that instead, as much as it may, of what is nearest to a camera (3,), scene frame, metres."""
        self.clear(looked.origin)
        self._stamps.extend(looked.stamps.tolist())
        self.looks = len(self._stamps)
        kept = np.argsort(self._away(looked.blocks, camera), kind="stable")[: self.most_blocks]
        tables, rows = looked.tables[kept], self._rows(looked.blocks[kept])
        tables = without_first(tables, len(looked.stamps) - self.looks)
        for number, name in enumerate(LOOKS):
            self._tables[name][rows] = tables[:, number]

    # --- what is known ------------------------------------------------------------------------------------------------

    def look_numbers(self, points: NDArray[np.floating], *names: str) -> NDArray[np.int64]:
        """(n,) of the voxels of points (n, 3), scene frame, metres, the number of one of `LOOKS`, 0: never; of several
        of them (k, n)."""
        voxel = np.rint((np.asarray(points, np.float64) - self.origin) / VOXEL).astype(np.int64)
        block = voxel // SIDE
        rest = voxel - block * SIDE
        rows = self._rows_of(block)
        cells = rows * CELLS + (rest[:, 0] * SIDE + rest[:, 1]) * SIDE + rest[:, 2]
        known = rows >= 0
        found = np.zeros((len(names), len(rows)), np.int64)
        for numbers, name in zip(found, names, strict=True):
            numbers[known] = self._tables[name].reshape(-1)[cells[known]]
        return found[0] if len(names) == 1 else found

    def _all(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks (n, 3) and their rows."""
        return np.array(list(self.blocks), np.int64).reshape(-1, 3), np.array(list(self.blocks.values()), np.int64)

    def _rows_of(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) rows of blocks (n, 3) in the tables; -1 for none."""
        if not self.blocks or not len(blocks):
            return np.full(len(blocks), -1)
        if self._sorted is None:
            keys, rows = self._all()
            order = np.argsort(keys @ PACKING)
            self._sorted = (keys @ PACKING)[order], rows[order]
        known, rows = self._sorted
        wanted = blocks @ PACKING
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[at] == wanted, rows[at], -1)

    def stamp_of(self, look: int) -> int:
        """Acquisition time of a look, nanoseconds; of the oldest that is remembered for older ones, 0 for none."""
        if look < 1 or not self._stamps:
            return 0
        return self._stamps[max(0, look - 1 - (self.looks - len(self._stamps)))]

    def states(self, points: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(n,) `State` of the voxels of points (n, 3), scene frame, metres."""
        return _state(*self.look_numbers(points, "seen", "free", "hit"))

    def well_within(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """(n,) whether points (n, 3), scene frame, metres, lie off the sides of their voxels: a surface that cuts a
        corner is in a voxel through whose middle others look."""
        place = (np.asarray(points, np.float64) - self.origin) / VOXEL
        return np.asarray((np.abs(place - np.rint(place)) <= INNER).all(axis=1))

    def filled(self, frame: PosedFrame, max_depth: float = FARTHEST) -> NDArray[np.float64]:
        """(n, 3) centres of the voxels, scene frame, metres, that are free and in which a frame measures something."""
        depth, K = thinned(frame)
        v, u = np.nonzero((depth > NEAREST) & (depth <= min(max_depth, FARTHEST)))
        points = backproject(depth[v, u], u, v, K, frame.T_world_camera).astype(np.float64)
        points = points[self.well_within(points)]
        voxel = np.rint((points - self.origin) / VOXEL).astype(np.int64)
        _, at, count = np.unique(voxel @ PACKING, return_index=True, return_counts=True)
        centres = voxel[at[count >= ENOUGH]] * VOXEL + self.origin
        return centres[self.states(centres) == State.FREE]

    def box(
        self, low: Sequence[float] | NDArray[np.floating], high: Sequence[float] | NDArray[np.floating]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """`State` (X, Y, Z) of the voxels that hold the corners of a box and of all between, and the centre (3,) of the
        first, scene frame, metres."""
        first, last = (np.rint((np.asarray(end) - self.origin) / VOXEL).astype(np.int64) for end in (low, high))
        begin, end = first // SIDE, last // SIDE + 1
        count = end - begin
        grid = np.stack(np.meshgrid(*map(np.arange, begin, end), indexing="ij"), axis=-1).reshape(-1, 3)
        rows = self._rows_of(grid)
        tables = (
            [np.where(rows[:, None] >= 0, self._tables[n][rows], 0) for n in ("seen", "free", "hit")]
            if len(self.blocks)
            else [np.zeros((len(grid), CELLS), np.int32)] * 3
        )
        state = _state(*tables).reshape(*count, SIDE, SIDE, SIDE).transpose(0, 3, 1, 4, 2, 5).reshape(*(count * SIDE))
        cut = tuple(slice(a, b) for a, b in zip(first - begin * SIDE, last - begin * SIDE + 1, strict=True))
        return state[cut], first * VOXEL + self.origin

    def seen_columns(
        self, low: Sequence[float] | NDArray[np.floating], high: Sequence[float] | NDArray[np.floating]
    ) -> float:
        """Share of the upright columns of voxels of a box (as `box`) that were seen at any height. It costs what is
        held, however large the box is."""
        first, last = (np.rint((np.asarray(end) - self.origin) / VOXEL).astype(np.int64) for end in (low, high))
        if not self.blocks:
            return 0.0
        keys, rows = self._all()
        inside = ((keys >= first // SIDE) & (keys <= last // SIDE)).all(axis=1)
        keys, rows = keys[inside], rows[inside]
        column = keys[:, :2] @ PACKING[:2]
        order = np.argsort(column, kind="stable")
        keys, rows, column = keys[order], rows[order], column[order]
        if not len(keys):
            return 0.0
        voxel = keys[:, :, None] * SIDE + np.arange(SIDE)
        x, y, z = ((voxel >= first[:, None]) & (voxel <= last[:, None])).transpose(1, 0, 2)
        seen = ((self._tables["seen"][rows] > 0) | (self._tables["hit"][rows] > 0)).reshape(-1, SIDE, SIDE, SIDE)
        columns = (seen & z[:, None, None]).any(axis=3) & x[:, :, None] & y[:, None]
        starts = np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))
        return float(np.logical_or.reduceat(columns, starts).sum() / (last - first + 1)[:2].prod())

    def extent(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Lower and upper corner of what was hit, scene frame, metres, whole voxels; None before anything was."""
        if not self.blocks:
            return None
        keys, rows = self._all()
        hit = self._tables["hit"][rows]
        occupied = (hit > 0) & (hit >= self._tables["free"][rows])
        some = occupied.any(axis=1)
        if not some.any():
            return None
        keys, occupied = keys[some], occupied[some]

        def end(axis: int, pick: Callable[[NDArray[np.int64]], np.int64]) -> float:
            """Of the outermost blocks, the outermost voxel."""
            outermost = pick(keys[:, axis])
            cells = OFFSETS[occupied[keys[:, axis] == outermost].any(axis=0), axis]
            return float(outermost * SIDE + pick(cells))

        low, high = (np.array([end(axis, pick) for axis in range(3)]) for pick in (np.min, np.max))
        return (low - 0.5) * VOXEL + self.origin, (high + 0.5) * VOXEL + self.origin

    def where(self, state: State) -> NDArray[np.float64]:
        """(n, 3) centres of the voxels of that state, not UNSEEN, scene frame, metres."""
        if not self.blocks:
            return np.zeros((0, 3))
        keys, rows = self._all()
        block, cell = np.nonzero(_state(*(self._tables[name][rows] for name in ("seen", "free", "hit"))) == state)
        return (keys[block] * SIDE + OFFSETS[cell]) * VOXEL + self.origin


def _state(seen: NDArray[np.integer], free: NDArray[np.integer], hit: NDArray[np.integer]) -> NDArray[np.uint8]:
    """`State` by the numbers of the last looks."""
    state = np.where((seen > 0) | (hit > 0), State.SEEN, State.UNSEEN).astype(np.uint8)
    state[free > hit] = State.FREE
    state[(hit >= free) & (hit > 0)] = State.OCCUPIED
    return state
