# SPDX-License-Identifier: Apache-2.0
"""What do decode steps in one piece, fewer bits and cheap gates bring on this machine?

decode_speedup   median decode step of transformers' layers over growing caches, over that of the graph; in turn,
                 on one prompt of the model in the package, pruned as it is by default
answer_ratio     median time of a whole answer with the graph and the scene's share of the prefill kept, over that of
                 answers the old way; the same questions in turn. `answer_ratios` has short answers and boxes
                 apart, and with the scene's prefix kept (budget.reuse), where there is less beside the decode steps
equal_tokens     whether all those answers have the same tokens
gate_overhead    median share of a prefill in bfloat16 that choosing tokens and gathering rows takes
                 (`benchmarks.prefill`: a random Llama a sixteenth of LLaVA-3D-7B, its prompt in full)
quantised.KIND   right answers that eight and four bits cost, points of a hundred (`benchmarks.quantised`)
real_size.KIND   of LLaVA-3D-7B's shape: what was measured last, see --real-size

python -m benchmarks.onboard --json F [--questions 200] [--quantised-questions 400] [--threads 2] [--repeats 60]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adatoken3d_ros.decoder.decode import Steps, generate
from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.weights import embedded_path
from benchmarks._growing import growing, step_of, written_by
from benchmarks._scenes import machine
from benchmarks._timing import argument_parser, make_case
from benchmarks.embedded import _scene as shown_room
from benchmarks.prefill import contestants, read_prompt

RESULTS = Path(__file__).parent / "results"
GOALS = {"decode_speedup": 3.0, "answer_ratio": 0.7, "gate_overhead": 0.01}


def asked_scene(engine: Engine, settings: Settings, questions: int) -> tuple[Scene, list[tuple[str, str]]]:
    """A furnished room, seen, and (family, question) of so many about it."""
    scene = open_scene(engine, settings)
    return scene, shown_room(scene, questions)


def filled(engine: Engine, scene: Scene, question: str) -> Prefill:
    """The default prefill of a question."""
    prompt, clicks = scene.prompt(Question(question))
    block = scene.prepared.block(None)
    spliced = scene.splice(prompt, clicks, block)
    policy = scene.make_policy(scene.strategy)
    schedule, decoder = scene.strategy.schedule, engine.model.decoder
    return prefill(decoder, spliced.embeds, spliced.layout, schedule, policy, scene=block.scene)


def step_times(engine: Engine, scene: Scene, question: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of decode steps of each way, in turn, each over a prefill of its own."""
    decoder, prepared = engine.model.decoder, engine.model.decoder.stepping
    with torch.inference_mode():
        ways: dict[str, Callable[[], int]] = {"growing": step_of(decoder, filled(engine, scene, question), 5)}
        for name, stepping in {"eager": None, **({"graph": prepared} if prepared else {})}.items():
            decoder.stepping = stepping
            ways[name] = Steps(decoder, filled(engine, scene, question), 5, repeats + 5).next
        decoder.stepping = prepared
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(repeats + 5):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if number >= 5:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return times


def answer_times(
    engine: Engine, scene: Scene, asked: list[tuple[str, str]], console: Console
) -> tuple[list[tuple[str, float, float]], bool]:
    """(family, ms the old way, ms) of each question, and whether all tokens are the same."""
    rows, equal = [], True
    engine.ask(scene, Question(asked[0][1]))  # the first one builds the tokens
    for number, (family, text) in enumerate(track(asked, "answers", console=console, transient=True)):
        took, ids = {}, {}
        for way in (growing, generate) if number % 2 else (generate, growing):
            written: list[int] = []
            with written_by(way, written):
                took[way] = engine.ask(scene, Question(text)).times.total
            ids[way] = written
        equal = equal and ids[growing] == ids[generate]
        rows.append((family, took[growing], took[generate]))
    return rows, equal


