# SPDX-License-Identifier: Apache-2.0
"""What does one way to fit a strategy make of three architectures?

For each of them, with random weights in the layout of its publisher and, where there are some, with trained ones:

    parity        largest difference of a logit from an independent way to the same answer, unpruned
    flops         exact operations of the prefill, unpruned and with `ours` fitted at 63 % and 80 % fewer
    prefill_ms    median times of the three, in turn; the scene's order is made ahead, as the engine does
    speedup, hit  unpruned over pruned time; as a share of what the operations predict
    accuracy      of trained weights: questions about new rooms, answered to the letter, and paired differences

Strategies are fitted by `adatoken3d calibrate --kind mined`: from what the model's attention does with a few prompts,
on rooms that are set aside, with no constant of a model. Times are of random weights, of a width at which the matrix
products count and of more than a thousand spatial tokens, and do not depend on what the weights are.

    python -m benchmarks.architectures --json F --picture PNG
    python -m benchmarks.architectures --from F --picture PNG    measures nothing, only draws
    python -m benchmarks.architectures --from F --docs MD        only puts the table into a page
    python -m benchmarks.architectures --json F --quick          everything at its smallest, for tests
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab import strategy_maker
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.strategy_maker import Prompts, Wanted
from adatoken3d_ros.lab.synthetic.furnished import Split, make_room
from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.synthetic.views import View, render_views, sights
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.decay import fit_decay
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import Policy
from benchmarks._architecture_forms import FORMS, Form, new_scene
from benchmarks._architecture_report import draw, goals, table, write_docs
from benchmarks._budgets import operations
from benchmarks._frontier_answers import judge
from benchmarks._paired import Tally
from benchmarks._scenes import CALIBRATION_SEED, Reader, Workers, bar, machine, write_json
from benchmarks._timing import interleaved
from benchmarks.accuracy import MAX_ANSWER
from benchmarks.frontier import UNPRUNED

SAVED = {"63": 0.63, "80": 0.80}
_QUESTION = ("What is next to the table?",)
_EXACT = tuple(family for family in FAMILIES if family != "box")  # not every architecture writes boxes
_PROMPTS_PER_ROOM = 4
_WIDTH = 150  # of the table in a file
_ASKED_AGAIN = 4  # calibration counts layers alone; with the output layer and scoring a little less is saved


# --- rooms ---


def views_of(seed: int, split: Split, count: int) -> list[View]:
    """As training sees them: every second room through a camera with noise."""
    return render_views(make_room(seed, split), seed=seed, count=count, noise=seed % 2 == 1)


def prompts_of_room(model: Any, tokenizer: Any, seed: int, split: Split, count: int, asked: int) -> Prompts:
    """A few questions of families in turn about one room."""
    views = views_of(seed, split, count)
    room, rng = make_room(seed, split), np.random.default_rng([seed, 2])
    turn = [_EXACT[(seed * asked + k) % len(_EXACT)] for k in range(asked)]
    found = generate(room, rng, sights(views, rng), per_family=1, families=turn)
    scene = new_scene(model, tokenizer, [view.frame for view in views])
    texts = [qa.question for qa in found] or _QUESTION
    frames = [view.frame for view in views]
    return strategy_maker.collect(scene, [(f"room {seed}", Path(), frames)], texts, _silent)


def _silent(step: str, done: int, total: int | None) -> None: ...


# --- one model ---


@dataclass(frozen=True, eq=False)
class Fitted:
    """Strategies by what they save, and what they were made of."""

    policy: Policy
    strategies: dict[str, Strategy]
    curves: dict[str, Any]


def fit(scene: Scene, prompts: Prompts, answer_tokens: int) -> Fitted:
    """`ours` at each share of SAVED, as `adatoken3d calibrate --kind mined` fits it."""
    information = strategy_maker.mine_all(scene, prompts, _silent)
    n_layers, wanted = scene.runtime.n_layers, Wanted(kind="mined", answer_tokens=answer_tokens)
    probe = strategy_maker.make_probe(scene, wanted, prompts, _silent)
    options = strategy_maker.policy_options(scene, "ours", wanted, prompts, information, probe)
    policy, strategies = make_policy("ours", **options), {}
    for name, saved in SAVED.items():
        asked = saved
        for _ in range(_ASKED_AGAIN):
            wanted = Wanted(kind="mined", flops_reduction=asked, answer_tokens=answer_tokens)
            schedule, _, extra = strategy_maker.choose(scene, wanted, policy, prompts, information, probe, _silent)
            short = saved - saved_by(scene, prompts.samples, schedule, policy)
            if short <= 0:
                break
            asked += short + 1e-4
        info = {"figures": extra.divergence_figures(schedule)}
        strategies[name] = Strategy(f"ours at -{name} %", "ours", schedule, options=options, info=info)
    decay = fit_decay(information.contribution)
    curves = {
        "contribution": information.contribution.tolist(),
        **{name: information.mean(name).tolist() for name in ("intra", "inter", "accumulated", "residual_weight")},
        "decay": decay.curve().tolist(),
        "decay_rate": decay.B,
        "decay_correlation": decay.correlation,
        "lowest_share": information.concentration("attention")["lowest_share"].mean,
        "prompts": len(prompts.samples),
        "kept": {name: list(s.schedule.ratios(n_layers)) for name, s in strategies.items()},
        "kl": {name: s.info["figures"]["kl"] for name, s in strategies.items()},
    }
    return Fitted(policy, strategies, curves)


def flops(scene: Scene, sample: Sample, schedule: Schedule, policy: Policy, rows: Sequence[int] = ()) -> float:
    """Exact operations of a prefill, scoring included.

    rows: what each layer saw; without them as planned, where what closes a line stays: an upper bound.
    """
    decoder = scene.runtime.model.decoder.size
    counts = schedule.counts(sample.n_spatial, decoder.n_layers, policy.kept)
    return operations(decoder, policy, counts, sample.n_spatial, sample.n_text, sample.layout.n_question, rows)


def saved_by(scene: Scene, samples: Sequence[Sample], schedule: Schedule, policy: Policy) -> float:
    """Share of the exact operations of all prompts together that a schedule saves."""
    spent, whole = (sum(flops(scene, sample, one, policy) for sample in samples) for one in (schedule, Schedule()))
    return 1 - spent / whole


def read(scene: Scene, sample: Sample, schedule: Schedule, policy: Policy) -> Prefill:
    """One prompt."""
    return prefill(scene.runtime.model.decoder, sample.embeds, sample.layout, schedule, policy, scene=sample.scene)


def times(scene: Scene, samples: Sequence[Sample], fitted: Fitted, args: argparse.Namespace) -> dict[str, Any]:
    """What all prompts save, and of the first one operations, milliseconds, and what one promises of the other."""
    sample, policy = samples[0], fitted.policy
    schedules = {"none": Schedule(), **{name: one.schedule for name, one in fitted.strategies.items()}}
    ways: dict[str, Callable[[], Prefill]] = {n: partial(read, scene, sample, s, policy) for n, s in schedules.items()}
    seconds = {name: median(s for s, _ in runs) for name, runs in interleaved(ways, args).items()}
    spent = {n: flops(scene, sample, one, policy, ways[n]().trace.rows_per_layer) for n, one in schedules.items()}
    speedup = {name: seconds["none"] / seconds[name] for name in SAVED}
    return {
        "spatial_tokens": sample.n_spatial,
        "other_tokens": sample.n_text,
        "flops": spent,
        "flops_saved": {n: saved_by(scene, samples, one.schedule, policy) for n, one in fitted.strategies.items()},
        "prefill_ms": {name: 1e3 * s for name, s in seconds.items()},
        "speedup": speedup,
        "hit": {name: speedup[name] * spent[name] / spent["none"] for name in SAVED},
        "schedule": {name: _stages(fitted.strategies[name].schedule) for name in SAVED},
    }


def _stages(schedule: Schedule) -> str:
    return " ".join(f"{stage.layer}:{stage.ratio:.4g}" for stage in schedule.stages)


def parity(form: Form, path: Path, scene: Scene, frames: Sequence[Any]) -> dict[str, Any]:
    """Of the unpruned logits, after one question."""
    question = _QUESTION[0]
    spliced, _ = scene.spliced(Question(question))
    none = make_policy("none")
    ours = prefill(scene.runtime.model.decoder, spliced.embeds, spliced.layout, Schedule(), none).logits
    theirs = form.oracle(path, scene, frames, question)
    return {
        "parity": float((ours - theirs).abs().max()),
        "parity_with": form.compared,
        "largest_logit": float(theirs.abs().max()),
        "rows": spliced.n_tokens,
    }


# --- trained weights ---


@dataclass(frozen=True, eq=False)
class Round:
    """A room of the test split and who answers about it."""

    seed: int
    views: int
    strategies: tuple[Strategy, ...]
    families: tuple[str, ...] = _EXACT


def answer_room(reader: Reader, task: Round) -> tuple[list[str], np.ndarray]:
    """Families (Q,) and scores (C, Q) of every strategy on every question."""
    views = views_of(task.seed, "test", task.views)
    rng = np.random.default_rng([0, task.seed])
    asked = generate(make_room(task.seed, "test"), rng, sights(views, rng), families=task.families)
    scene = new_scene(reader.model, reader.tokenizer, [view.frame for view in views])
    scores = np.zeros((len(task.strategies), len(asked)))
    with torch.inference_mode():
        for q, qa in enumerate(asked):
            spliced, block = scene.spliced(Question(qa.question))
            for c, strategy in enumerate(task.strategies):
                filled = prefill(
                    reader.decoder,
                    spliced.embeds,
                    spliced.layout,
                    strategy.schedule,
                    make_policy(strategy.policy, **strategy.options),
                    scene=block.scene,
                    max_new_tokens=MAX_ANSWER,
                )
                scores[c, q] = judge(reader, filled, qa, [])
    return [qa.family for qa in asked], scores


def accuracy(reader: Reader, fitted: Fitted, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Of unpruned and fitted runs on the same questions; intervals over rooms."""
    everybody = (UNPRUNED, *fitted.strategies.values())
    views = reader.model.sizes.num_views if args.room_views is None else args.room_views
    with Workers(reader, args.workers, console) as workers:
        rounds = [Round(seed, views, everybody, _EXACT[:2] if args.quick else _EXACT) for seed in range(args.rooms)]
        found = workers.map(f"{reader.path.name}: rooms", answer_room, rounds)
    rooms = [seed for seed, (families, _) in enumerate(found) for _ in families]
    families = [family for families, _ in found for family in families]
    tally = Tally(rooms, families, np.concatenate([scores for _, scores in found], axis=1))
    ways = ("none", *fitted.strategies)
    return {
        "questions": len(rooms),
        "rooms": tally.rooms,
        "macro": {name: float(tally.macro[k]) for k, name in enumerate(ways)},
        "interval": {name: tally.interval(k) for k, name in enumerate(ways)},
        "difference": {name: tally.difference(k, 0) for k, name in enumerate(ways) if k},
        "difference_interval": {name: tally.difference_interval(k, 0) for k, name in enumerate(ways) if k},
        "families": {
            name: {family: of["accuracy"] for family, of in tally.families(k, 0).items()} for k, name in enumerate(ways)
        },
    }


