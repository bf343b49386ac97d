# SPDX-License-Identifier: Apache-2.0
"""What a key frame costs beside the vision tower, and what it costs to move the model's origin.

python -m benchmarks.memory --json F [--views 20] [--channels 1024] [--repeats 15] [--threads 2]

`key_frame` is the whole chain for one more view of a full memory: `decide` (pose, sharpness, what it adds, what has
changed; all of them, as for the dearest frame), `add` (patches, voxel sums, carving), `evict` of another view, and
`recentre` (whether the model's origin should move; it does not). The features are given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene_memory import SceneMemory
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.patches import patch_points
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.window import OriginMode
from benchmarks.tokens import REST, VOXEL_SIZE, Case, make_case, measure

CHAIN = ("decide", "add", "evict", "recentre")


class Chain:
    """A memory of `views` views that is shown a room again and again, its steps timed one by one.

    The vision tower is left out: `encode_views` hands out the features of the case (twice as many views as are kept).
    """

    def __init__(self, case: Case, views: int, channels: int) -> None:
        self.case, self.shown = case, 0
        self.position = PositionMLP(channels)
        sizes = SimpleNamespace(tokens="voxels", patches=case.config.geometry, voxel_size=VOXEL_SIZE, num_views=views)
        model: Any = SimpleNamespace(
            sizes=sizes,
            lift_places=self.position.hidden,
            device="cpu",
            place_tokens=patch_points,
            grid=lambda *_: (case.config.geometry.rows, case.config.geometry.columns),
            encode_views=lambda rgb, **_: [self.case.features[(self.shown - 1) % len(self.case.frames)]],
        )
        # Each frame is compared with the map in every way that there is, and each is kept.
        key_frames = KeyFrameConfig(max_views=views, min_gain=0.02, min_sharpness=0.5, change_interval=0.0)
        self.memory = SceneMemory(model, SessionConfig(key_frames=key_frames, origin_mode=OriginMode.AUTO))
        self.spent: dict[str, tuple[float, float]] = {}
        for step in CHAIN[1:]:
            setattr(self.memory, f"_{step}", self._timed(step, getattr(self.memory, f"_{step}")))
        for _ in case.frames:
            self.step()

    def step(self) -> dict[str, tuple[float, float]]:
        """Milliseconds on the clock and of the processor of each step for one more frame, and of the whole chain."""
        frame = replace(self.case.frames[self.shown % len(self.case.frames)], stamp_ns=2 * 10**9 * (self.shown + 1))
        self.shown += 1
        self._timed("key_frame", self._take)(frame)
        return dict(self.spent)

    def _take(self, frame: Any) -> None:
        self._timed("decide", self.memory._selector.decide)(frame)
        self.memory._selector.accepted(frame)
        self.memory.pending.append(frame)
        self.memory.encode()

    def _timed(self, name: str, way: Any) -> Any:
        def call(*args: Any) -> Any:
            start, start_cpu = time.perf_counter(), time.process_time()
            made = way(*args)
            self.spent[name] = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - start_cpu)
            return made

        return call


def run(views: int, channels: int, repeats: int, seed: int) -> dict[str, Any]:
    """Milliseconds on the clock and of the processor of each step, median; the map holds all views."""
    case = make_case(2 * views, channels, seed)
    torch.manual_seed(seed)
    chain = Chain(case, views, channels)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("key_frame", *CHAIN)}
    for _ in range(repeats):
        time.sleep(REST)
        for name, spent in chain.step().items():
            times[name].append(spent)
    token_map: TokenMap = chain.memory._map
    shifts = iter(range(1, 1000))
    with torch.inference_mode():
        rest = measure(
            [
                {"move_origin": lambda: token_map.move_origin((next(shifts), 0, 0))},
                {"tokens": lambda: token_map.tokens()},
                {"position": lambda: chain.position.finish(token_map.tokens().position)},
            ],
            repeats,
        )
    times.update(rest)
    return {
        "views": len(token_map),
        "channels": channels,
        "voxels": token_map.n_voxels,
        "threads": torch.get_num_threads(),
        "ms": {name: statistics.median(clock for clock, _ in values) for name, values in times.items()},
        "cpu_ms": {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()},
        "least_ms": {name: min(clock for clock, _ in values) for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args.views, args.channels, args.repeats, args.seed)
    table = Table(title=f"{result['voxels']} voxels of {args.views} views, {args.channels} channels, median")
    for column in ("step", "ms", "cpu ms", "least ms"):
        table.add_column(column, justify="right")
    for name, value in result["ms"].items():
        table.add_row(name, *(f"{v:.1f}" for v in (value, result["cpu_ms"][name], result["least_ms"][name])))
    Console().print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
