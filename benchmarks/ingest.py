# SPDX-License-Identifier: Apache-2.0
"""Does the node keep up with its sensors, and is every message accounted for?

The real node with a tiny model takes 640 x 480 colour and depth at 30 Hz, with the default transport and once more with
the package's profile for it (config/fastdds_shm.xml), then coloured clouds of 300,000 points at 10 Hz with the default
one, each from a process of its own and a sensor that moves, poses as best effort:

    unaccounted_frames  received messages, pairs and frames that were neither used, nor no key frame, nor dropped for a
                        reason: differences in the node's own counters, all stages together
    not_received        images or clouds that were sent, but never received by the node (lost by the middleware);
    poses_not_received  the same of poses, which the node interpolates
    cpu_cores           CPU time of the node over time, while the sensor sends; the tiny model's encoder included
    accept_ms_p95       from a frame's stamp, taken right before it was published, until its pair was complete, had its
                        pose and calibration, and was handed to the thread that takes frames

    python -m benchmarks.ingest --json F
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._ros import ROOT, Bench, argument_parser, setting, unaccounted, write

PROFILE = ROOT / "config" / "fastdds_shm.xml"
_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")  # of Kilted, of Jazzy
_IMAGES = ("--kind", "images"), ("rgb/image", "depth/image")
# A reliable reader gets small messages late or never where large ones have filled the writer's shared memory.
_POSES = {"qos_overrides./pose.subscription.reliability": "best_effort"}

# name -> (parameters of the node, flags of the sensor, streams that make frames)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "images": (_POSES, *_IMAGES),
    "images_with_profile": (_POSES, *_IMAGES),
    "cloud": ({"input__source": "points", **_POSES}, ("--kind", "cloud"), ("points",)),
}


@contextmanager
def transport(profile: Path | None) -> Iterator[None]:
    """The middleware's profile for all processes that are started meanwhile; None for its default."""
    before = {name: os.environ.pop(name, None) for name in _VARIABLES}
    if profile is not None:
        os.environ.update(dict.fromkeys(_VARIABLES, str(profile)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One sensor for some seconds."""
    parameters, flags, streams = CASES[name]
    rate = args.cloud_rate if name == "cloud" else args.rate
    size = ("--width", args.width, "--height", args.height, "--points", args.points, "--speed", args.speed)
    with (
        TemporaryDirectory() as folder,
        transport(PROFILE if name == "images_with_profile" else None),
        Bench(args.model, show=args.show, **parameters) as bench,
    ):
        told = Path(folder) / "sensor.json"
        bench.wait(bench.counters, "the node's diagnostics")
        timing = ("--rate", rate, "--seconds", args.seconds, "--json", told)
        began, cpu = time.monotonic(), bench.cpu_seconds()
        command = [sys.executable, "-m", "benchmarks._ros_camera", *flags, *map(str, (*size, *timing))]
        bench.processes.run("sensor", command)
        sent = json.loads(told.read_text())
        # The sensor's own start lies in this time, too; the node then only waits.
        used = bench.cpu_seconds() - cpu
        idle = time.monotonic() - began - sent["seconds"]
        values = bench.settled({f"received.{stream}": sent["sent"][stream] for stream in streams})
    return figures(values, sent, streams) | {
        "cpu_cores": round(used / sent["seconds"], 3),
        "seconds": round(sent["seconds"], 2),
        "seconds_beside": round(idle, 2),
    }


def figures(values: dict[str, str], sent: dict[str, Any], streams: tuple[str, ...]) -> dict[str, Any]:
    """What the node's counters tell, beside what the sensor sent."""
    missing = unaccounted(values)
    received = {stream: int(values.get(f"received.{stream}", 0)) for stream in streams}
    fates = {name.removeprefix("frames."): int(count) for name, count in values.items() if name.startswith("frames.")}
    dropped = {name: int(count) for name, count in values.items() if "dropped." in name}
    age = values.get("accepted.age_ms.p95", "n/a")
    return {
        "unaccounted_frames": sum(abs(count) for count in missing.values()),
        "unaccounted": {name: count for name, count in missing.items() if count},
        "sent": sent["sent"],
        "not_received": sum(sent["sent"][stream] - received[stream] for stream in streams),
        "poses_not_received": sent["sent"]["pose"] - int(values.get("received.pose", 0)),
        "accept_ms_p95": None if age == "n/a" else float(age),
        "fates": fates,
        "dropped": dropped,
        "sensor_latest_ms": round(sent["latest_ms"], 1),
        "sensor_repeated": sent["repeated"],
        "acknowledged": sent["acknowledged"],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("How the node keeps up with images and clouds from another process.")
    parser.add_argument("--seconds", type=float, default=60.0, help="of sending, for each sensor")
    parser.add_argument("--rate", type=float, default=30.0, help="of colour and depth, hertz")
    parser.add_argument("--cloud-rate", type=float, default=10.0, help="of clouds, hertz")
    parser.add_argument("--width", type=int, default=640, help="of the images, pixels")
    parser.add_argument("--height", type=int, default=480, help="of the images, pixels")
    parser.add_argument("--points", type=int, default=300_000, help="of a cloud")
    parser.add_argument("--speed", type=float, default=0.25, help="of the sensor, metres a second")
    args = parser.parse_args(arguments)
    for name in ("seconds", "rate", "cloud_rate", "width", "height", "points"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    console = Console()
    found = {}
    for name in CASES:
        with console.status(f"{name}: {args.seconds:g} s of sending"):
            found[name] = measure(args, name)
    table = Table("", *found)
    for key in ("unaccounted_frames", "not_received", "poses_not_received", "cpu_cores", "accept_ms_p95"):
        table.add_row(key, *(str(case[key]) for case in found.values()))
    for fate in sorted({fate for case in found.values() for fate in case["fates"]}):
        table.add_row(f"frames: {fate}", *(str(case["fates"].get(fate, 0)) for case in found.values()))
    console.print(table)
    write(args.json, {**found.pop("images"), **found, "setting": setting(args)})


if __name__ == "__main__":
    main()
