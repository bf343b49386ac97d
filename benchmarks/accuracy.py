# SPDX-License-Identifier: Apache-2.0
"""How often is the model right, about rooms that it never saw?

Rooms of the split `test` (new rooms, known furniture) and `test_unseen` (furniture models never trained on) are
rendered, encoded as a session does it and asked about, answers decoded greedily. An answer counts when it is right to
the letter; a box by its overlap (intersection over union) with the true one. Beside it:

* majority: the most frequent answer of each family in training rooms; which of two things it is, is answered by the
  one named first;
* blind: a model that was trained alike without spatial tokens (`adatoken3d train --blind`), if one is given.

Questions about places that nobody saw are asked, too, in rooms whose tokens around a thing are taken away: `unknown`
has how often the answer to them is "I do not know", and how often it is to questions that can be answered.

--camera real and other ask about rooms as a camera sees them, the latter with a texture that no training room has
(`SceneConfig.camera`).

Intervals are 95 % bootstrap intervals over rooms: questions about one room are not independent.

    python -m benchmarks.accuracy --json F [--model DIR] [--blind DIR] [--questions 2000] [--scenes DIR] [--workers 2]
        [--camera ideal]
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.cli.train import CAMERAS
from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.lab.metrics.answers import overlap
from adatoken3d_ros.lab.synthetic.furnished import Split, make_room
from adatoken3d_ros.lab.synthetic.questions import generate as ask
from adatoken3d_ros.lab.synthetic.unseen import unseen
from adatoken3d_ros.lab.synthetic.wordings import QA, UNKNOWN
from adatoken3d_ros.lab.training.data import Scene
from adatoken3d_ros.lab.training.variants import looked_away
from adatoken3d_ros.lmm.text_places import parse_boxes
from adatoken3d_ros.weights import embedded_path
from benchmarks._paired import COLUMNS, EXACT, Tally, scene_interval
from benchmarks._refusals import refuse_missing, told_before
from benchmarks._scenes import Reader, Room, Workers, bar, find_rooms, machine, write_json

SPLITS: tuple[Split, ...] = ("test", "test_unseen")
MAX_ANSWER = 48  # tokens; a box takes 26 to 32
_BOXES = {"box@0.25": "acc25", "box@0.50": "acc50"}
_MAJORITY_ROOMS = 150
_UNSEEN = 3  # things that nobody looked at, a room and in turn
_AROUND = 0.8  # metres around them that nobody saw
_ONE_OF_TWO = ("closer", "taller", "larger")
TWO = re.compile(r"(?:, |: |Is |Of )the (.+?) (?:or|and) the (.+?)(?:\?|,| closer| the )")


@dataclass(frozen=True)
class Outcome:
    """One answer: `score` is 1 or 0, for a box its overlap with the true one."""

    room: int
    family: str
    answer: str
    score: float


def answers(reader: Reader, room: Room) -> list[str]:
    """The answer to each question about a room, decoded greedily with no token pruned; the scene is read once."""
    return _answers(reader, room.scene(), room.questions)


def about_the_unseen(reader: Reader, room: Room) -> list[tuple[str, str]]:
    """Families of questions about things in a room at which nobody looked, one after the other, and the answers."""
    scene, rng = room.scene(), np.random.default_rng([5, room.seed])
    found: list[tuple[str, str]] = []
    seen = [item for item in scene.room.items if item.instance in scene.sights]
    for k in rng.permutation(len(seen))[:_UNSEEN].tolist():
        away = looked_away(scene, seen[k], _AROUND)
        if asked := unseen(scene.room, away.sights, away.xyz.numpy(), rng, 1):
            found += [(asked[0].family, text) for text in _answers(reader, away, asked)]
    return found


def _answers(reader: Reader, scene: Scene, questions: Sequence[QA]) -> list[str]:
    samples = reader.samples(scene, questions)
    end = samples[0].layout.spatial_end
    texts: list[str] = []
    with torch.inference_mode():
        first = samples[0]
        prefix = ScenePrefix(reader.decoder, first.embeds[:, :end], first.spatial_start, layout=first.layout)
        for sample in samples:
            with prefix.asking(sample.embeds[:, end:], max_new_tokens=MAX_ANSWER) as read:
                ids = list(generate(reader.decoder, read, max_new_tokens=MAX_ANSWER, eos_ids={reader.eos}))
            texts.append(reader.text(ids))
    return texts


def score(qa: QA, answer: str) -> float:
    """1 for the answer to the letter, else 0; a box's overlap with the true one, 0 where there is none."""
    if qa.box is None:
        return float(answer == qa.answer)
    boxes = parse_boxes(answer)
    return overlap(boxes[0][:6], qa.box) if boxes else 0.0


