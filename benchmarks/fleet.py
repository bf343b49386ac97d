# SPDX-License-Identifier: Apache-2.0
"""Does one engine serve many robots as it serves one, and what happens if a replica dies?

Starts the service on this machine (Ray, replicas of one model), and robots in threads of this process: each has its
furnished room, encodes its key frames, and asks questions whose answers are known at random times (Poisson) over HTTP.
Four parts, of --seconds each: one robot that asks now and then; one robot that keeps --load of one engine busy; all
robots that together do; and the same once more with a replica killed (SIGKILL) in the middle.

    lost                questions that got neither an answer nor a status, of all parts
    resident_hits       share of the questions of all robots whose scene was on the replica as it was
    late                share of the questions that missed --budget-ms, which one robot alone keeps (`late_alone`)
    ttft_ratio          p95 of the time to the first words, all robots over one robot, at the same load of the engine
    ttft_ratio_idle     the same over one robot that asks now and then, so that none of its questions waits
    bytes_per_key_frame what a key frame takes on the way, mean
    killed.lost         as above, of the last part; killed.errors: with the status ERROR; killed.why: what they said
    killed.recovery_s   from the kill until each robot has an answer in time to a question that it asked afterwards
    killed.replaced_s   from the kill until there are as many replicas as before
    cost                processor seconds of the service a question; milliseconds of it for one robot's

    python -m benchmarks.fleet --json F [--robots 8] [--seconds 60] [--replicas 2] [--quick]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.engine import loading
from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.fleet.link import Missing
from adatoken3d_ros.fleet.loading import load_engine
from adatoken3d_ros.fleet.serving import Service, running
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views, sights
from adatoken3d_ros.settings import Settings
from benchmarks._scenes import machine, write_json

VIEWS = 6
REPLICA = "ray::ServeReplica"  # beginning of the name that Ray gives to its process
PATIENCE = 60.0  # seconds after which a question counts as lost
POLL = 0.05
ALONE_EVERY = 1.0  # seconds, of the robot whose questions do not wait


@dataclass(frozen=True)
class Told:
    """What became of a question: seconds on one clock; first: of the first words, the end where there were none."""

    robot: int
    asked: float
    first: float
    ended: float
    status: str
    in_time: bool
    right: bool
    resident: bool
    why: str = ""


@dataclass
class Robot:
    """A robot: its room's questions, its scene, and the connection that it asks over."""

    number: int
    url: str
    budget_ms: float
    missed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        settings = Settings({
            "engine.url": self.url, "engine.robot": f"robot{self.number}", "budget.warm_up": False,
            "scene.min_gain": 0.0,
            "scene.min_sharpness": 0.0, "scene.max_disagreement": 0.0, "scene.min_translation": 0.0,
            "scene.min_rotation": 0.0,
        })  # fmt: skip
        self.engine: Any = load_engine(settings)
        self.scene: Any = loading.open_scene(self.engine, settings)
        room = make_room(self.number, "test")
        views = render_views(room, seed=self.number, count=VIEWS)
        rng = np.random.default_rng(self.number)
        self.questions = [qa for qa in generate(room, rng, sights(views, rng), per_family=2) if qa.box is None]
        for view in views:
            self.scene.observe(view.frame)
        self.scene.encode_pending()
        self._watch()

    def _watch(self) -> None:
        """Notes when the engine says that it lacks something of the scene."""
        send = self.engine.link.ask

        def watched(*given: Any, **named: Any) -> Any:
            try:
                yield from send(*given, **named)
            except Missing:
                self.missed = True
                raise

        self.engine.link.ask = watched

    def body_sizes(self) -> list[int]:
        """Bytes of each key frame's body."""
        manifest, bodies = self.scene.described()
        return [len(bodies[view.body].packed(self.scene.whose)) for view in manifest.views]

    def ask(self, number: int, due: float) -> Told:
        """Asks its `number`-th question, which was due at a time of time.monotonic()."""
        qa = self.questions[number % len(self.questions)]
        question = Question(qa.question, latency_budget_ms=self.budget_ms, max_new_tokens=16)
        first: list[float] = []

        def began_writing(text: str, tokens: int) -> None:
            if not first:
                first.append(time.monotonic())

        with self.lock:  # one at a time, as its node's worker does
            self.missed = False
            answer: Answer = self.engine.ask(self.scene, question, arrived=due, on_text=began_writing)
            ended = time.monotonic()
        right = answer.status in (Status.OK, Status.TRUNCATED) and answer.text.strip() == qa.answer
        status = answer.status.name
        began = first[0] if first else ended
        why = answer.status_message if answer.status is Status.ERROR else ""
        return Told(self.number, due, began, ended, status, answer.budget_met, right, not self.missed, why)


