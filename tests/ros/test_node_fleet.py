# SPDX-License-Identifier: Apache-2.0
"""A node whose engine is elsewhere, over real DDS: its answers are those of a node with the engine inside, while the
engine is killed and comes back, too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_node import Live

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.fleet.metrics import fetch, read
from tests.engine.scenes import room_frame
from tests.fleet.shared import free_port

pytest.importorskip("uvicorn", reason="without the extra fleet")
ENGINE = Path(__file__).parent / "engine_process.py"


@pytest.fixture
def start_server(tiny_model: Path) -> Iterator[Callable[[int], tuple[Any, int]]]:
    """Starts an engine in a process of its own on a port, 0 for any; waits until it listens."""
    started: list[subprocess.Popen[str]] = []

    def start(port: int = 0) -> tuple[Any, int]:
        command = [sys.executable, str(ENGINE), str(tiny_model), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def unlike(one: Any, other: Any, name: str = "answer") -> list[str]:
    """Fields of two messages that differ, whatever fields there are: times may, and numbers by what 16 bits round."""
    if hasattr(one, "get_fields_and_field_types"):
        inner = [field for field in one.get_fields_and_field_types() if not field.endswith(("_ms", "_age"))]
        return [what for f in inner for what in unlike(getattr(one, f), getattr(other, f), f"{name}.{f}")]
    if isinstance(one, (str, bytes, bool)):
        return [] if one == other else [f"{name}: {one!r}, {other!r}"]
    if len(np.shape(one)) and len(one) and hasattr(one[0], "get_fields_and_field_types"):
        if len(one) != len(other):
            return [f"{name}: {len(one)}, {len(other)}"]
        return [what for k, pair in enumerate(zip(one, other, strict=True)) for what in unlike(*pair, f"{name}[{k}]")]
    if len(np.shape(one)) and len(one) and isinstance(one[0], str):
        return [] if list(one) == list(other) else [f"{name}: {one}, {other}"]
    near = np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=5e-3, atol=1e-6, equal_nan=True)
    return [] if near else [f"{name}: {one}, {other}"]


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """The command `adatoken3d serve` in a process of its own; waits until it says where robots ask."""
    pytest.importorskip("ray", reason="without the extra fleet")
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> Any:
        command = [sys.executable, "-m", "adatoken3d_ros.cli.main", "serve", "--model", str(tiny_model), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        assert process.stdout is not None
        told = []
        while (line := process.stdout.readline()) and "robots ask at" not in line:
            told.append(line)
        assert line, "".join(told)
        return process

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60.0)


@pytest.mark.timeout(300)
def test_the_command_and_a_node_that_was_there_before_it(
    live: Live, serve: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over TLS, with a token that is bound to the robot's name. Every field of an answer is that of a node with the
    engine inside, but for times; the command's table knows the robot."""
    frames = [room_frame(index) for index in range(3)]
    activate(live)
    feed(live, frames)
    inside = live.ask(max_new_tokens=4)
    port, metrics_port = free_port(), free_port()
    (tmp_path / "tokens").write_text("arm: 0123456789abcdef\nleg: fedcba9876543210\n")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    live.node.trigger_deactivate()
    live.node.trigger_cleanup()
    shared = {"engine.url": f"https://127.0.0.1:{port}", "engine.ca_file": cert, "engine.token": "0123456789abcdef"}
    activate(live, **shared, **{"engine.robot": "arm"})
    feed(live, frames)
    early = live.ask(max_new_tokens=4, latency_budget_ms=4000.0)
    assert early.status == Status.ERROR and early.budget_met, early.status_message
    assert f"the shared engine did not answer: https://127.0.0.1:{port} cannot be reached" in early.status_message
    options = ["--port", str(port), "--metrics-port", str(metrics_port), "--tokens-file", str(tmp_path / "tokens")]
    service = serve(*options, "--tls-cert", cert, "--tls-key", key)
    answer = live.ask(max_new_tokens=4)
    assert answer.plan.split(":")[0] == inside.plan.split(":")[0]
    answer.plan = inside.plan  # the command has measured how fast its machine is, which the plan says
    assert unlike(answer, inside) == [], answer.status_message
    assert live.node.engine.model_id == inside.model_id
    metrics = f"http://127.0.0.1:{metrics_port}/metrics"
    live.wait(lambda: "arm" in read(fetch(metrics)), "what was counted")
    assert main(["serve", "--status", metrics]) == 0 and "arm" in capsys.readouterr().out
    live.node.trigger_deactivate()
    live.node.trigger_cleanup()
    live.put({"engine.robot": "leg"})  # with the arm's token
    assert not live.configure() and "or not that of 'leg'" in live.node.engine.problem
    service.terminate()
    assert service.wait(60.0) == 0


def activate(live: Live, **settings: Any) -> None:
    live.put({"max_new_tokens": 4, "scene.min_sharpness": 0.0, **settings})
    assert live.configure(), live.node.engine.problem
    live.node.trigger_activate()


def feed(live: Live, frames: list[Any]) -> None:
    """The same key frames for each node, in the worker's thread."""
    queue = live.node.engine.queue
    assert queue is not None

    def show(scene: Any) -> None:
        for frame in frames:
            scene.observe(frame)
        scene.encode_pending()

    future = queue.call(show)
    live.wait(future.done, "the frames")
    future.result()


@pytest.mark.timeout(240)
def test_a_node_answers_as_with_the_engine_inside_and_outlives_a_killed_one(
    live: Live, start_server: Callable[..., tuple[Any, int]]
) -> None:
    room_frames = [room_frame(index) for index in range(3)]
    activate(live)
    feed(live, room_frames)
    inside = live.ask(max_new_tokens=4)
    assert inside.status in (Status.OK, Status.TRUNCATED)
    server, port = start_server()
    for encode in ("picture", "local"):
        live.node.trigger_deactivate()
        live.node.trigger_cleanup()
        activate(live, **{"engine.url": f"http://127.0.0.1:{port}", "engine.encode": encode})
        assert live.node.engine.model_id == inside.model_id
        feed(live, room_frames)
        answer = live.ask(max_new_tokens=4)
        for name in ("status", "model_id", "strategy", "spatial_tokens", "retained_tokens", "verdict"):
            assert getattr(answer, name) == getattr(inside, name), (encode, name, answer.status_message)
    assert unlike(answer, inside) == []  # a JPEG of noise is not the picture
    server.kill()  # -9
    server.wait()
    late = live.ask(max_new_tokens=4, latency_budget_ms=4000.0)
    assert late.status == Status.ERROR and "cannot be reached" in late.status_message
    start_server(port)
    again = live.ask(max_new_tokens=4)
    assert (again.status, again.text) == (answer.status, answer.text), again.status_message
