# SPDX-License-Identifier: Apache-2.0
"""Are the tokens where things are, on a robot whose odometry is its base's? Node and bag, with each source of poses.

`python -m benchmarks.robot --json F`: a robot's bag (examples/robot) of a furnished room, played to the node from
another process and read without ROS; each token's distance from the room's nearest surface.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.cli.ask import watch_all
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.ros.bag import read_bag
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.weights import embedded_path
from benchmarks._ros import argument_parser, setting, write
from benchmarks._ros_robot import of_node
from examples.robot import robot_bag

SOURCES = ("tf", "odometry", "pose_topic")
QUESTION = "Is there a chair in the room?"


def distances(room: FurnishedRoom, xyz: NDArray[np.float32], source: str) -> dict[str, Any]:
    """How far the tokens (M, 3) of the scene's frame, odom for odometry and else map, lie from the room's surfaces."""
    T = robot_bag.T_MAP_ODOM if source == "odometry" else np.eye(4)
    off = Renderer(room).distance((xyz @ T[:3, :3].T + T[:3, 3]).astype(np.float32))
    return {
        "tokens": len(off),
        "tokens_off_m": round(float(np.median(off)), 4) if len(off) else float("inf"),
        "tokens_off_m_p95": round(float(np.percentile(off, 95)), 4) if len(off) else float("inf"),
    }


def of_bag(room: FurnishedRoom, bag: Path, model: Path, source: str) -> dict[str, Any]:
    """The bag read without ROS; `auto` for TF, which it must choose."""
    settings = Settings({"model.path": str(model), "budget.warm_up": False})
    began = time.monotonic()
    engine = load_engine(settings)
    scene = open_scene(engine, settings)
    watch_all(scene, read_bag(bag, pose_source="auto" if source == "tf" else source))
    answer = engine.ask(scene, Question(QUESTION))
    tokens = scene.tokens()
    xyz = np.zeros((0, 3), np.float32) if tokens is None else tokens.xyz.float().cpu().numpy()
    return {**distances(room, xyz, source), "answered": answer.status.answered, "answer": answer.text,
            "first_answer_s": round(time.monotonic() - began, 2)}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Whether tokens are where things are, on a robot with odometry of its base.")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of the bag")
    parser.add_argument("--image-rate", type=float, default=robot_bag.RATE, help="of colour and depth, hertz")
    parser.add_argument("--rate", type=float, default=1.0, help="of the bag's time when it is played")
    parser.add_argument("--seed", type=int, default=0, help="of the room")
    parser.add_argument("--only", choices=[f"{way}.{source}" for way in ("node", "bag") for source in SOURCES])
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Figures by way (node, bag) and source; the largest of the medians as `tokens_off_m`."""
    room, model = make_room(args.seed, "test"), args.model or embedded_path()
    cases: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="adatoken3d-") as folder, Console().status("rendering the bag") as status:
        bag = robot_bag.write(Path(folder) / "bag", room, args.seconds, args.image_rate)
        for way in ("node", "bag"):
            for source in SOURCES:
                name = f"{way}.{source}"
                if args.only in (None, name):
                    status.update(f"{way}, {source}")
                    if way == "node":
                        xyz, figures = of_node(bag, model, source, QUESTION, rate=args.rate, show=args.show)
                        cases[name] = {**distances(room, xyz, source), **figures}
                    else:
                        cases[name] = of_bag(room, bag, model, source)
    return {
        "tokens_off_m": max(case["tokens_off_m"] for case in cases.values()),
        "first_answer_s": max(case["first_answer_s"] for case in cases.values()),
        "answered": all(case["answered"] for case in cases.values()),
        **cases,
    }


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    found = measure(args)
    keys = ("tokens", "tokens_off_m", "tokens_off_m_p95", "first_answer_s", "answered", "answer")
    table = Table("", *keys)
    for name, case in found.items():
        if isinstance(case, dict):
            table.add_row(name, *(str(case[key]) for key in keys))
    Console().print(table)
    write(args.json, {**found, "setting": setting(args)})


if __name__ == "__main__":
    main()