def times(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of questions from 0 on, Poisson of so many a second."""
    draw, now, found = random.Random(seed), 0.0, list[float]()
    while (now := now + draw.expovariate(rate)) < seconds:
        found.append(now)
    return found


def part(
    robots: Sequence[Robot], schedule: Sequence[Sequence[float]], at: float = 0.0, happen: Any = None
) -> tuple[list[Told], int, float]:
    """All robots ask by their schedules; what became of the questions, how many are lost, and the clock's start.

    happen: called `at` seconds after the start.
    """
    start = time.monotonic() + 0.2
    futures: list[Future[Told]] = []
    # One thread for each question that may be open: whoever waits for a robot's turn must not hold up another robot.
    with ThreadPoolExecutor(max_workers=max(64, 16 * len(robots))) as pool:
        events = sorted((when, k, n) for k, own in enumerate(schedule) for n, when in enumerate(own))
        called = happen is None
        for when, k, n in events:
            if not called and when >= at:
                time.sleep(max(0.0, start + at - time.monotonic()))
                happen()
                called = True
            time.sleep(max(0.0, start + when - time.monotonic()))
            futures.append(pool.submit(robots[k].ask, n, start + when))
        if not called:
            happen()
        found, lost = [], 0
        for future in futures:
            try:
                found.append(future.result(timeout=PATIENCE))
            except Exception as error:  # whatever it is: that question has no answer
                print(f"lost: {type(error).__name__}: {error}")
                lost += 1
    return found, lost, start


def replicas() -> list[psutil.Process]:
    """Processes of the service's engines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(REPLICA):
                found.append(process)
        except psutil.Error:
            continue
    return found


def p95(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95)) if values else float("nan")


def ttft(told: Sequence[Told]) -> float:
    """95th percentile of milliseconds to the first words, of questions that were answered."""
    return 1e3 * p95([one.first - one.asked for one in told if one.status in ("OK", "TRUNCATED", "UNSURE")])


def summary(told: Sequence[Told], lost: int) -> dict[str, Any]:
    """Figures of a part."""
    count = len(told) + lost
    return {
        "questions": count,
        "lost": lost,
        "statuses": dict(Counter(one.status for one in told)),
        "late": sum(not one.in_time for one in told) / max(1, count),
        "errors": sum(one.status == "ERROR" for one in told),
        "why": dict(Counter(one.why for one in told if one.why)),
        "refused": sum(one.status in ("BUSY", "BUDGET_INFEASIBLE") for one in told),
        "resident_hits": sum(one.resident for one in told) / max(1, len(told)),
        "right": sum(one.right for one in told) / max(1, len(told)),
        "ttft_p95_ms": round(ttft(told), 1),
        "total_p95_ms": round(1e3 * p95([one.ended - one.asked for one in told]), 1),
    }


def kill_one(console: Console, when: list[float]) -> None:
    """Kills a replica, and notes when."""
    victim = random.Random(0).choice(sorted(replicas(), key=lambda process: process.pid))
    console.print(f"killing {victim.pid}")
    when.append(time.monotonic())
    os.kill(victim.pid, signal.SIGKILL)


