# SPDX-License-Identifier: Apache-2.0
"""How long does it take to turn posed views into spatial tokens, their features given?

Three ways to the same tokens, measured in turn and in random order, so that the machine's moods fall on all of them:

* ours, from scratch: back-project the sampled pixels only, pool all patches at once;
* ours, one view: what a robot pays for a key frame, the view added to a full map and the tokens taken;
* upstream's way: resize and crop each depth image, back-project every one of its pixels in float32, pick 24x24 of
  them, pool with unique and a scattered mean. Upstream does not mask invalid depth; here both ways leave it out,
  upstream's by sending it to one more voxel that is cut off, which costs it next to nothing.

The features' mean is the same work in both ways and counts in both. Every way runs on one thread unless --threads says
otherwise: on a busy machine a way that takes milliseconds mostly waits for its other threads to be scheduled.

    python -m benchmarks.tokens --json F [--views 20] [--repeats 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import orbit
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import crop_transform, cropped_intrinsics, sample_pixels
from adatoken3d_ros.scene.patches import PatchConfig, patch_points, valid_depth
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.voxels import voxel_pool

K = np.array([[554.0, 0, 319.5], [0, 554.0, 239.5], [0, 0, 1]])
WIDTH, HEIGHT = 640, 480
VOXEL_SIZE = 0.2
REST = 0.1  # seconds
BORDER = 1e-5  # metres
INVALID_SHARE = 0.02  # of the pixels, as a depth camera leaves them out


@dataclass(frozen=True, eq=False)
class Case:
    """V views of a synthetic room and the features (V, P, C) float32 that a vision tower would give them."""

    frames: list[PosedFrame]
    features: Tensor
    config: PatchConfig


Pooled = tuple[Tensor, Tensor]  # features (M, C), voxel (M, 3)


def make_case(views: int, channels: int, seed: int) -> Case:
    """Views 2 s apart on the camera's path through room `seed`, with some depth missing.

    Depth is missing, too, where a point lies on the border of two voxels to within float32's rounding: there two
    correct ways may disagree on the voxel.
    """
    room, rng, config = make_room(seed), np.random.default_rng(seed), PatchConfig()
    renderer = Renderer(room)
    frames = []
    for index in range(views):
        T = orbit(room, 2.0 * index)
        rgb, depth, _ = renderer.render(K, WIDTH, HEIGHT, T)
        depth[rng.random(depth.shape) < INVALID_SHARE] = np.nan
        frame = PosedFrame(rgb, depth, K, T, index)
        quotient = patch_points(frame, config).xyz.astype(np.float64) / VOXEL_SIZE
        on_border = (np.abs(quotient - np.floor(quotient) - 0.5) * VOXEL_SIZE < BORDER).any(axis=1)
        rows, cols = sample_pixels(WIDTH, HEIGHT, config.geometry)
        at = np.ix_(rows, cols)
        depth[at] = np.where(on_border.reshape(depth[at].shape), np.nan, depth[at])
        frames.append(frame)
    features = torch.randn(views, config.geometry.patches, channels, generator=torch.Generator().manual_seed(seed))
    return Case(frames, features, config)


def ours(case: Case) -> Pooled:
    points = [patch_points(frame, case.config) for frame in case.frames]
    xyz = torch.from_numpy(np.concatenate([p.xyz for p in points]))
    valid = torch.from_numpy(np.concatenate([p.valid for p in points]))
    mean, _, _, voxel = voxel_pool(case.features.flatten(0, 1), xyz, VOXEL_SIZE, valid=valid)
    return mean, voxel


def patch_points_upstream(
    depths: Sequence[NDArray[np.float32]],
    Ks: Sequence[NDArray[np.float64]],
    Ts: Sequence[NDArray[np.float64]],
    image_size: int = 336,
    grid: int = 24,
) -> tuple[Tensor, Tensor]:
    """The published data flow in float32: resize and crop each depth image, back-project every pixel, then pick.

    The oracle of `patch_points` and the other side of `benchmarks.tokens`.

    Args:
        depths: V images (H, W), metres. Ks: V pinhole matrices (3, 3). Ts: V poses (4, 4), camera to world.

    Returns:
        xyz (V, grid, grid, 3) float32 and the depth it came from, (V, grid, grid) float32.
    """
    crops, intrinsics = [], []
    for depth, K in zip(depths, Ks, strict=True):
        crop = crop_transform(depth.shape[1], depth.shape[0], image_size)
        resized = Image.fromarray(depth).resize((crop.resized_width, crop.resized_height), Image.Resampling.NEAREST)
        box = (crop.x0, crop.y0, crop.x0 + image_size, crop.y0 + image_size)
        crops.append(torch.from_numpy(np.array(resized.crop(box))))
        intrinsics.append(torch.from_numpy(cropped_intrinsics(K, crop)))
    z = torch.stack(crops)
    k = torch.stack(intrinsics).float()[:, :, :, None, None]
    poses = torch.from_numpy(np.stack(list(Ts))).float()

    pixel = torch.arange(image_size, dtype=torch.float32)
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    x = (u - k[:, 0, 2]) * z / k[:, 0, 0]
    y = (v - k[:, 1, 2]) * z / k[:, 1, 1]
    camera = torch.stack([x, y, z, torch.ones_like(z)], dim=-1)
    world = torch.matmul(camera.flatten(1, 2), poses.transpose(1, 2))
    xyz = (world[..., :3] / world[..., 3:]).unflatten(1, (image_size, image_size)).permute(0, 3, 1, 2)
    picked = torch.nn.functional.interpolate(xyz, size=(grid, grid), mode="nearest")
    picked_depth = torch.nn.functional.interpolate(z[:, None], size=(grid, grid), mode="nearest")[:, 0]
    return picked.permute(0, 2, 3, 1), picked_depth


def upstream(case: Case) -> Pooled:
    size, grid = case.config.geometry.height, case.config.geometry.rows
    xyz, depth = patch_points_upstream(
        [f.depth for f in case.frames], [f.K for f in case.frames], [f.T_world_camera for f in case.frames], size, grid
    )
    valid = torch.from_numpy(valid_depth(depth.numpy(), case.config.max_depth)).flatten()
    index = torch.round(xyz.reshape(-1, 3) / VOXEL_SIZE).nan_to_num().to(torch.int64)
    low = index[valid].amin(dim=0)
    extent = index[valid].amax(dim=0) - low + 1
    shifted = index - low
    key = (shifted[:, 0] * extent[1] + shifted[:, 1]) * extent[2] + shifted[:, 2]
    key[~valid] = extent.prod()
    key, inverse = torch.unique(key, return_inverse=True)
    features = case.features.flatten(0, 1)
    total = torch.zeros(len(key), features.shape[1])
    total.scatter_add_(0, inverse[:, None].expand_as(features), features)
    count = torch.zeros(len(key)).scatter_add_(0, inverse, torch.ones(len(inverse)))
    mean = total / count[:, None]
    if not bool(valid.all()):
        key, mean = key[:-1], mean[:-1]
    voxel = torch.stack([key // (extent[1] * extent[2]), key // extent[2] % extent[1], key % extent[2]], dim=1) + low
    return mean, voxel


def upstream_points(case: Case) -> Tensor:
    """Only the geometry of upstream's way."""
    size, grid = case.config.geometry.height, case.config.geometry.rows
    return patch_points_upstream(
        [f.depth for f in case.frames], [f.K for f in case.frames], [f.T_world_camera for f in case.frames], size, grid
    )[0]


