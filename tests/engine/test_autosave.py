# SPDX-License-Identifier: Apache-2.0
"""Versions of a scene that are written by themselves: how many stay, and what a killed process leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.engine import autosave
from adatoken3d_ros.engine.autosave import State, Versions
from adatoken3d_ros.scene.storage import About, load_scene, pack_scene
from adatoken3d_ros.scene.token_map import TokenMap
from tests.scene.test_storage import IDENTITY, scene

# Writes a second version of a scene and is killed when it has written as many bytes as it is told.
KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from adatoken3d_ros.engine.autosave import Versions
from adatoken3d_ros.scene import sealed_file
from adatoken3d_ros.scene.storage import pack_scene
from tests.scene.test_storage import IDENTITY, scene

directory = Path(sys.argv[1])
packed, before = pack_scene(*scene(2), **IDENTITY), pack_scene(*scene(1), **IDENTITY)
Versions(directory / "whole", "x").write(packed, 1)
size = (directory / "whole" / "x.autosave.000001.scene").stat().st_size
replacing = sealed_file.replacing

class Doomed:
    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        data = bytes(data)
        self.file.write(data[: self.left])
        if len(data) >= self.left:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

for at in [0, 1, 8, 100, *range(1000, size, size // 12), size - 65, size - 1, size, size + 30, size + 63]:
    Versions(directory / f"at{at}", "x").write(before, 3)
    if os.fork() == 0:
        @contextmanager
        def doomed(path):
            with replacing(path) as file:
                yield Doomed(file, at)

        sealed_file.replacing = doomed
        Versions(directory / f"at{at}", "x").write(packed, 3)
        os._exit(7)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (at, status)
"""


def views_of(path: Path) -> int:
    return len(load_scene(path, TokenMap(0.2), channels=5, **IDENTITY)[0])


def test_so_many_versions_stay_and_the_newest_is_restored(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "new", "/robot_1/adatoken3d")
    assert versions.files() == [] and "there is no file" in versions.restore(views_of)
    for views in (1, 2, 3, 4, 5):
        versions.write(pack_scene(*scene(views), **IDENTITY), 3)
    names = [path.name for path in versions.files()]
    assert names == [f"robot_1.adatoken3d.autosave.{n:06d}.scene" for n in (5, 4, 3)]
    assert versions.restore(views_of).startswith("5 views were restored from")
    versions.write(pack_scene(*scene(1), **IDENTITY), 1)
    assert len(list((tmp_path / "new").glob("*"))) == 2, "the version and the lock"
    # Another scene's files are not this one's.
    assert Versions(tmp_path / "new", "adatoken3d").files() == []


def test_a_version_that_is_damaged_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    versions = Versions(tmp_path, "x")
    for views in (1, 2, 3):
        versions.write(pack_scene(*scene(views), **IDENTITY), 3)
    newest, middle, oldest = versions.files()
    newest.write_bytes(newest.read_bytes()[:-1])
    middle.write_bytes(b"")
    assert versions.restore(views_of) == f"1 views were restored from {oldest}"
    assert f"{newest} is damaged" in caplog.text and f"{middle} is no scene" in caplog.text
    oldest.unlink()
    assert "nothing was restored" in (said := versions.restore(views_of)) and str(newest) in said


def test_what_is_of_another_map_outlives_the_versions_of_this_one(tmp_path: Path) -> None:
    """The robot was in another house for a while; back home, it knows its home."""
    home, away = ({**IDENTITY, "about": About(name, {}, {})} for name in ("home", "away"))

    def of(name: str) -> Callable[[Path], int]:
        return lambda path: len(load_scene(path, TokenMap(0.2), channels=5, map_id=name, **IDENTITY)[0])

    Versions(tmp_path, "x").write(pack_scene(*scene(2), **home), 2)
    elsewhere = Versions(tmp_path, "x")
    assert "has map 'home', here it is 'away'" in elsewhere.restore(of("away"))
    for _ in range(4):
        elsewhere.write(pack_scene(*scene(3), **away), 2)
    assert [path.name[-9:-6] for path in elsewhere.files()] == ["005", "004", "001"]
    del elsewhere
    back = Versions(tmp_path, "x")
    assert back.restore(of("home")).startswith("2 views were restored")
    for _ in range(3):
        back.write(pack_scene(*scene(2), **home), 2)
    assert [path.name[-9:-6] for path in back.files()] == ["008", "007", "005", "004"]


