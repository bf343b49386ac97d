# SPDX-License-Identifier: Apache-2.0
"""Every question of a set asked under every strategy: a scene is built once, and what was answered is not asked again.

Answers are written down as they come, a line of JSON for each. A line belongs to all that the answer depends on, by a
digest: model, strategy, scene, question, wording, settings; so a run that ended goes on where it was, and one with
another strategy asks for that alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.evaluation.question_sets import Item, QuestionSet
from adatoken3d_ros.lab.spread import Spread
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.scene.frames import PosedFrame

Report = Callable[[str, int, int | None], None]
Record = dict[str, Any]
_FIELDS = ("text", "status_message", "spatial_tokens", "retained_tokens", "prefill_flops", "prefill_flops_unpruned")


@dataclass(frozen=True)
class Run:
    """What is asked of whom.

    Attributes:
        set: the questions. prompt: wording around each, with {question} and {situation}.
        strategies: {name in the table: strategy}; the first one is what others are compared with.
        settings: whatever else an answer depends on, plain values: of the model, of frames, of lengths.
    """

    set: QuestionSet
    prompt: str
    strategies: Mapping[str, Strategy]
    settings: Mapping[str, Any]

    def text(self, item: Item) -> str:
        """The question as it is asked. Raises ValueError for a wording that is none."""
        try:
            text = self.prompt.format(question=item.question.strip(), situation=item.situation.strip())
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"--prompt {self.prompt!r} may hold {{question}} and {{situation}} alone") from error
        return " ".join(text.split())

    def key(self, item: Item, strategy: Strategy, engine: Engine) -> str:
        """Digest of what the answer depends on."""
        gates = [[stage.layer, stage.ratio] for stage in strategy.schedule.stages]
        options = sorted((name, repr(value)) for name, value in strategy.options.items())
        whom = [engine.model_id, strategy.policy, options, gates, strategy.schedule.withdraw_layer]
        what = [self.set.name, item.id, item.scene, self.text(item), item.clicks, sorted(self.settings.items())]
        return hashlib.sha256(json.dumps([whom, what], default=str).encode()).hexdigest()[:32]


class Kept:
    """Answers in a file of one run at a time; a line that was cut off when a run was killed counts as not there.

    Raises:
        ValueError: for a file that holds something else, or that another run writes.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another run") from error
        self._file.seek(0)
        content = self._file.read()
        # In bytes: what was cut off may end within a character, and an answer may hold what ends a line elsewhere.
        whole = content[: content.rfind(b"\n") + 1]
        self.found: dict[str, Record] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                self.found[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no answer of this command") from error
        self._file.truncate(len(whole))

    def add(self, record: Record) -> None:
        """Writes one down."""
        line = json.dumps(record, ensure_ascii=False)
        self._file.write(f"{line}\n".encode())
        self._file.flush()
        self.found[record["key"]] = json.loads(line)

    def close(self) -> None:
        """Lets another run have the file."""
        self._file.close()


@dataclass(frozen=True)
class Desk:
    """Where questions are answered: by whom, how a scene of that engine is begun, the frames of a scene by its name."""

    engine: Engine
    open_scene: Callable[[], Scene]
    frames: Callable[[str], Iterable[PosedFrame]]


@dataclass(frozen=True)
class Sheet:
    """What is to be asked about a scene: of each question its number in the set, its strategy's name, the key."""

    run: Run
    scene: str
    todo: tuple[tuple[int, str, str], ...]


def answer_sheet(desk: Desk, sheet: Sheet) -> Iterator[Record]:
    """The answers, in turn. Raises as `answer_all`."""
    run = sheet.run
    scene = _built(desk.open_scene(), sheet.scene, desk.frames(sheet.scene))
    for index, strategy, key in sheet.todo:
        scene.set_strategy(run.strategies[strategy])
        item = run.set.items[index]
        answer = desk.engine.ask(scene, Question(run.text(item), np.array(item.clicks).reshape(-1, 3)))
        yield {"key": key, "strategy": strategy, "id": item.id, "scene": sheet.scene, **_told(answer)}


def whole_sheet(desk: Desk, sheet: Sheet) -> list[Record]:
    """The same, all at once: what travels back from another process."""
    return list(answer_sheet(desk, sheet))


def answer_all(
    run: Run, engine: Engine, spread: Spread[Desk] | Desk, kept: Kept, report: Report
) -> dict[str, list[Record]]:
    """{strategy: answers, in the order of the set}; asks what `kept` does not have yet.

    Args:
        engine: whose answers count as the same. spread: who answers, a scene each at a time, or this process's desk,
            whose answers are kept one by one. report: told (step, done, total).

    Raises:
        ValueError, OSError: for a scene that cannot be read, or of which nothing is seen; the scene is named.
    """
    keys = {
        name: [run.key(item, strategy, engine) for item in run.set.items] for name, strategy in run.strategies.items()
    }
    total = len(run.set.items) * len(run.strategies)
    done = sum(key in kept.found for several in keys.values() for key in several)
    report("answers", done, total)
    by_scene: dict[str, list[tuple[int, str, str]]] = {}
    for index, item in enumerate(run.set.items):
        waiting = [(index, name, keys[name][index]) for name in keys if keys[name][index] not in kept.found]
        by_scene.setdefault(item.scene, []).extend(waiting)
    sheets = [Sheet(run, name, tuple(todo)) for name, todo in by_scene.items() if todo]
    answered: Iterator[Iterable[Record]]
    if isinstance(spread, Desk):
        desk = spread
        answered = (answer_sheet(desk, sheet) for sheet in sheets)
    else:
        answered = spread.map(whole_sheet, sheets)
    for records in answered:
        for record in records:
            kept.add(record)
            done += 1
            report("answers", done, total)
    return {name: [kept.found[key] for key in several] for name, several in keys.items()}


def _built(scene: Scene, name: str, frames: Iterable[PosedFrame]) -> Scene:
    """A scene that has seen all of its frames; its tokens are made once for all strategies."""
    for frame in frames:
        scene.observe(frame)
        scene.encode_pending()
    if not len(scene.memory):
        raise ValueError(f"scene {name!r}: nothing was seen ({scene.memory.problem or 'no frame with depth'})")
    scene.prepare()
    return scene


def _told(answer: Answer) -> Record:
    return {
        **{name: getattr(answer, name) for name in _FIELDS},
        "status": answer.status.name,
        "boxes": [[*box.centre, *box.size] for box in answer.boxes],
        "confidence": None if np.isnan(answer.confidence) else answer.confidence,
        "times_ms": asdict(answer.times),
    }


def predictions(items: Sequence[Item], records: Sequence[Record]) -> list[Record]:
    """Answers in the form that OpenEQA's and LLaVA-3D's own scripts take: question_id, answer, text."""
    return [
        {"question_id": item.id, "answer": record["text"], "text": record["text"]}
        for item, record in zip(items, records, strict=True)
    ]
