# SPDX-License-Identifier: Apache-2.0
"""Whether views agree: where one looked through to a surface, another can have seen none in front of it.

A pose that is wrong by half a metre or twenty degrees puts a third or more of the points that two views share into free
space; a thing that came or went puts those that it covers there, and only in one of the two directions.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.frames import PosedFrame

SIDE = 160  # pixels of a sketch's longer side, about
GRID = 24, 32  # points of a sketch that are looked at
OVERLAP = 60  # of these must fall on measurements of the other view, or the two say nothing about each other
MARGIN, RELATIVE_MARGIN = 0.1, 0.05  # metres, and share of the distance, that count as the same surface
FARTHEST = 100.0  # metres; more than a wrong scale makes of a room, less than what codes 'nothing'
NEIGHBOURS = 6  # kept views that a new one is compared with, those whose cameras are nearest
UPRIGHT, LATEST = 6, 20  # views from which it can be told where up is, and those that are asked
FACING = math.radians(25)  # what faces a direction
LEVEL = 20  # points of a view that face up, from which its camera's height is told
ALLIES = 2  # doubtful frames that must agree with another one until all three are believed
DOUBTFUL = 6  # of which so many are remembered
FEWEST = 3  # pairs of views that show what is wrong,
FITTING = 0.5  # by so much of what they share lying on the same surfaces
JUDGED = 12  # of so many frames, the last that could be compared,
HOPELESS = 5  # so many contradictions are a scene's, not a frame's

_OPTICAL = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], np.float64)  # in a body's axes, REP 103

# What is usually wrong where nothing fits: how the right pose follows from the one given, and the right depth.
Change = Callable[[NDArray[np.float64]], NDArray[np.float64]]
CAUSES: Mapping[str, tuple[Change, float]] = {
    "the poses are inverted (world to camera instead of camera to world)": (lambda pose: _inverse(pose), 1.0),
    "the poses are of a body (x forward), not of the camera's optical frame": (lambda pose: pose @ _OPTICAL, 1.0),
    **{
        f"depth is {1 / factor:g} times what it should be: its scale is wrong": (lambda pose: pose, factor)
        for factor in (0.1, 0.2, 0.5, 2.0, 5.0, 10.0)
    },
}


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a view to compare it with others.

    Attributes:
        near: (h, w) float32 least depth around a pixel, metres; inf where nothing was measured.
        K: (3, 3) pinhole matrix of `near`, pixels.
        xyz: (n, 3) float32 some of its points, camera optical frame, metres.
        normals: (m, 3) float32 unit normals of its surfaces, towards the camera, camera optical frame.
        pose: T_world_camera (4, 4).
    """

    near: NDArray[np.float32]
    K: NDArray[np.float64]
    xyz: NDArray[np.float32]
    normals: NDArray[np.float32]
    pose: NDArray[np.float64]

    @classmethod
    def of(cls, frame: PosedFrame) -> Sketch:
        """Every k-th pixel of a frame's depth."""
        depth, K = thinned(frame)
        points = _points(depth, K)
        near = np.asarray(cv2.erode(depth, np.ones((3, 3), np.uint8)), np.float32)
        known = np.isfinite(points[..., 0])
        normals = _normals(points).astype(np.float32)
        normals = normals[np.isfinite(normals[:, 0])]
        return cls(near, K, points[known].astype(np.float32), normals, frame.T_world_camera)

    def height(self) -> float:
        """Metres by which the camera is above what faces up, the median; NaN where hardly anything does."""
        points = _points(self.near, self.K)
        up, down = _normals(points) @ self.pose[2, :3], -(points[:-1, :-1].reshape(-1, 3) @ self.pose[2, :3])
        level = down[up > math.cos(FACING)]
        return float(np.median(level)) if len(level) >= LEVEL else math.nan

    def frame(self, stamp_ns: int) -> PosedFrame:
        """What is left of the frame: black, with the least depth around each pixel."""
        depth = np.where(np.isfinite(self.near), self.near, np.float32(np.nan))
        return PosedFrame(np.zeros((*depth.shape, 3), np.uint8), depth, self.K, self.pose, stamp_ns)


