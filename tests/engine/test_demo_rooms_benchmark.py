# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from adatoken3d_ros.cli.demo import FAMILIES, ROUND
from benchmarks import demo_rooms
from benchmarks.demo_rooms import Asked, summary


def test_shares_by_hand() -> None:
    """Room 0: one of two right, room 1: one of one; the goal is of all."""
    one = Asked(0, "colour", "?", "red", "red", "OK", True)
    asked = [one, Asked(0, "count", "??", "2", "3", "OK", False), Asked(1, "colour", "?", "blue", "blue", "OK", True)]
    found = summary(asked)
    assert found["all"]["right"] == pytest.approx(2 / 3) and found["all"]["questions"] == 3 and not found["met"]
    assert found["asked_first"] == {"right": 1.0, "interval": [1.0, 1.0], "questions": 2}
    assert set(found["families"]) == {"colour", "count"} and found["rooms"] == 2
    assert found["wrong"] == [{"seed": 0, "question": "??", "expected": "2", "answer": "3"}]


def test_it_asks_what_the_demo_would(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    arguments = ["--json", str(tmp_path / "d.json"), "--model", str(tiny_directory), "--seeds", "1", "--views", "2"]
    monkeypatch.setattr(sys, "argv", ["demo_rooms", *arguments])
    demo_rooms.main()
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["asked_first"]["questions"] == ROUND < found["all"]["questions"] <= len(FAMILIES)
    assert found["setting"] == {"seeds": [0, 0], "views": 2, "budget_ms": 0.0} and len(found["wrong"]) > 3
