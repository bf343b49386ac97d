# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM at any moment of a program's start: status 0, and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy")

from adatoken3d_ros.ros.signals import SIGNALS
from adatoken3d_ros.ros.wiring import HELD_BACK

ROOT = Path(__file__).resolve().parents[2]
# Runs a program and sends it signals at the moment when it begins to import a module, or to construct an object of it.
STARTER = """
import os, runpy, sys, threading, time

program, moment, *numbers = sys.argv[1:]

def send():
    while numbers:
        os.kill(os.getpid(), int(numbers.pop()))
    time.sleep(0.2)  # whoever waits for signals in another thread has done what he does

class Finder:
    def find_spec(self, name, *rest):
        if name == moment and numbers:
            send()

def profile(frame, event, _):
    if event == "call" and frame.f_code.co_name == "__init__" and frame.f_code.co_filename.endswith(moment) and numbers:
        send()

sys.meta_path.insert(0, Finder())
if moment.endswith(".py"):
    sys.setprofile(profile)
sys.argv = [program]
if os.path.isfile(program):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def ended(program: str, moment: str, *numbers: signal.Signals) -> tuple[int, str]:
    """Exit status, and what was written to stderr."""
    arguments = [program, moment, *(str(int(number)) for number in numbers)]
    found = subprocess.run(
        [sys.executable, "-c", STARTER, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return found.returncode, found.stderr


@pytest.mark.parametrize(
    ("program", "moment", "numbers"),
    [
        # The first import of a module that is not Python's own; in the middle; the last ones.
        pytest.param("adatoken3d_ros.ros.node", "rclpy", (signal.SIGINT,), id="node-first"),
        pytest.param("scripts/adatoken3d_node", "numpy", (signal.SIGTERM,), id="node-middle"),
        pytest.param("adatoken3d_ros.ros.node", "adatoken3d_ros.ros.scene_services", (signal.SIGINT,), id="node-last"),
        pytest.param("scripts/demo_camera", "rclpy", (signal.SIGTERM,), id="camera-first"),
        pytest.param("adatoken3d_ros.ros.demo_camera", "nav_msgs.msg", (signal.SIGINT,), id="camera-middle"),
        # Its node is being made.
        pytest.param(
            "scripts/demo_camera",
            "adatoken3d_ros.lab.synthetic.furnished",
            (signal.SIGINT, signal.SIGTERM),
            id="camera-last",
        ),
        # What waits for messages is being made.
        pytest.param("adatoken3d_ros.ros.demo_camera", "rclpy/executors.py", (signal.SIGINT,), id="camera-spins"),
        pytest.param("adatoken3d_ros.ros.node", "rclpy/executors.py", (signal.SIGTERM,), id="node-spins"),
    ],
)
def test_a_signal_during_the_start(program: str, moment: str, numbers: tuple[signal.Signals, ...]) -> None:
    status, words = ended(program, moment, *numbers)
    assert (status, "Traceback" in words) == (0, False), words


@pytest.mark.parametrize("script", ["scripts/adatoken3d_node", "scripts/demo_camera"])
def test_a_signal_before_python_has_started(script: str) -> None:
    """The launch files hold signals back until the program has taken them over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        command = [sys.executable, str(ROOT / script)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.send_signal(signal.SIGINT)
    try:
        words, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in words, words
    held = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    found = subprocess.run([*HELD_BACK.split(), sys.executable, "-c", held], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[2,", "15]"]
