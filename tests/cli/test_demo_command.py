# SPDX-License-Identifier: Apache-2.0
"""What the demo decides before anything runs; the demo as a whole is tested with ROS."""

from __future__ import annotations

import socket
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from adatoken3d_ros.cli import demo
from adatoken3d_ros.cli.main import main
from adatoken3d_ros.lmm import registry


@pytest.mark.parametrize(
    ("missing", "message"),
    [("rclpy", "the demo needs ROS 2, and this Python finds no rclpy"), ("adatoken3d", "interfaces .* are not built")],
)
def test_missing_ros_says_what_to_install(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(OSError, match=message):
        demo.require_ros()
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("participant", [0, 1, 4])
def test_a_domain_in_use_or_claimed_is_passed_over(monkeypatch: pytest.MonkeyPatch, participant: int) -> None:
    monkeypatch.setattr(demo, "DOMAINS", range(96, 99))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as used:
        used.bind(("", 7410 + 250 * 97 + 2 * participant))
        first, claim = demo.claim_domain()
        second, other = demo.claim_domain()  # before anything has started in the first
        assert {first, second} == {96, 98}
        with other, pytest.raises(OSError, match="in use on this machine"):
            demo.claim_domain()
        claim.close()
        again, claim = demo.claim_domain([97, first])
        claim.close()
        assert again == first


def test_share_is_the_tree_that_runs_else_the_installed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (demo.share() / "config" / "demo.yaml").is_file()
    # An installed copy has no package.xml two folders above.
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "adatoken3d_ros" / "cli" / "demo.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path / "overlay"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/overlay, {tmp_path}/prefix"):
        demo.share()
    for prefix in ("prefix", "overlay"):
        folder = tmp_path / prefix / "share" / "adatoken3d"
        folder.mkdir(parents=True)
        (folder / "package.xml").touch()
        assert demo.share() == folder


def test_the_line_that_writes_it_writes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "tiny")])
    exec(demo.WRITE_TINY, {})
    model = registry.load(tmp_path / "tiny").model
    assert 0 < sum(parameter.numel() for parameter in model.parameters()) < 10**6


def test_tiny_checkpoint_is_written_once_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tiny"
    calls: list[Path] = []

    def write(command: list[str]) -> None:
        calls.append(Path(command[-1]))
        calls[-1].mkdir()
        assert not path.exists()

    demo.write_tiny(path, write)
    demo.write_tiny(path, write)
    assert path.is_dir() and len(calls) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny"]


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(command: list[str]) -> None:
        Path(command[-1]).mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.write_tiny(tmp_path / "tiny", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_written_by_another_demo_meanwhile_is_used(tmp_path: Path) -> None:
    def slower(command: list[str]) -> None:
        Path(command[-1]).mkdir()
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").touch()

    demo.write_tiny(tmp_path / "tiny", slower)
    assert (tmp_path / "tiny" / "config.json").is_file()


def test_checkpoint_of_other_code_has_another_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = Path(demo.__file__).parents[1] / "lmm"
    assert any(path.name == "tiny.py" for path in real.rglob("*.py")), "what is looked at is where the writer is"
    (tmp_path / "lmm" / "one").mkdir(parents=True)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "cli" / "demo.py"))
    (tmp_path / "lmm" / "one" / "tiny.py").write_text("a = 1")
    first = demo.tiny_checkpoint_path()
    assert first.parent == tmp_path / "cache" / "adatoken3d"
    assert demo.tiny_checkpoint_path() == first
    (tmp_path / "lmm" / "one" / "tiny.py").write_text("a = 2")
    assert demo.tiny_checkpoint_path() != first


def test_questions_given_and_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["Where is it?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    arguments = Namespace(question=["a?", "b?"], seconds=0.0, interactive=True)
    assert list(demo._questions(arguments, list)) == [("a?", None), ("b?", None), ("Where is it?", None)]


def test_questions_suggested_by_the_camera() -> None:
    arguments = Namespace(question=None, seconds=0.0, interactive=False)
    assert list(demo._questions(arguments, list)) == [(demo.QUESTION, None)]
    known = [Namespace(family=family, question=f"{family}?", answer=family) for family in ("on", "box", "class")]
    assert list(demo._questions(arguments, lambda: known)) == [("on?", "on"), ("box?", "box"), ("class?", "class")]


def test_suggestions_are_few_and_of_other_families_each_time() -> None:
    families = ["box", "on", "existence", "class", "class", "colour"]
    newest = [Namespace(family=family, question=f"{n}?") for n, family in enumerate(families)]
    source = Namespace(newest=lambda timeout: newest)
    assert [s.question for s in demo.suggested(source, 0)] == ["2?", "4?", "5?"]
    assert [s.question for s in demo.suggested(source, 3)] == ["1?", "2?", "4?"]
    assert [s.question for s in demo.suggested(source, 6)] == ["5?", "1?", "2?"]
    assert demo.suggested(Namespace(newest=lambda timeout: []), 3) == []


def test_the_model_in_the_package_answers_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "embedded_path", lambda: tmp_path)
    assert demo.default_model() == (tmp_path, False)

    def missing() -> Path:
        raise FileNotFoundError("there is no trained model yet")

    monkeypatch.setattr(demo, "embedded_path", missing)
    assert demo.default_model() == (demo.tiny_checkpoint_path(), True)
