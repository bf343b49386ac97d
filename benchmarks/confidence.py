# SPDX-License-Identifier: Apache-2.0
"""Is a model right as often as it says?

The probability p of an answer's first token tells right answers from wrong ones. On training rooms that no training
saw (from seed 7,000,000 on) a logistic curve over log(p / (1 - p)), with an offset for each family of questions, is
fitted to what was right (Platt 1999; here with a ridge on how far a family may be from all); `engine.understanding`
has the formula. It is checked on rooms of the splits `test` (new rooms, known furniture) and `test_unseen` (furniture
models that the model never saw), which the fit never sees:

* ece: expected calibration error, over ten equal bins of the confidence (Guo et al. 2017, arXiv:1706.04599), with its
  95 % bootstrap interval over rooms. Of a perfectly calibrated model it is not zero, as every bin has noise of its own:
  `ece_by_chance` is what it would be, at these confidences;
* auc: how often a right answer has a higher confidence than a wrong one;
* coverage: for thresholds of `unsure_below`, the share of the answers that stay, and how many of them are right.

An answer is right to the letter, a box at an overlap of 0.25. The strategy is the one that is used unless told
otherwise; `unpruned` is the same curve on answers without pruning, and `photographs` on the questions about a real desk
(`benchmarks.photographs`), where their folder is given: one scene, its intervals are over questions.

    python -m benchmarks.confidence --json F [--picture P] [--write] [--model DIR] [--scenes DIR]
        [--photographs DIR] [--resume FILE] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.decoder.decode import generate, surest
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.loading import fitted_strategies, make_strategy
from adatoken3d_ros.engine.understanding import FILE, Calibration, Understanding, log_odds, write_understanding
from adatoken3d_ros.lab.synthetic.furnished import Split
from adatoken3d_ros.lab.training.language import understanding
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.settings import BY_NAME
from adatoken3d_ros.weights import embedded_path
from benchmarks._kept import Kept, strategy_key
from benchmarks._refusals import refuse_missing, told_before
from benchmarks._scenes import CALIBRATION_SEED, Reader, Room, Workers, bar, find_rooms, machine, write_json
from benchmarks.accuracy import MAX_ANSWER, score
from benchmarks.photographs import read_questions, watch, wilson

FloatArray = NDArray[np.float64]

CHECKED: tuple[Split, ...] = ("test", "test_unseen")
GOAL = 0.05  # of the expected calibration error
THRESHOLDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
_FEWER = 4  # times fewer questions about unseen furniture and without pruning
_OVERLAP = 0.25  # at which a box is right
_BINS = 10
_RIDGE = 1.0  # on what a family's offset adds to that of all
_STEPS = 100  # of Newton's method, which needs some ten


@dataclass(frozen=True)
class Task:
    """A room, and with which strategy its questions are answered."""

    room: Room
    strategy: Strategy

    def kept_as(self) -> list[Any]:
        """What the answers depend on, the model apart."""
        return [self.room.key(), strategy_key(self.strategy)]


@dataclass(frozen=True)
class Answered:
    """One answer: the probability of its first token, and whether it was right."""

    room: int
    family: str
    probability: float
    right: bool


@torch.inference_mode()
def answers(reader: Reader, task: Task) -> list[tuple[str, float, bool]]:
    """Every question about a room, as a scene answers it without a budget: `Answered` without the room."""
    found = []
    strategy, room = task.strategy, task.room
    policy = make_policy(strategy.policy, **strategy.options)
    for qa, sample in zip(room.questions, reader.samples(room.scene(), room.questions), strict=True):
        read = prefill(reader.decoder, sample.embeds, sample.layout, strategy.schedule, policy, scene=sample.scene)
        sure = surest(read.logits)
        ids = list(generate(reader.decoder, read, max_new_tokens=MAX_ANSWER, eos_ids={reader.eos}))
        right = score(qa, reader.text(ids))
        found.append((qa.family, sure, right >= (_OVERLAP if qa.box is not None else 1.0)))
    return found


def of_photographs(model: Path, folder: Path, strategy: str) -> list[Answered]:
    """The questions about the desk, asked of a scene; each counts as a room of its own."""
    engine, scene = watch(model, folder, strategy)
    engine.understanding = Understanding(calibration=Calibration(1.0, 0.0))  # says the probability itself
    found = []
    for number, asked in enumerate(read_questions()[0]):
        answer = engine.ask(scene, Question(asked.question))
        found.append(Answered(number, asked.family, answer.confidence, asked.right(answer.text)))
    return found


def fit(answered: Sequence[Answered]) -> Calibration:
    """The most likely curve, by Newton's method.

    Raises:
        ValueError: where all or none of the answers are right.
    """
    families = sorted({one.family for one in answered})
    right = np.array([one.right for one in answered], np.float64)
    if not 0 < right.mean() < 1:
        raise ValueError(f"{int(right.sum())} of {len(right)} answers are right: nothing can be fitted to that")
    columns = [[log_odds(one.probability), 1.0, *(float(one.family == f) for f in families)] for one in answered]
    design = np.array(columns)
    ridge = np.diag([1e-3, 1e-3, *[_RIDGE] * len(families)])
    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-design @ weights))
        curvature = (design * (p * (1 - p))[:, None]).T @ design + ridge
        weights -= np.linalg.solve(curvature, design.T @ (p - right) + ridge @ weights)
    slope, offset, *own = (round(float(w), 4) for w in weights)
    return Calibration(slope, offset, {f: round(offset + one, 4) for f, one in zip(families, own, strict=True)})


def ece(confidence: FloatArray, right: FloatArray) -> float:
    """Expected calibration error: the mean over answers of how far their bin's confidence is from its accuracy."""
    of = _bins(confidence)
    gaps = [abs(confidence[of == k].sum() - right[of == k].sum()) for k in range(_BINS)]
    return float(sum(gaps) / len(confidence))


