# SPDX-License-Identifier: Apache-2.0
"""What an answer rests on, whether that is there still, how much was seen, and where to go to look at it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Answer, Status, TokenReport
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.events import SceneView
from adatoken3d_ros.engine.scene_memory import SceneMemory
from adatoken3d_ros.engine.words import sees
from adatoken3d_ros.scene.evidence import MOST, Cluster, Evidence, Observed, Triple, gather
from adatoken3d_ros.scene.goal import Goal, find_goal
from adatoken3d_ros.scene.occupancy import VOXEL, Occupancy, State
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.verdict import of_place, of_words

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene

REGION = 0.5  # metres around a point that is asked about
HIGH = 0.5  # metres above the floor that count as its level
SHOWN = 20.0  # metres around the camera in which the floor is shown


@dataclass(frozen=True, eq=False)
class Recalled:
    """A question asked as if nothing had gone.

    Attributes:
        xyz: (N, 3) tokens, scene frame, metres. contribution: (N,). owner: (N,) number of the tombstone, -1: is there.
    """

    xyz: NDArray[np.float32]
    contribution: NDArray[np.float32]
    owner: NDArray[np.int64]


def what_is_known(
    memory: SceneMemory, config: SessionConfig, answer: Answer, clicks: NDArray[np.float64], recalled: Recalled | None
) -> dict[str, Any]:
    """The fields of an answer that say what it rests on.

    Args:
        answer: with its report. clicks: (n, 3) points that it is about, scene frame, metres.
        recalled: None where nothing has gone, or there was no time.
    """
    report = answer.report
    assert report is not None
    past = memory.past
    floor = memory.floor
    coverage = _seen_around(past.occupancy, clicks) if len(clicks) else seen_floor(past.occupancy, floor)
    places = _places(answer, report, clicks)
    if len(clicks):
        asked = past.asked
        judged = [of_place(past.occupancy, asked, point, not past.holders(point[None])) for point in clicks]
        # Of several places what is least sure is told.
        verdict, reason, thing = max(judged, key=lambda item: _DOUBT.index(item[0]))
    else:
        xyz, share, owner = (
            (report.xyz, report.contribution, np.full(len(report.xyz), -1))
            if recalled is None
            else (recalled.xyz, recalled.contribution, recalled.owner)
        )
        present = gather(xyz, np.where(owner < 0, share, 0.0)) if share.sum() > 0 else []
        total = max(float(share.sum()), 1e-12)
        there = float(share[owner < 0].sum()) / total  # `gather` counts the shares of what it is given
        gone = [(t, float(share[owner == i].sum()) / total) for i, t in enumerate(past.tombstones.gone)]
        scaled = [Cluster(c.rows, c.contribution * there, c.low, c.high) for c in present]
        # Of an answer that is yes or no it does not say whether the thing is there.
        confidence = answer.confidence if sees(answer.text) is None else math.nan
        verdict, reason, thing = of_words(scaled, gone, coverage, bool(share.sum() > 0), confidence)
        if verdict is Observed.SEEN and thing is not None and thing.moved_to is not None:
            target = np.array(thing.moved_to)
            judged_there = of_place(past.occupancy, past.tombstones, target, not past.holders(target[None]))
            if judged_there[0] is Observed.SEEN_THEN_GONE:  # from there, too
                verdict, reason, thing = judged_there
        if answer.confidence == 0.0:
            verdict, reason, thing = Observed.UNKNOWN, "the model does not understand the question", None
    evidence = [_evidence(memory, place) for place in places]
    evidence += [_gone_from(past.occupancy, thing, clicks)] if thing is not None else []
    goal = _goal(memory, config, verdict, evidence, floor)
    return {
        "verdict": verdict,
        "verdict_reason": reason,
        "evidence": tuple(evidence),
        "coverage": coverage,
        "goal": goal.pose,
        "goal_reason": goal.reason,
    }


def guessed(answer: Answer, clicks: NDArray[np.float64]) -> Answer:
    """The answer, with what is known; one about a place (n, 3) that nobody saw is not sure: whatever it says is
    guessed, however sure the model is."""
    if not len(clicks) or answer.verdict is not Observed.NOT_OBSERVED or answer.status is not Status.OK:
        return answer
    message = "; ".join(filter(None, (answer.verdict_reason, answer.status_message)))
    return replace(answer, status=Status.UNSURE, status_message=message)


_DOUBT = (Observed.SEEN, Observed.UNKNOWN, Observed.NOT_OBSERVED, Observed.SEEN_THEN_GONE)


@dataclass(frozen=True)
class _Place:
    points: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    contribution: float
    asked: NDArray[np.float64] | None = None  # (3,) what was clicked on


def _places(answer: Answer, report: TokenReport, clicks: NDArray[np.float64]) -> list[_Place]:
    """Where the answer rests: what is clicked on first, then what it names by boxes, then what its tokens contributed
    from, most first."""
    total = float(report.contribution.sum())
    xyz = report.xyz.astype(np.float64)

    def place(inside: NDArray[np.bool_], low: NDArray[np.float64], high: NDArray[np.float64]) -> _Place:
        share = float(report.contribution[inside].sum()) / total if total > 0 else math.nan
        return _Place(xyz[inside], low, high, share)

    found = []
    for point in clicks:
        inside = np.linalg.norm(xyz - point, axis=1) <= REGION / 2
        if inside.any():
            found.append(replace(place(inside, xyz[inside].min(axis=0), xyz[inside].max(axis=0)), asked=point))
    for box in answer.boxes[:MOST]:
        low, high = (np.array(box.centre) + sign * np.array(box.size) / 2 for sign in (-1, 1))
        found.append(place(np.asarray(((xyz >= low) & (xyz <= high)).all(axis=1)), low, high))
    for cluster in gather(xyz, report.contribution, report.retained):
        found.append(_Place(xyz[cluster.rows], cluster.low, cluster.high, cluster.contribution))
    return found[:MOST]


def _evidence(memory: SceneMemory, place: _Place) -> Evidence:
    stamps = memory.past.holders(place.points) if len(place.points) else []
    occupancy = memory.past.occupancy
    hit = int(occupancy.look_numbers(place.points, "hit").max(initial=0)) if len(place.points) else 0
    last = max([*stamps, occupancy.stamp_of(hit)], default=0)
    if place.asked is not None:
        # What is beside it may have been seen later, or not so late.
        last = _last_hit(occupancy, place.asked[None]) or last
    return Evidence(
        _triple((place.low + place.high) / 2),
        _triple(np.maximum(place.high - place.low, VOXEL)),
        min([*stamps, last]),
        last,
        len(stamps),
        place.contribution,
    )


def _last_hit(occupancy: Occupancy, points: NDArray[np.float64]) -> int:
    """When something was measured last in one of the voxels of points (n, 3), nanoseconds; 0: never."""
    return occupancy.stamp_of(int(occupancy.look_numbers(points, "hit").max(initial=0)))


def _gone_from(occupancy: Occupancy, thing: Thing, clicks: NDArray[np.float64]) -> Evidence:
    """What has gone, as evidence: of a place (n, 3) that is asked about, last seen when that was."""
    last = _last_hit(occupancy, clicks)
    return remembered(replace(thing, last_ns=last) if thing.first_ns <= last <= thing.gone_ns else thing)


def remembered(thing: Thing) -> Evidence:
    """What has gone, as evidence."""
    return Evidence(
        _triple(thing.place),
        _triple(np.maximum(thing.high - thing.low, VOXEL)),
        thing.first_ns,
        thing.last_ns,
        thing.views,
        0.0,
        thing.gone_ns,
        thing.moved_to,
        thing.confidence,
    )


def _goal(
    memory: SceneMemory, config: SessionConfig, verdict: Observed, evidence: list[Evidence], floor: float | None
) -> Goal:
    """Where to look at what is there; where it was last, if it has gone and nobody knows where to."""
    wanted = [item for item in evidence if bool(item.gone_ns) == (verdict is Observed.SEEN_THEN_GONE)]
    if verdict is Observed.NOT_OBSERVED:
        return Goal(None, "what was asked about was never seen")
    if not wanted:
        return Goal(None, "the answer rests on no place")
    place, extent = np.array(wanted[0].moved_to or wanted[0].place), np.array(wanted[0].extent)
    camera = memory.camera
    low, high = place - extent / 2, place + extent / 2
    return find_goal(memory.past.occupancy, floor, camera, low, high, config.goal)


def _seen_around(occupancy: Occupancy, points: NDArray[np.float64]) -> float:
    """Share of what is within REGION of points (n, 3) that was ever seen."""
    shares = []
    for point in points:
        state, corner = occupancy.box(point - REGION, point + REGION)
        grid = np.stack(np.meshgrid(*map(np.arange, state.shape), indexing="ij"), axis=-1) * VOXEL + corner
        inside = np.linalg.norm(grid - point, axis=-1) <= REGION
        shares.append(float((state[inside] != State.UNSEEN).mean()))
    return float(np.mean(shares))


def seen_floor(occupancy: Occupancy, floor: float | None) -> float:
    """Share of the scene's extent at the level of its floor that was ever seen; NaN before anything was."""
    level = _level(occupancy, floor)
    return math.nan if level is None else occupancy.seen_columns(*level)


