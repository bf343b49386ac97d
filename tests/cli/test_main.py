# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: help at once, errors in one line, no traceback unless it is asked for."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from adatoken3d_ros.cli import info
from adatoken3d_ros.cli import main as command_line
from adatoken3d_ros.cli.processes import Processes
from adatoken3d_ros.weights import embedded_path

HEAVY = ("torch", "transformers", "rclpy", "open3d", "rosbags", "ray")


def run_with(monkeypatch: pytest.MonkeyPatch, action: object, *arguments: str) -> int:
    """main() with a command `info` that does `action`."""
    monkeypatch.setattr(info, "run", action)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return command_line.main([*arguments, "info"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raising(error: BaseException) -> object:
    def action(args: object) -> int:
        raise error

    return action


def test_every_command_is_there_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in command_line.COMMANDS:
        assert f"  {name}" in text
        with pytest.raises(SystemExit):
            command_line.main([name, "--help"])


def test_no_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main([])
    assert end.value.code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom adatoken3d_ros.cli.main import parser\nparser()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("budget -1 is\nnegative"), "budget -1 is negative"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (TimeoutError("no answer"), "no answer"),
        (
            ModuleNotFoundError("No module named 'rosbags'", name="rosbags"),
            "the Python module rosbags is missing: install it, or look at 'adatoken3d info'",
        ),
        (KeyError("x"), "KeyError: 'x' (adatoken3d --debug ... shows where)"),
    ],
)
def test_error_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, raising(error)) == 2
    assert capsys.readouterr().err == f"adatoken3d info: {line}\n"


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bad"):
        run_with(monkeypatch, raising(ValueError("bad")), "--debug")


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_an_interrupt_that_becomes_another_error_is_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where an import is interrupted and says that the module is broken."""

    def broken(args: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
        return 0

    assert run_with(monkeypatch, broken) == 130
    assert capsys.readouterr().err == ""


def test_an_interrupt_that_got_lost_comes_where_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []

    def waits(args: object) -> int:
        with suppress(KeyboardInterrupt):  # as in the callback of a weak reference
            signal.raise_signal(signal.SIGTERM)
        with Processes() as processes:
            processes.start("other", [sys.executable, "-c", "import time; time.sleep(60)"])
            reached.append("waiting")
            processes.check()
            reached.append("behind")
        return 0

    assert run_with(monkeypatch, waits) == 130
    assert reached == ["waiting"]


def test_reader_that_has_seen_enough() -> None:
    done = subprocess.run(
        f"{sys.executable} -m adatoken3d_ros.cli.main info | head -c 1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_info_names_versions_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    found = info.is_here
    monkeypatch.setattr(info, "is_here", lambda name: name != "tf2_msgs" and found(name))
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    assert command_line.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "adatoken3d_ros" in text and "torch" in text
    assert "-m adatoken3d_ros.ros.node --ros-args -p autostart:=true" in text
    assert str(embedded_path()) in text and "12 layers of 192" in text
    assert "missing, needed for the node, which reads /tf: apt install ros-$ROS_DISTRO-tf2-msgs" in text


def test_info_about_a_model(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert command_line.main(["info", "--model", str(tiny)]) == 0
    text = capsys.readouterr().out
    from adatoken3d_ros.lmm.registry import load

    report = load(tiny)[2]
    assert f"{report.parameters:,} (" in text
    # Keys and values of 8 layers, 4 heads of 16, 2560 spatial tokens and the text, 4 bytes each.
    assert re.search(rf"memory, float32 .*keys {2 * 8 * 64 * 2560 * 4 / 1e9:.2f} GB", text)


def test_info_about_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"adatoken3d info: --model: {tmp_path / 'none'} is no directory\n"
    assert command_line.main(["info", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"adatoken3d info: {tmp_path / 'config.json'} is missing\n"
