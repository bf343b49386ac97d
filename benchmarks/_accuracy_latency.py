# SPDX-License-Identifier: Apache-2.0
"""Accuracy against measured latency: the plans that budgets are kept with, and every rival on its own schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import scaled
from adatoken3d_ros.pruning.strategy import Strategy

if TYPE_CHECKING:
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.lab.synthetic.wordings import QA

Score = Callable[["QA", str], float]
Point = dict[str, float]


def strategies(own: Sequence[Strategy], policy: str, n_layers: int, factors: Sequence[float]) -> list[Strategy]:
    """Every strategy to be measured: `own`, those that `policy` is planned with, and each rival's scaled by factors."""
    found = list(own)
    for name in POLICY_NAMES:
        if name in ("none", policy):
            continue
        schedule = make_policy(name).default_schedule(n_layers)
        by_schedule = {scaled(schedule, factor): factor for factor in factors}
        found += [Strategy(name=f"{name} x{f:g}", policy=name, schedule=one) for one, f in by_schedule.items()]
    return found


def measure(
    engine: Engine,
    scene: Scene,
    scenes: Sequence[tuple[Callable[[Scene], None], Sequence[QA]]],
    asked: Sequence[Strategy],
    score: Score,
    progress: Callable[[], None],
) -> dict[str, list[Point]]:
    """By policy, its points: `ms` (median from question to answer) and `accuracy`.

    All strategies are asked the same questions, one after the other at each question, so that a machine that becomes
    slower becomes so for all.

    Args:
        scenes: what shows the room to the scene, and its questions.
        asked: strategies.
    """
    times: list[list[float]] = [[] for _ in asked]
    scores: list[list[float]] = [[] for _ in asked]
    for show, questions in scenes:
        scene.clear()
        show(scene)
        for qa in questions:
            for i, strategy in enumerate(asked):
                scene.set_strategy(strategy)
                answer = engine.ask(scene, Question(qa.question))
                times[i].append(answer.times.total)
                scores[i].append(score(qa, answer.text))
            progress()
    found: dict[str, list[Point]] = {}
    for strategy, ms, right in zip(asked, times, scores, strict=True):
        point = {"ms": median(ms), "accuracy": float(np.mean(right)), "questions": float(len(right))}
        found.setdefault(strategy.policy, []).append(point)
    return {name: sorted(points, key=lambda point: point["ms"]) for name, points in found.items()}


def draw(points: dict[str, list[Point]], policy: str, model: str, path: Path) -> None:
    """Accuracy against latency, a line for each policy; the one that budgets are kept with is the thick one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for name, line in points.items():
        ours = name == policy
        axes.plot(
            [point["ms"] for point in line],
            [100 * point["accuracy"] for point in line],
            "o-" if ours else "s--",
            label=f"{name} (planned with)" if ours else name,
            linewidth=2.5 if ours else 1.0,
            markersize=5 if ours else 3,
            color="tab:red" if ours else None,
            zorder=3 if ours else 2,
        )
    axes.set_xlabel("question to answer, ms (median)")
    axes.set_ylabel("right answers, %")
    axes.set_title(f"Accuracy against latency ({model} model)", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def thinned(options: Sequence[Strategy], most: int) -> list[Strategy]:
    """At most so many of them, evenly spread, the first and the last among them."""
    at = np.unique(np.linspace(0, len(options) - 1, min(most, len(options))).round().astype(int))
    return [replace(options[i], info={}) for i in at]