# --- everything ---


def examine_random(name: str, form: Form, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Parity, curves and times with random weights."""
    path = form.write(folder / name, **(form.quick if args.quick else form.large))
    model, tokenizer, _ = registry.load(path, dtype=torch.float32)
    frames = [view.frame for view in views_of(0, "test", form.views[args.quick])]
    scene = new_scene(model, tokenizer, frames)
    found = parity(form, path, scene, frames)
    prompts = strategy_maker.collect(scene, [("room 0", Path(), frames)], _QUESTION, _silent)
    fitted = fit(scene, prompts, answer_tokens=0)
    size = model.decoder.size
    figures = {"layers": size.n_layers, "width": size.hidden, "views": len(frames), **found, **fitted.curves}
    return {**figures, **times(scene, prompts.samples, fitted, args)}


def examine_trained(path: Path, args: argparse.Namespace, form: Form, console: Console) -> dict[str, Any]:
    """Parity, curves, times and accuracy with trained weights."""
    reader = Reader(path)
    model, tokenizer = reader.model, reader.tokenizer
    views = model.sizes.num_views if args.room_views is None else args.room_views
    prompts = Prompts()
    with bar(console, f"{path.name}: rooms set aside") as advance:
        for k in range(args.rooms_aside):
            one = prompts_of_room(
                model, tokenizer, CALIBRATION_SEED + k, "train", views, 1 if args.quick else _PROMPTS_PER_ROOM
            )
            prompts.extend(one)
            advance(k + 1, args.rooms_aside)
    frames = [view.frame for view in views_of(0, "test", views)]
    scene = new_scene(model, tokenizer, frames)
    found = parity(form, path, scene, frames)
    fitted = fit(scene, prompts, answer_tokens=4)
    figures = {"model": reader.about(), "views": views, **found, **fitted.curves}
    figures |= times(scene, prompts.samples, fitted, args)
    return {**figures, "accuracy": accuracy(reader, fitted, args, console)}


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The figures of all three."""
    result: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        for name, form in FORMS.items():
            console.print(f"{name}: random weights", highlight=False)
            random = examine_random(name, form, Path(temporary), args)
            trained = None
            if form.trained is not None and (form.trained / "config.json").is_file():
                trained = examine_trained(form.trained, args, form, console)
            parities = [one["parity"] for one in (random, trained) if one is not None]
            result[name] = {
                "parity": max(parities),
                "parity_with": form.compared,
                "timed": f"random weights, {random['spatial_tokens']} spatial tokens",
                **{f"{key}_{saved}": random[key][saved] for key in ("speedup", "hit") for saved in SAVED},
                "random": random,
                "trained": trained,
            }
    setting = {k: v for k, v in vars(args).items() if k in ("repeats", "warmup", "rooms", "rooms_aside", "quick")}
    return _told({**result, "setting": {**setting, **machine()}})


def _told(found: Any) -> Any:
    """With floats to five significant digits, so that two runs differ in what was timed and in nothing else."""
    if isinstance(found, dict):
        return {key: _told(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_told(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--from", type=Path, metavar="F", dest="source", help="read them from it instead of measuring")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the curves")
    parser.add_argument("--docs", type=Path, metavar="MD", help="put the table between the marks of this page")
    parser.add_argument("--quick", action="store_true", help="everything at its smallest; the figures say little")
    parser.add_argument("--rooms", type=int, default=24, help="of questions to trained weights (%(default)s)")
    parser.add_argument("--rooms-aside", type=int, default=4, help="to fit strategies on (%(default)s)")
    parser.add_argument("--room-views", type=int, help="of each room (as many as the model was trained with)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch while time is measured (%(default)s)")
    return parser


def main() -> None:
    commands = parser()
    args = commands.parse_args()
    for name in ("rooms", "rooms_aside", "repeats", "workers", "threads"):
        if getattr(args, name) < 1:
            commands.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.json is None and args.picture is None and args.docs is None:
        commands.error("--json, --picture or --docs must say where to write what is found")
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    if args.source is not None:
        result = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        if args.quick:
            args.rooms, args.rooms_aside, args.repeats, args.workers = 1, 1, 1, 1
        args.device = "cpu"
        torch.set_num_threads(args.threads)
        result = run(args, console)
    console.print(table(result))
    for goal, met in goals(result).items():
        console.print(f"{'yes' if met else 'NO '}  {goal}", highlight=False)
    if args.json is not None:
        write_json(args.json, result)
    if args.picture is not None:
        draw(result, args.picture)
    if args.docs is not None:
        write_docs(result, args.docs)


if __name__ == "__main__":
    main()