def floor_map(
    occupancy: Occupancy, floor: float | None, camera: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (n, 3), scene frame, metres, of the cells of the scene's extent at the level of its floor that are free,
    and of those that were never seen, no farther than `SHOWN` from a camera (3,) along an axis."""
    level = _level(occupancy, floor)
    if level is None:
        return np.zeros((0, 3)), np.zeros((0, 3))
    low, high = level
    near, far = (np.clip(camera[:2] + sign * SHOWN, low[:2], high[:2]) for sign in (-1, 1))
    state, corner = occupancy.box((*near, low[2]), (*far, high[2]))
    body = state[:, :, 1:] if state.shape[2] > 1 else state
    free = (body == State.FREE).any(axis=2) & (body != State.OCCUPIED).all(axis=2)
    unseen = (state == State.UNSEEN).all(axis=2)
    first, second = (np.pad(np.argwhere(cells), ((0, 0), (0, 1))) * VOXEL + corner for cells in (free, unseen))
    return first, second


def view_of(scene: Scene, frame_id: str) -> SceneView:
    """The scene as it is now, for who shows it."""
    tokens, marks = scene.tokens(), scene.memory.marks.all()
    if tokens is None:
        return SceneView(frame_id, marks=marks)
    past = scene.memory.past
    return SceneView(
        frame_id,
        tokens.xyz.float().cpu().numpy(),
        tokens.rgb.cpu().numpy(),
        tokens.count.cpu().numpy(),
        dict(scene.poses),
        scene.stamp_ns,
        marks,
        *floor_map(past.occupancy, scene.memory.floor, scene.poses[scene.stamp_ns][:3, 3]),
        tuple(map(remembered, past.tombstones.gone)),
        scene.nbytes,
        scene.config.memory_limit_mb * 1e6,
    )


def _level(occupancy: Occupancy, floor: float | None) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Corners of the scene's extent from the floor (its lowest surface where none was found) on up to HIGH."""
    ends = occupancy.extent()
    if ends is None:
        return None
    low, high = ends[0] + VOXEL / 2, ends[1] - VOXEL / 2
    level = low[2] if floor is None else floor
    return np.array([*low[:2], level]), np.array([*high[:2], level + HIGH])


def _triple(values: NDArray[np.floating]) -> Triple:
    x, y, z = (float(value) for value in values)
    return x, y, z
