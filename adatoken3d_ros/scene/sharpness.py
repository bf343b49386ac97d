# SPDX-License-Identifier: Apache-2.0
"""Whether a picture is blurred by motion, compared with those that came before it."""

from __future__ import annotations

from collections import deque
from statistics import median

import cv2
import numpy as np
from numpy.typing import NDArray

LINES = 240  # pictures are looked at with about so many
RECENT = 10.0  # seconds; older pictures show something else
MOST = 15  # pictures that one is compared with
LEAST = 3  # pictures; fewer say nothing
MOMENT_NS = 1_000_000  # no camera takes pictures closer together: such are drawn of one cloud, in several directions


def sharpness(rgb: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of an image (H, W, 3) uint8 over its own variance: its mean squared frequency.

    Blur takes the high frequencies and leaves most of the variance. Dividing makes a picture of a bare wall comparable
    with one of a bookshelf.
    """
    step = max(1, min(rgb.shape[:2]) // LINES)
    grey = np.ascontiguousarray(rgb[::step, ::step, 1])
    edges = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1].item() ** 2
    return float(edges / (cv2.meanStdDev(grey)[1].item() ** 2 + 1.0))


class BlurFilter:
    """Says of a frame that would be kept whether a sharper one should be waited for.

    Not where several pictures are of one moment: they are drawn, nothing moved while they were taken, and what each of
    them shows differs so much that none can be called blurred by another.

    Args:
        least: share of the recent pictures' median sharpness below which a picture is blurred; 0: none is.
        wait: seconds that the wait for a sharper one may take, by the stamps.
    """

    def __init__(self, least: float, wait: float) -> None:
        self._least = least
        self._wait = wait
        self.clear()

    def clear(self) -> None:
        """Forget the recent pictures."""
        self._recent: deque[tuple[int, float]] = deque(maxlen=MOST)
        self._came: deque[int] = deque(maxlen=MOST)
        self._since: int | None = None

    def expect(self, stamp_ns: int) -> None:
        """A picture has come, whether it is looked at or not: when will the next one?"""
        if self._came and stamp_ns < self._came[-1]:
            self.clear()
        if not self._came or stamp_ns > self._came[-1]:
            self._came.append(stamp_ns)

    def look(self, rgb: NDArray[np.uint8], stamp_ns: int) -> None:
        """Remembers how sharp the picture (H, W, 3) is; to be called with each that comes."""
        if not self._least:
            return
        self.expect(stamp_ns)
        if not self._recent or stamp_ns > self._recent[-1][0]:
            self._recent.append((stamp_ns, sharpness(rgb)))
        while self._recent[-1][0] - self._recent[0][0] > RECENT * 1e9:
            self._recent.popleft()

    def better_waits(self) -> bool:
        """Whether the picture that was looked at last, the newest, is blurred and the next one will come in time."""
        between = np.diff(self._came)
        if len(self._recent) <= LEAST or between.min() < MOMENT_NS:
            return False
        values = [value for _, value in self._recent]
        if values[-1] >= self._least * median(values[:-1]):
            return False
        now = self._came[-1]
        since = now if self._since is None else self._since
        next_one = now + median(between.tolist())
        if next_one - since > self._wait * 1e9:
            return False
        self._since = since
        return True

    def settled(self) -> None:
        """Nothing is waited for: a frame was kept, or the last one was not wanted anyway."""
        self._since = None
