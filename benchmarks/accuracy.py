# SPDX-License-Identifier: Apache-2.0
"""How often is the model right, about rooms that it never saw?

Rooms of the split `test` (new rooms, known furniture) and `test_unseen` (furniture models never trained on) are
rendered, observed by a session and asked about, answers decoded greedily. An answer counts when it is right to the
letter; a box by its overlap (intersection over union) with the true one. Beside it:

* majority: the most frequent answer of each family in training rooms;
* blind: a model that was trained alike without spatial tokens (`adatoken3d train --blind`), if one is given.

Intervals are 95 % bootstrap intervals over rooms: questions about one room are not independent.

    python -m benchmarks.accuracy --json F [--model DIR] [--blind DIR] [--questions 2000]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.session import SceneSession, SessionConfig
from adatoken3d_ros.model.checkpoint import load
from adatoken3d_ros.model.prompt import parse_boxes
from adatoken3d_ros.models import embedded_path
from adatoken3d_ros.pruning.gate import generate
from adatoken3d_ros.pruning.prefix import ScenePrefix
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.synthetic.furnished import FurnishedRoom, Split, make_room
from adatoken3d_ros.synthetic.questions import FAMILIES, QA
from adatoken3d_ros.synthetic.questions import generate as ask
from adatoken3d_ros.synthetic.views import Sight, View, render_views, sights

SPLITS: tuple[Split, ...] = ("test", "test_unseen")
EXACT = tuple(family for family in FAMILIES if family != "box")
MAX_ANSWER = 48  # tokens; a box takes 26 to 32
_MAJORITY_ROOMS = 150


@dataclass(frozen=True, eq=False)
class Case:
    """A room, how it is seen, and what is asked about it."""

    room: FurnishedRoom
    views: list[View]
    questions: list[QA]


@dataclass(frozen=True)
class Outcome:
    """One answer: `score` is 1 or 0, for a box its overlap with the true one."""

    room: int
    family: str
    answer: str
    score: float


def cases(split: Split, questions: int, n_views: int, seed: int, per_family: int = 2) -> Iterator[Case]:
    """Rooms from seed 0 of the split on, until there are so many questions; every second camera is noisy."""
    found = 0
    number = 0
    while found < questions:
        room = make_room(number, split)
        views = render_views(room, seed=number, count=n_views, noise=number % 2 == 1)
        seen: Mapping[int, Sight] = sights(views, np.random.default_rng([number, 1]))
        asked = ask(room, np.random.default_rng([seed, number]), seen, per_family=per_family)
        found += len(asked)
        number += 1
        yield Case(room, views, asked)


class Answerer:
    """A checkpoint that answers all questions about a room with no token pruned, its prefix read once."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer, _ = load(path, dtype=torch.float32)
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.training: dict[str, Any] = content.get("training", {})
        self.blind = bool(self.training.get("blind", False))
        # Every view counts: they were chosen to show the room.
        views = self.model.config.num_views
        self.config = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0, views))

    def answers(self, case: Case) -> list[str]:
        """The answer to each question, decoded greedily."""
        session = SceneSession(self.model, self.tokenizer, self.config)
        for view in case.views:
            session.observe(view.frame)
        session.encode_pending()
        texts: list[str] = []
        prefix: ScenePrefix | None = None
        for qa in case.questions:
            spliced, _ = session.spliced(Question(qa.question))
            start, end = spliced.spatial_start, spliced.spatial_start + spliced.n_spatial
            with torch.inference_mode():
                if prefix is None:
                    embeds = spliced.embeds[:, :end]
                    if self.blind:  # it was trained with one empty token in place of the scene
                        empty = self.model.project(torch.zeros(1, int(self.model.config.vision.hidden_size)))
                        embeds = torch.cat([embeds[:, :start], empty[None]], dim=1)
                    prefix = ScenePrefix(self.model.language, embeds, start)
                with prefix.asking(spliced.embeds[:, end:], max_new_tokens=MAX_ANSWER) as read:
                    eos = {int(self.tokenizer.eos_token_id)}
                    ids = list(generate(self.model.language, read, max_new_tokens=MAX_ANSWER, eos_ids=eos))
            texts.append(str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip())
        return texts


