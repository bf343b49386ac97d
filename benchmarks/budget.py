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
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.budget.plans import removed_share
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.probe import Probe
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule, scaled
from adatoken3d_ros.scene.frames import PosedFrame
from benchmarks import _accuracy_latency
from benchmarks._budget_bench import WAIT, Bench, Runner
from benchmarks._budget_report import Row, draw, figures, goals, report
from benchmarks._load import busy

FACTORS = (0.5, 1.0, 2.0)  # on each rival's own keep ratios, for the pictures
OWN_POINTS = 6  # schedules of the configured policy, for accuracy against latency


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


# The runs ----------------------------------------------------------------------------------------------------------


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


# What a choice takes --------------------------------------------------------------------------------------------------


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


# Policies side by side -----------------------------------------------------------------------------------------------


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
            prefill(bench.model.decoder, sample.embeds, sample.layout, schedule, policy, scene=sample.scene)
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