def thinned(frame: PosedFrame) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Every k-th pixel of a frame's depth, about `SIDE` on the longer side, metres, inf where nothing was measured; and
    the pinhole matrix (3, 3) of that picture."""
    step = max(1, round(max(frame.depth.shape) / SIDE))
    first = step // 2
    depth = frame.depth[first::step, first::step]
    depth = np.where((depth > 0) & (depth <= FARTHEST), depth, np.float32(np.inf))
    K = frame.K.copy()
    K[:2, 2] -= first
    K[:2] /= step
    return depth, K


def _points(depth: NDArray[np.float32], K: NDArray[np.float64]) -> NDArray[np.float64]:
    """A grid of points (h, w, 3) of a small depth image, camera optical frame, metres, NaN where it has none."""
    height, width = depth.shape
    rows = np.unique(np.linspace(0, height - 1, GRID[0]).round().astype(np.intp))
    cols = np.unique(np.linspace(0, width - 1, GRID[1]).round().astype(np.intp))
    z = depth[np.ix_(rows, cols)]
    x = (cols[None, :] - K[0, 2]) / K[0, 0]
    y = (rows[:, None] - K[1, 2]) / K[1, 1]
    return np.stack(np.broadcast_arrays(x, y, 1.0), axis=-1) * np.where(np.isfinite(z), z, np.nan)[..., None]


def _normals(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit normals (m, 3), towards the origin, of the triangles at the points (h, w, 3) of a grid but for its last row
    and column; NaN where there is none."""
    corner = points[:-1, :-1]
    normals = np.cross(points[1:, :-1] - corner, points[:-1, 1:] - corner).reshape(-1, 3)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / np.where(length > 0, length, np.nan)


def _inverse(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.inv(pose), np.float64)


class Comparison(NamedTuple):
    """What became of the points of two views that fall on measurements of the other.

    Attributes:
        before: share of those before or on what the other measured that lie clearly before it, the mean of both
            directions; NaN if all lie behind.
        on: share of all of them that lie on it.
    """

    before: float
    on: float


def compare(a: Sketch, b: Sketch, change: Change = lambda pose: pose, scale: float = 1.0) -> Comparison | None:
    """How two views fit; None where fewer than OVERLAP points of either fall on measurements of the other.

    Args:
        change: what is taken for the pose (4, 4) of a view, given the one that it has.
        scale: by what depths are multiplied before; margins are, too.
    """
    poses = change(a.pose), change(b.pose)
    shares, fitting = [], []
    for (view, T), (other, S) in permutations(zip((a, b), poses, strict=True), 2):
        to_other = np.linalg.inv(S) @ T
        moved = view.xyz @ to_other[:3, :3].T.astype(np.float32) + (to_other[:3, 3] / scale).astype(np.float32)
        moved = moved[moved[:, 2] > MARGIN]
        z = moved[:, 2]
        u = np.rint(other.K[0, 0] * moved[:, 0] / z + other.K[0, 2])
        v = np.rint(other.K[1, 1] * moved[:, 1] / z + other.K[1, 2])
        height, width = other.near.shape
        inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
        measured = other.near[v[inside].astype(np.intp), u[inside].astype(np.intp)]
        known = np.isfinite(measured)
        if known.sum() < OVERLAP:
            return None
        behind = z[inside][known] - measured[known]
        margin = MARGIN + RELATIVE_MARGIN * measured[known]
        before, on = int((behind < -margin).sum()), int((np.abs(behind) <= margin).sum())
        fitting.append(on / len(behind))
        if before + on:
            shares.append(before / (before + on))
    return Comparison(float(np.mean(shares)) if shares else math.nan, float(np.mean(fitting)))


def contradiction(a: Sketch, b: Sketch) -> float:
    """`Comparison.before` of two views; NaN where they cannot be compared."""
    found = compare(a, b)
    return math.nan if found is None else found.before