def score(qa: QA, answer: str) -> float:
    """1 for the answer to the letter, else 0; a box's overlap with the true one, 0 where there is none."""
    if qa.box is None:
        return float(answer == qa.answer)
    boxes = parse_boxes(answer)
    return overlap(boxes[0][:6], qa.box) if boxes else 0.0


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (cx, cy, cz, dx, dy, dz); 0 where a size is not positive."""
    first, second = np.array(a, np.float64), np.array(b, np.float64)
    if (first[3:] <= 0).any() or (second[3:] <= 0).any():
        return 0.0
    low = np.maximum(first[:3] - first[3:] / 2, second[:3] - second[3:] / 2)
    high = np.minimum(first[:3] + first[3:] / 2, second[:3] + second[3:] / 2)
    shared = float(np.prod(np.maximum(high - low, 0)))
    return shared / float(np.prod(first[3:]) + np.prod(second[3:]) - shared)


def summary(outcomes: Sequence[Outcome], seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """Accuracy by family, their mean (`macro`, boxes apart) with its interval, and boxes by overlap."""
    rooms = sorted({o.room for o in outcomes})
    place = {room: k for k, room in enumerate(rooms)}
    right = np.zeros((len(rooms), len(EXACT)))
    count = np.zeros_like(right)
    for o in outcomes:
        if o.family in EXACT:
            right[place[o.room], EXACT.index(o.family)] += o.score
            count[place[o.room], EXACT.index(o.family)] += 1
    drawn = np.random.default_rng(seed).integers(len(rooms), size=(resamples, len(rooms)))
    macros = [_macro(right[rows].sum(axis=0), count[rows].sum(axis=0)) for rows in drawn]
    boxes = np.array([o.score for o in outcomes if o.family == "box"])
    return {
        "macro": _macro(right.sum(axis=0), count.sum(axis=0)),
        "interval": [float(v) for v in np.quantile(macros, [0.025, 0.975])],
        "families": {f: float(r / n) for f, r, n in zip(EXACT, right.sum(axis=0), count.sum(axis=0), strict=True) if n},
        "boxes": {name: float((boxes >= t).mean()) for name, t in (("acc25", 0.25), ("acc50", 0.5)) if len(boxes)},
        "counts": dict(sorted(Counter(o.family for o in outcomes).items())),
        "questions": len(outcomes),
        "rooms": len(rooms),
    }


def _macro(right: np.ndarray, count: np.ndarray) -> float:
    asked = count > 0
    return float((right[asked] / count[asked]).mean())


def majority_answers(rooms: int = _MAJORITY_ROOMS) -> dict[str, str]:
    """The most frequent answer of each family in training rooms."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(rooms):
        for qa in ask(make_room(seed, "train"), np.random.default_rng([7, seed]), per_family=2):
            answers[qa.family][qa.answer] += 1
    return {family: min(found.items(), key=lambda f: (-f[1], f[0]))[0] for family, found in answers.items()}


def run(model: Path, blind: Path | None, questions: int, seed: int, console: Console) -> dict[str, Any]:
    """All figures."""
    ours = Answerer(model)
    unseeing = Answerer(blind) if blind is not None else None
    if unseeing is not None and not unseeing.blind:
        raise ValueError(f"{blind} was trained with spatial tokens: its config.json does not say blind")
    frequent = majority_answers()
    result: dict[str, Any] = {"majority": {}, "blind": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for split in SPLITS:
        found: dict[str, list[Outcome]] = defaultdict(list)
        started, seconds = time.monotonic(), 0.0
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(f"questions of {split}", total=questions)
            for case in cases(split, questions, ours.model.config.num_views, seed):
                before = time.monotonic()
                given = {"ours": ours.answers(case)}
                seconds += time.monotonic() - before
                given["majority"] = [frequent.get(qa.family, "") for qa in case.questions]
                if unseeing is not None:
                    given["blind"] = unseeing.answers(case)
                for who, texts in given.items():
                    found[who] += [
                        Outcome(case.room.seed, qa.family, text, score(qa, text))
                        for qa, text in zip(case.questions, texts, strict=True)
                    ]
                bar.advance(task, len(case.questions))
        result[split] = summary(found["ours"], seed)
        result[split]["seconds_per_question"] = seconds / len(found["ours"])
        result[split]["seconds"] = time.monotonic() - started
        for who in ("majority", "blind"):
            if found[who]:
                result[who][split] = summary(found[who], seed)
    result["model"] = {
        "name": model.resolve().name,
        "hash": ours.model.config.hash(),
        "parameters": sum(p.numel() for p in ours.model.parameters()),
        "training": ours.training,
    }
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return result


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
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args()
    for name in ("questions", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    torch.set_num_threads(arguments.threads)
    console = Console()
    result = run(arguments.model or embedded_path(), arguments.blind, arguments.questions, arguments.seed, console)
    console.print(report(result))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
