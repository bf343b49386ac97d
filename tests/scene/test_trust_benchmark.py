# SPDX-License-Identifier: Apache-2.0
"""The benchmark of wrong poses on one room."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import trust


def test_a_room_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trust.json"
    trust.main(["--rooms", "1", "--views", "10", "--questions", "0", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["setting"]["views"] == 10 and found["machine"]["processor"]
    assert found["false_alarms"] == found["right_frames_refused"] == found["ghost_voxels"] == 0.0
    assert found["found"]["inverted"] == found["found"]["y_down"] == 1.0
    assert "conventions_found" in capsys.readouterr().out


def test_ghosts_by_hand() -> None:
    frames = trust.walk(trust.FIRST_ROOM, 2)
    moved = frames[1].T_world_camera.copy()
    moved[2, 3] += 50.0
    ghost = replace(frames[1], T_world_camera=moved)
    assert trust.ghosts([frames[0], ghost], [1], frames) == 0.0
    assert trust.ghosts([frames[0], ghost], [2], frames) == 1.0
