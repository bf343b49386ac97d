# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.before_after`: arithmetic by hand, the order of its runs, its worktree, the probe on a small bag."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import adatoken3d_ros
from adatoken3d_ros.cli import ask
from benchmarks import _before_after_probe, before_after
from benchmarks._bags import write_bag


def test_ratios_by_hand() -> None:
    runs = {"answer": {"base": [100.0, 200.0, 400.0], "new": [110.0, 180.0, 400.0]}}
    figures = before_after.summary(runs, {"base": 1000, "new": 990})
    assert figures["answer_ratio"] == 0.9 and figures["lines_ratio"] == 0.99
    assert figures["medians"] == {"answer": {"base": 200.0, "new": 180.0}}
    assert figures["spread"] == {"answer_ratio": [0.9, 1.1]}
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(before_after.report(figures))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert [row[1::2] for row in rows if "answer" in row] == [["answer", "200", "180", "0.9", "0.9", "1.1", "1.05"]]


def test_runs_alternate_and_the_first_round_does_not_count(tmp_path: Path) -> None:
    trees = {"base": tmp_path / "base", "new": tmp_path / "new"}
    order: list[str] = []

    def program(tree: Path) -> dict[str, float]:
        order.append(tree.name)
        return {"answer": float(len(order))}

    runs = before_after.measure(trees, {"program": program}, 3)
    assert order == ["new", "base", "base", "new", "new", "base", "base", "new"]
    assert runs == {"answer": {"base": [3.0, 6.0, 7.0], "new": [4.0, 5.0, 8.0]}}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with three lines of Python in the package, a model and a test; then a change."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tree = tmp_path / "repository"
    for name, text in (("a.py", "1\n2\n"), ("b/c.py", "3\n"), ("weights/embedded/config.json", "{}")):
        (tree / before_after.PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / before_after.PACKAGE / name).write_text(text)
    (tree / "test_a.py").write_text("4\n5\n")
    author = "-c", "user.name=a", "-c", "user.email=a@b"
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tree), *command], check=True)
    (tree / before_after.PACKAGE / "a.py").write_text("1\n2\n2\n2\n")
    return tree


def test_a_worktree_holds_the_commit_and_goes_again(repository: Path) -> None:
    with before_after.worktree("HEAD", repository) as base:
        assert before_after.lines_of(base) == 3 and before_after.lines_of(repository) == 5
        revision = before_after.revision_of(base)
        assert before_after.revision_of(repository) == f"{revision}+"
        assert before_after.embedded_model(base) == base / before_after.PACKAGE / "weights" / "embedded"
        assert before_after.run(base, "-c", "import os; print(os.getcwd())").strip() == str(base.resolve())
        (base / "left.over").touch()
        with pytest.raises(RuntimeError, match="ended with 3: gone"):
            before_after.run(base, "-c", "import sys; print('gone', file=sys.stderr); sys.exit(3)")
    assert not base.exists()
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1
    with pytest.raises(RuntimeError, match="nowhere"), before_after.worktree("nowhere", repository):
        pass


def test_the_probe_times_messages_and_key_frames(
    tiny_directory: Path,
    wall_frame: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ask, "frames", ask.frames)  # the probe, whose process ends with it, replaces it
    bag = write_bag(tmp_path / "bag", [wall_frame(index) for index in range(3)])
    threads = torch.get_num_threads()
    _before_after_probe.main(str(tiny_directory), str(bag), passes=2, threads=threads, warm=1)
    lines = capsys.readouterr().out.splitlines()
    assert "frames: 3 key_frame" in lines[-2]
    figures = json.loads(lines[-1])
    assert figures["package"] == adatoken3d_ros.__file__
    assert len(figures["ingest_ms"]) == 2 and min(figures["ingest_ms"]) > 0
    assert len(figures["key_frame_ms"]) == 2 and min(figures["key_frame_ms"]) > 0


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--rounds", "0"], ["--hidden", "100"], ["--frames", "1"]):
        with pytest.raises(SystemExit):
            before_after.parse(["--base", "HEAD", "--json", "f", *flags])
        assert flags[0] in capsys.readouterr().err
