# SPDX-License-Identifier: Apache-2.0
"""What a key frame costs beside the vision tower, and what it costs to move the model's origin.

python -m benchmarks.memory --json F [--views 20] [--channels 1024] [--repeats 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.model.position import PositionMLP
from adatoken3d_ros.scene.keyframes import carve_free_space
from adatoken3d_ros.scene.patches import patch_points
from adatoken3d_ros.scene.sharpness import sharpness
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.window import best_shift, level_patches
from benchmarks.tokens import VOXEL_SIZE, make_case, measure


def run(views: int, channels: int, repeats: int, seed: int) -> dict[str, Any]:
    """Milliseconds on the clock and of the processor of each step, median; the map holds all views."""
    case = make_case(views, channels, seed)
    torch.manual_seed(seed)
    position = PositionMLP(channels)
    token_map = TokenMap(VOXEL_SIZE, embed=position.hidden)
    *_, last = case.frames

    def add(frame: Any = last) -> None:
        points = patch_points(frame, case.config)
        level = level_patches(points.xyz)
        token_map.add_view(frame.stamp_ns, case.features[frame.stamp_ns], points.xyz, points.rgb, points.valid, level)
        carve_free_space(token_map, frame)
        best_shift(token_map)

    for frame in case.frames:
        add(frame)
    shifts = iter(range(1, 1000))
    with torch.inference_mode():
        times = measure(
            [
                {"evict": lambda: token_map.remove_view(last.stamp_ns), "key_frame": add},
                {"sharpness": lambda: sharpness(last.rgb)},
                {"move_origin": lambda: token_map.move_origin((next(shifts), 0, 0))},
                {"tokens": lambda: token_map.tokens()},
                {"position": lambda: position.finish(token_map.tokens().position)},
            ],
            repeats,
        )
    return {
        "views": views,
        "channels": channels,
        "voxels": token_map.n_voxels,
        "threads": torch.get_num_threads(),
        "ms": {name: statistics.median(clock for clock, _ in values) for name, values in times.items()},
        "cpu_ms": {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args.views, args.channels, args.repeats, args.seed)
    table = Table(title=f"{result['voxels']} voxels of {args.views} views, {args.channels} channels, median")
    for column in ("step", "ms", "cpu ms"):
        table.add_column(column, justify="right")
    for name, value in result["ms"].items():
        table.add_row(name, f"{value:.1f}", f"{result['cpu_ms'][name]:.1f}")
    Console().print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
