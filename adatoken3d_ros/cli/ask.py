# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d ask`: a question about a bag or a folder of posed RGB-D frames.

No ROS is needed, and the same input gives the same answer every time.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.options import add_scenes, add_settings, settings_of

if TYPE_CHECKING:
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("ask", help="ask about a bag or a folder, without ROS", description=__doc__)
    parser.add_argument("question", help="in plain words")
    add_scenes(parser)
    parser.add_argument(
        "--click", type=float, nargs=3, action="append", default=[], metavar=("X", "Y", "Z"),
        help="point that the question is about, scene frame, metres; may be repeated",
    )  # fmt: skip
    add_settings(parser, "--strategy", "--budget-ms", "--max-new-tokens", "--unsure-below")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if the question was answered, 1 if it could not answer it."""
    for option, path in (("--model", args.model), ("--bag", args.bag), ("--folder", args.folder)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: {path} does not exist")

    import numpy as np

    from adatoken3d_ros.cli.output import print_answer, record_of_answer, write_json
    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.engine.requests import check_question

    if args.stride < 1:
        raise ValueError(f"--stride {args.stride} must be at least 1")
    settings = settings_of(args)
    question = Question(
        args.question,
        clicks=np.array(args.click, dtype=np.float64).reshape(-1, 3),
        latency_budget_ms=settings["latency_budget_ms"],
        max_new_tokens=settings["max_new_tokens"],
    )
    check_question(question)
    engine, scene = open_scene(args)
    verdicts = watch_all(scene, frames(args))
    answer = engine.ask(scene, question)
    record = record_of_answer(answer)
    print_answer(record)
    print("frames: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    if args.json is not None:
        write_json(record, args.json)
    return 0 if answer.status.answered else 1


def open_scene(args: argparse.Namespace) -> tuple[Engine, Scene]:
    """An engine and an empty scene as the options say; raises as `settings_of` and `loading` do."""
    from adatoken3d_ros.engine import loading

    settings = settings_of(args)
    engine = loading.load_engine(settings)
    return engine, loading.open_scene(engine, settings)


def frames(args: argparse.Namespace) -> Iterator[PosedFrame]:
    """Every --stride-th frame of --bag or --folder, one of either, in order."""
    if args.folder is not None:
        from adatoken3d_ros.scene.folder import read_folder

        yield from read_folder(args.folder, stride=args.stride)
        return
    from adatoken3d_ros.ros.bag import Topics, read_bag
    from adatoken3d_ros.ros.inputs.poses import pose_from_numbers

    source = read_bag(
        args.bag,
        topics=Topics(rgb=args.rgb_topic, depth=args.depth_topic, pose=args.pose_topic),
        pose_source=args.pose_source,
        scene_frame=args.scene_frame,
        T_base_camera=pose_from_numbers(args.base_to_camera) if any(args.base_to_camera) else None,
    )
    yield from itertools.islice(source, None, None, args.stride)


def watch_all(scene: Scene, source: Iterator[PosedFrame]) -> Counter[str]:
    """Shows every frame to the scene, with a progress display; returns how many there were of each verdict."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    verdicts: Counter[str] = Counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed}"), TimeElapsedColumn())
    console = Console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("frames", total=None)
        for frame in source:
            verdicts[scene.observe(frame).value] += 1
            scene.encode_pending()
            progress.advance(task)
    return verdicts
