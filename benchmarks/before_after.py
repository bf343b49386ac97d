# SPDX-License-Identifier: Apache-2.0
"""Is this tree as fast and as small as a commit before it?

The commit's sources are laid out as a git worktree in a temporary folder. Small programs then run in turn in both
trees, each in a process of its own with this interpreter: in one round the commit first, in the next this tree, so that
the machine's moods fall on both. A first round is thrown away: it fills caches. As the medians of this tree over those
of the commit:

    answer_ratio     a question about a known scene, from arrival to the whole answer (each tree's benchmarks.embedded)
    start_ratio      import and load of the embedded model (the same)
    key_frame_ratio  a frame observed and encoded as a view of the scene
    ingest_ratio     CPU time from a bag's messages to the frames that they make
    prefill_ratio    prefill of a random model with the policy `ours` (each tree's benchmarks.prefill)
    node_ratio       CPU time of the node while a camera sends images (each tree's benchmarks.ingest; only with --node)
    lines_ratio      lines of Python of the package; tests are no part of it

`spread` holds the least and the greatest ratio of a single round: a ratio means something beside these.

    python -m benchmarks.before_after --base REV --json F [--rounds 5] [--node 10]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "adatoken3d_ros"
PROBE = Path(__file__).with_name("_before_after_probe.py")
BOUND = 1.05  # of times; 1 of lines
APART = 12.0  # metres between two rooms
SIDES = ("base", "new")

Figures = dict[str, float]
Runs = dict[str, dict[str, list[float]]]  # figure -> side -> one number a round


@contextmanager
def worktree(revision: str, tree: Path = ROOT) -> Iterator[Path]:
    """The sources of a commit of a tree's repository in a folder of their own, which is gone afterwards.

    Raises:
        RuntimeError: where git knows no such commit; with its words.
    """
    with TemporaryDirectory(prefix="adatoken3d-before-") as folder:
        path = Path(folder) / "base"
        _git(tree, "worktree", "add", "--detach", str(path), revision)
        try:
            yield path
        finally:
            _git(tree, "worktree", "remove", "--force", str(path))


def revision_of(tree: Path) -> str:
    """The commit of a tree, with `+` where its files differ from it."""
    changed = _git(tree, "status", "--porcelain", "--untracked-files=no")
    return _git(tree, "rev-parse", "HEAD").strip() + ("+" if changed.strip() else "")


def lines_of(tree: Path) -> int:
    """Lines of all Python files of the package."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (tree / PACKAGE).rglob("*.py"))


def embedded_model(tree: Path) -> Path:
    """The checkpoint that comes with a tree, wherever it keeps it. Raises RuntimeError if there is not exactly one."""
    found = sorted(path.parent for path in (tree / PACKAGE).glob("*/embedded/config.json"))
    if len(found) != 1:
        raise RuntimeError(f"{tree} has {len(found)} embedded models, and one is needed")
    return found[0]


def run(tree: Path, *arguments: str) -> str:
    """What a program of Python prints in a tree. Raises RuntimeError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{tree}: {' '.join(arguments)[:200]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def benchmark(tree: Path, scratch: Path, name: str, *flags: object) -> dict[str, Any]:
    """The figures of a tree's own benchmark."""
    run(tree, "-m", f"benchmarks.{name}", "--json", str(scratch), *map(str, flags))
    return dict(json.loads(scratch.read_text(encoding="utf-8")))


