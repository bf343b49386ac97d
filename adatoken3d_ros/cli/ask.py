# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d ask`: questions about a bag or a folder of posed RGB-D frames.

One question; with --questions those of a file; with --chat those that you type. The model is loaded and the scene is
built once for all of them. No ROS is needed, and the same input gives the same answers every time. With --report a page
shows them to people.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.options import add_scenes, add_settings, check_files, settings_of
from adatoken3d_ros.cli.progress import step_progress
from adatoken3d_ros.cli.questions import Streamed, read_questions, typed_questions

if TYPE_CHECKING:
    from adatoken3d_ros.engine.answer import Answer, Question
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.pictures import Pictures
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame
    from adatoken3d_ros.settings import Settings


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("ask", help="ask about a bag or a folder, without ROS", description=__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("question", nargs="?", help="in plain words")
    asked.add_argument("--questions", type=Path, metavar="FILE", help="ask what is in a file, one question a line")
    asked.add_argument("--chat", action="store_true", help="ask what you type, until an empty line or the input's end")
    add_scenes(parser)
    parser.add_argument(
        "--click", type=float, nargs=3, action="append", default=[], metavar=("X", "Y", "Z"),
        help="point that the question is about, scene frame, metres; may be repeated",
    )  # fmt: skip
    add_settings(parser, "--strategy", "--budget-ms", "--max-new-tokens", "--unsure-below")
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help="also write the answer as JSON; several one in a line, each as it comes",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="also write a page for the browser: answers, tokens in 3D, key frames, times, how to repeat it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if every question was answered, 1 if one could not be."""
    check_files(args)
    settings = settings_of(args)
    texts = () if args.chat else read_questions(args.questions) if args.questions else (args.question,)

    from adatoken3d_ros.engine.requests import check_question

    questions = [_question(args, settings, text) for text in texts]
    for question in questions:
        check_question(question)
    engine, scene = open_scene(args)
    pictures = None
    if args.report is not None:
        from adatoken3d_ros.engine.pictures import Pictures

        pictures = Pictures()
    verdicts = watch_all(scene, frames(args), pictures)
    told = "frames: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    if args.chat or args.questions:
        print(told)
        asked = _chat(args, settings, engine, scene) if args.chat else _each(questions, engine, scene)
        return _written(with_report(args, scene, pictures, asked), args.json)

    from adatoken3d_ros.cli.output import print_answer, record_of_answer, write_json

    [answer] = with_report(args, scene, pictures, iter([engine.ask(scene, questions[0])]))
    record = record_of_answer(answer)
    print_answer(record)
    print(told)
    if args.json is not None:
        write_json(record, args.json)
    return 0 if answer.status.answered else 1


def _question(args: argparse.Namespace, settings: Settings, text: str) -> Question:
    import numpy as np

    from adatoken3d_ros.engine.answer import Question

    clicks = np.array(args.click, dtype=np.float64).reshape(-1, 3)
    return Question(text, clicks, settings["latency_budget_ms"], settings["max_new_tokens"])


def _chat(args: argparse.Namespace, settings: Settings, engine: Engine, scene: Scene) -> Iterator[Answer]:
    """Answers what is typed, each while it is written."""
    from adatoken3d_ros.cli.output import brief, record_of_answer

    print("Ask; an empty line ends.", file=sys.stderr)
    for text in typed_questions():
        streamed = Streamed(sys.stdout)
        answer = engine.ask(scene, _question(args, settings, text), on_text=streamed.show)
        streamed.show(answer.text or "(empty)")
        print(f"\n  [{brief(record_of_answer(answer))}]", flush=True)
        yield answer


def _each(questions: list[Question], engine: Engine, scene: Scene) -> Iterator[Answer]:
    """Answers one question after the other, with a progress display."""
    from rich.console import Console
    from rich.text import Text

    from adatoken3d_ros.cli.output import brief, record_of_answer

    console = Console()
    with step_progress(console) as report:
        for done, question in enumerate(questions, start=1):
            answer = engine.ask(scene, question)
            told = f"{question.text}\n  {answer.text or '(empty)'}\n  [{brief(record_of_answer(answer))}]"
            console.print(Text(told), soft_wrap=True)
            report("questions", done, len(questions))
            yield answer


def _written(answers: Iterator[Answer], path: Path | None) -> int:
    """Takes the answers as they come, each a line of JSON in `path`; what `run` returns."""
    from adatoken3d_ros.cli.output import record_of_answer

    failed = False
    with ExitStack() as stack:
        file = None if path is None else stack.enter_context(path.open("w", encoding="utf-8"))
        for answer in answers:
            failed = failed or not answer.status.answered
            if file is not None:
                print(json.dumps(record_of_answer(answer), ensure_ascii=False), file=file, flush=True)
    return int(failed)


def with_report(
    args: argparse.Namespace, scene: Scene, pictures: Pictures | None, answers: Iterator[Answer]
) -> Iterator[Answer]:
    """Hands on the answers; once there are no more, all that came are in the report, if one is wanted."""
    if pictures is None:
        yield from answers
        return

    from adatoken3d_ros.cli.output import record_of_answer
    from adatoken3d_ros.view.report import reported, write_report

    kept = []
    try:
        for answer in answers:
            kept.append(reported(record_of_answer(answer), answer.report, scene))
            yield answer
    finally:
        if kept:
            write_report(args.report, kept, pictures.of(scene), args.typed)


def open_scene(args: argparse.Namespace) -> tuple[Engine, Scene]:
    """An engine and an empty scene as the options say; raises as `settings_of` and `loading` do."""
    from rich.console import Console

    from adatoken3d_ros.engine import loading

    settings = settings_of(args)
    with Console().status("loading the model") as shown:
        engine = loading.load_engine(
            settings, lambda share, step: shown.update(f"loading the model: {step}, {share:.0%}")
        )
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
        topics=Topics(rgb=args.rgb_topic, depth=args.depth_topic, points=args.points_topic, pose=args.pose_topic),
        source=args.input_source,
        pose_source=args.pose_source,
        scene_frame=args.scene_frame,
        T_base_camera=pose_from_numbers(args.base_to_camera) if any(args.base_to_camera) else None,
        T_camera_depth=pose_from_numbers(args.depth_to_rgb) if any(args.depth_to_rgb) else None,
        slop=args.slop,
        max_covariance=args.max_covariance,
    )
    yield from itertools.islice(source, None, None, args.stride)


def watch_all(scene: Scene, source: Iterator[PosedFrame], pictures: Pictures | None = None) -> Counter[str]:
    """Shows every frame to the scene, with a progress display; returns how many there were of each verdict.

    `pictures` keeps those of the key frames.
    """
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
            if pictures is not None and frame.stamp_ns in scene.poses:
                pictures.add(frame, scene)
            progress.advance(task)
    return verdicts
