# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d replay`: a bag as the robot saw it, in its own time, with each question at its time. No ROS is needed.

Every frame goes through the node's own core in the order of the stamps; a question is asked when the frames before its
time were seen. The same bag and questions give the same bytes of JSON, so latency budgets, which depend on the machine,
have no place here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.ask import frames, open_scene, with_report
from adatoken3d_ros.cli.options import add_scenes, add_settings, check_files
from adatoken3d_ros.cli.output import Record, brief, record_of_answer
from adatoken3d_ros.cli.progress import step_progress
from adatoken3d_ros.cli.questions import read_questions
from adatoken3d_ros.text import quoted

if TYPE_CHECKING:
    from adatoken3d_ros.engine.answer import Answer
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.pictures import Pictures
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame

_TIMED = re.compile(r"([0-9]+(?:\.[0-9]{1,9})?)\s+(\S.*)")
_ABSOLUTE = 10**9  # seconds; a time from here on is one of the bag's clock, not since its first frame
# What depends on the machine or on its clock.
_MEASURED = ("plan", "predicted_ms", "budget_met", "latency_budget_ms")


@dataclass(frozen=True)
class Timed:
    """A question and when it is asked: nanoseconds, since the first frame or of the bag's clock."""

    at_ns: int
    text: str
    absolute: bool

    def due(self, first_ns: int) -> int:
        """When, on the bag's clock."""
        return self.at_ns if self.absolute else first_ns + self.at_ns


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("replay", help="a bag and questions, each at its time", description=__doc__)
    parser.add_argument(
        "--questions", type=Path, metavar="FILE",
        help="a line each: seconds since the first frame (or of the bag's clock), then the question; "
        "without it, what was asked on a topic 'question' while the bag was recorded",
    )  # fmt: skip
    add_scenes(parser, only_bag=True)
    add_settings(parser, "--strategy", "--max-new-tokens", "--unsure-below")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answers as JSON, one a line")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write a page for the browser (docs/view.md)")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if every question was answered, 1 if one could not be."""
    check_files(args)
    asked = _questions(args)

    from rich.console import Console
    from rich.text import Text

    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.engine.requests import check_question

    for question in asked:
        check_question(Question(question.text))
    engine, scene = open_scene(args)
    pictures = None
    if args.report is not None:
        from adatoken3d_ros.engine.pictures import Pictures

        pictures = Pictures()
    replay, failed, console = Replay(engine, scene, pictures), False, Console()
    with ExitStack() as stack:
        file = None if args.json is None else stack.enter_context(args.json.open("w", encoding="utf-8"))
        report = stack.enter_context(step_progress(console))
        answers = replay.answers(frames(args), asked, args.max_new_tokens)
        for done, answer in enumerate(with_report(args, scene, pictures, answers), start=1):
            record = replay.record(answer)
            age = "nothing seen" if record["data_age"] is None else f"data {record['data_age']:.3f} s old"
            told = f"{record['at']:.3f} s: {answer.question.text}\n  {answer.text or '(empty)'}\n"
            console.print(Text(f"{told}  [{brief(record_of_answer(answer))}, {age}]"), soft_wrap=True)
            failed = failed or not answer.status.answered
            if file is not None:
                print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            report("questions", done, len(asked))
    return int(failed)


class Replay:
    """Frames and questions in the order of their times.

    Args:
        engine: answers. scene: an empty one of it. pictures: keeps those of the key frames, if given.
    """

    def __init__(self, engine: Engine, scene: Scene, pictures: Pictures | None = None) -> None:
        self._engine, self._scene, self._pictures = engine, scene, pictures
        self._seen: Counter[str] = Counter()
        self._first_ns = self._now_ns = 0

    def answers(self, source: Iterator[PosedFrame], asked: Sequence[Timed], longest: int | None) -> Iterator[Answer]:
        """Each question's answer when all frames up to its time were seen; those after the last frame at the end."""
        waiting: list[Timed] | None = None
        for frame in source:
            if waiting is None:
                self._first_ns = frame.stamp_ns
                waiting = self._in_order(asked)
            while waiting and waiting[0].due(self._first_ns) < frame.stamp_ns:
                yield self._ask(waiting.pop(0), longest)
            self._seen[self._scene.observe(frame).value] += 1
            self._scene.encode_pending()
            if self._pictures is not None and frame.stamp_ns in self._scene.poses:
                self._pictures.add(frame, self._scene)
        for question in self._in_order(asked) if waiting is None else waiting:
            yield self._ask(question, longest)

    def record(self, answer: Answer) -> Record:
        """The answer that came last as plain values: as `record_of_answer`, without what was measured, but with the
        ages on the bag's clock, when it was asked (seconds since the first frame) and what the frames were until then.
        """
        record = {
            name: value
            for name, value in record_of_answer(answer).items()
            if name not in _MEASURED and not name.endswith("_ms")
        }
        ages = {"data_age": answer.stamp_ns, "confirmed_age": answer.confirmed_ns}
        record |= {name: (self._now_ns - stamp) / 1e9 if stamp else None for name, stamp in ages.items()}
        at = (self._now_ns - self._first_ns) / 1e9
        return {"at": at, "at_ns": self._now_ns, **record, "frames": dict(sorted(self._seen.items()))}

    def _in_order(self, asked: Sequence[Timed]) -> list[Timed]:
        return sorted(asked, key=lambda question: question.due(self._first_ns))

    def _ask(self, question: Timed, longest: int | None) -> Answer:
        from adatoken3d_ros.engine.answer import Question

        self._now_ns = question.due(self._first_ns)
        return self._engine.ask(self._scene, Question(question.text, max_new_tokens=longest))


def timed_questions(lines: Sequence[str], path: Path) -> tuple[Timed, ...]:
    """Questions with their times. Raises ValueError, naming file and line, for one without."""
    found = []
    for line in lines:
        if (match := _TIMED.fullmatch(line)) is None:
            raise ValueError(f"{path}: {quoted(line)} begins with no time in seconds, as in '12.5 What is this?'")
        whole, _, fraction = match[1].partition(".")
        if len(whole) > len(str(_ABSOLUTE)):
            raise ValueError(f"{path}: {quoted(match[1])} is no time in seconds")
        at_ns = int(whole) * 10**9 + int(fraction.ljust(9, "0") or 0)
        found.append(Timed(at_ns, match[2], int(whole) >= _ABSOLUTE))
    return tuple(found)


def _questions(args: argparse.Namespace) -> tuple[Timed, ...]:
    if args.questions is not None:
        return timed_questions(read_questions(args.questions), args.questions)
    from adatoken3d_ros.ros.bag import recorded_questions

    found = tuple(Timed(time, text, True) for time, text in recorded_questions(args.bag))
    if not found:
        raise ValueError(f"{args.bag} holds no question on a topic 'question': give some (--questions FILE)")
    return found
