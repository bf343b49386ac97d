# SPDX-License-Identifier: Apache-2.0
"""How often is the model, trained on rendered rooms, right about photographs of a real office desk?

The posed photographs are observed as `adatoken3d ask --folder` observes them, and every question of
`benchmarks/data/tum_fr1_desk.json` is asked through it, once with every token kept ("none") and once with the default
pruning ("ours"). An answer counts when it is right to the letter, or is one of the words that the file calls as right.
Beside it, what can be had without looking:

* majority: the most frequent answer of each family in training rooms;
* constant: for each family the best of always saying one word, always the first or always the second thing named,
  chosen with this file's answers in hand: more than any guesser gets;
* blind: a model that was trained without spatial tokens (`adatoken3d train --blind`), if one is given.

Intervals are Wilson's, 95 %, over the questions: they say what so few questions leave open about this one desk, and
nothing about other scenes.

The model was trained in rooms with the floor at z = 0 and the origin in their middle. Where it sees its origin here is
found by the scene itself, from the depth alone: on the floor, in the middle of what was seen (`scene.window`).

    python -m benchmarks.photographs --json F --photographs DIR [--model DIR] [--blind DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adatoken3d_ros.cli import ask
from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.synthetic.questions import FAMILIES
from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.scene.folder import read_folder
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.weights import embedded_path
from benchmarks._refusals import refuse_missing, told_before
from benchmarks._scenes import write_json
from benchmarks.accuracy import majority_answers

QUESTIONS = Path(__file__).parent / "data" / "tum_fr1_desk.json"
STRATEGIES = ("none", "ours")
_BLIND_TOKENS = 24  # of an answer; the longest right one has four


@dataclass(frozen=True)
class Checked:
    """A question about the photographs.

    Attributes:
        family: one of `synthetic.questions.FAMILIES`. question: with its points written in it, scene frame, metres.
        answer: to the letter. also: words that are as right.
        clicks: the points of the question, in order. pixels: [u, v] where one was taken from `photograph`, else None.
        about: names in the file's objects; of a comparison with a goal, the goal first and then the answer.
        photograph: stem of one that shows what decides the answer.
    """

    family: str
    question: str
    answer: str
    also: tuple[str, ...]
    clicks: tuple[tuple[float, ...], ...]
    pixels: tuple[tuple[int, int] | None, ...]
    about: tuple[str, ...]
    photograph: str

    def right(self, answer: str) -> bool:
        return answer in (self.answer, *self.also)


@dataclass(frozen=True)
class Thing:
    """What relations are asked about: its middle and how far it reaches from there, metres; a pixel that shows it."""

    centre: tuple[float, float, float]
    radius: float
    photograph: str
    pixel: tuple[int, int]


def read_questions(path: Path = QUESTIONS) -> tuple[list[Checked], dict[str, Thing]]:
    """The questions and the objects of a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: for content that does not fit; the text names it.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        questions = [
            Checked(
                entry["family"],
                entry["question"],
                entry["answer"],
                tuple(entry.get("also", ())),
                tuple(tuple(float(v) for v in click) for click in entry.get("clicks", ())),
                tuple((pixel[0], pixel[1]) if pixel else None for pixel in entry.get("pixels", ())),
                tuple(entry.get("about", ())),
                entry["photograph"],
            )
            for entry in content["questions"]
        ]
        things = {
            name: Thing(tuple(entry["centre"]), entry["radius"], entry["photograph"], tuple(entry["pixel"]))
            for name, entry in content["objects"].items()
        }
    except KeyError as error:
        raise ValueError(f"{path}: an entry lacks {error}") from error
    for asked in questions:
        if asked.family not in FAMILIES:
            raise ValueError(f"{path}: unknown family {asked.family!r} of {asked.question!r}")
    return questions, things


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - reach), min(1.0, middle + reach)


