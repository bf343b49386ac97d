# SPDX-License-Identifier: Apache-2.0
"""The doctor beside a running node and cameras that are well, or not."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("rclpy")

from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_graph import Camera, Graph, claim_domain, synthetic_frame

from adatoken3d_ros.cli.doctor import of_machine
from adatoken3d_ros.cli.main import main
from adatoken3d_ros.engine.preflight import need
from adatoken3d_ros.lmm.registry import outline
from adatoken3d_ros.ros.examination import Examination
from adatoken3d_ros.ros.findings import Finding
from adatoken3d_ros.settings import DEFAULTS
from adatoken3d_ros.weights import embedded_path

CAMERA = {"rgb": "/cam/color/image_raw", "rgb_info": "/cam/color/camera_info", "depth": "/cam/depth/image_raw"}
BEST_EFFORT = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)


@contextmanager
def streaming(camera: Camera) -> Iterator[None]:
    """The camera sends, beside whatever the test waits for."""
    stop = threading.Event()

    def send() -> None:
        for index in itertools.count():
            camera.send(camera.messages(time.time_ns(), *synthetic_frame(index % 40)))
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def look(graph: Graph, until: str = "") -> dict[str, list[Finding]]:
    """{what is found about: the findings}; looks again until there is something about `until`."""

    def once() -> dict[str, list[Finding]]:
        with closing(Examination("/adatoken3d", 1.0, Path("/share/fastdds_shm.xml"), graph.context)) as examination:
            found: dict[str, list[Finding]] = {}
            for one in examination.findings():
                found.setdefault(one.about, []).append(one)
        return found if not until or until in found else {}

    seen: dict[str, list[Finding]] = graph.wait(once, f"something about {until}")
    return seen


def test_what_is_well_and_what_is_not(graph: Graph, tiny_model: Path) -> None:
    assert "no /adatoken3d on ROS_DOMAIN_ID" in look(graph)["node"][0].text
    graph.start_node(tiny_model, qos__reliability="reliable", diagnostics__period=0.1, diagnostics__stale_after=0.1)
    assert graph.state() == "unconfigured"
    (node,) = look(graph)["node"]
    assert "/adatoken3d is unconfigured" in node.text and "ros2 lifecycle set /adatoken3d configure" in node.mend

    assert graph.transition("configure") and graph.transition("activate")
    elsewhere = Camera(graph, topics=CAMERA)
    with streaming(elsewhere):
        found = look(graph, "it says of its inputs")
    assert found["node"][0].level == "ok"
    assert "nobody publishes it" in found["/rgb/image"][0].text
    assert "rgb_topic:=/cam/color/image_raw or /cam/depth/image_raw" in found["/rgb/image"][0].mend
    assert found["/depth/camera_info"][0].level == "ok"  # this camera has it, and the node's name for it is the same
    assert "nothing on /rgb/image (nobody publishes it) yet" in found["it says of its inputs"][0].text

    camera = Camera(graph, qos=BEST_EFFORT)
    with streaming(camera):
        found = look(graph, "/pose")
    (image,) = found["/rgb/image"]
    assert image.level == "error" and "offers best_effort, volatile" in image.text
    assert "-p qos_overrides./rgb/image.subscription.reliability:=best_effort" in image.mend


def test_a_camera_that_is_well_and_transforms_that_are_missing(graph: Graph, tiny_model: Path) -> None:
    graph.start_node(tiny_model, pose__source="tf")
    assert graph.transition("configure") and graph.transition("activate")
    camera = Camera(graph)
    with streaming(camera):
        graph.wait(lambda: camera.rgb.get_subscription_count(), "the node's subscription")
        found = look(graph, "TF")
    for topic in ("/rgb/image", "/depth/image"):
        assert found[topic][0].level == "ok" and "messages a second from /tester" in found[topic][0].text
    assert "nothing came on /tf or /tf_static" in found["TF"][0].text
    assert found["shared memory"][0].level == "ok"


def test_a_node_that_loads_its_model(graph: Graph) -> None:
    graph.start_script(Path(__file__).with_name("fake_scene_node.py"), "loading")
    assert graph.state() == "unconfigured"
    (node,) = look(graph, "it says of its model")["node"]
    assert node.level == "error" and "is unconfigured, loading for 3.0 s" in node.text
    assert node.mend == "wait until it is active"


def test_a_node_of_another_kind(graph: Graph) -> None:
    graph.start_script(Path(__file__).with_name("fake_scene_node.py"))
    assert graph.state() == "unconfigured"
    (node,) = look(graph)["node"]
    assert node.level == "error" and "is no node that answers questions" in node.text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    domain, lock = claim_domain()
    with closing(lock):
        monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
        monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        monkeypatch.setenv("COLUMNS", "300")
        written = tmp_path / "findings.json"
        assert main(["doctor", "--seconds", "0.2", "--json", str(written)]) == 1
    text = capsys.readouterr().out
    assert "ros2 launch adatoken3d" in text and "errors" in text
    found = {one["about"]: one for one in json.loads(written.read_text())}
    assert found["node"]["level"] == "error" and f"ROS_DOMAIN_ID {domain}" in found["node"]["text"]
    assert {"GPU", "memory", "model", "shared memory", "/rgb/image"} <= found.keys()
    assert found["model"]["level"] == "ok" and "weights/embedded" in found["model"]["text"]
    assert main(["doctor", "--seconds", "0"]) == 2
    assert capsys.readouterr().err == "adatoken3d doctor: --seconds 0 must be above 0 and at most 600\n"
    assert main(["doctor", "--node", "a b"]) == 2
    assert capsys.readouterr().err == "adatoken3d doctor: --namespace, --node: '/a b' is no node's name\n"


def test_where_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adatoken3d_ros.cli.doctor.missing", lambda: ["psutil"])
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert [one.about for one in of_machine(False, DEFAULTS)] == ["GPU"]


@pytest.mark.parametrize(("dtype", "width"), [("auto", 4), ("float32", 4), ("bfloat16", 2)])
def test_memory_is_that_of_the_number_type(dtype: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are stored in two bytes; on a CPU they take four."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = embedded_path()
    needed = need(outline(path), torch.float32 if width == 4 else torch.bfloat16, max_views=20, max_new_tokens=64)
    free = need(outline(path), torch.bfloat16, max_views=20).total
    monkeypatch.setattr("adatoken3d_ros.lmm.safetensors_files.free_bytes", lambda device: free)
    found = {one.about: one for one in of_machine(False, {**DEFAULTS, "model.dtype": dtype})}
    assert found["memory"].level == ("error" if width == 4 else "ok")
    assert f"embedded in {'bfloat16' if width == 2 else 'float32'} needs {needed}" in found["memory"].text
    assert ("take scene.max_views: " in found["memory"].mend) == (width == 4)
