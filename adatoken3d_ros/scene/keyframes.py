# SPDX-License-Identifier: Apache-2.0
"""Which frames are worth encoding, and which view goes when there are too many."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.agreement import Agreement, Sketch
from adatoken3d_ros.scene.carving import CarvingConfig, seen_through
from adatoken3d_ros.scene.coverage import Coverage
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import sample_pixels
from adatoken3d_ros.scene.patches import PatchConfig, patch_points, valid_depth
from adatoken3d_ros.scene.sharpness import MOMENT_NS, BlurFilter
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.settings import BY_NAME, OF_CHOSEN_FRAMES

FILLED = 3  # patches that a voxel counts for in which something came up
NOISE = 0.25  # of a voxel's side, by which a measurement may be off


class Verdict(str, Enum):
    """What became of a frame."""

    KEY_FRAME = "key_frame"
    DUPLICATE_STAMP = "duplicate_stamp"
    TOO_SIMILAR = "too_similar"
    NOTHING_NEW = "nothing_new"
    BLURRED = "blurred"
    NO_DEPTH = "no_depth"
    DISAGREES = "disagrees"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class KeyFrameConfig:
    """When a frame adds to the scene, and which views go: the settings `scene.*` of the same names say what each means.

    Attributes:
        max_age: with a limit, views from before stamps jumped back go, too.
        carving: when something that was there has gone; None: nothing ever does.
    """

    min_translation: float = OF_CHOSEN_FRAMES["scene.min_translation"]
    min_rotation: float = OF_CHOSEN_FRAMES["scene.min_rotation"]
    max_views: int = OF_CHOSEN_FRAMES["scene.max_views"]
    max_voxels: int = OF_CHOSEN_FRAMES["scene.max_voxels"]
    near: float = OF_CHOSEN_FRAMES["scene.near"]
    far: float = OF_CHOSEN_FRAMES["scene.far"]
    max_age: float = OF_CHOSEN_FRAMES["scene.max_age"]
    min_gain: float = OF_CHOSEN_FRAMES["scene.min_gain"]
    min_sharpness: float = OF_CHOSEN_FRAMES["scene.min_sharpness"]
    sharpness_wait: float = OF_CHOSEN_FRAMES["scene.sharpness_wait"]
    change_interval: float = OF_CHOSEN_FRAMES["scene.change_interval"]
    min_change: int = OF_CHOSEN_FRAMES["scene.min_change"]
    max_disagreement: float = OF_CHOSEN_FRAMES["scene.max_disagreement"]
    max_height: float = OF_CHOSEN_FRAMES["scene.max_height"]
    carving: CarvingConfig | None = field(default_factory=CarvingConfig)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "carving" and (problem := BY_NAME[f"scene.{name}"].problem(value)):
                raise ValueError(problem)


class _View(NamedTuple):
    order: int
    T_world_camera: NDArray[np.float64]


class KeyFrameSelector:
    """Picks key frames: sharp ones from a new place that show something new, or from any place that has changed, and
    that do not contradict what is known (`scene.agreement`).

    `decide` keeps no view; one is kept from `accepted` on.

    `evict` names views that go, the first of these that there is: one that is too far away, too old or outvoted,
    the oldest first; over `max_views` or `max_voxels` in the map the one of these that is missed least, that of
    least worth, of equal ones the oldest. A view's worth is the number of voxels that no other view holds, divided
    by 1 + d / `near` for a camera d metres away from the newest one: without that, a robot that drives on would
    keep where it came from and forget where it is, because neighbouring views show much the same. The newest view
    always stays, or a robot in a room that it knows would encode the same place again and again. Views that wait to
    be encoded are for the caller to bound: the encoded ones, of which the scene consists, do not go for them. The
    newest view is the one that was accepted last, not the one with the greatest stamp: time may jump back.

    Args:
        config: thresholds. patches: where depth is looked at.
        token_map: what has been seen. Without one, no change is noticed and the oldest view goes.
        came_up: how many free voxels are filled by a thing that a frame shows; of `FILLED` patches each, as a change.

    Attributes:
        confirmed: stamp of the last frame that agreed with the map, nanoseconds; None if there was none since the last
            view was accepted.
    """

    # No stamp among so many of the last accepted ones is encoded twice, whether its view is still kept or not.
    REMEMBERED_STAMPS = 4096

    def __init__(
        self,
        config: KeyFrameConfig | None = None,
        patches: PatchConfig | None = None,
        token_map: TokenMap | None = None,
        came_up: Callable[[PosedFrame], int] | None = None,
    ) -> None:
        self._came_up = came_up
        self.config = config or KeyFrameConfig()
        self._patches = patches or PatchConfig()
        self._map = token_map
        self._blur = BlurFilter(self.config.min_sharpness, self.config.sharpness_wait)
        self._agreement = Agreement(self.config.max_disagreement, self.config.max_height)
        self.clear()

    def clear(self) -> None:
        """Forget all views and stamps (a new scene, or time jumped back)."""
        self._views: dict[int, _View] = {}  # by stamp, in the order of arrival
        self._arrived = 0
        self._stamps: deque[int] = deque(maxlen=self.REMEMBERED_STAMPS)
        self.confirmed: int | None = None
        self._looked: int | None = None  # stamp of the last frame in which a change was looked for, or that was kept
        self._blur.clear()
        self._agreement.clear()

    @property
    def contradiction(self) -> str:
        """What is wrong where most of the latest frames contradict each other, in words; empty where they do not."""
        return self._agreement.problem

    def __len__(self) -> int:
        return len(self._views)

    def stamps(self) -> tuple[int, ...]:
        """Stamps of the kept views in the order of their arrival, nanoseconds."""
        return tuple(self._views)

    def order(self, stamp_ns: int) -> int:
        """How many views had been accepted before this one, which is kept."""
        return self._views[stamp_ns].order

    @property
    def arrived(self) -> int:
        """How many views were accepted: the next one's order."""
        return self._arrived

    def poses(self) -> dict[int, NDArray[np.float64]]:
        """{stamp: T_world_camera} of the kept views in the order of their arrival."""
        return {stamp: view.T_world_camera for stamp, view in self._views.items()}

    def sketches(self) -> dict[int, Sketch]:
        """By stamp, of the kept views that have one: by what a new frame is judged."""
        return self._agreement.sketches()

    @property
    def nbytes(self) -> int:
        """Of the sketches."""
        return self._agreement.nbytes

    def restore(
        self,
        poses: Mapping[int, NDArray[np.float64]],
        sketches: Mapping[int, Sketch] | None = None,
        confirmed: int | None = None,
    ) -> None:
        """Replaces the views by these {stamp: T_world_camera}, oldest first, with their sketches, and `confirmed`."""
        self.clear()
        self.confirmed = confirmed
        for stamp, pose in poses.items():
            self._keep(stamp, pose)
        self._agreement.restore(sketches or {})

    def move(self, poses: Mapping[int, NDArray[np.float64]]) -> None:
        """Kept views were taken from elsewhere than was believed, {stamp: T_world_camera}."""
        for stamp, pose in poses.items():
            self._views[stamp] = self._views[stamp]._replace(T_world_camera=pose)
        self._agreement.move(poses)

    def announce(self, stamp_ns: int, T_world_camera: NDArray[np.float64]) -> Verdict | None:
        """A frame has arrived with this stamp and pose (4, 4): the verdict where they decide, None: it has to be seen.

        The stamp is noted even then: by these it is known how soon a sharper frame may come.
        """
        if stamp_ns in self._stamps:
            return Verdict.DUPLICATE_STAMP
        self._blur.expect(stamp_ns)
        if self._is_known(T_world_camera) and not self._looks_for_changes(stamp_ns):
            return Verdict.TOO_SIMILAR
        return None

    def decide(self, frame: PosedFrame) -> Verdict:
        """Whether to encode the frame; looks at its stamp, its pose, its depth, what it shows, and its sharpness."""
        if frame.stamp_ns in self._stamps:
            return Verdict.DUPLICATE_STAMP
        self._blur.look(frame.rgb, frame.stamp_ns)
        looked = self._looked
        verdict = self._wanted(frame)
        if verdict != Verdict.KEY_FRAME:
            self._blur.settled()
        elif self._blur.better_waits():
            self._looked = looked  # the sharper frame shows the change, too
            return Verdict.BLURRED
        return verdict

    def _wanted(self, frame: PosedFrame) -> Verdict:
        """The verdict on a frame that is as sharp as can be."""
        similar = self._is_known(frame.T_world_camera)
        if similar and not self._changed(frame):
            return Verdict.TOO_SIMILAR
        height, width = frame.depth.shape
        rows, cols = sample_pixels(width, height, self._patches.geometry)
        if not valid_depth(frame.depth[np.ix_(rows, cols)], self._patches.max_depth).any():
            return Verdict.NO_DEPTH
        # Where what is known is wrong, nothing new has to be shown to mend it.
        known = not similar and not self.contradiction and self._gain(frame) < self.config.min_gain
        if known and not self._changed(frame):
            self.confirmed = frame.stamp_ns
            return Verdict.NOTHING_NEW
        return Verdict.KEY_FRAME if self._agreement.believes(frame) else Verdict.DISAGREES

    def accepted(self, frame: PosedFrame) -> None:
        """The frame is a view from now on.

        Raises:
            ValueError: if a frame of this stamp was accepted before.
        """
        if frame.stamp_ns in self._stamps:
            raise ValueError(f"a frame with stamp {frame.stamp_ns} ns was accepted before")
        self._keep(frame.stamp_ns, frame.T_world_camera)
        self._agreement.keep(frame)
        self._looked, self.confirmed = frame.stamp_ns, None
        self._blur.settled()

    def _keep(self, stamp_ns: int, T_world_camera: NDArray[np.float64]) -> None:
        self._views[stamp_ns] = _View(self._arrived, T_world_camera)
        self._arrived += 1
        self._stamps.append(stamp_ns)

    def forget(self, stamp_ns: int) -> None:
        """The view cannot be used; its place is new again, its stamp is not."""
        self._views.pop(stamp_ns, None)
        self._agreement.drop(stamp_ns)

    def evict(self, held: Coverage | None = None, *, full: bool = False) -> int | None:
        """Drop the view that is missed least if there are too many and return its stamp, else None.

        The caller takes it out of the map before it asks again; or out of `held`, the map's coverage, if that is given:
        then the map may follow when all is decided. `full`: there are too many, but for the newest.
        """
        if not self._views:
            return None
        *others, newest = self._views
        places = np.array([view.T_world_camera[:3, 3] for view in self._views.values()])
        away = dict(zip(others, np.linalg.norm(places[:-1] - places[-1], axis=1).tolist(), strict=True))
        max_age = (self.config.max_age or math.inf) * 1e9
        for stamp in others:
            # An older view with a later stamp is from before time jumped back: nobody knows how old it is.
            too_old = math.isfinite(max_age) and not 0 <= newest - stamp <= max_age
            if away[stamp] > (self.config.far or math.inf) or too_old or stamp in self._agreement.outvoted:
                self.forget(stamp)
                return stamp
        scene = self._map if held is None else held
        crowded = full or (scene is not None and scene.n_voxels > self.config.max_voxels)
        if len(self._views if scene is None else scene) <= (1 if crowded else self.config.max_views):
            return None
        exclusive = dict.fromkeys(self._views, 0) if scene is None else scene.exclusive()
        encoded = [stamp for stamp in others if stamp in exclusive]
        least = min(encoded, key=lambda stamp: exclusive[stamp] / (1.0 + away[stamp] / self.config.near))
        self.forget(least)
        return least

    def _changed(self, frame: PosedFrame) -> bool:
        """Whether the frame shows a scene that is not the one in the map, looked at once in `change_interval`."""
        token_map = self._map
        if token_map is None or not self._looks_for_changes(frame.stamp_ns):
            return False
        self._looked = frame.stamp_ns
        points = patch_points(frame, self._patches)
        new = int((~token_map.near_occupied(points.xyz[points.valid])).sum()) if points.valid.any() else 0
        gone = 0
        if new < self.config.min_change and self.config.carving is not None:
            through = seen_through(frame, token_map.centres(), token_map.voxel_size, self.config.carving)
            gone = int(through.sum())
        changed = max(new, gone) >= self.config.min_change
        if not changed and self._came_up is not None:
            changed = FILLED * self._came_up(frame) >= self.config.min_change
        if points.valid.any() and not changed and self._agreement.fits(frame, self._near(frame.T_world_camera)):
            self.confirmed = frame.stamp_ns
        return changed

    def _gain(self, frame: PosedFrame) -> float:
        """Share of the frame's patches that lie where nothing was seen yet; 1 while there is nothing to compare.

        Beside a surface that was seen is where nothing was seen: only what noise may have moved over a voxel's side
        counts as seen.
        """
        token_map = self._map
        if not self.config.min_gain or token_map is None or not token_map.n_voxels:
            return 1.0
        points = patch_points(frame, self._patches)
        seen = token_map.holds(points.xyz[points.valid], token_map.voxel_size * NOISE)
        return float((~seen).double().mean())

    def _looks_for_changes(self, stamp_ns: int) -> bool:
        """Whether it is time to look, and there is a scene that can have changed."""
        if self._map is None or not self._map.n_voxels:
            return False
        if self._looked is None:
            return True
        since = stamp_ns - self._looked
        # What is drawn of one cloud in several directions is looked at in each.
        return 0 < since < MOMENT_NS or not 0 <= since < self.config.change_interval * 1e9

    def _is_known(self, T_world_camera: NDArray[np.float64]) -> bool:
        """Whether a kept view was taken from about there."""
        return bool(self._near(T_world_camera))

    def _near(self, T_world_camera: NDArray[np.float64]) -> set[int]:
        """Stamps of the kept views from about there."""
        return {stamp for stamp, v in self._views.items() if self._similar(T_world_camera, v.T_world_camera)}

    def _similar(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
        if np.linalg.norm(a[:3, 3] - b[:3, 3]) >= self.config.min_translation:
            return False
        return rotation_angle(a, b) < self.config.min_rotation


def rotation_angle(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Degrees between the rotations of two (4, 4) poses: |R_a - R_b| = 2 sqrt(2) sin(angle / 2) (Frobenius norm)."""
    chord = float(np.linalg.norm(a[:3, :3] - b[:3, :3])) / (2.0 * math.sqrt(2.0))
    return math.degrees(2.0 * math.asin(min(1.0, chord)))