def test_the_version_before_loads_wherever_a_process_is_killed(tmp_path: Path) -> None:
    """kill -9 of real processes at bytes all over the file, before and while its checksum is written."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    places = [path for path in tmp_path.iterdir() if path.name.startswith("at")]
    assert len(places) >= 15
    for place in places:
        versions = Versions(place, "x")
        assert [path.suffix for path in sorted(place.iterdir())] == [".part", ".lock", ".scene"], (
            "a draft is left behind"
        )
        assert versions.restore(views_of).startswith("1 views")
        versions.write(pack_scene(*scene(3), **IDENTITY), 3)
        assert versions.restore(views_of).startswith("3 views")


def test_two_nodes_of_one_name_do_not_write_over_each_other(tmp_path: Path) -> None:
    first, second = Versions(tmp_path, "x"), Versions(tmp_path, "x")
    path = first.write(pack_scene(*scene(1), **IDENTITY), 1)
    with pytest.raises(OSError, match="another node of this name saves its scene here") as raised:
        second.write(pack_scene(*scene(2), **IDENTITY), 1)
    assert str(tmp_path) in str(raised.value) and second.files() == [path]
    first.write(pack_scene(*scene(3), **IDENTITY), 1)
    del first  # as at its end, whatever that was
    second.write(pack_scene(*scene(2), **IDENTITY), 1)
    assert second.restore(views_of).startswith("2 views")


def test_a_directory_that_cannot_be_read_costs_the_restore_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    versions = Versions(tmp_path / "file", "x")
    said = versions.restore(views_of)
    assert said.startswith("nothing was restored: ") and str(tmp_path / "file") in said
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        versions.write(pack_scene(*scene(1), **IDENTITY), 1)


def test_drafts_of_long_ago_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tmp_path / ".x.autosave.000009.scene.ab.part"
    draft.write_bytes(b"half")
    monkeypatch.setattr(autosave, "_DRAFT_SECONDS", -1.0)
    Versions(tmp_path, "x").write(pack_scene(*scene(1), **IDENTITY), 1)
    assert not draft.exists()


def test_a_file_that_cannot_grow_is_said_and_the_versions_stay(tmp_path: Path) -> None:
    """As on a full disk, but by the kernel."""
    versions = Versions(tmp_path, "x")
    versions.write(pack_scene(*scene(1), **IDENTITY), 1)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            versions.write(pack_scene(*scene(2), **IDENTITY), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert versions.restore(views_of).startswith("1 views") and len(list(tmp_path.iterdir())) == 2
    versions.write(pack_scene(*scene(2), **IDENTITY), 1)
    assert versions.restore(views_of).startswith("2 views")


def test_a_full_disk_is_said_and_the_versions_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = Versions(tmp_path, "x")
    versions.write(pack_scene(*scene(1), **IDENTITY), 1)

    def full(*_: Any) -> Any:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("adatoken3d_ros.scene.sealed_file._bytes", full)
    with pytest.raises(OSError, match="No space left"):
        versions.write(pack_scene(*scene(2), **IDENTITY), 1)
    assert versions.restore(views_of).startswith("1 views") and len(list(tmp_path.iterdir())) == 2


def test_that_nothing_has_changed_is_worth_a_file_now_and_then_and_at_the_end() -> None:
    saved, later, much_later = (State("views", seconds * 10**9) for seconds in (100, 130, 800))
    assert saved.is_new(None) and not saved.is_new(saved) and not saved.is_new(saved, ending=True)
    assert not later.is_new(saved) and later.is_new(saved, ending=True)
    assert much_later.is_new(saved) and State("others", 100 * 10**9).is_new(saved)