def ratios(rows: list[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """By kind of answer the median milliseconds of both ways and their ratio."""
    kinds = {
        "all": rows,
        "short": [row for row in rows if row[0] != "box"],
        "boxes": [row for row in rows if row[0] == "box"],
    }
    found = {}
    for kind, some in kinds.items():
        if some:
            before, now = median(row[1] for row in some), median(row[2] for row in some)
            found[kind] = {"before_ms": round(before, 2), "now_ms": round(now, 2), "ratio": round(now / before, 4)}
    return found


def gate_overhead(device: str, repeats: int) -> float:
    """Of our policy in bfloat16."""
    given = ["--dtype", "bfloat16", "--device", device]
    case = make_case(argument_parser("").parse_args(given))
    policy, schedule = contestants(len(case.decoder))["ours"]
    shares = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        trace = read_prompt(case, policy, schedule).trace
        if device != "cpu":
            torch.cuda.synchronize()
        if number:
            shares.append(trace.gate_seconds / (time.perf_counter() - began))
    return median(shares)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures."""
    settings = Settings(
        {
            "model.path": str(args.model or embedded_path()),
            "model.device": args.device,
            "model.dtype": "float32",
            "budget.warm_up": False,
            "model.decoding": "eager",
        }
    )
    engine = load_engine(settings)
    began = time.perf_counter()
    with console.status("compiling a decode step"), TemporaryDirectory() as folder:
        why = engine.prepare_decoding(args.cache or Path(folder))
    compiled = time.perf_counter() - began
    scene, asked = asked_scene(engine, settings, args.questions)
    steps = step_times(engine, scene, asked[0][1], args.repeats)
    rows, equal = answer_times(engine, scene, asked, console)
    kept, _ = asked_scene(engine, settings | {"budget.reuse": "prefix"}, 1)
    reused, same = answer_times(engine, kept, asked[: args.questions // 4 or 1], console)
    ms = {name: round(median(times), 3) for name, times in steps.items()}
    found = ratios(rows)
    figures: dict[str, Any] = {
        "decode_speedup": round(ms["growing"] / ms.get("graph", ms["eager"]), 3),
        "decode_speedup_eager": round(ms["growing"] / ms["eager"], 3),
        "decode_ms": ms,
        "answer_ratio": found["all"]["ratio"],
        "answer_ratios": {**found, **{f"{kind}, prefix kept": row for kind, row in ratios(reused).items()}},
        "equal_tokens": equal and same,
        "questions": len(rows) + len(reused),
        "compile_s": round(compiled, 1),
        "eager_because": why,
    }
    with console.status("gates in bfloat16"):
        figures["gate_overhead"] = round(gate_overhead(args.device, args.gate_repeats), 5)
    figures["quantised"] = _quantised(args, console)
    figures["real_size"] = _real_size(args.real_size)
    return {**figures, "threads": args.threads, "device": args.device, "machine": machine()}


def _quantised(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if not args.quantised_questions:
        return {}
    from benchmarks.quantised import accuracy_losses

    with TemporaryDirectory() as folder:
        path = args.model or embedded_path()
        return accuracy_losses(path, ("int8", "int4"), args.quantised_questions, args.scenes or Path(folder), console)


def _real_size(file: Path | None) -> dict[str, Any]:
    """What `file`, or the first of the results that has eight or four bits, says of each kind of weights; empty where
    nothing was measured yet."""
    for one in [file] if file else sorted(RESULTS.glob("real_size*.json")):
        found: dict[str, Any] = json.loads(one.read_text(encoding="utf-8")).get("real_size", {})
        if found:
            return {**found, "file": one.name}
    return {}


def report(figures: dict[str, Any]) -> Table:
    """For people."""
    table = Table(title="Onboard")
    for name in ("", "measured", "goal"):
        table.add_column(name, justify="right" if name else "left")
    ms = figures["decode_ms"]
    for name in ms:
        table.add_row(f"decode step, {name}", f"{ms[name]:.2f} ms", "")
    table.add_row("decode speed-up", f"{figures['decode_speedup']:.2f}", f">= {GOALS['decode_speedup']:g}")
    for kind, row in figures["answer_ratios"].items():
        told = f"{row['now_ms']:.1f} / {row['before_ms']:.1f} ms = {row['ratio']:.2f}"
        table.add_row(f"answers, {kind}", told, f"<= {GOALS['answer_ratio']:g}" if kind == "all" else "")
    table.add_row(f"same tokens, {figures['questions']} questions", str(figures["equal_tokens"]), "True")
    table.add_row("gates' share of a prefill", f"{figures['gate_overhead']:.2%}", f"<= {GOALS['gate_overhead']:.0%}")
    for kind in ("int8", "int4"):
        if one := figures["quantised"].get(kind):
            low, high = one["interval"]
            table.add_row(
                f"{kind}: right answers lost", f"{one['accuracy_loss']:.2f} [{low:.2f}, {high:.2f}]", "<= 0.5"
            )
        if one := figures["real_size"].get(kind):
            told = f"{one.get('peak_rss_gb')} GB, weights {one.get('weights_gb')} GB"
            table.add_row(f"7B, {kind}: peak memory", told, "")
    return table


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onboard", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="file to write the figures to")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="about one room, each in both ways (%(default)s)")
    parser.add_argument(
        "--quantised-questions", type=int, default=400, help="for eight and four bits; 0: none (%(default)s)"
    )
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms for these, encoded once and kept")
    parser.add_argument("--real-size", type=Path, metavar="F",
                        help="figures of `benchmarks.real_size` (those in benchmarks/results)")  # fmt: skip
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where compiled steps are kept (nowhere)")
    parser.add_argument("--repeats", type=int, default=60, help="decode steps of each way (%(default)s)")
    parser.add_argument("--gate-repeats", type=int, default=9, help="prefills in bfloat16 (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    args = parser.parse_args(words)
    for name in ("questions", "repeats", "gate_repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    return args


def main() -> None:
    args, console = parse(), Console()
    torch.set_num_threads(args.threads)
    figures = measure(args, console)
    console.print(report(figures))
    args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
