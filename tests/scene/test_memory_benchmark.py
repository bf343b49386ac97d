# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory


def test_every_step_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "memory.json"
    arguments = ["memory", "--json", str(target), "--views", "3", "--channels", "8", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    memory.main()
    result = json.loads(target.read_text())
    assert result["voxels"] > 100 and result["views"] == 3
    chain = {"decide", "add", "evict", "recentre"}
    assert result["ms"].keys() == {"key_frame", "move_origin", "tokens", "position"} | chain
    for kind in ("ms", "least_ms"):
        assert all(value > 0 for value in result[kind].values())
    assert sum(result["least_ms"][name] for name in chain) < result["least_ms"]["key_frame"]
    assert result["ms"]["evict"] > 0.01, "a view goes for each that comes"