@dataclass(eq=False)
class Agreement:
    """Which frames are believed, by what the kept views show; and what is wrong if hardly any can be.

    A frame that contradicts its neighbours (by the median) waits for others that agree with it. So do they; when there
    are enough of them, they are believed, and the views that they contradict are `outvoted`. A kept view that more
    later views contradict than confirm is outvoted, too.

    Args:
        limit: share of contradiction above which two views do not agree; 0: every frame is believed, and the sketches
            only tell what was looked at from where, when views move or come from a file.
        highest: metres that cameras may be above what faces up, or depth is wrong; 0: any number.

    Attributes:
        outvoted: stamps of kept views that should go.
    """

    limit: float
    highest: float = 0.0
    outvoted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._views: dict[int, Sketch] = {}
        self._heights: dict[int, float] = {}  # of the latest, see `Sketch.height`
        self._doubtful: deque[Sketch] = deque(maxlen=DOUBTFUL)
        self._votes: Counter[int] = Counter()
        self._judged: deque[bool] = deque(maxlen=JUDGED)
        self._case: tuple[int, Sketch, dict[int, float], list[Sketch]] | None = None
        self.outvoted.clear()
        self._contradiction = self._cause = self._tilt = self._scale = ""
        self._until_search, self._between = 0, 1  # frames until a cause is looked for, and to the next time

    @property
    def problem(self) -> str:
        """What is wrong with the whole scene, in words; empty while enough fits."""
        return self._contradiction or self._tilt or self._scale

    def believes(self, frame: PosedFrame) -> bool:
        """Whether the frame agrees with the kept views near it, or with enough frames that were doubted before."""
        if not self.limit:
            return True
        sketch = Sketch.of(frame)
        found = self._compared(sketch)
        self._case = frame.stamp_ns, sketch, found, []
        if self._agrees(found):
            return True
        allies = [other for other in self._doubtful if contradiction(sketch, other) <= self.limit]
        if len(allies) >= min(ALLIES, sum(value > self.limit for value in found.values())):
            self._case = frame.stamp_ns, sketch, found, [sketch, *allies]
            return True
        self._doubtful.append(sketch)
        return False

    def fits(self, frame: PosedFrame, same: Collection[int] = ()) -> bool:
        """Whether a frame that is to be no view agrees with those near it; looked at while there is a `problem` alone,
        so that it ends when frames are right again.

        Args:
            same: stamps of views from the same place: with these it agrees however wrong its pose is.
        """
        if not self.problem:
            return True
        found = self._compared(Sketch.of(frame))
        return self._agrees({stamp: value for stamp, value in found.items() if stamp not in same})

    def _compared(self, sketch: Sketch) -> dict[int, float]:
        """Contradictions of the neighbours that it can be compared with, by stamp."""
        found = {stamp: contradiction(sketch, self._views[stamp]) for stamp in self._neighbours(sketch)}
        return {stamp: value for stamp, value in found.items() if not math.isnan(value)}

    def _agrees(self, found: Mapping[int, float]) -> bool:
        """Whether most of what was `_compared` agrees, which is noted; of nothing, nothing is."""
        if not found:
            return True
        agrees = float(np.median(list(found.values()))) <= self.limit
        self._judge(agrees)
        return agrees

    def keep(self, frame: PosedFrame) -> None:
        """The frame, which has been believed, is a view from now on; it votes on those that it was compared with."""
        if not self.limit:
            self._views[frame.stamp_ns] = Sketch.of(frame)
            return
        if self._case is None or self._case[0] != frame.stamp_ns:
            self._case = frame.stamp_ns, Sketch.of(frame), {}, []
        stamp, sketch, found, winners = self._case
        self._case = None
        for other, value in found.items():
            if other in self._views:
                self._votes[other] += 1 if value <= self.limit else -1
                if value > self.limit and self._votes[other] <= -ALLIES:
                    self.outvoted.add(other)
        if winners:
            self._doubtful.clear()
            for other, view in self._views.items():
                values = [contradiction(winner, view) for winner in winners]
                if sum(value > self.limit for value in values) > sum(value <= self.limit for value in values):
                    self.outvoted.add(other)
        self._views[stamp] = sketch
        self._look_at_all()

    def drop(self, stamp_ns: int) -> None:
        """The view is kept no more."""
        if self._views.pop(stamp_ns, None) is None:
            return
        self._votes.pop(stamp_ns, None)
        self.outvoted.discard(stamp_ns)
        self._look_at_all()

    def _look_at_all(self) -> None:
        """What can be wrong although no two views contradict each other."""
        latest = list(self._views)[-LATEST:] if self.limit else []
        self._heights = {s: self._heights[s] if s in self._heights else self._views[s].height() for s in latest}
        self._tilt = tilt([self._views[stamp] for stamp in latest])
        self._scale = too_high(list(self._heights.values()), self.highest)

    @property
    def nbytes(self) -> int:
        """Of all sketches."""
        return sum(s.near.nbytes + s.xyz.nbytes + s.normals.nbytes for s in (*self._views.values(), *self._doubtful))

    def sketches(self) -> dict[int, Sketch]:
        """Of the kept views, by stamp."""
        return dict(self._views)

    def restore(self, sketches: Mapping[int, Sketch]) -> None:
        """Forgets everything else than these sketches of kept views."""
        self.clear()
        self._views.update(sketches)
        self._look_at_all()

    def move(self, poses: Mapping[int, NDArray[np.float64]]) -> None:
        """Kept views were taken from elsewhere, {stamp: T_world_camera}; what doubted their old places is forgotten."""
        moved = {stamp: replace(self._views[stamp], pose=T) for stamp, T in poses.items() if stamp in self._views}
        self.restore({**self._views, **moved})

    def _neighbours(self, sketch: Sketch) -> list[int]:
        """Stamps of the views that were taken from near by in about that direction, a metre being worth 90 degrees."""

        def away(stamp: int) -> float:
            pose = self._views[stamp].pose
            turned = 1.0 - float(pose[:3, 2] @ sketch.pose[:3, 2])
            return float(np.linalg.norm(pose[:3, 3] - sketch.pose[:3, 3])) + turned

        return sorted(self._views, key=away)[:NEIGHBOURS]

    def _judge(self, agrees: bool) -> None:
        self._judged.append(agrees)
        wrong = self._judged.count(False)
        if wrong < HOPELESS or wrong * 2 < len(self._judged):
            self._contradiction = self._cause = ""
            self._until_search, self._between = 0, 1
            return
        # A search costs as much as hundreds of comparisons: soon again while there are few frames, then seldom.
        if not self._cause and self._until_search <= 0:
            self._cause = likely_cause([*list(self._views.values())[-NEIGHBOURS:], *self._doubtful], self.limit)
            self._until_search, self._between = self._between, min(2 * self._between, JUDGED)
        self._until_search -= 1
        self._contradiction = (
            f"views do not agree: {wrong} of the last {len(self._judged)} frames have surfaces in front of what others "
            f"measured there; {self._cause or 'poses or depth are wrong'}"
        )