def recovery(told: Sequence[Told], killed: float, robots: int) -> float | None:
    """Seconds from the kill until each robot that asked afterwards has an answer in time to such a question; None: one
    has none."""
    ends = [killed]
    for number in {one.robot for one in told if one.asked >= killed} & set(range(robots)):
        good = [one.ended for one in told if one.robot == number and one.asked >= killed and one.in_time
                and one.status in ("OK", "TRUNCATED", "UNSURE")]  # fmt: skip
        if not good:
            return None
        ends.append(min(good))
    return round(max(ends) - killed, 2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    model = loading.checkpoint_path(str(args.model or ""))
    settings = Settings({"model.path": str(model), "budget.warm_up": True, "model.self_test": False})
    service = Service(settings, replicas=args.replicas, port=free_port(), metrics_port=free_port())
    with running(service) as url:
        console.print(f"{args.replicas} replicas at {url}")
        robots = [Robot(number, url, args.budget_ms) for number in range(args.robots)]
        sizes = [size for robot in robots for size in robot.body_sizes()]
        for robot in robots:  # scenes arrive, and plans are warm
            for number in range(2):
                robot.ask(number, time.monotonic())
        alone, lost_alone, _ = part(robots[:1], [times(1 / ALONE_EVERY, args.seconds, 1)])
        service_s = float(np.mean([one.ended - one.asked for one in alone]))
        rate = args.load / service_s
        one, lost_one, _ = part(robots[:1], [times(rate, args.seconds, 2)])
        before = sum(sum(process.cpu_times()[:2]) for process in replicas())
        many = [times(rate / args.robots, args.seconds, 10 + number) for number in range(args.robots)]
        every, lost_every, _ = part(robots, many)
        spent = sum(sum(process.cpu_times()[:2]) for process in replicas()) - before
        when: list[float] = []
        again = [times(rate / args.robots, args.seconds, 100 + number) for number in range(args.robots)]
        watcher = _Watcher(args.replicas)

        def happen() -> None:
            kill_one(console, when)
            watcher.start()

        dead, lost_dead, _ = part(robots, again, args.seconds / 2, happen)
        replaced = watcher.end(when[0], 60.0)
    whole, killed = summary(every, lost_every), summary(dead, lost_dead)
    return {
        "lost": lost_alone + lost_one + lost_every + lost_dead,
        "resident_hits": round(whole["resident_hits"], 4),
        "late": round(whole["late"], 4),
        "late_alone": round(summary(alone, lost_alone)["late"], 4),
        "ttft_ratio": round(ttft(every) / ttft(one), 3),
        "ttft_ratio_idle": round(ttft(every) / ttft(alone), 3),
        "bytes_per_key_frame": round(float(np.mean(sizes))),
        "killed": {**killed, "recovery_s": recovery(dead, when[0], args.robots), "replaced_s": replaced},
        "recovery_s": recovery(dead, when[0], args.robots),
        "cost": {
            "cpu_s_a_question": round(spent / max(1, len(every)), 3), "service_ms_alone": round(1e3 * service_s, 1),
        },
        "parts": {"idle": summary(alone, lost_alone), "one": summary(one, lost_one), "all": whole},
        "setting": {
            "robots": args.robots, "replicas": args.replicas, "seconds": args.seconds, "load": args.load,
            "budget_ms": args.budget_ms, "questions_a_second": round(rate, 2), "views": VIEWS,
            "model": Path(model).name, "load_average": os.getloadavg()[0],
        },
        "machine": machine(),
    }  # fmt: skip


class _Watcher:
    """Looks how long a replica is missing."""

    def __init__(self, wanted: int) -> None:
        self._wanted, self._full = wanted, float("nan")
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, killed: float, seconds: float) -> float | None:
        """Seconds from the kill until all were there, or None if they were not in time."""
        self._thread.join(seconds)
        return None if np.isnan(self._full) else round(self._full - killed, 2)

    def _look(self) -> None:
        time.sleep(0.2)  # the dead one's entry goes
        while len(replicas()) < self._wanted:
            time.sleep(POLL)
        self._full = time.monotonic()


def table(result: dict[str, Any]) -> Table:
    """For people."""
    shown = Table(title="One engine, many robots", title_justify="left")
    parts = {**result["parts"], "killed": result["killed"]}
    shown.add_column("")
    for name in parts:
        shown.add_column({"idle": "one, idle", "one": "one robot", "all": "all robots", "killed": "one killed"}[name])
    for key in (
        "questions",
        "lost",
        "errors",
        "refused",
        "late",
        "resident_hits",
        "right",
        "ttft_p95_ms",
        "total_p95_ms",
    ):
        shown.add_row(key.replace("_", " "), *(f"{one[key]:.4g}" for one in parts.values()))
    return shown


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--json", type=Path, required=True, metavar="F", help="file to write the figures to")
    found.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (the embedded model)")
    found.add_argument("--robots", type=int, default=8, metavar="N", help="(%(default)s)")
    found.add_argument("--replicas", type=int, default=2, metavar="N", help="(%(default)s)")
    found.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of each part (%(default)s)")
    found.add_argument("--load", type=float, default=0.5, metavar="X", help="of one engine, all robots (%(default)s)")
    found.add_argument("--budget-ms", type=float, default=2000.0, metavar="MS", help="of a question (%(default)s)")
    found.add_argument("--quick", action="store_true", help="a few seconds, to try it")
    return found


def main() -> None:
    commands = parser()
    if commands.parse_known_args()[0].quick:
        commands.set_defaults(robots=3, seconds=4.0)
    args = commands.parse_args()
    for name, least in {"robots": 1, "replicas": 2, "seconds": 1, "budget_ms": 1}.items():
        if getattr(args, name) < least:
            commands.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if not 0 < args.load < 1:
        commands.error(f"--load {args.load} is outside (0, 1)")
    console = Console()
    result = run(args, console)
    console.print(table(result))
    heads = ("lost", "resident_hits", "late", "ttft_ratio", "bytes_per_key_frame", "recovery_s")
    console.print(", ".join(f"{name} {result[name]}" for name in heads))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
