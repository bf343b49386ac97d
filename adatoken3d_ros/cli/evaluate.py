# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d evaluate`: how right a model is on a published question set, under each strategy of a list.

ScanQA, SQA3D, Scan2Cap, OpenEQA and sets of your own; docs/evaluate.md says where each is had and what scenes may be.
A scene is built once for all questions and strategies. What was answered is in --out and is not asked again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros import __version__
from adatoken3d_ros.cli.options import add_settings, settings_of
from adatoken3d_ros.cli.progress import step_progress
from adatoken3d_ros.cli.spreading import absolute, add_ray, spread_over

if TYPE_CHECKING:
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.lab.evaluation.answering import Desk
    from adatoken3d_ros.lab.evaluation.question_sets import QuestionSet
    from adatoken3d_ros.scene.frames import PosedFrame
    from adatoken3d_ros.settings import Settings

# Frames were chosen, and each of them is a view, as where the published figures come from.
_CHOSEN = {
    "scene.min_translation": 0.0, "scene.min_rotation": 0.0, "scene.min_gain": 0.0, "scene.min_sharpness": 0.0,
    "scene.max_disagreement": 0.0, "scene.carving": False,
}  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("evaluate", help="how right a model is, by published sets", description=__doc__)
    for option, metavar, needed, text in (
        ("--questions", "FILE", True, "the set, as published (.json) or of your own (.json, .jsonl)"),
        ("--answers", "FILE", False, "the right answers where they are in another file (SQA3D's annotations)"),
        ("--boxes", "FILE", False, "of the things that captions are asked about (Scan2Cap)"),
        ("--scenes", "DIR", True, "folder of the scenes, by their names in the set"),
        ("--out", "DIR", True, "for answers.jsonl, result.json, report.html, predictions; made if missing"),
    ):
        parser.add_argument(option, type=Path, metavar=metavar, required=needed, help=text)
    parser.add_argument(
        "--strategies", nargs="+", metavar="NAME", default=["none", "ours"],
        help="pruning strategies, names or .yaml files; compared with the first (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", metavar="TEXT", help="wording with {question} and {situation}, instead of the published one"
    )
    parser.add_argument(
        "--frames", type=int, default=20, metavar="N",
        help="of each scene, evenly, each a view; 0: all, views chosen as on a robot (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N questions; 0: all")
    add_settings(parser, "--model", "--vision-path", "--device", "--dtype", "--quantization")
    add_settings(parser, "--max-new-tokens", "--origin-mode")
    add_ray(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if every question got an answer, else 1."""
    settings = _settings(args)
    questions = _questions(args)
    args.out.mkdir(parents=True, exist_ok=True)

    from rich.console import Console

    from adatoken3d_ros.engine import loading
    from adatoken3d_ros.lab.evaluation.answering import Kept, Run, answer_all, predictions
    from adatoken3d_ros.lab.evaluation.marking import mark
    from adatoken3d_ros.lab.evaluation.page import page, table
    from adatoken3d_ros.lab.evaluation.scenes import find_scene

    console = Console()
    with console.status("loading the model"):
        engine = loading.load_engine(settings)
    strategies = {name: loading.strategy_of(engine, name) for name in args.strategies}
    told = {"frames": args.frames, "max_new_tokens": settings["max_new_tokens"], "scenes": str(args.scenes.resolve()),
            "dtype": settings["model.dtype"],
            "quantization": settings["model.quantization"], "origin": settings["scene.origin_mode"]}  # fmt: skip
    asked = Run(questions, args.prompt or questions.prompt, strategies, told)
    for item in questions.items:  # a missing scene or a wrong wording is told before any work
        find_scene(args.scenes, item.scene)
        asked.text(item)
    with closing(Kept(args.out / "answers.jsonl")) as kept, step_progress(console) as report, ExitStack() as stack:
        make = partial(_desk, _settings(absolute(args)), args.scenes.resolve(), args.frames)
        cluster = stack.enter_context(spread_over(args, make))
        answers = answer_all(asked, engine, cluster or make(engine), kept, report)
    marked = mark(questions.items, answers)
    result = {
        "set": questions.name, "form": questions.form, "prompt": asked.prompt, "model": engine.model_id,
        "settings": told, "command": args.typed, "version": __version__, **marked,
    }  # fmt: skip
    console.print(table(result))
    written = {"result.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n", "report.html": page(result)}
    for name, records in answers.items():
        content = json.dumps(predictions(questions.items, records), indent=1, ensure_ascii=False)
        written[f"predictions-{Path(name).stem}.json"] = content + "\n"
    for name, text in written.items():
        (args.out / name).write_text(text, encoding="utf-8")
    console.print(f"{', '.join(written)} are in {args.out}", soft_wrap=True, highlight=False)
    unanswered = sum(
        record["status"] not in ("OK", "TRUNCATED", "UNSURE") for one in answers.values() for record in one
    )
    return int(unanswered > 0)


def _desk(settings: Settings, scenes: Path, frames: int, engine: Engine | None = None) -> Desk:
    """Where answers are given, with an engine of its own unless there is one."""
    from adatoken3d_ros.engine import loading
    from adatoken3d_ros.lab.evaluation.answering import Desk
    from adatoken3d_ros.lab.evaluation.scenes import find_scene, frames_of

    own = engine or loading.load_engine(settings)
    return Desk(
        own,
        lambda: loading.open_scene(own, settings),
        lambda name: frames_of(find_scene(scenes, name), frames, _bag),
    )


def _settings(args: argparse.Namespace) -> Settings:
    for option in ("frames", "limit"):
        if getattr(args, option) < 0:
            raise ValueError(f"--{option} {getattr(args, option)} must not be negative")
    if len({Path(name).stem for name in args.strategies}) < len(args.strategies):
        raise ValueError(f"--strategies {' '.join(args.strategies)} names one twice: files need names of their own")
    if not args.scenes.is_dir():
        raise FileNotFoundError(f"--scenes: {args.scenes} is no folder")
    settings = settings_of(args)
    return settings | (_CHOSEN | {"scene.max_views": args.frames}) if args.frames else settings


def _questions(args: argparse.Namespace) -> QuestionSet:
    from adatoken3d_ros.lab.evaluation.question_sets import read_question_set

    questions = read_question_set(args.questions, args.answers, args.boxes)
    return replace(questions, items=questions.items[: args.limit]) if args.limit else questions


def _bag(path: Path) -> Iterator[PosedFrame]:
    from adatoken3d_ros.ros.bag import read_bag

    return read_bag(path)
