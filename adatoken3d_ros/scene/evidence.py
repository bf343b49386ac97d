# SPDX-License-Identifier: Apache-2.0
"""What an answer rests on: places of the scene, with when they were seen.

The tokens that contributed most, which hold `ENOUGH` of what the answer drew from the scene, are brought together where
they touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.proposals import clusters

EDGE = 0.25  # metres; tokens in neighbouring cubes of this edge touch
ENOUGH = 0.5  # share of the contribution
MOST_TOKENS = 48
MOST = 5  # pieces of evidence

Triple = tuple[float, float, float]


class Observed(IntEnum):
    """What is known of what was asked about; the numbers are those of adatoken3d/msg/Answer."""

    UNKNOWN = 0
    SEEN = 1
    SEEN_THEN_GONE = 2
    NOT_OBSERVED = 3


@dataclass(frozen=True)
class Evidence:
    """A place that an answer rests on, or one where what was asked about has been.

    Attributes:
        place: middle of the axis-aligned box around it, scene frame, metres. extent: its edge lengths, metres.
        first_ns, last_ns: acquisition times of the first and of the newest frame that show it.
        views: how many views show it.
        contribution: share of what the answer drew from the scene; 0 for what has gone, NaN where it was not measured.
        gone_ns: acquisition time of the frame that looked through its place; 0 while it is there.
        moved_to: where the like was found soon after it had gone, scene frame, metres. moved_confidence: 0 to 1.
    """

    place: Triple
    extent: Triple
    first_ns: int
    last_ns: int
    views: int
    contribution: float
    gone_ns: int = 0
    moved_to: Triple | None = None
    moved_confidence: float = 0.0


@dataclass(frozen=True, eq=False)
class Cluster:
    """Tokens that touch: their rows, the share of the contribution that they hold, and the box around them, metres."""

    rows: NDArray[np.int64]
    contribution: float
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def gather(
    xyz: NDArray[np.floating], contribution: NDArray[np.floating], retained: NDArray[np.bool_] | None = None
) -> list[Cluster]:
    """Where the tokens (N, 3), scene frame, metres, lie that contributed most, at most `MOST` places.

    Args:
        contribution: (N,) of each, 0 or more. retained: (N,) which may count; None: all.

    Returns:
        The places of most contribution first; none where nothing was measured.
    """
    share = np.asarray(contribution, np.float64)
    total = share.sum()
    if not total > 0:
        return []
    share = share / total
    share = np.where(retained, share, 0.0) if retained is not None else share
    order = np.argsort(-share, kind="stable")[:MOST_TOKENS]
    order = order[share[order] > 0]
    order = order[: int(np.searchsorted(share[order].cumsum(), ENOUGH * share.sum())) + 1]
    found = []
    for part in clusters(np.floor(np.asarray(xyz)[order] / EDGE).astype(np.int64)):
        rows = order[part]
        points = np.asarray(xyz, np.float64)[rows]
        found.append(Cluster(rows, float(share[rows].sum()), points.min(axis=0), points.max(axis=0)))
    return sorted(found, key=lambda cluster: -cluster.contribution)[:MOST]
