# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from adatoken3d_ros.engine.engine import Engine
from benchmarks import embedded


@pytest.fixture
def threads() -> Iterator[int]:
    """As many as there were before and will be after."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_a_process_loads_and_asks(tiny_directory: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "warm_up", lambda *_: False)
    figures = embedded.child(str(tiny_directory), threads, questions=2)
    assert all(figures[name] >= 0 for name in ("import_s", "load_s", "warm_up_s"))
    assert len(figures["questions"]) == 2 and all(milliseconds > 0 for _, milliseconds in figures["questions"])
    assert figures["spatial_tokens"] > 0 and figures["model"].startswith(f"{tiny_directory.name}@")


def test_medians_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three loads, and the last process's questions, boxes apart."""
    asked: list[int] = []

    def process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        given = json.loads(command[-1])
        asked.append(given["questions"])
        load = (3.0, 1.0, 2.0)[len(asked) - 1]
        figures = {"import_s": 5.0, "load_s": load, "warm_up_s": 1.0, "parameters": 7, "model": "m@0", "torch": "2"}
        rows = [["on", 10.0], ["box", 90.0], ["on", 30.0], ["count", 20.0]]
        figures |= {"questions": rows, "spatial_tokens": 400}
        return subprocess.CompletedProcess(command, 0, f"a line\n{json.dumps(figures)}\n", "")

    monkeypatch.setattr(subprocess, "run", process)
    (tmp_path / "model.safetensors").write_bytes(bytes(2_500_000))
    figures = embedded.measure(tmp_path, 3, 4, 2, Console(quiet=True))
    assert asked == [0, 0, 4]
    assert (figures["load_s"], figures["megabytes"]) == (2.0, 2.5)
    assert figures["question_ms"] == {"all": 25.0, "boxes": 90.0, "short answers": 20.0}
    assert figures["slowest_question_ms"] == 90.0
    assert embedded.report(figures).row_count == 7


def test_a_process_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "CheckpointError: no weights")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="ended with 1: CheckpointError: no weights"):
        embedded.measure(tmp_path, 1, 1, 1, Console(quiet=True))
