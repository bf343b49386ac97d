# SPDX-License-Identifier: Apache-2.0
"""How many answers does a policy cost, for how many operations and how much time saved?

Every pruning policy answers the same questions about rooms that the model never saw, at budgets: shares of the exact
prefill operations of an unpruned answer; and at fixed numbers of spatial tokens, the mean over the layers, the
same in every room. How a policy comes to its schedule at a budget is told in `_budgets`; whatever is measured for it is
measured in rooms of the training split that no training uses, never in test rooms. A policy that needs what the model
does not offer is left out, and its reason told.

* Accuracy: every prompt goes through `prefill`; an answer is right where each of its tokens, and the end after it,
  is the best one after those before it, which is where greedy decoding would give it to the letter. Boxes are decoded,
  and count by their overlap with the true one. Differences to unpruned are paired; intervals are 95 % bootstrap
  intervals over rooms.
* Operations: exact prefill, scoring included, of the counts that the traces of these prompts report.
* Time: from a question's text to the end of its answer on a scene that is ready, alone and in turn with all others;
  median of the ratio to unpruned. What makes the accuracy pass fast (`_reuse`) is off.

With --resume, a run that was ended goes on where it was, and another policy costs its own answers alone; --first N is
for the answers about the first N rooms, of those that --rooms and --questions lay out. --quick is for trying.

    python -m benchmarks.frontier --json F [--picture PNG] [--model DIR] [--resume FILE] [--quick]
    python -m benchmarks.frontier --from F --json F2 --picture PNG --docs MD...    measures nothing, tells what F says
    python -m benchmarks.frontier --strategies DIR [--model DIR]    only fits `ours`, for the folder of a checkpoint
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.lab.synthetic.questions import FAMILIES
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.lab.training.packing import spatial_tokens
from adatoken3d_ros.lmm.interface import ViewTokens
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import SceneTokens
from adatoken3d_ros.weights import embedded_path
from benchmarks._budgets import CONTESTANTS, RIVALS, Operations, Tokens
from benchmarks._frontier_answers import Ask, answer, read, unfit
from benchmarks._frontier_docs import write_docs
from benchmarks._frontier_fit import choose, choose_ours, fit, shipped
from benchmarks._frontier_report import GOAL_63, GOAL_80, draw, goals, table, token_table, verdict
from benchmarks._kept import Kept
from benchmarks._paired import Tally
from benchmarks._refusals import refuse_missing, told_before
from benchmarks._scenes import (
    CALIBRATION_SEED,
    Reader,
    Room,
    Workers,
    balanced_rooms,
    bar,
    find_rooms,
    machine,
    write_json,
)
from benchmarks.accuracy import MAX_ANSWER, SPLITS

TARGETS = (GOAL_63, GOAL_80)  # two and three budgets in 90 minutes on two cores, from 0.06 s an answer
FITTED = (0.9, 0.75, 0.6, 0.5, 0.43, GOAL_63, 0.28, GOAL_80, 0.15, 0.1, 0.07, 0.05)  # from all to hardly any time
TOKENS = (256, 128, 64)  # that a layer sees, mean over the layers
UNPRUNED = Strategy("none", "none", Schedule())
_TOLD = ("unpruned", "policies", "skipped", "tokens", "losses", "goals", "setting", "model")
_REPEATS = 2  # of the timing of each question
_UNPRUNED_EVERY = 10  # timed strategies
_QUICK = {"rooms": 2, "questions": 24, "rooms_aside": 1, "timed": 1, "targets": [0.37, 0.2], "tokens": [128]}


# --- time ---


def time_all(
    reader: Reader, rooms: Sequence[Room], strategies: Sequence[Strategy], questions: int, console: Console
) -> tuple[list[dict[str, float]], float]:
    """Of each strategy, the medians of the ratios of whole time and prefill time to unpruned, and ms; ms of unpruned.

    Each question is of another family and, as far as there are so many, of another room.
    """
    policies = [make_rival(s.policy, **s.options) for s in strategies]
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
                ask(UNPRUNED, make_rival("none"))
                for _ in range(_REPEATS):
                    own, reference = [], []
                    for c, (strategy, policy) in enumerate(zip(strategies, policies, strict=True)):
                        if c % _UNPRUNED_EVERY == 0:
                            reference.append(ask(UNPRUNED, make_rival("none")))
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
    with bar(console, f"rooms of {args.split}") as progress:
        each = math.ceil(args.questions / len(FAMILIES))
        common: dict[str, Any] = {"seed": args.seed, "workers": args.workers, "progress": progress}
        laid_out = balanced_rooms(reader, folder, args.split, rooms=args.rooms, per_family=each, **common)
    rooms = [room for room in laid_out[: args.first] if room.questions]
    aside = _aside(args, reader, folder, console)
    started = time.monotonic()
    skipped = unfit(reader, rooms[0], [name for name in args.policies if name != "random"])
    names = [name for name in CONTESTANTS if name in {*args.policies, "ours"} and name not in skipped]
    with Workers(reader, args.workers, console, args.ray) as pool:
        workers = Kept(pool, args.resume, reader.model.identity)
        fitted = fit(workers, reader, aside)
        work = Operations(reader.decoder.size, _sizes(reader, laid_out))  # the same, however many are answered
        strategies = choose(workers, aside, fitted, work, reader.n_layers, args.targets, names)
        strategies += shipped(reader, args.targets)
        usual = Tokens(round(fmean(room.n_spatial for room in aside)), reader.n_layers)
        counted: list[tuple[int, Strategy]] = []
        for count in (count for count in args.tokens if count < usual.n_spatial):
            share = count / usual.n_spatial
            chosen = choose(workers, aside, fitted, usual, reader.n_layers, [share], names)
            counted += [(count, strategy) for strategy in chosen]
        tasks = []
        for room in rooms:
            size = Tokens(room.n_spatial, reader.n_layers)
            theirs = [size.fitted(strategy, count) for count, strategy in counted]
            tasks += [Ask(room, strategy) for strategy in (UNPRUNED, *strategies, *theirs)]
        answered = workers.map("answers", answer, tasks)
    answering = time.monotonic() - started
    ways = 1 + len(strategies) + len(counted)
    by_way = [answered[way::ways] for way in range(ways)]
    scores, spent = (np.array([np.concatenate([room[k] for room in one]) for one in by_way]) for k in (0, 1))
    asked = [(room.seed, qa.family) for room in rooms for qa in room.questions]
    tally = Tally([seed for seed, _ in asked], [family for _, family in asked], scores, seed=args.seed)
    times, unpruned_ms = time_all(reader, rooms, strategies, args.timed, console) if args.timed else (None, None)
    shares = spent.sum(axis=1) / spent[0].sum()
    who = [*names, *(strategy.info["contestant"] for strategy in strategies)]
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in who}
    for k, strategy in enumerate(strategies):
        point = {"flops": float(shares[k + 1]), **_accuracies(tally, k + 1), **(times[k] if times else {})}
        points[strategy.info["contestant"]].append({**_settings(strategy), **point})
    at: dict[str, dict[str, Any]] = {str(count): {} for count in args.tokens}
    for way, (count, strategy) in enumerate(counted, 1 + len(strategies)):
        point = {**_settings(strategy), "flops": float(shares[way]), **_accuracies(tally, way)}
        at[str(count)][strategy.info["contestant"]] = point
    budgets = [{"target": strategy.info["target"]} for strategy in strategies]
    budgets += [{"tokens": count} for count, _ in counted]
    behind = _rivalry(tally, [*strategies, *(strategy for _, strategy in counted)], budgets)
    reached = goals(
        points, behind, {count: at[str(count)]["ours"] for count in args.tokens if "ours" in at[str(count)]}
    )
    return {
        "unpruned": {**_accuracies(tally, 0), "flops": 1.0, "ms": unpruned_ms},
        "policies": points,
        "not_reached": {
            name: [t for t in args.targets if t not in {p["target"] for p in some}] for name, some in points.items()
        },
        "skipped": skipped,
        "tokens": at,
        **{
            f"tokens_{count}": {"retained": found["ours"]["ratio"], "interval": found["ours"]["ratio_interval"]}
            for count, found in at.items()
            if "ours" in found
        },
        "losses": len(reached["ahead"]["clearly_behind"]),
        "goals": reached,
        "fitted": {"options": fitted.options, "rate": fitted.rate, **fitted.notes},
        "setting": {
            "split": args.split,
            "questions": len(asked),
            "rooms": tally.rooms,
            "rooms_laid_out": args.rooms,
            "families": {family: sum(one == family for _, one in asked) for family in FAMILIES},
            "timed_questions": args.timed,
            "workers": args.workers,
            "seconds_without_timing": answering,
            "results_reused": workers.reused,
        },
        "model": reader.about(),
        "machine": machine(),
    }


def _aside(args: argparse.Namespace, reader: Reader, folder: Path, console: Console) -> tuple[Room, ...]:
    """Rooms for what is measured beforehand."""
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
    return tuple(found[: args.rooms_aside])


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
        "ratio_interval": tally.ratio_interval(way, 0),
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


def _rivalry(tally: Tally, strategies: Sequence[Strategy], budgets: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """`ours` against each rival at the same budget; `strategies` are the ways after the unpruned one."""
    named = [(strategy.info["contestant"], budget) for strategy, budget in zip(strategies, budgets, strict=True)]
    found = []
    for way, (name, budget) in enumerate(named, 1):
        if name in RIVALS and ("ours", budget) in named:
            ours = 1 + named.index(("ours", budget))
            difference, interval = tally.difference(ours, way), tally.difference_interval(ours, way)
            found.append({**budget, "rival": name, "difference": difference, "interval": interval})
    return found


def fit_ours(args: argparse.Namespace, folder: Path, console: Console) -> None:
    """Writes `ours` at every budget of FITTED into --strategies; the one of the claim is what its name alone means."""
    reader = Reader(args.model)
    aside = _aside(args, reader, folder, console)
    with Workers(reader, args.workers, console, args.ray) as pool:
        workers = Kept(pool, args.resume, reader.model.identity)
        work = Operations(reader.decoder.size, _sizes(reader, aside))
        strategies = choose_ours(workers, reader, aside, work, FITTED, GOAL_63)
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
    parser.add_argument("--from", type=Path, metavar="F", dest="source", help="read them from it instead of measuring")
    parser.add_argument("--picture", type=Path, help="PNG to draw them in")
    parser.add_argument("--docs", type=Path, nargs="+", default=(), metavar="MD", help="pages to put them in")
    parser.add_argument(
        "--strategies", type=Path, metavar="DIR", help="write ours, fitted to the model, into this folder"
    )
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--rooms", type=int, default=128, help="new rooms (%(default)s)")
    parser.add_argument("--questions", type=int, default=2040, help="about them, of all families alike (%(default)s)")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N of these rooms (all)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results so far; what is found goes there at once")
    parser.add_argument("--rooms-aside", type=int, default=12, help="training rooms to fit strategies on (%(default)s)")
    parser.add_argument("--timed", type=int, default=12, help="questions whose time is measured (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few questions and budgets, to try it")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the operations")
    parser.add_argument(
        "--policies", nargs="+", default=CONTESTANTS, choices=CONTESTANTS, metavar="NAME", help="beside ours (all)"
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="numbers of tokens that a layer sees")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (%(default)s)")
    parser.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="those processes over the Ray at this address, which sees --scenes at the same path (one on this machine)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="of torch while time is measured (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the bootstrap")
    return parser


def main() -> None:
    commands = parser()
    if commands.parse_known_args()[0].quick:
        commands.set_defaults(**_QUICK)
    args = commands.parse_args()
    for name, least in {"rooms": 1, "questions": 1, "rooms_aside": 1, "timed": 0, "workers": 1, "threads": 1}.items():
        if getattr(args, name) < least:
            commands.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if args.first is not None and args.first < 1:
        commands.error(f"--first {args.first} must be at least 1")
    if any(count < 1 for count in args.tokens):
        commands.error(f"--tokens {min(args.tokens)} must be at least 1")
    for target in args.targets:
        if not 0 < target < 1:
            commands.error(f"--targets {target} is outside (0, 1)")
    args.targets, args.tokens = list(dict.fromkeys(args.targets)), list(dict.fromkeys(args.tokens))
    refuse_missing(commands, args, "model")
    told = told_before(commands, args, "frontier", _TOLD)
    if args.json is None and args.strategies is None:
        commands.error("--json or --strategies must say where to write what is found")
    if args.ray not in (None, "local") and args.scenes is None:
        commands.error(f"--ray {args.ray} needs --scenes: a folder that every machine sees")
    torch.set_num_threads(args.threads)
    args.model = args.model or embedded_path()
    console = Console()
    with TemporaryDirectory() as temporary:
        if args.strategies is not None:
            fit_ours(args, args.scenes or Path(temporary), console)
        if args.json is None:
            return
        result = run(args, args.scenes or Path(temporary), console) if told is None else told
    console.print(table(result))
    console.print(token_table(result))
    console.print(verdict(result["goals"]))
    write_json(args.json, result)
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(result, args.picture)
    write_docs(result, args.json, args.docs)


if __name__ == "__main__":
    main()
