# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes: what is spread over it and what is served on it is what one process gives, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from tests.cli.test_calibrate import write_scene
from tests.fleet.shared import TOKEN, free_port, listening, plain, unlike
from tests.fleet.test_link import robot, show

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of all processes: one thread of torch each, and a folder for Ray that is nobody else's."""
    pytest.importorskip("ray", reason="without the extra fleet")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a short name: it is in those of sockets
        more = {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        # With this all of it is on 127.0.0.1, whatever other addresses the machine has.
        yield {**os.environ, **more, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, str(HERE / "two_nodes.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as nodes:
        assert nodes.stdout is not None and nodes.stdin is not None
        told = []
        while (line := nodes.stdout.readline()) and not line.startswith("address "):
            told.append(line)
        assert line, "".join(told)
        yield line.split()[1]
        nodes.stdin.close()
        nodes.wait(60.0)


def test_a_calibration_over_both_is_that_of_one_process(
    address: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """Two workers of a processor each, so one on each node."""
    model = write_tiny_checkpoint(tmp_path / "tiny", seed=0, layers=3)
    folders = [str(write_scene(tmp_path / name, seed)) for seed, name in enumerate(("kitchen", "office"))]
    found = {}
    for name, more in (("alone", []), ("spread", ["--ray", address])):
        out, report = tmp_path / f"{name}.yaml", tmp_path / name
        command = ["calibrate", "--model", str(model), "--folder", *folders, "--kind", "calibrated", "--withdraw"]
        command += ["--answer-tokens", "1", "--max-gates", "1", "--flops-reduction", "0.3", "--horizon-kl", "1e-9"]
        command += ["--out", str(out), "--report", str(report), *more]
        ended = subprocess.run(
            [sys.executable, "-m", "adatoken3d_ros.cli.main", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400.0,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        strategy = yaml.safe_load(out.read_text())
        del strategy["info"]["figures"]["prefill_ms"]
        mined = {path.name: path.read_bytes() for path in sorted(report.glob("information.*[!g]"))}
        found[name] = strategy, (report / "calibration.json").read_text(), mined
    assert found["alone"] == found["spread"]


def test_an_engine_that_is_served_on_it_answers_as_one_that_is_not(
    address: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """`adatoken3d serve --address`, two replicas of a processor each, so one on each node; a scene for each of them."""
    from adatoken3d_ros.fleet.replica import Replica, ReplicaConfig

    model, port = write_tiny_checkpoint(tmp_path / "tiny", seed=0, layers=3), free_port()
    (tmp_path / "token").write_text(TOKEN * 2)
    command = ["serve", "--model", str(model), "--address", address, "--replicas", "2", "--port", str(port)]
    command += ["--token-file", str(tmp_path / "token")]
    here = Replica(ReplicaConfig(dict(plain(model, **{"budget.warm_up": True}))))
    with (
        listening(here) as own,
        subprocess.Popen(
            [sys.executable, "-m", "adatoken3d_ros.cli.main", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        ) as service,
    ):
        assert service.stdout is not None
        told = []
        while (line := service.stdout.readline()) and "robots ask at" not in line:
            told.append(line)
        assert line, "".join(told)
        answers: list[Any] = []
        for place in (port, own):
            for first in range(4):
                engine, scene, _ = robot(f"http://127.0.0.1:{place}", model, **{"engine.token": TOKEN * 2})
                show(scene, first, first + 1)
                answer = engine.ask(scene, Question("What is there?"))
                assert answer.status.answered, answer.status_message
                answers.append(replace(answer, times=None, predicted=None, decision=None, plan=""))
        for there, alone in zip(answers[:4], answers[4:], strict=True):
            assert unlike(there, alone) == []
        service.terminate()
        assert service.wait(60.0) == 0
    here.stop()
