# SPDX-License-Identifier: Apache-2.0
"""Are poses that cannot be right found, and right ones believed?

Furnished rooms seen by a camera with the noise of a structured-light sensor. Each room is shown as it is, and with what
is usually wrong with all of its poses or depths; then as it is with one pose of 30 that is 1.7 m off, in a direction
drawn at random. A fault is `found` if the scene is called wrong, `named` if its cause is. In a few rooms the camera
goes slowly: of what it saw well, `seen_voxels_missing` is the share that no kept frame shows; and with the noise of a
stereo camera instead (standard deviation of its disparities, pixels), how far right frames contradict each other.

    python -m benchmarks.trust --json F [--rooms 40] [--views 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adatoken3d_ros.lab.synthetic.camera import intrinsics
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import noisy_depth, orbit
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, KeyFrameSelector, Verdict
from adatoken3d_ros.scene.patches import patch_points
from adatoken3d_ros.settings import DEFAULTS
from benchmarks import _trust_memory, _trust_selection
from benchmarks._scenes import machine, write_json

WIDTH, HEIGHT = 320, 240
STEP = 0.8  # seconds between two frames of the camera's path
SLOW_STEP, SLOW_VIEWS, SLOW_ROOMS = 0.25, 80, 5  # seconds between frames, frames and rooms of a slow walk
OFF = 1.7  # metres
VOXEL = 0.25  # metres
FIRST_ROOM = 5000
Pose = NDArray[np.float64]
# A camera on a base: 0.2 m before it, 0.8 m above, its optical axes in the base's.
BASE_TO_CAMERA = np.array([[0, 0, 1, 0.2], [-1, 0, 0, 0], [0, -1, 0, 0.8], [0, 0, 0, 1.0]])
Y_DOWN = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])


@dataclass(frozen=True)
class Fault:
    """What is said instead of the right pose, by what depth is multiplied, and words of the cause."""

    pose: Callable[[Pose], Pose]
    scale: float
    cause: str


FAULTS = {
    "inverted": Fault(lambda pose: np.asarray(np.linalg.inv(pose)), 1.0, "inverted"),
    "scale": Fault(lambda pose: pose, 5.0, "its scale is wrong"),
    "base": Fault(lambda pose: pose @ np.asarray(np.linalg.inv(BASE_TO_CAMERA)), 1.0, "of a body"),
    "y_down": Fault(lambda pose: Y_DOWN @ pose, 1.0, "-y seems to be"),
}


def walk(seed: int, views: int, step: float = STEP) -> list[PosedFrame]:
    """A camera's way through room `seed`, a frame each `step` seconds."""
    room, rng = make_room(seed, "test"), np.random.default_rng(seed)
    renderer, K, frames = Renderer(room), intrinsics(WIDTH, HEIGHT), []
    for index in range(views):
        pose = orbit(room, step * index)
        rgb, depth, _ = renderer.render(K, WIDTH, HEIGHT, pose)
        frames.append(PosedFrame(rgb, noisy_depth(depth, rng), K, pose, stamp_ns=index + 1))
    return frames


def _timed(frames: Sequence[PosedFrame]) -> list[PosedFrame]:
    """The frames with the stamps of a slow walk."""
    return [replace(frame, stamp_ns=round((i + 1) * SLOW_STEP * 1e9)) for i, frame in enumerate(frames)]


def shown(frames: Sequence[PosedFrame], limit: float) -> tuple[KeyFrameSelector, str, int, list[float]]:
    """The selector that has been shown the frames, the last problem, refusals, and milliseconds of each decision."""
    selector = KeyFrameSelector(KeyFrameConfig(max_disagreement=limit, max_views=len(frames)))
    problem, refused, times = "", 0, []
    for frame in frames:
        begin = time.perf_counter()
        verdict = selector.decide(frame)
        times.append(1e3 * (time.perf_counter() - begin))
        refused += verdict == Verdict.DISAGREES
        if verdict == Verdict.KEY_FRAME:
            selector.accepted(frame)
            while selector.evict() is not None:
                pass
        problem = selector.contradiction or problem
    return selector, problem, refused, times


def voxels(frames: Sequence[PosedFrame]) -> set[tuple[int, ...]]:
    """Voxels in which patches of the frames lie."""
    found: set[tuple[int, ...]] = set()
    for frame in frames:
        points = patch_points(frame)
        found |= set(map(tuple, np.floor(points.xyz[points.valid] / VOXEL).astype(int).tolist()))
    return found


