# SPDX-License-Identifier: Apache-2.0
"""How many answers does a policy cost, for how many operations and how much time saved?

Every pruning policy answers the same questions about rooms that the model never saw, at nine budgets: shares of the
exact prefill operations of an unpruned answer. How a policy comes to its schedule at a budget is told in `_budgets`;
whatever is measured for it is measured in rooms of the training split that no training uses, never in test rooms.

* Accuracy: every prompt goes through `gate.prefill`; an answer is right where each of its tokens, and the end after it,
  is the best one after those before it, which is where greedy decoding would give it to the letter. Boxes are decoded,
  and count by their overlap with the true one. Differences to unpruned are paired; intervals are 95 % bootstrap
  intervals over rooms.
* Operations: exact prefill, scoring included, of the counts that the traces of these prompts report.
* Time: from a question's text to the end of its answer on a scene that is ready, alone and in turn with all others;
  median of the ratio to unpruned. What makes the accuracy pass fast (`_reuse`) is off.

    python -m benchmarks.frontier --json F [--picture PNG] [--model DIR] [--questions 500]
    python -m benchmarks.frontier --strategies DIR [--model DIR]    only fits `ours`, for the folder of a checkpoint
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.synthetic.questions import FAMILIES
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.lab.training.packing import spatial_tokens
from adatoken3d_ros.lmm.interface import ViewTokens
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import SceneTokens
from adatoken3d_ros.weights import embedded_path
from benchmarks._budgets import CONTESTANTS, RIVALS, Operations, operations
from benchmarks._frontier_fit import choose, fit
from benchmarks._frontier_report import GOAL_63, draw, goals, table, verdict
from benchmarks._paired import Tally
from benchmarks._reuse import decode_along, remembering
from benchmarks._scenes import CALIBRATION_SEED, Reader, Room, Workers, bar, find_rooms, machine
from benchmarks.accuracy import MAX_ANSWER, SPLITS, score

TARGETS = (0.9, 0.75, 0.6, 0.5, 0.43, 0.37, 0.28, 0.2, 0.15)
FITTED = (*TARGETS, 0.1, 0.07, 0.05)  # for plans with hardly any time, too
UNPRUNED = Strategy("none", "none", Schedule())
_REPEATS = 2  # of the timing of each question
_UNPRUNED_EVERY = 10  # timed strategies


# --- accuracy ---


@dataclass(frozen=True, eq=False)
class Round:
    """A room and everybody who answers its questions."""

    room: Room
    strategies: tuple[Strategy, ...]


def answer_room(reader: Reader, task: Round) -> tuple[np.ndarray, np.ndarray]:
    """Scores (C, Q) and exact prefill operations (C, Q) of every strategy on every question."""
    samples = reader.samples(task.room.scene(), task.room.questions)
    decoder = reader.decoder.size
    scores = np.zeros((len(task.strategies), len(samples)))
    spent = np.zeros_like(scores)
    guesses: list[list[int]] = [[] for _ in samples]  # the last strategy's boxes
    with remembering(reader.decoder):
        for c, strategy in enumerate(task.strategies):
            policy = make_policy(strategy.policy, **strategy.options)
            for q, (sample, qa) in enumerate(zip(samples, task.room.questions, strict=True)):
                with torch.inference_mode():
                    filled = read(reader, sample, strategy, policy)
                    scores[c, q] = judge(reader, filled, qa, guesses[q])
                sizes = sample.n_spatial, sample.n_text, sample.layout.n_question
                spent[c, q] = operations(decoder, policy, filled.trace.spatial_per_layer, *sizes)
    return scores, spent


def read(reader: Reader, sample: Sample, strategy: Strategy, policy: Any) -> Prefill:
    """One prompt through the gate."""
    return prefill(
        reader.decoder,
        sample.embeds,
        sample.layout,
        strategy.schedule,
        policy,
        scene=sample.scene,
        max_new_tokens=MAX_ANSWER,
    )


def judge(reader: Reader, filled: Prefill, qa: QA, guess: list[int]) -> float:
    """1 where greedy decoding gives the answer to the letter, else 0; of a box, the overlap of the decoded one.

    `guess`: tokens that a box may be, replaced by what it is.
    """
    if qa.box is None:  # only a guess as well: a tokenizer may begin an answer with a space
        guess = reader.tokenizer.encode(qa.answer, add_special_tokens=False)
    guess[:] = decode_along(reader.decoder, filled, guess, max_new_tokens=MAX_ANSWER, eos=reader.eos)
    return score(qa, reader.text(guess))


# --- time ---


def time_all(
    reader: Reader, rooms: Sequence[Room], strategies: Sequence[Strategy], questions: int, console: Console
) -> tuple[list[dict[str, float]], float]:
    """Of each strategy, the medians of the ratios of whole time and prefill time to unpruned, and ms; ms of unpruned.

    Each question is of another family and, as far as there are so many, of another room.
    """
    policies = [make_policy(s.policy, **s.options) for s in strategies]
    ratios: list[list[tuple[float, float, float]]] = [[] for _ in strategies]
    unpruned: list[float] = []
    with bar(console, "time") as advance:
        for k in range(questions):
            room = rooms[k % len(rooms)]
            family = FAMILIES[k % len(FAMILIES)]
            qa = next((qa for qa in room.questions if qa.family == family), room.questions[0])
            scene = room.scene()
            with torch.inference_mode():
                (sample,) = reader.samples(scene, [qa])
                assert sample.scene is not None
                _ = sample.scene.order  # of a scene that is ready
                spatial = spatial_tokens(reader.model, [scene])[0]
                ask = partial(_ask, reader, spatial, sample.scene, scene.where, qa)
                ask(UNPRUNED, make_policy("none"))
                for _ in range(_REPEATS):
                    own, reference = [], []
                    for c, (strategy, policy) in enumerate(zip(strategies, policies, strict=True)):
                        if c % _UNPRUNED_EVERY == 0:
                            reference.append(ask(UNPRUNED, make_policy("none")))
                        own.append(ask(strategy, policy))
                    whole, reading = (median(one) for one in zip(*reference, strict=True))
                    unpruned.append(whole * 1e3)
                    for found, (seconds, prefill_seconds) in zip(ratios, own, strict=True):
                        found.append((seconds / whole, prefill_seconds / reading, seconds * 1e3))
            advance(k + 1, questions)
    names = ("time", "prefill_time", "ms")
    figures = [{n: float(median(v)) for n, v in zip(names, zip(*f, strict=True), strict=True)} for f in ratios]
    return figures, float(median(unpruned))


def _ask(
    reader: Reader,
    spatial: torch.Tensor,
    tokens: SceneTokens,
    where: ViewTokens | None,
    qa: QA,
    strategy: Strategy,
    policy: Any,
) -> tuple[float, float]:
    """Seconds from the question's text to the end of its answer, and of them in the prefill."""
    start = time.perf_counter()
    prompt = reader.sample(spatial, tokens, qa, where)
    middle = time.perf_counter()
    filled = read(reader, prompt, strategy, policy)
    first = int(filled.logits.argmax())  # the device has finished when this is known
    end = time.perf_counter()
    if first != reader.eos:
        reader.text(list(generate(reader.decoder, filled, max_new_tokens=MAX_ANSWER, eos_ids={reader.eos})))
    return time.perf_counter() - start, end - middle