def likely_cause(sketches: Iterable[Sketch], limit: float) -> str:
    """Which of CAUSES makes most of what the views share lie on the same surfaces; empty where none does."""
    views = list(sketches)
    best, found = FITTING, ""
    for cause, (change, scale) in CAUSES.items():
        pairs = [compare(a, b, change, scale) for i, a in enumerate(views) for b in views[:i]]
        compared = [pair for pair in pairs if pair is not None and not math.isnan(pair.before)]
        if len(compared) >= FEWEST and np.mean([pair.before for pair in compared]) < limit:
            fitting = float(np.mean([pair.on for pair in compared]))
            if fitting > best:
                best, found = fitting, cause
    return found and f"probably {found}"


def tilt(sketches: Iterable[Sketch]) -> str:
    """Where up seems to be if it is not z, in words; empty where z can be up, or too little is seen to tell.

    That is the axis that most surfaces face (a floor, tops of things) of those towards which the pictures' up points on
    the average: cameras are held upright, more or less. It must be faced by half as many as z at least, which a camera
    that looks down from above sees.
    """
    views = list(sketches)
    if len(views) < UPRIGHT:
        return ""
    upright = -np.mean([view.pose[:3, 1] for view in views], axis=0)
    normals = np.concatenate([view.normals @ view.pose[:3, :3].T.astype(np.float32) for view in views])
    axes = [(sign, axis) for axis in range(3) for sign in (1, -1)]
    facing = {(s, i): float((s * normals[:, i] > math.cos(FACING)).mean()) if len(normals) else 0.0 for s, i in axes}
    sign, axis = max(
        (found for found in axes if found[0] * upright[found[1]] > 0.4), key=facing.__getitem__, default=(1, 2)
    )
    if upright[2] > 0.4 or facing[sign, axis] < max(0.1, facing[1, 2] / 2):
        return ""
    return f"the scene frame's z is not up: {'+-'[sign < 0]}{'xyz'[axis]} seems to be"


def too_high(heights: Sequence[float], highest: float) -> str:
    """That cameras seem to be higher above the floor than they can be, in words; empty where they are not, or too few
    tell. Where a camera only turns, no two views tell a wrong scale.

    Args:
        heights: of views, metres; NaN where one tells nothing. highest: metres; 0: any height can be.
    """
    known = [height for height in heights if not math.isnan(height)]
    if not highest or len(known) < UPRIGHT or (height := float(np.median(known))) <= highest:
        return ""
    return (
        f"the floor seems to be {height:.1f} m below the camera, more than {highest:g} m: "
        "probably depth is some times what it should be: its scale is wrong"
    )