def auc(confidence: FloatArray, right: FloatArray) -> float:
    """How often a right answer has the higher confidence than a wrong one, ties half; NaN without either."""
    good, bad = confidence[right == 1], confidence[right == 0]
    if not len(good) or not len(bad):
        return float("nan")
    return float(((good[:, None] > bad).mean() + (good[:, None] >= bad).mean()) / 2)


def figures(answered: Sequence[Answered], known: Calibration, seed: int) -> dict[str, Any]:
    """What the module's text says, of answers and a curve that was fitted to others."""
    right = np.array([one.right for one in answered], np.float64)
    raw = np.array([one.probability for one in answered])
    confidence = np.array([known(one.probability, one.family) for one in answered])
    rooms, families = np.array([one.room for one in answered]), np.array([one.family for one in answered])
    names, rng = np.unique(rooms), np.random.default_rng(seed)
    rows = {name: np.flatnonzero(rooms == name) for name in names}
    draws = [np.concatenate([rows[name] for name in rng.choice(names, len(names))]) for _ in range(1000)]
    chance = [ece(confidence, (rng.random(len(right)) < confidence).astype(np.float64)) for _ in range(200)]
    return {
        "questions": len(answered),
        "rooms": [int(name) for name in names],
        "right": float(right.mean()),
        "ece": ece(confidence, right),
        "ece_interval": [float(v) for v in np.quantile([ece(confidence[d], right[d]) for d in draws], (0.025, 0.975))],
        "ece_by_chance": float(np.mean(chance)),
        "ece_of_probability": ece(raw, right),
        "auc": auc(confidence, right),
        "auc_of_probability": auc(raw, right),
        "reliability": _groups(_bins(confidence), confidence, right),
        "coverage": [_coverage(threshold, confidence, right) for threshold in THRESHOLDS],
        "families": _groups(families, confidence, right),
    }


def _groups(of: NDArray[Any], confidence: FloatArray, right: FloatArray) -> dict[str, Any]:
    """By name: what is said of a group of answers, and what holds."""
    return {
        str(name): {
            "questions": int(m.sum()),
            "confidence": float(confidence[m].mean()),
            "right": float(right[m].mean()),
            "interval": list(wilson(int(right[m].sum()), int(m.sum()))),
        }
        for name in np.unique(of)
        for m in [of == name]
    }


def _coverage(threshold: float, confidence: FloatArray, right: FloatArray) -> dict[str, Any]:
    stay = confidence >= threshold
    share = float(right[stay].mean()) if stay.any() else None
    return {"unsure_below": threshold, "answered": float(stay.mean()), "right": share}


def _bins(confidence: FloatArray) -> NDArray[np.int64]:
    return np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)


