# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d record`: a question with all that it needs as one MCAP file, of a bag or a folder of posed frames.

In it are the key frames with their poses, the question, and every topic of the answer. Foxglove, Lichtblick and RViz
show it (config/foxglove.json, config/adatoken3d.rviz); `adatoken3d replay FILE` asks it again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.ask import frames, open_scene, watch_all
from adatoken3d_ros.cli.options import add_scenes, add_settings, check_files, settings_of
from adatoken3d_ros.settings import DEFAULTS

if TYPE_CHECKING:
    from adatoken3d_ros.engine.answer import Answer
    from adatoken3d_ros.scene.frames import PosedFrame


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("record", help="a question with all it needs as MCAP", description=__doc__)
    parser.add_argument("question", nargs="+", help="in plain words; several are asked one after the other")
    add_scenes(parser)
    add_settings(parser, "--strategy", "--max-new-tokens", "--unsure-below")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .mcap file to write")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if every question was answered, 1 if one could not be: it is recorded all the same."""
    check_files(args)
    if args.out.suffix != ".mcap":
        raise ValueError(f"--out {args.out} must be an .mcap file")

    from adatoken3d_ros.cli.output import print_answer, record_of_answer
    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.engine.events import KeyFramesShown
    from adatoken3d_ros.engine.knowing import view_of
    from adatoken3d_ros.engine.pictures import MOST_SHOWN, picture_of, voxels_of
    from adatoken3d_ros.engine.requests import check_question
    from adatoken3d_ros.ros.recording import asked_at, write_recording

    longest = settings_of(args)["max_new_tokens"]
    questions = [Question(text, max_new_tokens=longest) for text in args.question]
    for question in questions:
        check_question(question)
    engine, scene = open_scene(args)
    watched: dict[int, PosedFrame] = {}

    def watching() -> Iterator[PosedFrame]:
        for frame in frames(args):
            watched[frame.stamp_ns] = frame
            yield frame
            # What is no view any more, or never became one, is not needed.
            for stamp in [stamp for stamp in watched if stamp not in scene.poses]:
                del watched[stamp]

    watch_all(scene, watching())
    asked: list[tuple[int, Answer]] = []
    for question in questions:
        answer = engine.ask(scene, question)
        print_answer(record_of_answer(answer))
        asked.append((asked_at(scene.confirmed_ns or scene.stamp_ns) + len(asked) * 10**9, answer))
    frame_id = args.scene_frame or DEFAULTS["scene.frame_id"]
    view = view_of(scene, frame_id)
    kept = [watched[stamp] for stamp in sorted(watched) if stamp in scene.poses]
    pictures = tuple(picture_of(frame, scene) for frame in kept[-MOST_SHOWN:])
    shown = KeyFramesShown(frame_id, scene.stamp_ns, pictures, voxels_of(scene))
    write_recording(args.out, kept, view, asked, shown)
    print(f"{args.out}: {len(kept)} key frames, {len(asked)} questions, {args.out.stat().st_size / 1e6:.1f} MB")
    return int(not all(answer.status.answered for _, answer in asked))