def summary(outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """Accuracy by family, their mean (`macro`, boxes apart) and boxes by overlap, each with its interval."""
    scores = np.array([[o.score for o in outcomes]])
    tally = Tally([o.room for o in outcomes], [o.family for o in outcomes], scores, seed=seed)
    found = {name: float(value) for name, value in zip(COLUMNS, tally.accuracy[0], strict=True) if not np.isnan(value)}
    return {
        "macro": float(tally.macro[0]),
        "interval": tally.interval(0),
        "families": {name: value for name, value in found.items() if name in EXACT},
        "boxes": {_BOXES[name]: value for name, value in found.items() if name in _BOXES},
        "intervals": {_BOXES.get(name, name): between for name, between in tally.column_intervals(0).items()},
        "counts": dict(sorted(Counter(o.family for o in outcomes).items())),
        "questions": len(outcomes),
        "rooms": tally.rooms,
    }


def guesses(questions: Sequence[QA], frequent: Mapping[str, str]) -> list[str]:
    """What somebody says who looks at nothing: of two things the first, else the family's most frequent answer."""
    two = [TWO.search(qa.question) if qa.family in _ONE_OF_TWO else None for qa in questions]
    return [named[1] if named else frequent.get(qa.family, "") for qa, named in zip(questions, two, strict=True)]


def majority_answers(rooms: int = _MAJORITY_ROOMS) -> dict[str, str]:
    """The most frequent answer of each family in training rooms."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(rooms):
        for qa in ask(make_room(seed, "train"), np.random.default_rng([7, seed]), per_family=2):
            answers[qa.family][qa.answer] += 1
    return {family: min(found.items(), key=lambda f: (-f[1], f[0]))[0] for family, found in answers.items()}


def outcomes(rooms: Sequence[Room], texts: Sequence[Sequence[str]]) -> list[Outcome]:
    """From the texts of the answers to each question of each room."""
    return [
        Outcome(room.seed, qa.family, text, score(qa, text))
        for room, given in zip(rooms, texts, strict=True)
        for qa, text in zip(room.questions, given, strict=True)
    ]


def unknown(about_unseen: Sequence[Outcome], others: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """How often one says that one does not know: where nothing was seen, and of all else that was asked."""
    found: dict[str, Any] = {}
    for name, some in (("of_unseen", about_unseen), ("of_seen", others)):
        said = np.array([float(one.answer == UNKNOWN) for one in some])
        share = scene_interval([one.room for one in some], said, seed=seed).tolist() if some else [None] * 3
        found[name] = {"said": share[0], "interval": share[1:], "questions": len(some)}
    return found


def run(
    model: Path,
    blind: Path | None,
    questions: int,
    seed: int,
    console: Console,
    folder: Path,
    workers: int = 1,
    camera: str = "ideal",
) -> dict[str, Any]:
    """All figures; rooms are kept in the folder."""
    ours = Reader(model, camera=camera)
    if blind is not None and not Reader(blind).blind:
        raise ValueError(f"{blind} was trained with spatial tokens: its config.json does not say blind")
    frequent = majority_answers()
    result: dict[str, Any] = {**{split: {} for split in SPLITS}, "blind": {}, "majority": {}, "unknown": {}}
    found: dict[Split, list[Room]] = {}
    for split in SPLITS:
        with bar(console, f"rooms of {split}") as progress:
            found[split] = find_rooms(ours, folder, split, questions, seed=seed, workers=workers, progress=progress)
    with Workers(ours, workers, console) as pool:
        for split, rooms in found.items():
            started = time.monotonic()
            seen = outcomes(rooms, pool.map(f"answers, {split}", answers, rooms))
            result[split] = summary(seen, seed)
            told = [
                Outcome(room.seed, family, text, float(text == UNKNOWN))
                for room, given in zip(rooms, pool.map(f"the unseen, {split}", about_the_unseen, rooms), strict=True)
                for family, text in given
            ]
            result["unknown"][split] = unknown(told, seen, seed)
            result[split]["seconds"] = time.monotonic() - started
            guessed = [guesses(room.questions, frequent) for room in rooms]
            result["majority"][split] = summary(outcomes(rooms, guessed), seed)
    if blind is not None:
        result["blind_model"] = Reader(blind).about()
        with Workers(Reader(blind), workers, console) as pool:
            for split, rooms in found.items():
                given = pool.map(f"blind answers, {split}", answers, rooms)
                result["blind"][split] = summary(outcomes(rooms, given), seed)
    return {**result, "camera": camera, "model": ours.about(), "machine": {**machine(), "workers": workers}}


def report(result: Mapping[str, Any]) -> Table:
    """Families down, models across."""
    columns: list[tuple[str, Any]] = [(split, result[split]) for split in SPLITS]
    columns += [(f"{who}, {split}", result[who][split]) for who in ("majority", "blind") for split in result[who]]
    table = Table(title="Answers right to the letter; macro with its 95 % interval; boxes by overlap")
    table.add_column("family")
    for name, values in columns:
        table.add_column(f"{name}\n{values['questions']} questions", justify="right")
    for family in EXACT:
        table.add_row(family, *(f"{values['families'].get(family, float('nan')):.2f}" for _, values in columns))
    table.add_row("macro", *("{:.3f} [{:.3f}, {:.3f}]".format(v["macro"], *v["interval"]) for _, v in columns))
    for name in ("acc25", "acc50"):
        table.add_row(f"boxes {name}", *(f"{v['boxes'].get(name, float('nan')):.2f}" for _, v in columns))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--blind", type=Path, help="checkpoint trained with --blind")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many a split")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the bootstrap")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    parser.add_argument("--camera", choices=CAMERAS, default="ideal", help="what rooms are seen through (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, with a thread each where there are several")
    parser.add_argument("--threads", type=int, default=2, help="of torch in a single process")
    arguments = parser.parse_args()
    for name in ("questions", "workers", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    refuse_missing(parser, arguments, "model", "blind")
    told_before(parser, arguments)
    torch.set_num_threads(arguments.threads)
    console = Console()
    with TemporaryDirectory() as temporary:
        result = run(
            arguments.model or embedded_path(),
            arguments.blind,
            arguments.questions,
            arguments.seed,
            console,
            arguments.scenes or Path(temporary),
            arguments.workers,
            arguments.camera,
        )
    console.print(report(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
