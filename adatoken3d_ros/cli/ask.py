# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d ask`: a question about a bag or a folder of posed RGB-D frames.

No ROS is needed, and the same input gives the same answer every time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adatoken3d_ros.engine.session import SceneSession
    from adatoken3d_ros.pruning.strategy import Strategy
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
    parser.add_argument("--strategy", default="", metavar="NAME|FILE", help="pruning strategy: a name or a YAML file")
    parser.add_argument("--budget-ms", type=float, default=0.0, metavar="MS", help="latency budget of the answer")
    parser.add_argument("--max-new-tokens", type=int, default=0, metavar="N", help="longest answer in tokens")
    parser.add_argument("--max-views", type=int, default=20, metavar="N", help="key frames to keep (%(default)s)")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="use every N-th frame (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if the question was answered, 1 if the session could not answer it."""
    for option, path in (("--model", args.model), ("--bag", args.bag), ("--folder", args.folder)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: {path} does not exist")

    import numpy as np

    from adatoken3d_ros.cli.output import print_answer, record_of_answer, write_json
    from adatoken3d_ros.engine.answer import Question, Status
    from adatoken3d_ros.engine.session import check_question

    question = Question(
        args.question,
        clicks=np.array(args.click, dtype=np.float64).reshape(-1, 3),
        latency_budget_ms=args.budget_ms,
        max_new_tokens=args.max_new_tokens or None,
    )
    check_question(question)
    session = open_session(args)
    verdicts = watch_all(session, frames(args))
    answer = session.ask(question)
    record = record_of_answer(answer)
    print_answer(record)
    print("frames: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    if args.json is not None:
        write_json(record, args.json)
    return 0 if answer.status in (Status.OK, Status.TRUNCATED) else 1


def open_session(args: argparse.Namespace) -> SceneSession:
    """Loads the model. Raises CheckpointError, StrategyError or ValueError, which name what is wrong."""
    import torch

    from adatoken3d_ros.engine.session import SceneSession, SessionConfig
    from adatoken3d_ros.model.checkpoint import load
    from adatoken3d_ros.scene.keyframes import KeyFrameConfig

    device = choose_device(args.device)
    if args.dtype == "auto":
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, args.dtype)
    model, tokenizer, _ = load(args.model, dtype=dtype, device=device)
    config = SessionConfig(key_frames=KeyFrameConfig(max_views=args.max_views))
    strategy = choose_strategy(args.strategy, int(model.config.language.num_hidden_layers))
    model_id = f"{args.model.resolve().name}@{model.config.hash()}"
    return SceneSession(model, tokenizer, config, strategy=strategy, model_id=model_id)


def choose_device(name: str) -> str:
    """A torch device for `name`; auto takes the GPU where there is one.

    Raises:
        ValueError: for a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA device that torch can use")
    return name


def choose_strategy(name: str, n_layers: int) -> Strategy | None:
    """A strategy by name, or from a YAML file; None for the session's default. Raises StrategyError."""
    from adatoken3d_ros.pruning.strategy import Strategy, default_strategy

    if not name:
        return None
    if Path(name).suffix in (".yaml", ".yml"):
        return Strategy.load(Path(name))
    return default_strategy(name, n_layers)


def frames(args: argparse.Namespace) -> Iterator[PosedFrame]:
    """The frames of --bag or --folder, in order."""
    if args.folder is not None:
        from adatoken3d_ros.scene.folder import read_folder

        yield from read_folder(args.folder, stride=args.stride)
        return
    from adatoken3d_ros.ros.bag import read_bag

    for index, frame in enumerate(read_bag(args.bag)):
        if index % args.stride == 0:
            yield frame


def watch_all(session: SceneSession, source: Iterator[PosedFrame]) -> Counter[str]:
    """Shows every frame to the session, with a progress display; returns how many there were of each verdict."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    verdicts: Counter[str] = Counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("frames", total=None)
        for frame in source:
            verdicts[session.observe(frame).value] += 1
            session.encode_pending()
            progress.advance(task)
    return verdicts