def ghosts(frames: Sequence[PosedFrame], stamps: Sequence[int], right: Sequence[PosedFrame]) -> float:
    """Share of the voxels of the kept frames that lie farther than one voxel from all that is there."""
    there = voxels(right)
    near = {(x + i, y + j, z + k) for x, y, z in there for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)}
    kept = voxels([frame for frame in frames if frame.stamp_ns in stamps])
    return len(kept - near) / max(1, len(kept))


def measure(rooms: int, views: int, limit: float) -> dict[str, Any]:
    """The figures over `rooms` rooms."""
    found: dict[str, list[bool]] = {name: [] for name in FAULTS}
    named: dict[str, list[bool]] = {name: [] for name in FAULTS}
    alarms, refused, believed_wrong, ghost, without, times, bare = [], 0, 0, [], [], [], []
    for seed in track(range(FIRST_ROOM, FIRST_ROOM + rooms), "rooms", transient=True):
        frames = walk(seed, views)
        _, problem, wrongly, took = shown(frames, limit)
        alarms.append(bool(problem))
        refused += wrongly
        times += took
        bare += shown(frames, 0.0)[3]
        for name, fault in FAULTS.items():
            depth = [(frame.depth * np.float32(fault.scale)).astype(np.float32) for frame in frames]
            said = [
                replace(f, depth=d, T_world_camera=fault.pose(f.T_world_camera))
                for f, d in zip(frames, depth, strict=True)
            ]
            problem = shown(said, limit)[1]
            found[name].append(bool(problem))
            named[name].append(fault.cause in problem)
        rng = np.random.default_rng(seed)
        place, way = int(rng.integers(views)), rng.normal(size=3) * (1.0, 1.0, 0.1)
        moved = frames[place].T_world_camera.copy()
        moved[:3, 3] += OFF * way / np.linalg.norm(way)
        said = [replace(f, T_world_camera=moved) if i == place else f for i, f in enumerate(frames)]
        selector = shown(said, limit)[0]
        believed_wrong += place + 1 in selector.stamps()
        ghost.append(ghosts(said, selector.stamps(), frames))
        without.append(ghosts(said, shown(said, 0.0)[0].stamps(), frames))
    return {
        "conventions_found": float(np.mean([*map(np.mean, found.values())])),
        "conventions_named": float(np.mean([*map(np.mean, named.values())])),
        "found": {name: float(np.mean(values)) for name, values in found.items()},
        "named": {name: float(np.mean(values)) for name, values in named.items()},
        "false_alarms": float(np.mean(alarms)),
        "right_frames_refused": refused / (rooms * views),
        "wrong_pose_believed": believed_wrong / rooms,
        "ghost_voxels": float(np.mean(ghost)),
        "ghost_voxels_without_the_check": float(np.mean(without)),
        "check_ms": statistics.median(times) - statistics.median(bare),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rooms", type=int, default=40, metavar="N", help="rooms (%(default)s)")
    parser.add_argument("--views", type=int, default=30, metavar="N", help="frames of each (%(default)s)")
    parser.add_argument(
        "--questions", type=int, default=200, metavar="N", help="of what answers say of themselves (%(default)s)"
    )
    args = parser.parse_args(argv)
    limit = DEFAULTS["scene.max_disagreement"]
    figures = measure(args.rooms, args.views, limit)
    slow = range(FIRST_ROOM, FIRST_ROOM + min(args.rooms, SLOW_ROOMS))
    if args.questions:
        figures |= _trust_memory.measure_memory(args.questions)
    figures |= _trust_selection.measure(lambda seed: _timed(walk(seed, SLOW_VIEWS, SLOW_STEP)), slow, limit)
    table = Table(title=f"{args.rooms} rooms, {args.views} frames each")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, value in figures.items():
        table.add_row(
            name, ", ".join(f"{k} {v:.3f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.4f}"
        )
    Console().print(table)
    if args.json is not None:
        setting = {"rooms": args.rooms, "views": args.views, "limit": limit, "questions": args.questions}
        write_json(args.json, {"setting": setting, **figures, "machine": machine()})


if __name__ == "__main__":
    main()
