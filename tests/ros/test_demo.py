# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")

from adatoken3d_ros.cli import demo

MARK = "ADATOKEN3D_TEST_RUN"
STOP_SECONDS = 10.0  # the watchdogs' one to two, on a machine that has other work as well; less than a hang takes
DEADLINE = 60.0
# Seconds after the start, over everything that the demo does: imports, discovery, loading, looking around, asking.
MOMENTS = [0.0, *(round(random.Random(7).uniform(low, low + 1.5), 2) for low in (0.1, 1.0, 2.5, 4.0, 6.0, 9.0))]


class Run:
    """A demo in a process of its own; everything that it starts carries a mark in its environment."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: self.mark, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "adatoken3d_ros.cli.main", "demo", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def living(self) -> list[str]:
        """Command lines of the processes with the mark that still run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def wait_until_alone(self, patience: float = DEADLINE) -> None:
        deadline = time.monotonic() + patience
        while (living := self.living()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not living


@pytest.fixture(scope="module", autouse=True)
def checkpoint() -> Path:
    """Written before the first demo: the moments of an interrupt should lie in its work, not in this."""
    model, tiny = demo.default_model()
    return demo.tiny_checkpoint() if tiny else model


@pytest.fixture
def run() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for one in runs:
        one.process.kill()
        one.process.communicate()


def test_asks_what_the_room_can_answer_and_shows_figures(run: list[Run], tmp_path: Path, checkpoint: Path) -> None:
    record = tmp_path / "answer.json"
    run.append(Run("--views", "3", "--json", str(record)))
    out, err = run[0].process.communicate(timeout=DEADLINE * 2)
    assert (run[0].process.returncode, err) == (0, "")
    assert not run[0].living()
    tiny = checkpoint == demo.tiny_checkpoint_path()
    assert out.count("tiny model with random weights") == tiny
    assert out.count("small model that comes with the package") == (not tiny)
    assert f"of {demo.ROUND} answers are those of the room" in out
    for row in (
        "question",
        "answer",
        "expected",
        "status",
        "spatial tokens",
        "prefill FLOPs",
        "time (ms)",
        "age of the data",
    ):
        assert out.count(f"│ {row} ") == demo.ROUND
    answer = json.loads(record.read_text())
    assert answer["question"] and answer["expected"]
    assert answer["status"] in ("OK", "TRUNCATED", "UNSURE"), "of three views it may say that it does not know"
    assert 0 < answer["retained_tokens"] <= answer["spatial_tokens"]
    assert f"{answer['spatial_tokens']} before, {answer['retained_tokens']} after" in out
    assert 0 < answer["data_age"] < DEADLINE
    stages = [answer[f"{stage}_ms"] for stage in ("queue", "encode", "tokens", "prefill", "decode")]
    assert sum(stages) == pytest.approx(answer["total_ms"], rel=0.05)


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt_ends_every_process_in_time(run: list[Run], moment: float) -> None:
    run.append(Run("--seconds", "600"))
    while not run[0].living():
        time.sleep(0.001)
    with pytest.raises(subprocess.TimeoutExpired):
        run[0].process.wait(timeout=0.3 + moment)
    run[0].process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    run[0].process.wait(timeout=DEADLINE)
    run[0].wait_until_alone(STOP_SECONDS)
    assert time.monotonic() - begin < STOP_SECONDS
    assert run[0].process.returncode in (130, -signal.SIGINT)


def test_repeated_interrupts_and_sigterm(run: list[Run]) -> None:
    run.append(Run("--seconds", "600"))
    with pytest.raises(subprocess.TimeoutExpired):
        run[0].process.wait(timeout=4.0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        run[0].process.send_signal(number)
    begin = time.monotonic()
    run[0].process.wait(timeout=DEADLINE)
    run[0].wait_until_alone(STOP_SECONDS)
    assert time.monotonic() - begin < STOP_SECONDS


def test_killed_demo_takes_its_nodes_along(run: list[Run]) -> None:
    run.append(Run("--seconds", "600"))
    deadline = time.monotonic() + DEADLINE
    # A process that is just becoming another program has no environment for a moment.
    while len(living := run[0].living()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(living) == 3
    run[0].process.kill()
    run[0].wait_until_alone()


def test_model_that_cannot_be_loaded_is_one_line(run: list[Run], tmp_path: Path) -> None:
    run.append(Run("--model", str(tmp_path)))
    out, err = run[0].process.communicate(timeout=DEADLINE * 2)
    assert run[0].process.returncode == 2
    assert err.count("\n") == 1
    assert "could not configure" in err and f"{tmp_path}/config.json is missing" in err
    assert not run[0].living()


def test_two_demos_at_once_have_domains_of_their_own(run: list[Run], tmp_path: Path) -> None:
    records = [tmp_path / "0.json", tmp_path / "1.json"]
    for number, record in enumerate(records):
        question = f"Which room is number {number}?"
        run.append(Run("--question", question, "--views", "2", "--json", str(record), "--timeout", str(DEADLINE)))
    for one in run:
        out, err = one.process.communicate(timeout=DEADLINE * 5)
        assert (one.process.returncode, err) == (0, ""), out
    answers = [json.loads(record.read_text()) for record in records]
    assert [answer["question"] for answer in answers] == ["Which room is number 0?", "Which room is number 1?"]
    assert not any("expected" in answer for answer in answers)  # nobody knows what was meant
