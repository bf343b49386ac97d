# SPDX-License-Identifier: Apache-2.0
"""Are latency budgets kept, and what does that cost?

Questions about furnished rooms with budgets log-uniform between the p95 of the cheapest plan and of the unpruned
answer, both as predicted when the question is asked, go through the real engine: a scene in its worker's thread,
frames handed in as they would come from a camera, every fourth question together with a view that nobody has encoded
yet. Twice:

* quiet: nothing but this benchmark (and what else the machine may be doing) runs;
* hog: half-way, as many processes that never rest are started as the machine has cores.

By run: `miss_rate` (late answers), `p95_overshoot` (of late / budget - 1, 0 for those in time), `median_use` (time
taken over budget), `p95_prediction_error` (of predicted over taken time - 1, without the queue), `clock_error_ms`
(largest difference between the answer's total and the asker's own clock) and `loss_by_decile` of the budgets. With a
trained model there is also `accuracy_by_decile`, and `accuracy_latency`: what --frontier-questions questions take from
the question to the answer and how many answers are right, for plans of the configured policy and for every rival on its
own schedules (a second picture, beside P with the ending `_accuracy`). `controllers` has the same for the quiet
questions with their budgets ignored: always unpruned, always the configured strategy, always the cheapest plan.

The loss is the divergence (KL, nats) from the unpruned answer that each of the model's fitted strategies was measured
to have: in the files that come with the model, as the node uses them, or else on some of the scenes before. What is no
schedule (views, tokens, the answer's length) counts by the engine's proxy.

    python -m benchmarks.budget --json F [--picture P] [--questions 200] [--frontier-questions 20] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adatoken3d_ros.decoder.prefill import Layout, prefill
from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.budget.controller import BudgetConfig
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.budget.plans import RUNGS, options, removed_share
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.events import FrameTaken, Listeners
from adatoken3d_ros.engine.loading import fitted_strategies, make_strategy
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.lab.probe import Probe, Sample
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule, scaled
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.weights import embedded_path
from benchmarks import _accuracy_latency
from benchmarks._load import busy

WAIT = 120.0  # seconds until an answer that does not come ends the benchmark
FACTORS = (0.5, 1.0, 2.0)  # on each rival's own keep ratios, for the pictures
MOST_LATE = 20  # late answers that are told one by one
OWN_POINTS = 6  # schedules of the configured policy, for accuracy against latency


@dataclass(frozen=True, eq=False)
class Shown:
    """A room: the views that are there when it is asked about, those that come later, and questions with answers."""

    first: list[PosedFrame]
    later: list[PosedFrame]
    questions: list[QA]


@dataclass(frozen=True, eq=False)
class Row:
    """One question that was answered; times in milliseconds, `asker` by the clock of who asked."""

    budget: float
    asker: float
    answer: Answer
    loss: float
    score: float | None

    @property
    def use(self) -> float:
        return self.answer.times.total / self.budget


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Latency budgets through the real engine.")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--picture", type=Path, metavar="P", help="draw loss against latency into this file")
    parser.add_argument("--model", type=Path, help="a checkpoint; the embedded one, or else one of random weights")
    parser.add_argument("--strategy", default="ours", help="configured strategy: a policy's name or a .yaml file")
    parser.add_argument("--questions", type=int, default=200, help="in each run (%(default)s)")
    parser.add_argument(
        "--frontier-questions", type=int, default=20, help="a strategy, for accuracy against latency (%(default)s)"
    )
    parser.add_argument("--scenes", type=int, default=5, help="rooms (%(default)s)")
    parser.add_argument(
        "--views", type=int, default=8, help="views that are encoded before the questions (%(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=12, help="of a random model (%(default)s)")
    parser.add_argument("--hidden", type=int, default=192, help="width of a random model (%(default)s)")
    parser.add_argument("--image", type=int, default=224, help="image size of a random model (%(default)s)")
    args = parser.parse_args(arguments)
    if min(args.questions, args.frontier_questions, args.scenes, args.views, args.threads, args.max_new_tokens) < 1:
        parser.error("questions, scenes, views, threads and tokens must be at least 1")
    return args


# What is asked -----------------------------------------------------------------------------------------------------


def make_scenes(args: argparse.Namespace) -> list[Shown]:
    """Test rooms, with enough questions for their share of the run."""
    each = -(-args.questions // args.scenes)
    scenes = []
    for seed in range(args.scenes):
        room = make_room(seed, "test")
        late = -(-each // 4)
        frames = [view.frame for view in render_views(room, seed=args.seed, count=args.views + late)]
        frames = [replace(frame, stamp_ns=frame.stamp_ns + 1) for frame in frames]
        asked = generate(room, np.random.default_rng([args.seed, seed]), per_family=4)
        random = np.random.default_rng([args.seed, seed, 1])
        questions = [asked[i] for i in random.permutation(len(asked))]
        scenes.append(Shown(frames[: args.views], frames[args.views :], (questions * each)[:each]))
    return scenes


class Bench:
    """A model and what all runs share: scenes, the fit to this machine, and the measured loss of each schedule."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args = args
        self.trained = args.model is not None
        path = args.model
        self._temporary = tempfile.TemporaryDirectory()
        if path is None:
            try:
                path, self.trained = embedded_path(), True
            except FileNotFoundError:
                path = write_tiny_checkpoint(
                    self._temporary.name,
                    args.seed,
                    layers=args.layers,
                    hidden_size=args.hidden,
                    intermediate_size=args.hidden * 11 // 4,
                    heads=max(1, args.hidden // 32),
                    image_size=args.image,
                )
        self.name = "embedded" if self.trained and args.model is None else "random" if not self.trained else str(path)
        self.model, self.tokenizer, _ = registry.load(path, dtype=torch.float32)
        self.n_layers = len(self.model.decoder)
        model_hash = self.model.identity
        self.fitted = fitted_strategies(path, model_hash)
        self.strategy = make_strategy(args.strategy, self.n_layers, model_hash, self.fitted)
        console.print("rendering rooms")
        self.scenes = make_scenes(args)
        console.print("warming up")
        engine = Engine(self.model, self.tokenizer)
        engine.warm_up(self.strategy)
        assert engine.latency is not None
        self._fit = engine.latency
        self.samples = [self._sample(scene) for scene in self.scenes[:3]]
        if not self.calibrated:
            console.print("measuring the loss of each schedule")
            self.fitted = self._calibrate()

    def engine(self) -> Engine:
        """A fresh engine; its latency model starts from the fit."""
        engine = Engine(self.model, self.tokenizer, fitted=self.fitted)
        engine.latency = LatencyModel(self._fit.coefficients, self._fit.key, self._fit.scatter)
        return engine

    def open(self, engine: Engine) -> Scene:
        """An empty scene."""
        config = SessionConfig(
            key_frames=KeyFrameConfig(min_translation=0.0, min_rotation=0.0, max_views=self.args.views + 4),
            max_new_tokens=self.args.max_new_tokens,
            seed=self.args.seed,
            budget=BudgetConfig(),
        )
        return engine.open(config, self.strategy)

    def _sample(self, shown: Shown) -> Sample:
        scene = self.open(self.engine())
        for frame in shown.first:
            scene.observe(frame)
        scene.encode_pending()
        spliced, block = scene.spliced(Question(shown.questions[0].question))
        return Sample(spliced.embeds, spliced.spatial_start, spliced.n_spatial, block.scene)

    @property
    def calibrated(self) -> list[Strategy]:
        """Strategies of the configured policy with measured losses, by what they remove."""
        own = [one for one in self.fitted.values() if one.policy == self.strategy.policy]
        return sorted(own, key=lambda one: removed_share(one.schedule, self.n_layers))

    def _calibrate(self) -> dict[str, Strategy]:
        policy = make_policy(self.strategy.policy, **self.strategy.options)
        probe = Probe(self.model.decoder, self.samples, policy)
        found = {}
        for option in options(self.strategy, self.n_layers):
            figures = {"figures": {"kl": probe.divergence(option.strategy.schedule)}}
            found[option.strategy.name] = replace(option.strategy, info=figures)
        return found


# The runs ----------------------------------------------------------------------------------------------------------


class Runner:
    """One scene in its worker; frames and questions go in as they would from outside."""

    def __init__(self, bench: Bench) -> None:
        self._done = threading.Semaphore(0)
        self.worker = Worker(bench.engine)
        self.queue = self.worker.open(bench.open, events=Listeners().add(FrameTaken, lambda _: self._done.release()))
        self.worker.start()
        self.queue.ready.result(WAIT)

    def show(self, frames: list[PosedFrame]) -> None:
        """Each is encoded before the next comes."""
        for frame in frames:
            self.queue.submit_frame(partial(_itself, frame))
            assert self._done.acquire(timeout=WAIT)

    def ask(self, question: Question, frame: PosedFrame | None) -> tuple[Answer, float]:
        """The answer and the milliseconds until it was there; `frame` comes in just before the question."""
        if frame is not None:
            self.queue.submit_frame(partial(_itself, frame))
        began = time.monotonic()
        answer = self.queue.submit(question).result.result(WAIT)
        ended = time.monotonic()
        if frame is not None:
            assert self._done.acquire(timeout=WAIT)
        return answer, (ended - began) * 1e3


def _itself(frame: PosedFrame) -> PosedFrame:
    return frame


def budget_range(scene: Scene, question: Question) -> tuple[float, float]:
    """p95 of the cheapest plan and of the unpruned answer as they are now, milliseconds."""
    table = scene.plans(question)
    reserve = scene.config.budget.reserve_ms
    return 1e3 * table.cheapest_seconds + reserve, table.unpruned.p95_ms + reserve


def run(
    bench: Bench,
    progress: Callable[[], None],
    *,
    way: str = "budget",
    budgets: Sequence[float] | None = None,
    hogged: bool = False,
) -> list[Row]:
    """All questions in one way: `budget`, `unpruned`, `fixed` or `cheapest`; `budgets` of an earlier run, or drawn."""
    random = np.random.default_rng(bench.args.seed)
    rows: list[Row] = []
    runner = Runner(bench)
    half = bench.args.questions // 2
    hogs = ExitStack()
    if way == "unpruned":
        full = replace(bench.strategy, schedule=Schedule(), name="unpruned")
        runner.queue.call(lambda scene: scene.set_strategy(full)).result(WAIT)
    try:
        for scene in bench.scenes:
            runner.queue.call(lambda scene: scene.clear()).result(WAIT)
            runner.show(scene.first)
            later = list(scene.later)
            for i, qa in enumerate(scene.questions):
                if len(rows) == bench.args.questions:
                    break
                if hogged and len(rows) == half:
                    hogs.enter_context(busy(os.cpu_count() or 1))
                question = Question(qa.question, max_new_tokens=bench.args.max_new_tokens)
                low, high = runner.queue.call(partial(budget_range, question=question)).result(WAIT)
                drawn = low * (max(low, high) / low) ** random.random()
                budget = budgets[len(rows)] if budgets is not None else drawn
                # Without time left the engine answers by its fastest plan.
                limit = {"budget": budget, "cheapest": 1e-3}.get(way)
                frame = later.pop() if i % 4 == 0 and later else None
                answer, asker = runner.ask(replace(question, latency_budget_ms=limit), frame)
                rows.append(Row(budget, asker, answer, _loss(answer), bench_score(bench, qa, answer.text)))
                progress()
    finally:
        hogs.close()
        assert runner.worker.stop(WAIT)
    return rows


def _loss(answer: Answer) -> float:
    assert answer.decision is not None, answer.status_message
    return answer.decision.loss


def bench_score(bench: Bench, qa: QA, text: str) -> float | None:
    if not bench.trained:
        return None
    from benchmarks.accuracy import score

    return float(score(qa, text))


# Figures -----------------------------------------------------------------------------------------------------------


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What the module's text says of a run."""
    late = [max(0.0, row.use - 1.0) for row in rows]
    clock = [abs(row.asker - row.answer.times.total) for row in rows]
    errors = [
        abs(row.answer.predicted.total / (row.answer.times.total - row.answer.times.queue) - 1.0)
        for row in rows
        if row.answer.predicted is not None
    ]
    found: dict[str, Any] = {
        "questions": len(rows),
        "miss_rate": sum(over > 0 for over in late) / len(rows),
        "p95_overshoot": float(np.percentile(late, 95)),
        "median_use": median(row.use for row in rows),
        "p95_prediction_error": float(np.percentile(errors, 95)) if errors else None,
        "median_ms": median(row.answer.times.total for row in rows),
        "clock_error_ms": max(clock),
        "clock_error_ms_p95": float(np.percentile(clock, 95)),
        "clock_error_ms_p50": median(clock),
        "hurried": sum("hurried before" in row.answer.plan for row in rows),
        "loss": float(np.mean([row.loss for row in rows])),
        "loss_by_decile": by_decile(rows, lambda row: row.loss),
        "statuses": dict(Counter(row.answer.status.name for row in rows)),
        "rungs": dict(Counter(RUNGS[row.answer.decision.rung] for row in rows if row.answer.decision is not None)),
        "late": [_late(row) for row in rows if row.use > 1.0][:MOST_LATE],
        "budget_ms": [min(row.budget for row in rows), max(row.budget for row in rows)],
    }
    if rows[0].score is not None:
        found["accuracy"] = float(np.mean([row.score for row in rows if row.score is not None]))
        found["accuracy_by_decile"] = by_decile(rows, lambda row: row.score or 0.0)
    return found


def _late(row: Row) -> dict[str, Any]:
    """What happened to a late answer."""
    answer = row.answer
    return {
        "budget_ms": row.budget,
        "plan": answer.plan,
        "status": answer.status_message,
        "predicted_ms": None if answer.predicted is None else asdict(answer.predicted),
        "taken_ms": asdict(answer.times),
    }


def by_decile(rows: Sequence[Row], value: Callable[[Row], float]) -> list[float]:
    """Mean over the questions in each tenth of the budgets, from tight to ample."""
    ordered = sorted(rows, key=lambda row: row.budget)
    parts = np.array_split(np.array([value(row) for row in ordered]), min(10, len(ordered)))
    return [float(part.mean()) for part in parts]


def time_of_choice(bench: Bench) -> dict[str, float]:
    """Microseconds of a look-up, and of making the table that it looks into."""
    scene = bench.open(bench.engine())
    for frame in bench.scenes[0].first:
        scene.observe(frame)
    scene.encode_pending()
    question = Question(bench.scenes[0].questions[0].question)
    table = scene.plans(question)
    budgets = np.geomspace(0.1 * table.cheapest_seconds, 100 * table.cheapest_seconds, 500)
    began = time.perf_counter()
    for budget in budgets:
        table.choose(float(budget))
    chosen = time.perf_counter()
    for _ in range(20):
        scene.controller.forget_tables()
        scene.plans(question)
    made = time.perf_counter()
    return {"choose_us": 1e6 * (chosen - began) / len(budgets), "table_us": 1e6 * (made - chosen) / 20}


# The picture -------------------------------------------------------------------------------------------------------


def frontier(bench: Bench, progress: Callable[[], None]) -> dict[str, list[dict[str, float]]]:
    """By policy, prefill time and divergence on the sample prompts for its own schedule scaled by FACTORS."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in POLICY_NAMES:
        if name == "none":
            continue
        own = name == bench.strategy.policy
        policy = make_policy(name, **bench.strategy.options) if own else make_policy(name)
        probe = Probe(bench.model.decoder, bench.samples, policy)
        schedules = [scaled(policy.default_schedule(bench.n_layers), factor) for factor in FACTORS]
        if own:
            schedules = [one.schedule for one in bench.calibrated]
        found[name] = []
        for schedule in dict.fromkeys(schedules):
            times = [_prefill_ms(bench, schedule, policy) for _ in range(3)]
            found[name].append(
                {
                    "prefill_ms": median(times),
                    "loss": probe.divergence(schedule),
                    "removed": removed_share(schedule, bench.n_layers),
                }
            )
        progress()
    return found


def _prefill_ms(bench: Bench, schedule: Schedule, policy: Any) -> float:
    """Mean over the sample prompts."""
    began = time.perf_counter()
    with torch.inference_mode():
        for sample in bench.samples:
            layout = Layout(sample.spatial_start, sample.n_spatial, sample.n_tokens)
            prefill(bench.model.decoder, sample.embeds, layout, schedule, policy, scene=sample.scene)
    return 1e3 * (time.perf_counter() - began) / len(bench.samples)


def accuracy_latency(bench: Bench, progress: Callable[[], None]) -> dict[str, list[_accuracy_latency.Point]]:
    """Accuracy against latency by policy, see `_accuracy_latency`; every question with all views encoded."""
    each = -(-bench.args.frontier_questions // len(bench.scenes))

    def show(frames: Sequence[PosedFrame], scene: Scene) -> None:
        for frame in frames:
            scene.observe(frame)
        scene.encode_pending()

    def score(qa: QA, text: str) -> float:
        return bench_score(bench, qa, text) or 0.0

    own = _accuracy_latency.thinned(bench.calibrated, OWN_POINTS)
    asked = _accuracy_latency.strategies(own, bench.strategy.policy, bench.n_layers, FACTORS)
    scenes = [(partial(show, scene.first), scene.questions[:each]) for scene in bench.scenes]
    engine = bench.engine()
    engine.latency = None  # the strategy alone decides, and no table is made
    return _accuracy_latency.measure(engine, bench.open(engine), scenes, asked, score, progress)


def draw(result: dict[str, Any], path: Path) -> None:
    """Left: loss against prefill time by policy. Right: how much of its budget each answer took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for name, points in result["frontier"].items():
        ordered = sorted(points, key=lambda point: point["prefill_ms"])
        ours = name == result["setting"]["policy"]
        left.plot(
            [point["prefill_ms"] for point in ordered],
            [max(point["loss"], 1e-6) for point in ordered],
            "o-" if ours else "s--",
            label=f"{name} (planned with)" if ours else name,
            linewidth=2.5 if ours else 1.0,
            markersize=5 if ours else 3,
            color="tab:red" if ours else None,
            zorder=3 if ours else 2,
        )
    left.set_yscale("log")
    left.set_xlabel("prefill, ms")
    left.set_ylabel("divergence from the unpruned answer, KL in nats")
    left.set_title(f"What a pruning policy costs and saves ({result['setting']['model']} model)", fontsize=10)
    left.legend(fontsize=7)
    left.grid(alpha=0.3)
    for name, colour in (("quiet", "tab:blue"), ("hog", "tab:orange")):
        pairs = np.array(result["pairs"][name])
        right.scatter(
            pairs[:, 0], pairs[:, 1], s=8, color=colour, label=f"{name}: {result[name]['miss_rate']:.1%} late"
        )
    budgets = [budget for name in ("quiet", "hog") for budget, _ in result["pairs"][name]]
    ends = np.array([min(budgets), max(budgets)])
    right.plot(ends, ends, "k-", linewidth=1, label="budget")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("latency budget, ms")
    right.set_ylabel("question to answer, ms")
    right.set_title("Answers against their budgets", fontsize=10)
    right.legend(fontsize=7)
    right.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that goes into the file."""
    torch.set_num_threads(args.threads)
    bench = Bench(args, console)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("asking", total=5 * args.questions)

        def advance() -> None:
            progress.advance(task)

        quiet = run(bench, advance)
        budgets = [row.budget for row in quiet]
        others = {way: run(bench, advance, way=way, budgets=budgets) for way in ("unpruned", "fixed", "cheapest")}
        hogged = run(bench, advance, hogged=True)
        half = args.questions // 2
        task = progress.add_task("policies", total=len(POLICY_NAMES) - 1)
        policies = frontier(bench, advance)
        if bench.trained:
            task = progress.add_task("accuracy", total=args.frontier_questions)
        accuracy = {"accuracy_latency": accuracy_latency(bench, advance)} if bench.trained else {}
    return {
        **accuracy,
        "quiet": figures(quiet),
        "hog": {**figures(hogged[half:]), "before": figures(hogged[:half])},
        "controllers": {"ours": figures(quiet), **{way: figures(rows) for way, rows in others.items()}},
        "planning": time_of_choice(bench),
        "frontier": policies,
        "pairs": {
            "quiet": [(row.budget, row.answer.times.total) for row in quiet],
            "hog": [(row.budget, row.answer.times.total) for row in hogged[half:]],
        },
        "setting": {
            "model": bench.name,
            "trained": bench.trained,
            "policy": bench.strategy.policy,
            "strategy": bench.strategy.name,
            "cores": os.cpu_count(),
            "load_1min": os.getloadavg()[0],
            **{name: value for name, value in vars(args).items() if name not in ("json", "picture", "model")},
        },
    }


def goals(result: dict[str, Any]) -> dict[str, bool]:
    """What the engine is held to."""
    quiet, hogged, controllers = result["quiet"], result["hog"], result["controllers"]
    goals = {
        "quiet: at most 1 % late": quiet["miss_rate"] <= 0.01,
        "hog: at most 5 % late after it started": hogged["miss_rate"] <= 0.05,
        "p95 overshoot at most 5 %, quiet and hog": max(quiet["p95_overshoot"], hogged["p95_overshoot"]) <= 0.05,
        "quiet: half the answers take 70 % of their budget": quiet["median_use"] >= 0.7,
        "a look-up takes less than 0.1 ms": result["planning"]["choose_us"] < 100.0,
        "on average no worse than always the cheapest plan": quiet["loss"] <= controllers["cheapest"]["loss"],
    }
    if "accuracy_by_decile" in quiet:
        ours, cheapest = quiet["accuracy_by_decile"], controllers["cheapest"]["accuracy_by_decile"]
        goals["more accurate in the upper half of the budgets"] = np.mean(ours[5:]) >= np.mean(ours[:5])
        goals["in every decile as accurate as the cheapest"] = all(a >= b for a, b in zip(ours, cheapest, strict=True))
    return goals


def report(result: dict[str, Any]) -> Table:
    table = Table(title=f"Latency budgets, {result['setting']['model']} model", box=SIMPLE)
    table.add_column("run", no_wrap=True)
    for column in ("late", "p95 over", "use", "p95 error", "ms", "loss"):
        table.add_column(column, justify="right")
    rows = {"quiet": result["quiet"], "hog": result["hog"]}
    for name, row in {**rows, **{k: v for k, v in result["controllers"].items() if k != "ours"}}.items():
        error = row["p95_prediction_error"]
        table.add_row(
            name,
            f"{row['miss_rate']:.1%}",
            f"{row['p95_overshoot']:.1%}",
            f"{row['median_use']:.0%}",
            "" if error is None else f"{error:.0%}",
            f"{row['median_ms']:.0f}",
            f"{row['loss']:.2e}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    console = Console()
    result = measure(args, console)
    console.print(report(result))
    for goal, met in goals(result).items():
        console.print(f"{'yes' if met else 'NO '}  {goal}")
    if not result["setting"]["trained"]:
        console.print("The model has random weights: losses are real, accuracy cannot be measured.")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        shown = {key: value for key, value in result.items() if key != "pairs"}  # hundreds of points: in the picture
        args.json.write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    if args.picture is not None:
        draw(result, args.picture)
        if "accuracy_latency" in result:
            beside = args.picture.with_name(f"{args.picture.stem}_accuracy{args.picture.suffix}")
            setting = result["setting"]
            _accuracy_latency.draw(result["accuracy_latency"], setting["policy"], setting["model"], beside)


if __name__ == "__main__":
    main()
