# SPDX-License-Identifier: Apache-2.0
"""Which frames are worth encoding, and which view goes when there are too many."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import sample_pixels
from adatoken3d_ros.scene.patches import PatchConfig, valid_depth


class Verdict(str, Enum):
    """What became of a frame."""

    KEY_FRAME = "key_frame"
    DUPLICATE_STAMP = "duplicate_stamp"
    TOO_SIMILAR = "too_similar"
    NO_DEPTH = "no_depth"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class KeyFrameConfig:
    """When a frame adds to the scene.

    Attributes:
        min_translation: metres. min_rotation: degrees. A frame is new if it differs by one of them from each kept view.
        max_views: views that are kept.
    """

    min_translation: float = 0.15
    min_rotation: float = 10.0
    max_views: int = 20

    def __post_init__(self) -> None:
        if not self.min_translation >= 0 or not 0 <= self.min_rotation <= 180:
            raise ValueError(
                f"min_translation {self.min_translation} m or min_rotation {self.min_rotation} deg is invalid"
            )
        if self.max_views < 1:
            raise ValueError(f"max_views {self.max_views} must be at least 1")


class KeyFrameSelector:
    """Picks key frames by pose change.

    `decide` changes nothing; a view is kept from `accepted` on. Over `max_views`, `evict` names the view with the
    oldest stamp: it is the one most likely to show a scene that has changed.
    """

    # No stamp among so many of the last accepted ones is encoded twice, whether its view is still kept or not.
    REMEMBERED_STAMPS = 4096

    def __init__(self, config: KeyFrameConfig | None = None, patches: PatchConfig | None = None) -> None:
        self.config = config or KeyFrameConfig()
        self._patches = patches or PatchConfig()
        self.clear()

    def clear(self) -> None:
        """Forget all views and stamps (a new scene, or time jumped back)."""
        self._views: dict[int, NDArray[np.float64]] = {}
        self._stamps: deque[int] = deque(maxlen=self.REMEMBERED_STAMPS)

    def __len__(self) -> int:
        return len(self._views)

    def stamps(self) -> tuple[int, ...]:
        """Stamps of the kept views, ascending, nanoseconds."""
        return tuple(sorted(self._views))

    def decide(self, frame: PosedFrame) -> Verdict:
        """Whether to encode the frame; looks only at its stamp, its pose and the sampled pixels' depth."""
        if frame.stamp_ns in self._stamps:
            return Verdict.DUPLICATE_STAMP
        if any(self._similar(frame.T_world_camera, pose) for pose in self._views.values()):
            return Verdict.TOO_SIMILAR
        height, width = frame.depth.shape
        rows, cols = sample_pixels(width, height, self._patches.image_size, self._patches.grid)
        if not valid_depth(frame.depth[np.ix_(rows, cols)], self._patches.max_depth).any():
            return Verdict.NO_DEPTH
        return Verdict.KEY_FRAME

    def accepted(self, frame: PosedFrame) -> None:
        """The frame is a view from now on.

        Raises:
            ValueError: if a frame of this stamp was accepted before.
        """
        if frame.stamp_ns in self._stamps:
            raise ValueError(f"a frame with stamp {frame.stamp_ns} ns was accepted before")
        self._views[frame.stamp_ns] = frame.T_world_camera
        self._stamps.append(frame.stamp_ns)

    def evict(self) -> int | None:
        """Drop the view with the oldest stamp if there are more than `max_views` and return its stamp, else None."""
        if len(self._views) <= self.config.max_views:
            return None
        oldest = min(self._views)
        del self._views[oldest]
        return oldest

    def _similar(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
        if np.linalg.norm(a[:3, 3] - b[:3, 3]) >= self.config.min_translation:
            return False
        return rotation_angle(a, b) < self.config.min_rotation


def rotation_angle(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Degrees between the rotations of two (4, 4) poses: |R_a - R_b| = 2 sqrt(2) sin(angle / 2) (Frobenius norm)."""
    chord = float(np.linalg.norm(a[:3, :3] - b[:3, :3])) / (2.0 * math.sqrt(2.0))
    return math.degrees(2.0 * math.asin(min(1.0, chord)))
