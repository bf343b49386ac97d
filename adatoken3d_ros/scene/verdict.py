# SPDX-License-Identifier: Apache-2.0
"""What is known of what was asked about, by where the scene was looked at and what is there: see docs/memory.md.

A question about a place asks for the state of that place. A question in words is about the places that the model's
answer rests on: it is asked once more as if nothing had gone, and what has gone and would have been drawn on more than
all that is there is what was asked about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.scene.evidence import Cluster, Observed
from adatoken3d_ros.scene.occupancy import VOXEL, Occupancy, State
from adatoken3d_ros.scene.tombstones import Thing, Tombstones

REACH = 0.25  # metres; a point belongs to what is so near to it
LOOKED = 0.5  # share of a place that must have been seen, or nobody has looked there
STANDS_OUT = 0.12  # of the contribution: so much makes a place the one that is asked about
NAMED = (2.75, 1.54, 1.89)  # of `stands_out`: always, for the confidence, for the share
WHOLE = 0.95  # coverage of a scene that was seen

MOSTLY = 0.5  # of the voxels around a place that were occupied, so many must be free: it has gone

_MIDDLE = 13  # of the 27 around a voxel
_AROUND = np.stack(np.meshgrid(*[np.arange(-1, 2) * VOXEL] * 3, indexing="ij"), axis=-1).reshape(-1, 3)

Judgement = tuple[Observed, str, Thing | None]


def of_place(
    occupancy: Occupancy, tombstones: Tombstones, point: NDArray[np.float64], emptied: bool = False
) -> Judgement:
    """Of a point (3,), scene frame, metres: verdict, reason, and what has gone from there.

    Args:
        emptied: no view shows anything in the point's voxel of the token map.
    """
    around = point + _AROUND
    states, near = occupancy.states(around), np.linalg.norm(around - point, axis=1) <= REACH
    state = states[_MIDDLE]
    gone = next(iter(tombstones.within(point - REACH / 2, point + REACH / 2)), None)
    first = occupancy.stamp_of(int(occupancy.look_numbers(point[None], "first")[0]))
    if emptied and gone is not None and first <= gone.last_ns and _beside(gone, point):
        # A voxel that also holds what stands behind does not get free.
        return Observed.SEEN_THEN_GONE, _gone(gone), gone
    if state == State.OCCUPIED:
        return Observed.SEEN, "something is at the place", None
    if gone is not None and first <= gone.gone_ns:
        return Observed.SEEN_THEN_GONE, _gone(gone), gone
    was = near & (occupancy.look_numbers(around, "hit") > 0)
    if state == State.FREE and was[_MIDDLE] and (states[was] == State.FREE).mean() >= MOSTLY:
        thing = _emptied(occupancy, around[was & (states == State.FREE)])
        # A thing of which tokens are left to remember it by may have been larger than they say.
        known = tombstones.within(thing.low - VOXEL, thing.high + VOXEL)
        thing = next((other for other in known if other.last_ns >= thing.first_ns), thing)
        return Observed.SEEN_THEN_GONE, _gone(thing), thing
    unseen = (states != State.UNSEEN).mean() < LOOKED
    if state == State.UNSEEN and unseen:
        return Observed.NOT_OBSERVED, "nobody has looked at the place", None
    if bool((states[near] == State.OCCUPIED).any()):
        return Observed.SEEN, "something is beside the place", None
    if state == State.UNSEEN or unseen:
        return Observed.NOT_OBSERVED, "nobody has looked at the place", None
    return Observed.UNKNOWN, "the place was seen, and nothing was there", None


def _beside(thing: Thing, point: NDArray[np.float64]) -> bool:
    """Whether some of what a thing is remembered by lies no farther than a voxel from a point (3,)."""
    away = np.linalg.norm(thing.xyz.numpy() - point, axis=1)
    return bool((away <= VOXEL).any())


def _emptied(occupancy: Occupancy, voxels: NDArray[np.float64]) -> Thing:
    """What was where voxels (n, 3) are free now, of which no token is left to remember it by."""
    hit, free, first = occupancy.look_numbers(voxels, "hit", "free", "first")
    nothing = torch.zeros(0, dtype=torch.int64)
    return Thing(
        voxels.min(axis=0) - VOXEL / 2,
        voxels.max(axis=0) + VOXEL / 2,
        nothing,
        nothing.float(),
        nothing.float(),
        nothing.byte(),
        nothing,
        occupancy.stamp_of(int(first.min())),
        occupancy.stamp_of(int(hit.max())),
        0,
        occupancy.stamp_of(int(free.max())),
    )


def of_words(
    present: Sequence[Cluster],
    gone: Sequence[tuple[Thing, float]],
    coverage: float,
    measured: bool,
    confidence: float = math.nan,
) -> Judgement:
    """Of a question in words: verdict, reason, and what has gone that it is about.

    Args:
        present: where what is there was drawn on, most first. gone: what has gone, and its share of the contribution.
        coverage: share of the scene that was seen, NaN where nobody knows.
        measured: whether the contribution was.
        confidence: how likely the answer's words are right, NaN where nobody knows. It only counts while something of
            the scene was never seen.
    """
    if not measured:
        return Observed.UNKNOWN, "no gate measured what the answer rests on", None
    best = max(gone, key=lambda item: item[1], default=None)
    most = present[0].contribution if present else 0.0
    if best is not None and best[1] > most:
        thing = best[0]
        if thing.moved_to is not None:
            return Observed.SEEN, _gone(thing), thing
        return Observed.SEEN_THEN_GONE, _gone(thing), thing
    whole = coverage >= WHOLE
    if stands_out(most, math.nan if whole else confidence):
        return Observed.SEEN, "the answer rests on what is there", None
    if whole:
        return Observed.UNKNOWN, "nothing that was seen stands out", None
    if math.isnan(coverage):
        why = "nothing that was seen stands out, and how much of the scene was seen is not known"
        return Observed.UNKNOWN, why, None
    sure = "" if math.isnan(confidence) else f" for an answer with a confidence of {confidence:.2f}"
    why = f"nothing that was seen stands out{sure}, and {coverage:.0%} of the scene was seen"
    return Observed.NOT_OBSERVED, why, None


def stands_out(share: float, confidence: float) -> bool:
    """Whether a place with so much of the contribution is what was asked about: the less sure the words are, the more
    it must be. The numbers were fitted to furnished rooms (docs/memory.md)."""
    if math.isnan(confidence):
        return share >= STANDS_OUT
    return share > 0.0 and NAMED[0] + NAMED[1] * _logit(confidence) + NAMED[2] * _logit(share) >= 0.0


def _logit(chance: float) -> float:
    bounded = min(max(chance, 1e-3), 1 - 1e-3)
    return math.log(bounded / (1 - bounded))


def _gone(thing: Thing) -> str:
    """In words."""
    x, y, z = (round(float(value), 2) + 0.0 for value in thing.place)
    last, gone = thing.last_ns / 1e9, thing.gone_ns / 1e9
    text = f"it was at ({x:.2f}, {y:.2f}, {z:.2f}) m until {last:.2f} s, and gone by {gone:.2f} s"
    if thing.moved_to is not None:
        x, y, z = (round(value, 2) + 0.0 for value in thing.moved_to)
        text += f"; the like appeared at ({x:.2f}, {y:.2f}, {z:.2f}) m (confidence {thing.confidence:.2f})"
    return text
