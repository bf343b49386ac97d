# SPDX-License-Identifier: Apache-2.0
"""Does the node stay whole when everything happens to it, in any order, for hours?

A schedule of actions is drawn from --seed before anything starts, and carried out on the real node with real clients:
frames of a sensor that moves (some of them malformed), questions, questions that are cancelled or whose client goes
away, parameter changes (some of them to be refused), clearing the scene, and lifecycle cycles. The same seed and the
same minutes give the same schedule, so that what failed once can be repeated.

    rss_growth_mb_per_hour  slope of the node's memory over time: median of the slopes between all pairs of samples
                            (Theil and Sen), of one sample a second, the first fifth of the time left out. Half an
                            hour at least is needed for it to mean something.
    unanswered              questions without an answer of any status, and other requests without a reply, within
                            --patience
    crashes                 1 if the node ended by itself; the run then ends, and its last words are in the figures

    python -m benchmarks.soak --minutes 60 --json F
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy.stats import theilslopes

from adatoken3d_ros.cli.processes import ProcessError
from adatoken3d_ros.ros.client import LifecycleError, SceneClient
from benchmarks._ros import NODE, Bench, Requests, argument_parser, setting, unaccounted, write
from benchmarks._ros_camera import Camera

# Actions a second at the middle speed, by kind.
RATES = {
    "frame": 8.0,
    "malformed_frame": 0.1,
    "question": 0.4,
    "cancelled_question": 0.15,
    "abandoned_question": 0.05,
    "parameter": 0.3,
    "clear": 0.02,
    "reactivate": 0.03,
    "reload": 0.01,
}
PARAMETERS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("strategy", ("ours", "none", "random", "divprune", "no_such_strategy")),
    ("question_policy", ("queue", "replace", "reject", "maybe")),
    ("queue_limit", (0, 2, 8, -1)),
    ("latency_budget_ms", (0.0, 50.0, 5000.0, -1.0)),
    ("max_new_tokens", (1, 16, 64, 0)),
    ("diagnostics.stale_after", (5.0, 0.5, 1e9)),
    ("scene.max_views", (3,)),  # the node is configured: refused
)
SAMPLE_SECONDS = 1.0
WARM_UP = 0.2  # share of the samples that is left out
CLIENTS = 8  # questions that may be open at a time
SIZE = (160, 120)  # pixels


@dataclass(frozen=True)
class Action:
    """Something that happens `at` seconds after the start.

    Attributes:
        what: a key of RATES. number: of the action among all. value: what it needs, by kind.
    """

    at: float
    what: str
    number: int
    value: Any = None


def schedule(seed: int, seconds: float) -> list[Action]:
    """Actions of each kind at random times (a Poisson process), in order; the same arguments give the same list."""
    rng = random.Random(seed)
    drawn: list[tuple[float, str, Any]] = []
    for what, rate in RATES.items():
        at = rng.expovariate(rate)
        while at < seconds:
            drawn.append((at, what, _value(rng, what)))
            at += rng.expovariate(rate)
    drawn.sort(key=lambda item: item[:2])
    return [Action(at, what, number, value) for number, (at, what, value) in enumerate(drawn)]


def _value(rng: random.Random, what: str) -> Any:
    if what == "parameter":
        name, values = rng.choice(PARAMETERS)
        return name, rng.choice(values)
    if "question" in what:
        return {
            "text": rng.choice(("What is there?", "Where is the door?", " ", "x" * 2000)),
            "tokens": rng.choice((0, 4, 64, 400)),
            "budget": rng.choice((0.0, 0.0, 20.0, 1000.0)),
            "after": rng.uniform(0.0, 0.5),
        }
    if what == "malformed_frame":
        return rng.choice(("encoding", "step", "width"))
    return None


@dataclass
class Tally:
    """What happened."""

    actions: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    samples: list[tuple[float, float]] = field(default_factory=list)
    unanswered: int = 0
    crashes: int = 0


class Soak:
    """Carries out a schedule; `tally` is what came of it."""

    def __init__(self, bench: Bench, patience: float) -> None:
        self._bench = bench
        self._patience = patience
        self._requests = Requests()
        self._camera = Camera(self._requests.node, "images", width=SIZE[0], height=SIZE[1], points=1, speed=0.5)
        self._pool = ThreadPoolExecutor(CLIENTS, thread_name_prefix="client")
        self._open: list[Future[None]] = []
        self._frames = 0
        self.tally = Tally()

    def run(self, actions: Sequence[Action], progress: Any) -> None:
        """Each action at its time, or at once if it is late. Ends early when the node has ended."""
        began, sampled = time.monotonic(), 0.0
        try:
            for action in actions:
                while True:
                    self._bench.processes.check()
                    now = time.monotonic() - began
                    if now - sampled >= SAMPLE_SECONDS:
                        sampled = now
                        self.tally.samples.append((now, self._bench.rss_mb()))
                    if now >= action.at:
                        break
                    time.sleep(min(action.at - now, SAMPLE_SECONDS / 4))
                progress(action.at)
                self.tally.actions[action.what] += 1
                try:
                    self._do(action)
                except (TimeoutError, LifecycleError) as error:
                    self.tally.unanswered += isinstance(error, TimeoutError)
                    self._problem(error, action)
            for question in self._open:
                question.result()
            self._bench.processes.check()
        except (ProcessError, ConnectionError) as error:
            self.tally.crashes += 1
            self._problem(error)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._requests.close()

    def _do(self, action: Action) -> None:
        client = self._bench.client
        if action.what in ("frame", "malformed_frame"):
            self._frames += 1
            spoil = {action.value: {"encoding": "strange", "step": 1, "width": 3}[action.value]} if action.value else {}
            self._camera.send(self._frames, action.at, spoil)
        elif "question" in action.what:
            self._open = [question for question in self._open if not question.done()]
            self._open.append(self._pool.submit(self._question, action))
        elif action.what == "parameter":
            reason = self._requests.set_parameter(*action.value)
            self.tally.refused.update([action.value[0]] if reason else [])
        elif action.what == "clear":
            client.clear(timeout=self._patience)
        else:
            client.deactivate(timeout=self._patience)
            if action.what == "reload":
                client.cleanup(timeout=self._patience)
                client.configure(timeout=self._patience)
            client.activate(timeout=self._patience)

    def _question(self, action: Action) -> None:
        """In a thread of the pool: one question in the way that the action tells."""
        value, limits = action.value, {"timeout": self._patience}
        asked = {"latency_budget_ms": value["budget"], "max_new_tokens": value["tokens"], **limits}
        try:
            if action.what == "question":
                answer = self._bench.client.ask(value["text"], **asked)
            elif action.what == "cancelled_question":
                stream = self._bench.client.stream(value["text"], **asked)
                time.sleep(value["after"])
                stream.cancel()
                answer = stream.result()
            else:
                with SceneClient() as other:
                    other.stream(value["text"], **asked)
                    time.sleep(value["after"])
                self.tally.statuses["abandoned"] += 1
                return
        except (TimeoutError, ConnectionError, RuntimeError) as error:
            self.tally.unanswered += action.what != "abandoned_question"
            self._problem(error, action)
        else:
            self.tally.statuses[str(answer.status)] += 1

    def _problem(self, error: Exception, action: Action | None = None) -> None:
        where = "" if action is None else f"action {action.number} ({action.what} at {action.at:.1f} s): "
        self.tally.problems.append(f"{where}{type(error).__name__}: {error}")


def growth_mb_per_hour(samples: Sequence[tuple[float, float]]) -> float | None:
    """Theil-Sen slope of (seconds, MB), the first WARM_UP of the time left out; None for fewer than three samples."""
    if not samples:
        return None
    start = samples[0][0] + WARM_UP * (samples[-1][0] - samples[0][0])
    kept = np.array([sample for sample in samples if sample[0] >= start])
    if len(kept) < 3:
        return None
    kept = kept[:: max(1, len(kept) // 1500)]  # all pairs are looked at
    return float(theilslopes(kept[:, 1], kept[:, 0]).slope * 3600)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    actions = schedule(args.seed, 60 * args.minutes)
    with (
        Bench(args.model, show=args.show, scene__max_views=6, max_new_tokens=16) as bench,
        Progress(TextColumn("soak"), BarColumn(), TimeRemainingColumn(), transient=True) as progress,
    ):
        soak = Soak(bench, args.patience)
        task = progress.add_task("", total=60 * args.minutes)
        try:
            soak.run(actions, lambda at: progress.update(task, completed=at))
            counters = bench.settled() if not soak.tally.crashes else {}
        finally:
            soak.close()
        words = bench.processes.last_words(NODE) if soak.tally.crashes else ""
    return figures(soak.tally, counters) | {"last_words": words, "scheduled": len(actions)}


def figures(tally: Tally, counters: dict[str, str]) -> dict[str, Any]:
    slope = growth_mb_per_hour(tally.samples)
    return {
        "rss_growth_mb_per_hour": None if slope is None else round(slope, 3),
        "rss_mb": [round(tally.samples[i][1], 1) for i in (0, -1)] if tally.samples else [],
        "unanswered": tally.unanswered,
        "crashes": tally.crashes,
        "unaccounted": {name: count for name, count in unaccounted(counters).items() if count},
        "actions": dict(sorted(tally.actions.items())),
        "answers_by_status": dict(sorted(tally.statuses.items())),
        "parameters_refused": dict(sorted(tally.refused.items())),
        "problems": tally.problems[:20],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Everything that can happen to the node, in any order, for as long as wanted.")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the schedule")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds until a question counts as unanswered")
    args = parser.parse_args(arguments)
    if not args.minutes > 0 or not args.patience > 0:
        parser.error(f"--minutes {args.minutes} and --patience {args.patience} must be positive")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    found = measure(args)
    table = Table("soak", "")
    for name in ("rss_growth_mb_per_hour", "unanswered", "crashes", "scheduled"):
        table.add_row(name, str(found[name]))
    for group in ("actions", "answers_by_status", "parameters_refused"):
        for name, count in found[group].items():
            table.add_row(f"{group.replace('_', ' ')}: {name}", str(count))
    console = Console()
    console.print(table)
    for problem in found["problems"]:
        console.print(problem, markup=False)
    write(args.json, found | {"setting": setting(args)})


if __name__ == "__main__":
    main()
