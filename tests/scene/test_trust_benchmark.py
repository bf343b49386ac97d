# SPDX-License-Identifier: Apache-2.0
"""The benchmark of wrong poses on one room."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adatoken3d_ros.scene.evidence import Observed
from benchmarks import trust
from benchmarks._trust_memory import LOOKED_AT, ROUND, ask_about, tell_story


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


def test_what_goes_moves_and_comes_in_a_room_that_changes() -> None:
    story = tell_story(8002)
    assert story is not None and story.added is not None
    added, gone = story.added, story.removed.instance
    assert not any(added in pixels for pixels in story.pixels[:ROUND])
    assert not any(gone in pixels for pixels in story.pixels[ROUND:])
    asked = ask_about(story, np.random.default_rng(0))
    come = [one for one in asked if one.added]
    assert sum(added in points for points in story.shown[ROUND:]) >= LOOKED_AT
    assert come and asked[: len(come)] == come
    assert all(one.right is Observed.SEEN and one.last_seen_ns[0] >= story.frames[ROUND].stamp_ns for one in come)
