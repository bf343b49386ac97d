# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM at random moments of the node's and the demo camera's first seconds."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from adatoken3d_ros.cli.demo import claim_domain
from benchmarks._hostile import ACCEPTED, CRASH, HANG, ROOT, Outcome

PROGRAMS = (
    ["-m", "adatoken3d_ros.ros.node"],
    ["-m", "adatoken3d_ros.ros.demo_camera"],
    ["scripts/adatoken3d_node"],
    ["scripts/demo_camera"],
)


def signals(first: int, count: int, seconds: float, args: argparse.Namespace) -> Iterator[Outcome]:
    """A program, and one to three signals at a random moment after its first line: status 0, no traceback."""
    domain, claim = claim_domain()
    environment = {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    until = time.monotonic() + seconds
    with claim, TemporaryDirectory(prefix="adatoken3d-hostile-") as folder:
        log = Path(folder) / "log"
        for seed in range(first, first + count):
            if time.monotonic() >= until:
                return
            yield _signalled(random.Random(seed), seed, log, environment)


def _signalled(rng: random.Random, seed: int, log: Path, environment: dict[str, str]) -> Outcome:
    program, after = rng.choice(PROGRAMS), rng.choice([0.0, rng.uniform(0, 0.3), rng.uniform(0, 3.0)])
    numbers = [rng.choice([signal.SIGINT, signal.SIGTERM]) for _ in range(rng.choice([1, 1, 2, 3]))]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *program], cwd=ROOT, env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        while not _catches(process.pid) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(after)
        for number in numbers:
            process.send_signal(number)
            time.sleep(rng.choice([0.0, 0.001, 0.05]))
        try:
            status = process.wait(30.0)
        except subprocess.TimeoutExpired:
            return Outcome(seed, HANG, "hang", f"{program} {after:.3f} s {numbers}: {log.read_text()[-1000:]}", 30.0)
    finally:
        process.kill()
        process.wait()
    words, seconds = log.read_text(errors="replace"), time.monotonic() - began
    if status != 0 or "Traceback" in words:
        return Outcome(seed, CRASH, f"status {status}", f"{program} {after:.3f} s {numbers}: {words[-1500:]}", seconds)
    return Outcome(seed, ACCEPTED, seconds=seconds)


def _catches(pid: int) -> bool:
    """Whether the process has a handler of its own for SIGTERM: Python installs none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
