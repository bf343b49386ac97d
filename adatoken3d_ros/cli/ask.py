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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("ask", help="ask about a bag or a folder, without ROS", description=__doc__)
    parser.add_argument("question", help="in plain words")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model's checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bag", type=Path, metavar="PATH", help="ROS 2 bag: an .mcap or .db3 file, or a bag's folder")
    source.add_argument("--folder", type=Path, metavar="DIR", help="color/, depth/, pose/ and intrinsics.json")
    parser.add_argument(
        "--click", type=float, nargs=3, action="append", default=[], metavar=("X", "Y", "Z"),
        help="point that the question is about, scene frame, metres; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--pose-source", default="auto", choices=["auto", "pose_topic", "odometry", "tf"], help="poses in the bag"
    )
    parser.add_argument(
        "--base-to-camera", type=pose, metavar="'X Y Z ROLL PITCH YAW'",
        help="camera optical frame in the frame whose pose the source gives, where the bag has no TF that says so; "
        "metres and radians, or 'X Y Z QX QY QZ QW'",
    )  # fmt: skip
    parser.add_argument("--scene-frame", default="", metavar="NAME", help="frame of the scene, for TF in a bag (map)")
    for name in ("rgb", "depth", "pose"):
        parser.add_argument(f"--{name}-topic", default="", metavar="NAME", help="in the bag, if it has several")
    parser.add_argument("--strategy", default="", metavar="NAME|FILE", help="pruning strategy: a name or a YAML file")
    parser.add_argument("--budget-ms", type=float, default=0.0, metavar="MS", help="latency budget of the answer")
    parser.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="longest answer in tokens")
    parser.add_argument("--max-views", type=int, default=20, metavar="N", help="key frames to keep (%(default)s)")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="use every N-th frame (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--upstream-numerics", action="store_true",
        help="compute as LLaVA-3D was published: bfloat16 geometry, missing depth kept, a random cap on the tokens",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answer as JSON")


def pose(text: str) -> NDArray[np.float64]:
    """A pose (4, 4) from numbers between spaces or commas. Raises argparse.ArgumentTypeError, with the text."""
    from adatoken3d_ros.ros.inputs.poses import pose_from_numbers

    try:
        return pose_from_numbers([float(word) for word in text.replace(",", " ").split()])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is no pose: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if the question was answered, 1 if it could not answer it."""
    for option, path in (("--model", args.model), ("--bag", args.bag), ("--folder", args.folder)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: {path} does not exist")

    import numpy as np

    from adatoken3d_ros.cli.output import print_answer, record_of_answer, write_json
    from adatoken3d_ros.engine.answer import Question, Status
    from adatoken3d_ros.engine.requests import check_question

    if args.stride < 1 or args.max_views < 1:
        raise ValueError(f"--stride {args.stride} and --max-views {args.max_views} must be at least 1")
    question = Question(
        args.question,
        clicks=np.array(args.click, dtype=np.float64).reshape(-1, 3),
        latency_budget_ms=args.budget_ms,
        max_new_tokens=args.max_new_tokens or None,
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
    return 0 if answer.status in (Status.OK, Status.TRUNCATED) else 1


def open_scene(args: argparse.Namespace) -> tuple[Engine, Scene]:
    """What the node would make, still empty, from --model, --device, --dtype, --max-views and --strategy.

    --upstream-numerics need not be among `args`.

    Raises:
        ValueError, OSError: for a checkpoint, device or strategy that cannot be used; the text names it.
    """
    from adatoken3d_ros.engine.config import SessionConfig
    from adatoken3d_ros.engine.loading import ModelSettings, load_engine
    from adatoken3d_ros.engine.loading import open_scene as open_empty

    default = SessionConfig()
    settings = ModelSettings(
        path=str(args.model),
        vision_path="",
        dtype=args.dtype,
        device=args.device,
        template=default.template,
        upstream_numerics=getattr(args, "upstream_numerics", default.upstream_numerics),
        seed=default.seed,
        strategy=args.strategy or "ours",
        max_views=args.max_views,
        min_translation=default.key_frames.min_translation,
        min_rotation=default.key_frames.min_rotation,
        max_depth=default.max_depth,
        origin=default.origin,
        min_sharpness=0.0 if getattr(args, "folder", None) else ModelSettings.min_sharpness,  # of stills each counts
        origin_mode="fixed" if getattr(args, "upstream_numerics", False) else "auto",
        warm_up=getattr(args, "budget_ms", 0.0) > 0,  # a budget is kept by who knows how fast the machine is
    )
    engine = load_engine(settings)
    return engine, open_empty(engine, settings)


def frames(args: argparse.Namespace) -> Iterator[PosedFrame]:
    """Every --stride-th frame of --bag or --folder, in order. The bag options need not be among `args`."""
    if args.folder is not None:
        from adatoken3d_ros.scene.folder import read_folder

        yield from read_folder(args.folder, stride=args.stride)
        return
    from adatoken3d_ros.ros.bag import Topics, read_bag

    given = {name: getattr(args, f"{name}_topic", "") for name in ("rgb", "depth", "pose")}
    source = read_bag(
        args.bag,
        topics=Topics(**given),
        pose_source=getattr(args, "pose_source", "auto"),
        scene_frame=getattr(args, "scene_frame", ""),
        T_base_camera=getattr(args, "base_to_camera", None),
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
