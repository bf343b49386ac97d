# SPDX-License-Identifier: Apache-2.0
"""How long do others wait while the model writes an answer?

The real node has seen a view and is writing an answer that does not end by itself. Beside it, in turn and from another
process, again and again:

    queue_status_ms   from asking a second question until the node says that it waits
    parameter_get_ms  from asking for a parameter until its value is there
    cancel_ms         from cancelling the second question until the node has taken that

each from the request to the reply as a client sees it; p50, p95, p99 and the largest of --requests. The tiny model is
the hard case: its steps are so short that its thread asks for Python's lock all the time.

Then --budgeted questions with latency budgets go through the service while pictures of 320 x 240 come at 10 Hz from a
third process:

    clock_error_ms    how far the asker's clock from request to reply is from the answer's own total; p50, p95, p99
                      and the largest, which has to keep the goal

    python -m benchmarks.responsiveness --json F
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks._ros import Bench, Requests, argument_parser, percentiles, setting, write
from benchmarks._ros_camera import Camera

GOAL_MS = 50.0
TRUNCATED = 4  # of Answer.status: the answer was cut at its limit, so the model wrote until then
CLOCK_GOAL_MS = 10.0
BUDGETS_MS = (40.0, 80.0, 160.0, 320.0)  # in turn
NAMES = ("queue_status_ms", "parameter_get_ms", "cancel_ms")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All requests, each counted only if the first question was still being answered when its reply came."""
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    questions, retried = 0, 0
    with Bench(args.model, show=args.show, diagnostics__period=0.05) as bench:
        requests = Requests()
        try:
            show_a_view(bench, requests)
            with Progress(
                TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
            ) as progress:
                task = progress.add_task("", total=args.requests)
                running = None
                while len(times["cancel_ms"]) < args.requests:
                    if running is None or running.done():
                        if running is not None and (status := running.result().answer.status) != TRUNCATED:
                            raise RuntimeError(f"the long answer ended with status {status}")
                        bench.wait(lambda: waiting(bench) == "0", "the node to be free")
                        running, questions = requests.ask("What is there?", args.tokens), questions + 1
                        bench.wait(lambda: waiting(bench) == "1", "the node to be answering")
                    got = requests.get_parameter("queue_limit")
                    queued, cancelled = requests.queue_and_cancel("And what is beside it?")
                    if running.done():
                        retried += 1
                        continue
                    for name, value in zip(NAMES, (queued, got, cancelled), strict=True):
                        times[name].append(value)
                    progress.advance(task)
        finally:
            requests.close()
    return figures(times) | {"requests": args.requests, "long_answers": questions, "not_counted": retried}


def clock_error(args: argparse.Namespace) -> dict[str, Any]:
    """How far the answers' own times are from the asker's while a camera streams."""
    errors: list[float] = []
    late = 0
    with Bench(args.model, show=args.show, budget__warm_up=True) as bench:
        requests = Requests()
        try:
            size = ["--width", "320", "--height", "240", "--rate", "10", "--seconds", "600"]
            bench.python("camera", "benchmarks._ros_camera", "--kind", "images", *size)
            bench.wait(lambda: int(bench.counters().get("key_frames", 0)), "a key frame")
            for index in range(args.budgeted):
                answer, seen = requests.answered("What is there?", 8, BUDGETS_MS[index % len(BUDGETS_MS)])
                errors.append(abs(seen - answer.total_ms))
                late += not answer.budget_met
        finally:
            requests.close()
    return clock_figures(errors) | {"budgeted": args.budgeted, "late": late}


def clock_figures(errors: list[float]) -> dict[str, Any]:
    """Percentiles of the clocks' differences, and whether the largest keeps the goal."""
    found: dict[str, Any] = dict(percentiles("clock_error_ms", errors))
    return found | {"clock_goal_ms": CLOCK_GOAL_MS, "clock_met": found["clock_error_ms_max"] <= CLOCK_GOAL_MS}


def show_a_view(bench: Bench, requests: Requests) -> None:
    """So that there is something to ask about."""
    camera = Camera(requests.node, "images", width=64, height=48, points=1, speed=0.0)
    bench.wait(camera.matched, "the node's inputs")
    camera.send(0, 0.0)
    bench.wait(lambda: int(bench.counters().get("key_frames", 0)), "a key frame")


def waiting(bench: Bench) -> str:
    """Questions that wait or are being answered, as the node told last."""
    return bench.client.diagnostics("model").get("questions_waiting", "")


def both(found: dict[str, Any], clocks: dict[str, Any]) -> dict[str, Any]:
    """The figures of the two measurements: `met` says whether both goals were."""
    return found | clocks | {"met": found["met"] and clocks["clock_met"], "requests_met": found["met"]}


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles of each kind of request, and whether the largest of the p99 keeps the goal."""
    found: dict[str, Any] = {}
    for name, values in times.items():
        found |= percentiles(name, values)
    found["goal_ms"] = GOAL_MS
    found["met"] = all(found[f"{name}_p99"] < GOAL_MS for name in times)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("How fast the node replies to others while its model writes an answer.")
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    parser.add_argument("--tokens", type=int, default=3000, help="length of the long answers")
    parser.add_argument("--budgeted", type=int, default=100, help="questions with a budget, for the clocks")
    args = parser.parse_args(arguments)
    if args.requests < 1 or args.tokens < 1:
        parser.error(f"--requests {args.requests} and --tokens {args.tokens} must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    found = measure(args)
    if args.budgeted > 0:
        found = both(found, clock_error(args))
    table = Table("while the model writes", "p50 ms", "p95 ms", "p99 ms", "largest ms")
    for name in (*NAMES, *(["clock_error_ms"] if args.budgeted > 0 else [])):
        cells = (f"{found[f'{name}_{what}']:.1f}" for what in ("p50", "p95", "p99", "max"))
        table.add_row(name.removesuffix("_ms"), *cells)
    console = Console()
    console.print(table)
    requests_met = found.get("requests_met", found["met"])
    console.print(f"goal: p99 under {GOAL_MS:g} ms each: {'met' if requests_met else 'MISSED'}")
    if args.budgeted > 0:
        largest = f"p95 {found['clock_error_ms_p95']:.1f} ms, largest {found['clock_error_ms_max']:.1f} ms"
        kept = "met" if found["clock_met"] else "MISSED"
        console.print(f"goal: clocks agree within {CLOCK_GOAL_MS:g} ms ({largest}): {kept}")
    write(args.json, found | {"setting": setting(args)})


if __name__ == "__main__":
    main()