def run(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Rooms, answers, the curve and its check."""
    reader = Reader(args.model)
    fitted = fitted_strategies(args.model, reader.model.identity)
    name = str(BY_NAME["strategy"].default)
    chosen = make_strategy(name, reader.n_layers, reader.model.identity, fitted)
    unpruned = make_strategy("none", reader.n_layers, reader.model.identity, fitted)

    def rooms(split: Split, questions: int, first: int = 0) -> list[Room]:
        with bar(console, f"rooms, {split}") as progress:
            return find_rooms(
                reader, folder, split, questions, first=first, seed=args.seed, workers=args.workers, progress=progress
            )

    aside = rooms("train", args.fit_questions, CALIBRATION_SEED)
    tested = {"test": rooms("test", args.questions), "test_unseen": rooms("test_unseen", args.questions // _FEWER or 1)}
    with Workers(reader, args.workers, console) as pool:
        workers = Kept(pool, args.resume, reader.model.identity)

        def asked(what: str, about: Sequence[Room], strategy: Strategy) -> list[Answered]:
            given = workers.map(what, answers, [Task(room, strategy) for room in about])
            return [Answered(room.seed, *one) for room, some in zip(about, given, strict=True) for one in some]

        train = asked("answers to fit to", aside, chosen)
        known = fit(train)
        given = {split: asked(f"answers, {split}", of, chosen) for split, of in tested.items()}
        found: dict[str, Any] = {split: figures(some, known, args.seed) for split, some in given.items()}
        if args.photographs is not None:
            desk = figures(of_photographs(args.model, args.photographs, name), known, args.seed)
            found["photographs"] = {key: value for key, value in desk.items() if key != "rooms"}
        whole = figures(asked("answers, unpruned", tested["test"][::_FEWER], unpruned), known, args.seed)
    return {
        "goal": GOAL,
        "strategy": name,
        "confidence": {"model_hash": reader.model.identity, **asdict(known)},
        "fit": {"split": "train", "questions": len(train), "rooms": [room.seed for room in aside], "seed": args.seed},
        **found,
        "unpruned": whole,
        "met": found["test"]["ece"] <= GOAL,
        "model": reader.about(),
        "machine": machine(),
    }


def write(result: Mapping[str, Any], model: Path) -> None:
    """The curve into the file beside the model, which is made if there is none."""
    path = model / FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else understanding()
    write_understanding(model, {**content, "confidence": result["confidence"]})


def table(result: Mapping[str, Any]) -> Table:
    """Splits across."""
    columns = [name for name in (*CHECKED, "unpruned", "photographs") if name in result]
    shown = Table(
        title=f"Right as often as it says? {result['fit']['questions']} questions fitted to. Sure at: stay, right"
    )
    shown.add_column("", no_wrap=True)
    for name in columns:
        shown.add_column(f"{name}\n{result[name]['questions']} asked", justify="right", no_wrap=True)
    for label, row in (
        ("right", lambda one: f"{one['right']:.3f}"),
        ("ECE", lambda one: f"{one['ece']:.3f}"),
        ("95 %", lambda one: "{:.3f} to {:.3f}".format(*one["ece_interval"])),
        ("ECE by chance", lambda one: f"{one['ece_by_chance']:.3f}"),
        ("ECE of p", lambda one: f"{one['ece_of_probability']:.3f}"),
        ("AUC", lambda one: f"{one['auc']:.3f}"),
        ("AUC of p", lambda one: f"{one['auc_of_probability']:.3f}"),
    ):
        shown.add_row(label, *(row(result[name]) for name in columns))
    for k, threshold in enumerate(THRESHOLDS):
        cells = [result[name]["coverage"][k] for name in columns]
        shares = [f"{c['answered']:.0%}, {c['right']:.0%}" if c["answered"] else "none" for c in cells]
        shown.add_row(f"sure at {threshold:g}", *shares)
    return shown


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Reliability, and what a threshold costs and brings, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="as often as it says")
    looks = {"test": ("new rooms", "#4c72b0"), "test_unseen": ("new rooms, unseen furniture", "#dd8452")}
    for split, (label, colour) in looks.items():
        of = result[split]
        bins = list(of["reliability"].values())
        x, y = ([one[key] for one in bins] for key in ("confidence", "right"))
        spread = np.array([[abs(one["right"] - end) for end in one["interval"]] for one in bins]).T
        left.errorbar(x, y, spread, fmt="o-", capsize=2, color=colour, label=f"{label}: ECE {of['ece']:.3f}")
        stay, good = ([100 * one[key] for one in of["coverage"] if one["right"]] for key in ("answered", "right"))
        right.plot(stay, good, "o-", color=colour, label=f"{label}: AUC {of['auc']:.3f}")
        for one in of["coverage"]:
            if one["right"]:
                place = (100 * one["answered"], 100 * one["right"])
                right.annotate(f"{one['unsure_below']:g}", place, (4, 4), textcoords="offset points", fontsize=8)
    left.set(title="What it says and what holds", xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    right.set(title="Sure enough at ...", xlabel="answers that stay, %", ylabel="of these right, %")
    right.invert_xaxis()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle(f"Confidence of the model {result['model']['name']}, bars: 95 % intervals", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.confidence", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--picture", type=Path, help="PNG to draw them in")
    parser.add_argument("--write", action="store_true", help=f"write the curve into the model's {FILE}")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="of the desk, as benchmarks.photographs takes it"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="answers are kept here, and not asked for again")
    parser.add_argument("--fit-questions", type=int, default=1100, help="at least so many (%(default)s)")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many of the split test (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the bootstrap")
    args = parser.parse_args()
    for name in ("fit_questions", "questions", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    refuse_missing(parser, args, "model", "photographs")
    told_before(parser, args)
    args.model = args.model or embedded_path()
    torch.set_num_threads(1)
    console = Console()
    with TemporaryDirectory() as temporary:
        result = run(args, args.scenes or Path(temporary), console)
    console.print(table(result))
    write_json(args.json, result)
    if args.picture is not None:
        draw(result, args.picture)
    if args.write:
        write(result, args.model)


if __name__ == "__main__":
    main()
