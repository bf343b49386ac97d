# SPDX-License-Identifier: Apache-2.0
"""How long until the model that comes with the package is there, and until a question about a known scene is answered?

Each load happens in a process of its own, the file in the system's cache, as the node loads it:

    import_s     torch, transformers and the engine, before anything is loaded
    load_s       from the directory to an engine that can be asked (goal: under 2 s)
    warm_up_s    measuring how fast this machine is, for latency budgets; not needed when the result is kept
    question_ms  one question about a scene of 8 views that is encoded and built, from its arrival to the whole answer:
                 median over all families, and apart for short answers and boxes, which are written digit by digit
                 (goal: under 500 ms)

    python -m benchmarks.embedded --json F [--model DIR] [--runs 5] [--questions 48] [--threads 2] [--beside 0]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._load import busy

ROOM = 2  # seed of the split `test`: 16 things
LOAD_GOAL_S, QUESTION_GOAL_MS = 2.0, 500.0
_CHILD = "import sys, json; from benchmarks.embedded import child; print(json.dumps(child(**json.loads(sys.argv[1]))))"


def child(model: str, threads: int, questions: int) -> dict[str, Any]:
    """One fresh process: loads and asks so many questions (0: none)."""
    started = time.perf_counter()
    import torch

    from adatoken3d_ros.cli import ask
    from adatoken3d_ros.engine.answer import Question

    for module in ("engine.engine", "engine.budget.controller", "lmm.llava3d.checkpoint"):  # what loading would import
        importlib.import_module(f"adatoken3d_ros.{module}")
    torch.set_num_threads(threads)
    imported = time.perf_counter()
    parser = argparse.ArgumentParser()
    ask.add_parser(parser.add_subparsers())
    given = ["ask", "", "--model", model, "--folder", ".", "--device", "cpu", "--dtype", "float32"]
    engine, scene = ask.open_scene(parser.parse_args(given))
    loaded = time.perf_counter()
    engine.warm_up(scene.strategy)
    warm = time.perf_counter()
    figures: dict[str, Any] = {
        "import_s": imported - started,
        "load_s": loaded - imported,
        "warm_up_s": warm - loaded,
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "model": engine.model_id,
        "torch": torch.__version__,
    }
    if questions:
        texts = _scene(scene, questions)
        engine.ask(scene, Question(texts[0][1]))  # the first one builds the tokens
        rows = []
        for family, text in texts:
            answer = engine.ask(scene, Question(text))
            rows.append((family, answer.times.total, answer.spatial_tokens))
        figures["spatial_tokens"] = rows[0][2]
        figures["questions"] = [(family, milliseconds) for family, milliseconds, _ in rows]
    return figures


def _scene(scene: Any, questions: int) -> list[tuple[str, str]]:
    """Shows a furnished room to the scene; (family, question) of so many questions about it."""
    import numpy as np

    from adatoken3d_ros.lab.synthetic.furnished import make_room
    from adatoken3d_ros.lab.synthetic.questions import generate
    from adatoken3d_ros.lab.synthetic.views import render_views, sights

    room = make_room(ROOM, "test")
    views = render_views(room, seed=ROOM, count=scene.runtime.model.sizes.num_views)
    for view in views:
        scene.observe(view.frame)
    scene.encode_pending()
    scene.prepare()
    rng, seen = np.random.default_rng(0), sights(views, np.random.default_rng(0))
    asked: list[tuple[str, str]] = []
    while len(asked) < questions:
        asked += [(qa.family, qa.question) for qa in generate(room, rng, seen, per_family=1)]
    return asked[:questions]


def measure(model: Path, runs: int, questions: int, threads: int, console: Console, beside: int = 0) -> dict[str, Any]:
    """All figures, each the median of its runs. Raises RuntimeError with a process's words if it fails."""
    found = []
    for number in track(range(runs), "fresh processes", console=console, transient=True):
        last = number == runs - 1
        given = json.dumps({"model": str(model), "threads": threads, "questions": questions if last else 0})
        with busy(beside):
            done = subprocess.run([sys.executable, "-c", _CHILD, given], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a process that loads {model} ended with {done.returncode}: {done.stderr[-800:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    last = found[-1]
    times = {"all": last["questions"]}
    times["boxes"] = [row for row in last["questions"] if row[0] == "box"]
    times["short answers"] = [row for row in last["questions"] if row[0] != "box"]
    return {
        **{name: round(median(one[name] for one in found), 3) for name in ("import_s", "load_s", "warm_up_s")},
        "question_ms": {name: round(median(row[1] for row in rows), 1) for name, rows in times.items() if rows},
        "slowest_question_ms": round(max(row[1] for row in last["questions"]), 1),
        "spatial_tokens": last["spatial_tokens"],
        "parameters": last["parameters"],
        "megabytes": round(sum(f.stat().st_size for f in model.iterdir()) / 1e6, 1),
        "model": last["model"],
        "setting": {
            "runs": runs,
            "questions": questions,
            "threads": threads,
            "beside": beside,
            "spin_count": os.environ.get("GOMP_SPINCOUNT", ""),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": last["torch"],
        },
    }


def report(figures: dict[str, Any]) -> Table:
    """What was measured, beside the goals."""
    table = Table(title=f"{figures['model']}: {figures['megabytes']} MB, {figures['spatial_tokens']} spatial tokens")
    for name in ("", "measured", "goal"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("import (torch, transformers, engine)", f"{figures['import_s']:.2f} s", "")
    table.add_row("load", f"{figures['load_s']:.2f} s", f"{LOAD_GOAL_S:g} s")
    table.add_row("measure the machine's speed", f"{figures['warm_up_s']:.2f} s", "")
    for name, milliseconds in figures["question_ms"].items():
        table.add_row(f"question, {name}", f"{milliseconds:.0f} ms", f"{QUESTION_GOAL_MS:g} ms")
    table.add_row("slowest question", f"{figures['slowest_question_ms']:.0f} ms", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--runs", type=int, default=5, help="processes, the last of which asks")
    parser.add_argument("--questions", type=int, default=48, help="about one room")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--beside", type=int, default=0, help="processes that never rest meanwhile (%(default)s)")
    arguments = parser.parse_args()
    if arguments.beside < 0:
        parser.error(f"--beside {arguments.beside} must be at least 0")
    for name in ("runs", "questions", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    from adatoken3d_ros.weights import embedded_path

    console = Console()
    model = arguments.model or embedded_path()
    figures = measure(model, arguments.runs, arguments.questions, arguments.threads, console, arguments.beside)
    console.print(report(figures))
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
