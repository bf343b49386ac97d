# SPDX-License-Identifier: Apache-2.0
"""What an answer rests on: places of the scene, with when they were seen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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