class Programs:
    """What is measured in a tree: one process each, one number for each figure (milliseconds, seconds or cores).

    Args:
        args: of the command line.
        bag: that the camera's frames are read from.
        scratch: file that benchmarks write to.
    """

    def __init__(self, args: argparse.Namespace, bag: Path, scratch: Path) -> None:
        self._args, self._bag, self._scratch = args, bag, scratch
        self.all: dict[str, Callable[[Path], Figures]] = {
            "embedded": self.embedded,
            "probe": self.probe,
            "prefill": self.prefill,
        }
        if args.node:
            self.all["node"] = self.node

    def embedded(self, tree: Path) -> Figures:
        """Import, load and questions."""
        flags = "--runs", 1, "--questions", self._args.questions, "--threads", self._args.threads
        found = benchmark(tree, self._scratch, "embedded", *flags)
        return {"answer": found["question_ms"]["all"], "start": 1000 * (found["import_s"] + found["load_s"])}

    def probe(self, tree: Path) -> Figures:
        """Key frames and messages."""
        given = {
            "model": str(embedded_model(tree)),
            "bag": str(self._bag),
            "passes": self._args.passes,
            "threads": self._args.threads,
            "warm": min(3, self._args.frames // 2),
        }
        found = json.loads(run(tree, "-c", PROBE.read_text(encoding="utf-8"), json.dumps(given)).splitlines()[-1])
        if tree not in Path(found["package"]).parents:
            raise RuntimeError(f"in {tree} the package was taken from {found['package']}")
        return {"key_frame": median(found["key_frame_ms"]), "ingest": median(found["ingest_ms"])}

    def prefill(self, tree: Path) -> Figures:
        """The policy `ours` among all others."""
        size = self._args.hidden
        sizes = "--hidden", size, "--intermediate", 11 * size // 4, "--heads", max(size // 64, 1), "--vocab", 2000
        flags = *sizes, "--layers", self._args.layers, "--repeats", self._args.passes
        return {"prefill": benchmark(tree, self._scratch, "prefill", *flags)["ours"]["prefill_ms"]}

    def node(self, tree: Path) -> Figures:
        """A node that listens to a camera."""
        return {"node": benchmark(tree, self._scratch, "ingest", "--seconds", self._args.node)["cpu_cores"]}


def make_bag(path: Path, frames: int) -> Path:
    """One view of each of so many furnished rooms, side by side, so that each is a key frame."""
    from adatoken3d_ros.lab.synthetic.furnished import make_room
    from adatoken3d_ros.lab.synthetic.views import render_views
    from benchmarks._bags import write_bag

    shown = []
    for number in range(frames):
        (view,) = render_views(make_room(number, "test"), seed=number, count=1, width=640, height=480)
        T = view.frame.T_world_camera.copy()
        T[0, 3] += APART * number
        shown.append(replace(view.frame, T_world_camera=T, stamp_ns=(1 + number) * 10**9))
    return write_bag(path, shown)


def measure(trees: Mapping[str, Path], programs: Mapping[str, Callable[[Path], Figures]], rounds: int) -> Runs:
    """Every figure of both trees, round by round in turn; the order within a round changes each time."""
    runs: Runs = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(programs) * len(SIDES) * (1 + rounds))
        for number in range(1 + rounds):
            for name, program in programs.items():
                for side in SIDES if number % 2 else SIDES[::-1]:
                    progress.update(task, description=f"{name}, {side}")
                    found = program(trees[side])
                    progress.advance(task)
                    if number:
                        for figure, value in found.items():
                            runs.setdefault(figure, {one: [] for one in SIDES})[side].append(value)
    return runs


def summary(runs: Runs, lines: Mapping[str, int]) -> dict[str, Any]:
    """Ratios of the medians, their spread over the rounds, and what they were made of."""
    ratios, spread, medians = {}, {}, {}
    for name, sides in runs.items():
        base, new = sides["base"], sides["new"]
        medians[name] = {side: round(median(values), 4) for side, values in sides.items()}
        ratios[f"{name}_ratio"] = round(median(new) / median(base), 4)
        each = [b / a for a, b in zip(base, new, strict=True)]
        spread[f"{name}_ratio"] = [round(min(each), 4), round(max(each), 4)]
    ratios["lines_ratio"] = round(lines["new"] / lines["base"], 4)
    return {**ratios, "spread": spread, "medians": medians, "lines": dict(lines), "runs": runs}


def report(figures: Mapping[str, Any]) -> Table:
    """One row a ratio."""
    table = Table(title="this tree over the commit before")
    for name in ("", "before", "now", "ratio", "rounds from", "to", "at most"):
        table.add_column(name, justify="right" if name else "left")
    for name, sides in [*figures["medians"].items(), ("lines", figures["lines"])]:
        low, high = figures["spread"].get(f"{name}_ratio", ("", ""))
        numbers = sides["base"], sides["new"], figures[f"{name}_ratio"], low, high
        table.add_row(name, *(f"{n:.4g}" if isinstance(n, float) else str(n) for n in numbers), f"{limit(name):g}")
    return table


def limit(name: str) -> float:
    """The greatest ratio that is no loss."""
    return 1.0 if name == "lines" else BOUND


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.before_after", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=5, help="that count, each with both trees (%(default)s)")
    parser.add_argument("--questions", type=int, default=24, help="of benchmarks.embedded (%(default)s)")
    parser.add_argument("--frames", type=int, default=12, help="key frames in the bag (%(default)s)")
    parser.add_argument("--passes", type=int, default=5, help="over the bag, and prefills, in a process (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="size of the random model (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the random model (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--node", type=float, default=0.0, metavar="S", help="also seconds of a camera and the node")
    args = parser.parse_args(arguments)
    for name in ("rounds", "questions", "passes", "layers", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if args.frames < 2 or args.hidden < 64 or args.hidden % 64 or args.node < 0:
        parser.error("--frames must be at least 2, --hidden a multiple of 64, --node not negative")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    console = Console()
    with TemporaryDirectory(prefix="adatoken3d-") as folder, worktree(args.base) as base:
        trees = {"base": base, "new": ROOT}
        revisions = {side: revision_of(tree) for side, tree in trees.items()}
        programs = Programs(args, make_bag(Path(folder) / "bag", args.frames), Path(folder) / "figures.json")
        runs = measure(trees, programs.all, args.rounds)
        figures = summary(runs, {side: lines_of(tree) for side, tree in trees.items()})
    console.print(report(figures))
    setting = {name: value for name, value in vars(args).items() if name not in ("json", "base")}
    content = {**figures, "revisions": revisions, "setting": {**machine(), **setting}}
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