# --- everything ---


def run(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """All figures."""
    reader = Reader(args.model)
    find = partial(find_rooms, reader, folder, seed=args.seed, workers=args.workers)
    with bar(console, f"rooms of {args.split}") as progress:
        rooms = find(args.split, args.questions, progress=progress)
    with bar(console, "rooms set aside") as progress:
        aside = tuple(
            find("train", 18 * args.rooms_aside, first=CALIBRATION_SEED, progress=progress)[: args.rooms_aside]
        )
    n_layers = reader.n_layers
    started = time.monotonic()
    with Workers(reader, args.workers, console) as workers:
        work = Operations(reader.decoder.size, _sizes(reader, rooms))
        fitted = fit(workers, reader, aside, work)
        strategies = choose(workers, aside, fitted, work, n_layers, args.targets)
        everybody = (UNPRUNED, *strategies)
        answered = workers.map("answers", answer_room, [Round(room, everybody) for room in rooms])
    answering = time.monotonic() - started
    scores, spent = (np.concatenate([one[k] for one in answered], axis=1) for k in (0, 1))
    asked = [(room.seed, qa.family) for room in rooms for qa in room.questions]
    tally = Tally([seed for seed, _ in asked], [family for _, family in asked], scores, seed=args.seed)
    times, unpruned_ms = time_all(reader, rooms, strategies, args.timed, console)
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for way, (strategy, seconds) in enumerate(zip(strategies, times, strict=True), 1):
        point = {"flops": float(spent[way].sum() / spent[0].sum()), **_accuracies(tally, way), **seconds}
        points[strategy.info["contestant"]].append({**_settings(strategy), **point})
    behind = _rivalry(tally, strategies)
    return {
        "unpruned": {**_accuracies(tally, 0), "flops": 1.0, "ms": unpruned_ms},
        "policies": points,
        "not_reached": {
            name: [t for t in args.targets if t not in {p["target"] for p in points[name]}] for name in CONTESTANTS
        },
        "goals": goals(points, behind),
        "fitted": {"options": fitted.options, "rate": fitted.rate, **fitted.notes},
        "setting": {
            "split": args.split,
            "questions": len(asked),
            "rooms": tally.rooms,
            "timed_questions": args.timed,
            "workers": args.workers,
            "seconds_without_timing": answering,
        },
        "model": reader.about(),
        "machine": machine(),
    }


def _sizes(reader: Reader, rooms: Sequence[Room], most: int = 40) -> list[tuple[int, int, int]]:
    """Spatial, other and question tokens of the prompts: of all, or of so many at equal distances."""
    asked = [(room, qa) for room in rooms for qa in room.questions]
    found = []
    for room, qa in asked[:: max(1, len(asked) // most)]:
        empty = torch.zeros(room.n_spatial, reader.decoder.size.hidden)
        sample = reader.sample(empty, SceneTokens(torch.zeros(1, 3)), qa, room.scene().where)
        found.append((sample.n_spatial, sample.n_text, sample.layout.n_question))
    return found


def _accuracies(tally: Tally, way: int) -> dict[str, Any]:
    return {
        "macro": float(tally.macro[way]),
        "interval": tally.interval(way),
        "difference": tally.difference(way, 0),
        "difference_interval": tally.difference_interval(way, 0),
        "ratio": float(tally.macro[way] / tally.macro[0]) if tally.macro[0] > 0 else None,
        "families": tally.families(way, 0),
    }


def _settings(strategy: Strategy) -> dict[str, Any]:
    return {
        **{name: value for name, value in strategy.info.items() if name != "contestant"},
        "policy": strategy.policy,
        "options": dict(strategy.options),
        "stages": {str(stage.layer): stage.ratio for stage in strategy.schedule.stages},
        "withdraw_layer": strategy.schedule.withdraw_layer,
    }


def _rivalry(tally: Tally, strategies: Sequence[Strategy]) -> list[dict[str, Any]]:
    """`ours` against each rival at the same target."""
    place = {(s.info["contestant"], s.info["target"]): way for way, s in enumerate(strategies, 1)}
    found = []
    for (name, target), way in place.items():
        if name in RIVALS and ("ours", target) in place:
            ours = place["ours", target]
            difference, interval = tally.difference(ours, way), tally.difference_interval(ours, way)
            found.append({"target": target, "rival": name, "difference": difference, "interval": interval})
    return found


def fit_ours(args: argparse.Namespace, folder: Path, console: Console) -> None:
    """Writes `ours` at every budget of FITTED into --strategies; the one of the claim is what its name alone means."""
    reader = Reader(args.model)
    with bar(console, "rooms set aside") as progress:
        found = find_rooms(
            reader,
            folder,
            "train",
            18 * args.rooms_aside,
            first=CALIBRATION_SEED,
            seed=args.seed,
            workers=args.workers,
            progress=progress,
        )
    aside = tuple(found[: args.rooms_aside])
    with Workers(reader, args.workers, console) as workers:
        work = Operations(reader.decoder.size, _sizes(reader, aside))
        fitted = fit(workers, reader, aside, work)
        strategies = choose(workers, aside, fitted, work, reader.n_layers, FITTED, ("ours",))
    args.strategies.mkdir(parents=True, exist_ok=True)
    for strategy in strategies:
        target = strategy.info["target"]
        name = "ours" if target == GOAL_63 else f"ours-{target:g}"
        info = {
            **{key: value for key, value in strategy.info.items() if key != "contestant"},
            "rooms": [room.seed for room in aside],
            "split": "train",
        }
        made = replace(strategy, name=name, model_hash=reader.model.identity, model_id=reader.path.name, info=info)
        made.save(args.strategies / f"{name}.yaml")
        console.print(f"{name}: {strategy.info['setting']}, KL {strategy.info['figures']['kl']:.3g}")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--json", type=Path, metavar="F", help="compare all policies and write the figures to this file"
    )
    parser.add_argument("--picture", type=Path, help="PNG to draw them in")
    parser.add_argument(
        "--strategies", type=Path, metavar="DIR", help="write ours, fitted to the model, into this folder"
    )
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--questions", type=int, default=500, help="at least so many (%(default)s)")
    parser.add_argument("--rooms-aside", type=int, default=6, help="training rooms to fit strategies on (%(default)s)")
    parser.add_argument("--timed", type=int, default=12, help="questions whose time is measured (%(default)s)")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the operations")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch while time is measured (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the bootstrap")
    return parser


def main() -> None:
    commands = parser()
    args = commands.parse_args()
    for name in ("questions", "rooms_aside", "timed", "workers", "threads"):
        if getattr(args, name) < 1:
            commands.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for target in args.targets:
        if not 0 < target < 1:
            commands.error(f"--targets {target} is outside (0, 1)")
    if args.json is None and args.strategies is None:
        commands.error("--json or --strategies must say where to write what is found")
    torch.set_num_threads(args.threads)
    args.model = args.model or embedded_path()
    console = Console()
    with TemporaryDirectory() as temporary:
        if args.strategies is not None:
            fit_ours(args, args.scenes or Path(temporary), console)
        if args.json is None:
            return
        result = run(args, args.scenes or Path(temporary), console)
    console.print(table(result))
    console.print(verdict(result["goals"]))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.picture is not None:
        draw(result, args.picture)


if __name__ == "__main__":
    main()
