# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d demo --robots N`: one engine as a service, and robots that share it, with a room, a camera, a node each,
in namespaces of their own and separate processes over DDS."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.processes import Processes

if TYPE_CHECKING:
    from adatoken3d_ros.ros.client import SceneClient
    from adatoken3d_ros.ros.suggestions import Suggestion, Suggestions

_POLL = 0.1  # seconds
_QUESTION = "What is in the room?"  # where a camera suggests nothing


@dataclass(frozen=True)
class Told:
    """A row of the table."""

    robot: str
    question: str
    answer: str
    expected: str | None
    status: str
    answered: bool
    total_ms: float
    queue_ms: float
    tokens: str


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that mean one robot, and OSError where Ray is missing."""
    if not 1 <= args.robots <= 32:
        raise ValueError(f"--robots {args.robots} must be from 1 to 32")
    if args.robots == 1:
        return
    for option in ("rviz", "view", "interactive", "json", "seconds"):
        if getattr(args, option):
            raise ValueError(f"--{option} is for one robot: not with --robots {args.robots}")
    from adatoken3d_ros.fleet.cluster import require_ray

    require_ray()


def run(
    args: argparse.Namespace,
    processes: Processes,
    model: Path,
    start: Callable[[str, int, dict[str, str]], None],
    suggested: Callable[[Suggestions, int], list[Suggestion]],
) -> int:
    """Starts engine and robots, has all of them ask at once; 0 if every question was answered.

    start: begins a robot's processes, by its namespace, the seed of its room, and parameters of its node.
    """
    from rich.console import Console

    from adatoken3d_ros.ros.client import SceneClient

    console = Console()
    port, metrics_port = _free_port(), _free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["serve", "--model", str(model), "--port", str(port), "--metrics-port", str(metrics_port)]
    processes.start("serve", [sys.executable, "-m", "adatoken3d_ros.cli.main", *command])
    with console.status("starting Ray and the engine"):
        _wait(url, processes, args.timeout)
    names = [f"robot{number}" for number in range(args.robots)]
    for number, name in enumerate(names):
        start(name, args.seed + number, {"engine.url": url, "engine.robot": name})
    with ExitStack() as stack:
        pool, ended = ThreadPoolExecutor(len(names)), threading.Event()
        stack.callback(pool.shutdown)  # after the clients are closed, which ends what their threads wait for
        clients = [stack.enter_context(closing(SceneClient(namespace=name))) for name in names]
        stack.callback(ended.set)
        with console.status("every robot looks around its room") as shown:
            robots = [
                pool.submit(_robot, args, client, name, ended, suggested)
                for client, name in zip(clients, names, strict=True)
            ]
            while not all(robot.done() for robot in robots):
                processes.check()
                shown.update(
                    f"robots look around and ask: {sum(robot.done() for robot in robots)} of {len(names)} done"
                )
                time.sleep(_POLL)
            told = [row for robot in robots for row in robot.result()]
        console.print(table(told))
        known = [row for row in told if row.expected is not None]
        if known:
            right = sum(row.answer == row.expected for row in known)
            console.print(f"{right} of {len(known)} answers are those of the rooms.")
        processes.interrupt()
    return 0 if all(row.answered for row in told) else 1


def _robot(
    args: argparse.Namespace,
    client: SceneClient,
    name: str,
    ended: threading.Event,
    suggested: Callable[[Suggestions, int], list[Suggestion]],
) -> list[Told]:
    """Brings one robot up, waits until it has looked around, and asks."""
    from adatoken3d_ros.engine.answer import Status
    from adatoken3d_ros.ros.suggestions import Suggestions

    suggestions = Suggestions(client.node, f"/{name}/demo_camera/questions")
    client.state(timeout=args.timeout)
    client.configure(timeout=args.timeout)
    client.activate(timeout=args.timeout)
    deadline = time.monotonic() + args.timeout
    while int(client.diagnostics("scene").get("key_frames", 0)) < args.views:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name}: fewer than {args.views} key frames within {args.timeout:g} s")
        if ended.wait(_POLL):
            return []  # nobody asks for it any more
    asked: list[tuple[str, str | None]] = [(text, None) for text in args.question or ()]
    if not asked:
        asked = [(one.question, one.answer) for one in suggested(suggestions, 0)] or [(_QUESTION, None)]
    told = []
    for question, expected in asked:
        answer = client.ask(question, latency_budget_ms=args.budget_ms, timeout=args.timeout)
        status = Status(answer.status)
        tokens = f"{answer.retained_tokens} of {answer.spatial_tokens}"
        text = answer.text or answer.status_message
        told.append(
            Told(
                name,
                question,
                text,
                expected,
                status.name,
                status.answered,
                answer.total_ms,
                answer.queue_ms,
                tokens,
            )
        )
    return told


def table(told: list[Told]) -> Any:
    """Answers and times of all robots."""
    from rich.table import Table

    shown = Table(title="One engine, many robots", title_justify="left")
    for head in ("robot", "question", "answer", "in the room", "status", "total ms", "queue ms", "tokens"):
        shown.add_column(head, justify="right" if head.endswith("ms") else "left")
    for row in told:
        shown.add_row(
            row.robot, row.question, row.answer, row.expected or "", row.status,
            f"{row.total_ms:.0f}", f"{row.queue_ms:.0f}", row.tokens,
        )  # fmt: skip
    return shown


def _wait(url: str, processes: Processes, seconds: float) -> None:
    """Until the service answers. Raises ProcessError if it has ended, TimeoutError if it takes too long."""
    request = urllib.request.Request(f"{url}/v1/hello", headers={"x-robot": "demo"})
    deadline = time.monotonic() + seconds
    while True:
        processes.check()
        try:
            with urllib.request.urlopen(request, timeout=2.0):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine does not answer at {url} within {seconds:g} s: {error}") from error
        time.sleep(_POLL)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
