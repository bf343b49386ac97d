# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d evaluate` on a small made set: the metrics of its answers, a run that goes on, scenes of each form."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.lab.evaluation.answering import Kept
from adatoken3d_ros.lab.evaluation.marking import mark
from adatoken3d_ros.lab.evaluation.question_sets import Item
from adatoken3d_ros.lab.evaluation.scenes import find_scene, frames_of
from adatoken3d_ros.lab.metrics import java


@pytest.fixture
def scenes(folder: Path, tmp_path: Path) -> Path:
    """One room under two names."""
    root = tmp_path / "scenes"
    root.mkdir()
    for name in ("wall", "other"):
        (root / name).symlink_to(folder)
    return root


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    entries = [
        {"scene": scene, "question": text, "answers": ["two"], "id": f"{scene}-{index}", "type": "count"}
        for index, text in enumerate(("How many chairs are there?", "How many lamps are there?"))
        for scene in ("wall", "other")
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_every_strategy_is_asked_once_and_an_ended_run_goes_on(
    tiny: Path, scenes: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked: list[tuple[str, str]] = []
    whole = Engine.ask

    def counted(self: Engine, scene: Any, question: Any, **options: Any) -> Any:
        asked.append((scene.strategy.name, question.text))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return whole(self, scene, question, **options)

    monkeypatch.setattr(Engine, "ask", counted)
    options = ["--questions", str(questions), "--scenes", str(scenes), "--out", str(out), "--model", str(tiny)]
    command = ["evaluate", *options, "--max-new-tokens", "3", "--strategies", "none", "fastv"]
    assert main(command) == 130
    lines = (out / "answers.jsonl").read_text()
    assert len(lines.splitlines()) == 5
    (out / "answers.jsonl").write_text(lines + '{"key": "cut o')
    assert main(command) == 0
    assert len(asked) == 6 + 3  # the one that was interrupted, and those that were missing
    result = json.loads((out / "result.json").read_text())
    assert (result["questions"], result["scenes"], result["form"]) == (4, 2, "ours")
    assert result["command"].startswith(f"adatoken3d evaluate --questions {questions}")
    none, fastv = result["strategies"]["none"], result["strategies"]["fastv"]
    assert none["saved"] == 0 < fastv["saved"]
    assert none["metrics"]["EM"]["difference_interval"] == [0, 0]
    page = (out / "report.html").read_text()
    assert "<svg" in page and "fastv" in page and "http" not in page.partition("<svg")[0]
    told = json.loads((out / "predictions-fastv.json").read_text())
    assert [one["question_id"] for one in told] == ["wall-0", "other-0", "wall-1", "other-1"]
    before = (out / "answers.jsonl").read_bytes()
    assert main([*command, "--strategies", "none"]) == 0 and len(asked) == 9
    assert (out / "answers.jsonl").read_bytes() == before
    assert main([*command, "--strategies", "none", "--limit", "1", "--prompt", "{question} Be brief."]) == 0
    assert [text for _, text in asked[9:]] == ["How many chairs are there? Be brief."]


def test_what_is_wrong_is_told_before_any_work(
    tiny: Path, scenes: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["evaluate", "--questions", str(questions), "--out", str(tmp_path / "o"), "--model", str(tiny)]
    for extra, said in (
        (["--scenes", str(tmp_path / "no")], "is no folder"),
        (["--scenes", str(tmp_path)], "there is no scene 'wall'"),
        (["--scenes", str(scenes), "--prompt", "{text}"], "may hold {question} and {situation} alone"),
        (["--scenes", str(scenes), "--strategies", "best"], "strategy 'best' is none of"),
        (["--scenes", str(scenes), "--frames", "-1"], "--frames -1"),
        (["--scenes", str(scenes), "--strategies", "ours", "mine/ours.yaml"], "names one twice"),
    ):
        assert main([*base, *extra]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "o" / "answers.jsonl").exists()


def test_a_scene_is_found_by_each_of_its_names(tmp_path: Path) -> None:
    for name in ("scene0709_00", "scannet/scene0011_00"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run.mcap").touch()
    assert find_scene(tmp_path, "scannet-v0/002-scannet-scene0709_00") == tmp_path / "scene0709_00"
    assert find_scene(tmp_path, "scannet/scene0011_00") == tmp_path / "scannet/scene0011_00"
    assert find_scene(tmp_path, "run") == tmp_path / "run.mcap"
    for name in ("../x", "/etc", "scene9"):
        with pytest.raises(FileNotFoundError):
            find_scene(tmp_path, name)


def test_answers_outlive_a_kill_and_belong_to_one_run(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    said = {"key": "k", "text": "what ends lines elsewhere: \u2028 \x85"}
    with closing(Kept(path)) as kept:
        kept.add(said)
        with pytest.raises(ValueError, match="is being written by another run"):
            Kept(path)
    whole = path.read_bytes()
    path.write_bytes(whole + '{"key": "é'.encode()[:-1])
    with closing(Kept(path)) as kept:
        assert kept.found == {"k": said}
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"[1]\n")
    with pytest.raises(ValueError, match="line 2 is no answer"):
        Kept(path)


def test_of_a_bag_as_many_frames_evenly_and_not_all_at_once(tmp_path: Path) -> None:
    class Frame:
        def __init__(self, number: int) -> None:
            self.number = number

    held: weakref.WeakSet[Frame] = weakref.WeakSet()

    def read(_: Path) -> Iterator[Any]:
        for number in range(50):
            frame = Frame(number)
            held.add(frame)
            assert len(held) < 5
            yield frame

    (tmp_path / "run.mcap").touch()
    assert [frame.number for frame in frames_of(tmp_path / "run.mcap", 3, read)] == [0, 16, 32]
    assert sum(1 for _ in frames_of(tmp_path / "run.mcap", 0, read)) == 50


def record(text: str, boxes: Any = (), status: str = "OK") -> dict[str, Any]:
    return {"text": text, "boxes": list(boxes), "status": status, "prefill_flops_unpruned": 0}


def test_marks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scenes; one way has both questions of the first right, the other none. Boxes: half overlaps by a third."""
    monkeypatch.setattr(java, "why_not", lambda: "not here")
    items = [Item("0", "a", "?", ("two",)), Item("1", "a", "?", ("red",)), Item("2", "b", "?", ("door",))]
    items.append(Item("3", "b", "?", (), box=(0, 0, 0, 1, 1, 1)))
    half = record("", [(0.5, 0, 0, 1, 1, 1)])
    ways = {
        "one": [record("2"), record("red"), record("the red door"), half],
        "two": [record("3"), record("blue"), record("door", status="ERROR"), record("")],
    }
    found = mark(items, ways, resamples=500)
    one, two = (found["strategies"][way]["metrics"] for way in ways)
    assert one["EM"]["value"] == pytest.approx(200 / 3) and one["EM-refined"]["value"] == 100
    assert two["EM"]["value"] == 0 == two["EM-refined"]["value"]  # an error's text is no answer
    assert two["EM"]["difference"] == pytest.approx(-200 / 3)
    assert two["EM"]["difference_interval"] == [-100, 0]
    assert (one["Acc@0.25"]["value"], one["Acc@0.5"]["value"], one["Acc@0.25"]["questions"]) == (100, 0, 1)
    assert found["meteor"] == "not here" and "METEOR" not in one


def test_a_caption_counts_where_its_box_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two boxes of a unit cube, one moved by a third (overlap 0.5) and one by a half (overlap a third)."""
    monkeypatch.setattr(java, "why_not", lambda: "not here")
    items = [
        Item(str(moved), "a", "?", (text,), box=(0, 0, 0, 1, 1, 1), given=(moved, 0, 0, 1, 1, 1))
        for moved, text in ((1 / 3 - 1e-9, "a brown chair"), (0.5, "the red lamp"))
    ]
    found = mark(items, {"one": [record("a brown chair"), record("the red lamp")]})["strategies"]["one"]["metrics"]
    assert found["CIDEr@0.25"]["value"] == pytest.approx(1000) and found["BLEU-4@0.25"]["value"] == pytest.approx(100)
    assert found["CIDEr@0.5"]["value"] == pytest.approx(500)
    assert found["ROUGE-L@0.5"]["value"] < 100
    assert "EM" not in found