class Incremental:
    """A map that holds all views but the oldest one it has taken out; each call adds it back."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.map = TokenMap(VOXEL_SIZE)
        for frame in case.frames:
            self._add(frame)

    def _add(self, frame: PosedFrame) -> None:
        points = patch_points(frame, self.case.config)
        self.map.add_view(frame.stamp_ns, self.case.features[frame.stamp_ns], points.xyz, points.rgb, points.valid)

    def take_out(self) -> None:
        self.map.remove_view(self.case.frames[-1].stamp_ns)

    def add_back(self) -> Pooled:
        self._add(self.case.frames[-1])
        tokens = self.map.tokens()
        return tokens.features, tokens.voxel


def same(a: Pooled, b: Pooled, tolerance: float = 1e-4) -> bool:
    """The same voxels in the same order with features that agree."""
    return torch.equal(a[1], b[1]) and torch.allclose(a[0], b[0], rtol=0, atol=tolerance)


def measure(
    ways: list[dict[str, Callable[[], Any]]], repeats: int, seed: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds on the clock and of the processor: `repeats` rounds of all ways in turn, after one not counted.

    The order of the groups of ways is drawn anew for each round (within a group it stays), because a way finds the
    caches and the memory as the one before it left them. A rest before each lets none pay for threads that still spin
    or for its predecessor's share of a busy machine.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for group in ways for name in group}
    order = random.Random(seed)
    for turn in range(repeats + 1):
        for group in order.sample(ways, len(ways)):
            for name, way in group.items():
                time.sleep(REST)
                start, start_cpu = time.perf_counter(), time.process_time()
                way()
                if turn:
                    times[name].append((1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - start_cpu)))
    return times


def run(views: int, channels: int, repeats: int, seed: int) -> dict[str, Any]:
    case = make_case(views, channels, seed)
    incremental = Incremental(case)
    points = [patch_points(frame, case.config) for frame in case.frames]
    xyz = torch.from_numpy(np.concatenate([p.xyz for p in points]))
    valid = torch.from_numpy(np.concatenate([p.valid for p in points]))
    flat = case.features.flatten(0, 1)
    times = measure(
        [
            {"ours": lambda: ours(case)},
            {"upstream": lambda: upstream(case)},
            {"ours_geometry": lambda: [patch_points(frame, case.config) for frame in case.frames]},
            {"upstream_geometry": lambda: upstream_points(case)},
            {"ours_pooling": lambda: voxel_pool(flat, xyz, VOXEL_SIZE, valid=valid)},
            {"remove_view": incremental.take_out, "add_view": incremental.add_back},
        ],
        repeats,
    )
    medians = {name: statistics.median(clock for clock, _ in values) for name, values in times.items()}
    cpu = {name: statistics.median(processor for _, processor in values) for name, values in times.items()}
    built, expected = ours(case), upstream(case)
    incremental.take_out()
    return {
        "ours_ms": medians["ours"],
        "upstream_ms": medians["upstream"],
        "speedup": medians["upstream"] / medians["ours"],
        "same_tokens": same(built, expected) and same(incremental.add_back(), expected),
        "n_tokens": len(built[1]),
        "ours_cpu_ms": cpu["ours"],
        "upstream_cpu_ms": cpu["upstream"],
        "cpu_speedup": cpu["upstream"] / cpu["ours"],
        "add_view_ms": medians["add_view"],
        "remove_view_ms": medians["remove_view"],
        "parts_ms": {name: medians[name] for name in ("ours_geometry", "ours_pooling", "upstream_geometry")},
        "views": views,
        "image": [WIDTH, HEIGHT],
        "channels": channels,
        "valid_share": float(valid.float().mean()),
        "repeats": repeats,
        "seed": seed,
        "machine": {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def report(result: dict[str, Any]) -> Table:
    parts = result["parts_ms"]
    table = Table(
        title=f"{result['n_tokens']} spatial tokens from {result['views']} views, median of {result['repeats']}"
    )
    table.add_column("way")
    for column in ("total ms", "geometry ms", "pooling ms", "faster"):
        table.add_column(column, justify="right")
    table.add_row(
        "every pixel, then pick (upstream)",
        f"{result['upstream_ms']:.1f}",
        f"{parts['upstream_geometry']:.1f}",
        "",
        "1.0x",
    )
    table.add_row(
        "sampled pixels only",
        f"{result['ours_ms']:.1f}",
        f"{parts['ours_geometry']:.1f}",
        f"{parts['ours_pooling']:.1f}",
        f"{result['speedup']:.1f}x",
    )
    table.add_row(
        "one more view, tokens taken",
        f"{result['add_view_ms']:.1f}",
        "",
        "",
        f"{result['upstream_ms'] / result['add_view_ms']:.1f}x",
    )
    table.add_row("one view less", f"{result['remove_view_ms']:.1f}", "", "", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--views", type=int, default=20)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for every way")
    parser.add_argument("--seed", type=int, default=0, help="of the room and the features")
    arguments = parser.parse_args()
    for name in ("views", "channels", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    torch.set_num_threads(arguments.threads)
    result = run(arguments.views, arguments.channels, arguments.repeats, arguments.seed)
    console = Console()
    console.print(report(result))
    console.print(f"in processor time: {result['cpu_speedup']:.1f}x, on {result['machine']['threads']} thread(s)")
    console.print(f"the same tokens: {'yes' if result['same_tokens'] else 'NO'}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
