# SPDX-License-Identifier: Apache-2.0
"""Of the demo's questions about its rooms, how many are answered right?

As `adatoken3d demo --seed S`, in one process and without ROS: the demo's camera circles in the room, its frames go to a
scene with the node's settings until that has as many key frames as the demo waits for, and what the camera would
suggest then is asked. `asked_first` are the three questions that the demo asks by itself, `all` those of all its
families. An answer is right to the letter. Intervals are 95 % bootstrap intervals over rooms.

    python -m benchmarks.demo_rooms --json F [--seeds 20] [--first 0] [--model DIR] [--budget-ms 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.cli.demo import FAMILIES, ROUND, share, suggested
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.synthetic.camera import HEIGHT, WIDTH, intrinsics
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, make_room
from adatoken3d_ros.lab.synthetic.guide import Guide
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import View, orbit
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import BY_NAME, Settings
from adatoken3d_ros.weights import embedded_path
from benchmarks._paired import scene_interval
from benchmarks._refusals import refuse_missing, told_before
from benchmarks._scenes import bar, machine, write_json

GOAL = 0.9
VIEWS = 6  # key frames that the demo waits for
_PERIOD = 1.0  # seconds between two frames: so often the demo's camera notes what it has shown
_LONGEST = 80.0  # seconds: twice around


@dataclass(frozen=True)
class Asked:
    """A question of the demo, and what came of it."""

    seed: int
    family: str
    question: str
    expected: str
    answer: str
    status: str
    first: bool

    @property
    def right(self) -> bool:
        """To the letter."""
        return self.answer == self.expected


def settings_of(model: Path) -> Settings:
    """The node's in the demo."""
    content = yaml.safe_load((share() / "config" / "demo.yaml").read_text(encoding="utf-8"))
    given = {name: value for name, value in content["/**"]["ros__parameters"].items() if name in BY_NAME}
    return Settings({**given, "model.path": str(model), "model.device": "cpu"})


def look_around(scene: Scene, room: FurnishedRoom, guide: Guide, views: int) -> None:
    """Shows frames to a scene, and to the guide, until the scene has so many views, at most for `_LONGEST`."""
    renderer, K = Renderer(room), intrinsics(WIDTH, HEIGHT)
    for t in np.arange(0.0, _LONGEST, _PERIOD):
        pose = orbit(room, float(t))
        rgb, depth, ids = renderer.render(K, WIDTH, HEIGHT, pose)
        frame = PosedFrame(rgb, depth, K, pose, 1 + round(t * 1e9))
        guide.show(View(frame, ids))
        scene.observe(frame)
        if len(scene.memory.poses) >= views:
            return


def ask_about(engine: Engine, scene: Scene, seed: int, views: int, budget_ms: float) -> list[Asked]:
    """Everything that the demo's camera suggests of a room, in the demo's order."""
    room = make_room(seed, "test")
    guide = Guide(room, seed)
    look_around(scene, room, guide, views)
    now = guide.questions()
    newest: Any = SimpleNamespace(newest=lambda timeout: now)
    offered = [one for k in range(0, len(FAMILIES), ROUND) for one in suggested(newest, k)]
    found: dict[str, Asked] = {}
    for one in offered:
        if one.question in found:
            continue
        answer = engine.ask(scene, Question(one.question, latency_budget_ms=budget_ms or None))
        status, first = answer.status.name, len(found) < ROUND
        found[one.question] = Asked(seed, one.family, one.question, one.answer, answer.text, status, first)
    return list(found.values())


def summary(asked: Sequence[Asked], seed: int = 0) -> dict[str, Any]:
    """Shares right: of all, of those that come first, of each family."""

    def share_of(some: Sequence[Asked]) -> dict[str, Any]:
        right = np.array([float(one.right) for one in some])
        _, low, high = scene_interval([one.seed for one in some], right, seed=seed).tolist()
        return {"right": float(right.mean()), "interval": [low, high], "questions": len(some)}

    by_family = {family: [one for one in asked if one.family == family] for family in FAMILIES}
    return {
        "all": share_of(asked),
        "asked_first": share_of([one for one in asked if one.first]),
        "families": {family: share_of(some) for family, some in by_family.items() if some},
        "rooms": len({one.seed for one in asked}),
        "wrong": [
            {"seed": one.seed, "question": one.question, "expected": one.expected, "answer": one.answer}
            for one in asked
            if not one.right
        ],
        "goal": GOAL,
        "met": share_of(asked)["right"] >= GOAL,
    }


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures."""
    settings = settings_of(args.model)
    engine = load_engine(settings)
    asked: list[Asked] = []
    with bar(console, "rooms") as progress:
        for k in range(args.seeds):
            asked += ask_about(engine, open_scene(engine, settings), args.first + k, args.views, args.budget_ms)
            progress(k + 1, args.seeds)
    setting = {"seeds": [args.first, args.first + args.seeds - 1], "views": args.views, "budget_ms": args.budget_ms}
    return {**summary(asked), "setting": setting, "model": engine.model_id, "machine": machine()}


def report(result: Mapping[str, Any]) -> Table:
    """Families down."""
    table = Table(title=f"The demo's questions about {result['rooms']} of its rooms (goal: {result['goal']:.0%} right)")
    for name in ("", "right", "95 %", "asked"):
        table.add_column(name, justify="right" if name else "left")
    rows = {"all": result["all"], "asked by itself": result["asked_first"], **result["families"]}
    for name, one in rows.items():
        table.add_row(name, f"{one['right']:.3f}", "{:.3f} to {:.3f}".format(*one["interval"]), str(one["questions"]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_rooms", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--seeds", type=int, default=20, help="rooms (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (%(default)s)")
    parser.add_argument("--views", type=int, default=VIEWS, help="key frames to wait for (%(default)s)")
    parser.add_argument("--budget-ms", type=float, default=0.0, help="of each question; 0: none (%(default)s)")
    args = parser.parse_args()
    for name, least in (("seeds", 1), ("first", 0), ("views", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    refuse_missing(parser, args, "model")
    told_before(parser, args)
    args.model = args.model or embedded_path()
    torch.set_num_threads(1)
    console = Console()
    result = run(args, console)
    console.print(report(result))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
