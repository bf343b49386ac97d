# SPDX-License-Identifier: Apache-2.0
"""Does a browser that stops reading slow the answers of the view?

The page of `adatoken3d view` is served on a furnished room, with the model in the package. Two clients, processes of
their own, read what the page sends, as browsers do. Questions are asked by the page, one after the other, in four
stretches of --seconds: both clients read; one is stopped (SIGSTOP) and reads nothing; the same once more after it was
let go for a moment; both read. The same questions come in each, and an answer's time is from asking until all of it was
told to the page:

    reads_ms, stopped_ms    p50, p95, p99 and the largest of the answers of two stretches each
    p99_ratio               of the second to the first, with the 95 % interval of 2,000 bootstraps over answers
    goal_ratio              that p99_ratio should not pass; `met` says whether it does not

    python -m benchmarks.view --json benchmarks/results/view_cpu.json

takes two and a half minutes, and should have the machine to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from adatoken3d_ros.cli.output import record_of_answer
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.loading import load_engine
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.view.local import LocalSource
from benchmarks._ros import percentiles, setting, write

GOAL = 1.05
ORDER = (False, True, True, False)  # whether a client is stopped in a stretch
CLIENT = """
import contextlib, sys
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
with contextlib.suppress(ConnectionClosed), connect(sys.argv[1], subprotocols=[sys.argv[2]], max_size=None) as page:
    print("reads", flush=True)
    for message in page:
        pass
"""


def measure(args: argparse.Namespace) -> dict[bool, list[float]]:
    """Milliseconds of each answer, by whether a client was stopped."""
    from adatoken3d_ros.view.page import Page
    from adatoken3d_ros.view.server import address, start, stop

    room = make_room(args.seed, "test")
    given = {"model.path": str(args.model)} if args.model else {}
    settings = Settings({**given, "scene.min_sharpness": 0.0})
    frames = [view.frame for view in render_views(room, count=args.views)]
    asked = generate(room, np.random.default_rng(args.seed), per_family=2)
    texts = [qa.question for qa in asked[: args.questions]]
    source = LocalSource(load_engine(settings), settings, frames, record_of_answer)
    server = start("127.0.0.1", 0, "")
    page = Page(server, source)
    try:
        if not source.wait() or source.problem:
            raise RuntimeError(f"the room was not seen: {source.problem}")
        for text in texts:  # what is done once is done
            page.answer(Question(text))
        url = address(server, "").replace("http", "ws", 1)
        with client(url), client(url) as other:
            times: dict[bool, list[float]] = {False: [], True: []}
            for stopped in ORDER:
                os.kill(other.pid, signal.SIGSTOP if stopped else signal.SIGCONT)
                times[stopped] += stretch(page, texts, args.seconds)
                os.kill(other.pid, signal.SIGCONT)
            return times
    finally:
        page.close()
        stop(server)
        source.close()


def stretch(page: Any, texts: Sequence[str], seconds: float) -> list[float]:
    """Asks for so long, and once at least."""
    times: list[float] = []
    end = time.monotonic() + seconds
    for text in cycle(texts):
        begun = time.monotonic()
        page.answer(Question(text))
        times.append(1000 * (time.monotonic() - begun))
        if time.monotonic() >= end:
            break
    return times


@contextlib.contextmanager
def client(url: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads all that a page sends."""
    command = [sys.executable, "-c", CLIENT, url, f"viser-v{version('viser')}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "reads\n":
            raise RuntimeError("a client could not come in")
        yield process
    finally:
        process.kill()
        process.wait()


def figures(times: dict[bool, list[float]], seed: int = 0) -> dict[str, Any]:
    """What is written, but for the setting."""
    reads, stopped = (np.array(times[one]) for one in (False, True))
    rng = np.random.default_rng(seed)

    def again(values: np.ndarray[Any, Any]) -> Any:
        return np.percentile(rng.choice(values, (2000, len(values))), 99, axis=1)

    low, high = np.percentile(again(stopped) / again(reads), (2.5, 97.5))
    ratio = float(np.percentile(stopped, 99) / np.percentile(reads, 99))
    return {
        **percentiles("reads_ms", reads.tolist()),
        **percentiles("stopped_ms", stopped.tolist()),
        "answers": {"reads": len(reads), "stopped": len(stopped)},
        "p99_ratio": round(ratio, 3),
        "p99_ratio_interval": [round(float(low), 3), round(float(high), 3)],
        "goal_ratio": GOAL,
        "met": ratio <= GOAL,
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (the one in the package)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of four stretches (%(default)s)")
    parser.add_argument("--views", type=int, default=10, help="key frames of the room (%(default)s)")
    parser.add_argument("--questions", type=int, default=24, help="different ones (%(default)s)")
    parser.add_argument("--seed", type=int, default=9, help="of the room (%(default)s)")
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    found = {**figures(measure(args)), "setting": setting(args)}
    write(args.json, found)
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
