# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of a trained model refuse before they measure anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from adatoken3d_ros.lab.training.train import Trainer
from benchmarks import accuracy, claims, confidence, demo_rooms, frontier, photographs

BAD: list[tuple[ModuleType, list[str], str]] = [
    (frontier, ["--from", "old.json"], "old.json holds no figures of this benchmark, or of another version: without ["),
    (frontier, ["--from", "old.json"], "'tokens', 'losses'"),
    (frontier, ["--from", "list.json"], "list.json holds no figures of this benchmark"),
    (frontier, ["--from", "torn.json"], "torn.json is no JSON"),
    (frontier, ["--from", "none.json"], "none.json"),
    (frontier, ["--resume", "torn.json"], "torn.json ends with what no run has begun to write"),
    (frontier, ["--resume", "folder"], "folder is no file"),
    (frontier, ["--docs", "page.md"], "page.md has no <!-- frontier -->"),
    (frontier, ["--docs", "none.md"], "none.md"),
    (frontier, ["--json", "folder"], "--json folder is a folder"),
    (frontier, ["--model", "none"], "--model none is no folder"),
    (frontier, ["--policies", "nobody"], "invalid choice: 'nobody'"),
    (frontier, ["--policies"], "expected at least one argument"),
    (claims, ["--from", "old.json"], "without ['contribution'"),
    (claims, ["--docs", "page.md"], "page.md has no <!-- claims -->"),
    (claims, ["--beside", "none"], "--beside none is no folder"),
    (claims, ["--model", "none"], "--model none is no folder"),
    (accuracy, ["--model", "none"], "--model none is no folder"),
    (accuracy, ["--blind", "none"], "--blind none is no folder"),
    (accuracy, ["--json", "folder"], "--json folder is a folder"),
    (confidence, ["--resume", "torn.json"], "torn.json ends with what no run has begun to write"),
    (confidence, ["--photographs", "none"], "--photographs none is no folder"),
    (demo_rooms, ["--model", "none"], "--model none is no folder"),
    (photographs, ["--photographs", "none"], "--photographs none is no folder"),
    (photographs, ["--photographs", "folder", "--blind", "none"], "--blind none is no folder"),
]


@pytest.mark.parametrize(("benchmark", "given", "named"), BAD, ids=[" ".join(given) for _, given, _ in BAD])
def test_what_cannot_be_used_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], benchmark: ModuleType,
    given: list[str], named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("old.json").write_text(json.dumps({"unpruned": {}, "policies": {}, "goals": {}, "setting": {}, "model": {}}))
    Path("list.json").write_text("[]")
    Path("torn.json").write_text("{")
    Path("page.md").write_text("no block\n")
    monkeypatch.setattr(benchmark, "run", lambda *args: pytest.fail("it began to measure"))
    name = benchmark.__name__.rpartition(".")[2]
    monkeypatch.setattr(sys, "argv", [name, "--json", "new.json", *given])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2 and named in capsys.readouterr().err
    assert not Path("new.json").exists()


def test_few_questions_leave_rooms_without_any(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each family: the first room has them, and the time of none can be measured in the others."""
    make_trainer().save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    sizes = ["--quick", "--questions", "1", "--rooms", "3", "--timed", "2", "--targets", "0.6", "0.6", "--tokens"]
    given = ["--model", "model", "--json", "f.json", "--picture", "new/f.png", "--workers", "1", "--policies", "fastv"]
    monkeypatch.setattr(frontier, "time_all", lambda reader, rooms, *args: (timed.extend(rooms), (None, None))[1])
    timed: list[frontier.Room] = []
    monkeypatch.setattr(sys, "argv", ["frontier", *given, *sizes])
    frontier.main()
    found = json.loads(Path("f.json").read_text())
    assert timed and all(room.questions for room in timed)
    assert [point["target"] for point in found["policies"]["ours"]] == [0.6], "a budget that is given twice is one"
    assert found["setting"]["rooms"] == len(timed) and Path("new/f.png").is_file()