def summary(questions: Sequence[Checked], answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy overall with its interval, and by family; `macro` is the mean of the families."""
    right: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for asked, answer in zip(questions, answers, strict=True):
        count[asked.family] += 1
        right[asked.family] += asked.right(answer)
    families = {family: right[family] / count[family] for family in FAMILIES if count[family]}
    return {
        "accuracy": sum(right.values()) / len(questions),
        "interval": list(wilson(sum(right.values()), len(questions))),
        "macro": sum(families.values()) / len(families),
        "families": families,
        "counts": {family: count[family] for family in families},
        "questions": len(questions),
    }


def constant_answers(questions: Sequence[Checked]) -> list[str]:
    """What the best guesser says who knows the family's answers and the question's wording, but not which is which."""
    said: dict[str, Callable[[Checked], str]] = {}
    for family in dict.fromkeys(asked.family for asked in questions):
        own = [asked for asked in questions if asked.family == family]
        ways: list[Callable[[Checked], str]] = [
            lambda asked, word=word: word  # type: ignore[misc]
            for word in sorted({word for asked in own for word in (asked.answer, *asked.also)})
        ]
        if all(len(offered(asked)) == 2 for asked in own):
            ways += [lambda asked: offered(asked)[0], lambda asked: offered(asked)[1]]
        said[family] = max(ways, key=lambda way: sum(asked.right(way(asked)) for asked in own))
    return [said[asked.family](asked) for asked in questions]


def offered(asked: Checked) -> tuple[str, ...]:
    """The two names between which a comparison leaves the choice, in the question's order; () for other families."""
    if asked.family not in ("closer", "taller", "larger"):
        return ()
    return tuple(sorted(asked.about[-2:], key=lambda name: asked.question.rfind(f"the {name}")))


def watch(model: Path, photographs: Path, strategy: str) -> tuple[Engine, Scene]:
    """Engine and scene of `adatoken3d ask --folder` after it has seen the photographs.

    Raises:
        ValueError, OSError: for a checkpoint or a folder that cannot be used.
    """
    parser = argparse.ArgumentParser()
    ask.add_parser(parser.add_subparsers())
    given = ["ask", "", "--model", str(model), "--folder", str(photographs)]
    args = parser.parse_args([*given, "--strategy", strategy, "--device", "cpu", "--dtype", "float32"])
    engine, scene = ask.open_scene(args)
    ask.watch_all(scene, ask.frames(args))
    return engine, scene


def run(model: Path, photographs: Path, blind: Path | None, console: Console) -> dict[str, Any]:
    """All figures.

    Raises:
        ValueError, OSError: for a checkpoint or a folder that cannot be used; RuntimeError if a question fails.
    """
    questions, _ = read_questions()
    if blind is not None:
        check_blind(blind)
    result: dict[str, Any] = {}
    given: dict[str, list[str]] = {}
    for name in STRATEGIES:
        engine, scene = watch(model, photographs, name)
        texts = []
        for asked in track(questions, f"questions ({name})", console=console, transient=True):
            answer = engine.ask(scene, Question(asked.question))
            if not answer.status.answered:
                raise RuntimeError(f"{asked.question!r}: {answer.status.name} {answer.status_message}")
            texts.append(answer.text)
        given[name] = texts
        result |= {"views": len(scene.poses), "spatial_tokens": answer.spatial_tokens, "model": engine.model_id}
    origin = tuple(round(float(v), 3) for v in scene.memory.origin)
    result["origin"] = list(origin)
    frequent = majority_answers()
    given["majority"] = [frequent.get(asked.family, "") for asked in questions]
    given["constant"] = constant_answers(questions)
    if blind is not None:
        given["blind"] = blind_answers(blind, questions, next(read_folder(photographs)), origin)
    for name, texts in given.items():
        result[name] = summary(questions, texts)
    result["answers"] = [
        {"question": asked.question, "right": [asked.answer, *asked.also], **{n: t[k] for n, t in given.items()}}
        for k, asked in enumerate(questions)
    ]
    result["machine"] = {"processor": platform.machine(), "torch": torch.__version__}
    return result


def blind_answers(path: Path, questions: Sequence[Checked], frame: PosedFrame, origin: tuple[float, ...]) -> list[str]:
    """What a model answers that was trained without spatial tokens, greedily.

    Raises:
        ValueError: if it was trained with them.
    """
    check_blind(path)
    model, tokenizer, _ = load(path, dtype=torch.float32)
    x, y, z = origin
    scene = Engine(model, tokenizer).open(SessionConfig(origin=(x, y, z)))
    scene.observe(frame)
    scene.encode_pending()
    # It was trained with one empty token in place of the scene.
    empty = model.scene_tokens(torch.zeros(1, model.sizes.feature_width), torch.zeros(1, 0))[None]
    texts = []
    for asked in questions:
        with torch.inference_mode():
            spliced, _ = scene.spliced(Question(asked.question))
            start, end = spliced.spatial_start, spliced.spatial_start + spliced.n_spatial
            prefix = ScenePrefix(model.decoder, torch.cat([spliced.embeds[:, :start], empty], dim=1), start)
            with prefix.asking(spliced.embeds[:, end:], max_new_tokens=_BLIND_TOKENS) as read:
                eos = {int(tokenizer.eos_token_id)}
                ids = list(generate(model.decoder, read, max_new_tokens=_BLIND_TOKENS, eos_ids=eos))
        texts.append(str(tokenizer.decode(ids, skip_special_tokens=True)).strip())
    return texts


def check_blind(path: Path) -> None:
    """Raises ValueError for a checkpoint that was trained with spatial tokens."""
    if not json.loads((path / "config.json").read_text(encoding="utf-8")).get("training", {}).get("blind", False):
        raise ValueError(f"{path} was trained with spatial tokens: its config.json does not say blind")


def report(result: Mapping[str, Any]) -> Table:
    """Families down, answerers across."""
    names = [name for name in (*STRATEGIES, "blind", "majority", "constant") if name in result]
    first = result[names[0]]
    title = (
        f"{first['questions']} questions about photographs ({result['views']} views kept, {result['spatial_tokens']} "
        f"tokens, origin {result['origin']} m)"
    )
    table = Table(title=title)
    table.add_column("family")
    for name in names:
        table.add_column(name, justify="right")
    for family, count in first["counts"].items():
        table.add_row(f"{family} ({count})", *(f"{result[name]['families'][family]:.2f}" for name in names))
    table.add_row(
        "all", *("{:.2f} [{:.2f}, {:.2f}]".format(result[n]["accuracy"], *result[n]["interval"]) for n in names)
    )
    table.add_row("mean of families", *(f"{result[name]['macro']:.2f}" for name in names))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures and all answers to")
    parser.add_argument("--photographs", type=Path, required=True, help="folder with the posed photographs")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--blind", type=Path, help="checkpoint trained with --blind")
    arguments = parser.parse_args()
    refuse_missing(parser, arguments, "photographs", "model", "blind")
    told_before(parser, arguments)
    console = Console()
    result = run(arguments.model or embedded_path(), arguments.photographs, arguments.blind, console)
    console.print(report(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
