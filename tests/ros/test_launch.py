# SPDX-License-Identifier: Apache-2.0
"""Launch files, launched. What needs `launch_ros` is skipped without it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from sensor_msgs.msg import Image
from test_robot_commands import REALSENSE
from test_shared_files import parameter, topics_of
from test_wiring import launches

from adatoken3d_ros.cli.demo import default_model, tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted((ROOT / "launch").glob("*.launch.py"))
RVIZ = ROOT / "config" / "adatoken3d.rviz"


def by_name(path: Path) -> str:
    return path.name


@pytest.fixture
def share() -> Path:
    """The installed package's share folder, where `ros2 launch` looks for the files."""
    pytest.importorskip("launch_ros", reason="launch_ros is not installed: the launch files are not run")
    packages = pytest.importorskip("ament_index_python.packages")
    try:
        return Path(packages.get_package_share_directory("adatoken3d"))
    except (LookupError, OSError) as error:
        pytest.skip(f"adatoken3d is not in the ament index: {error}")


def description(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.name.replace(".", "_"), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


@pytest.mark.parametrize("path", LAUNCH, ids=by_name)
def test_every_argument_has_a_description(path: Path, share: Path) -> None:
    arguments = {argument.name: argument for argument in description(path).get_launch_arguments()}
    assert {"namespace", "params_file", "model", "rviz", "autostart", "log_level"} <= set(arguments)
    for argument in arguments.values():
        assert argument.description.rstrip().endswith((".", "]")), argument.name


LAUNCHER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
arguments = [tuple(argument.split(":=", 1)) for argument in sys.argv[2:]]
include = IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments=arguments)
service = LaunchService()
service.include_launch_description(LaunchDescription([include]))
sys.exit(service.run())
"""


class Launched:
    """A launch file that runs in a process of its own, its output in a file."""

    def __init__(self, graph: Any, log: Path, path: Path, *arguments: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, str(path), *arguments],
                env=graph.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> float:
        """SIGINT as from a terminal, to the whole group; returns the seconds until the launch has ended."""
        begin = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(timeout=60)
        return time.monotonic() - begin

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def launch(graph: Any, tmp_path: Path, share: Path) -> Iterator[Any]:
    started: list[Launched] = []
    # The installed programs say `env python3`: this one.
    graph.environment["PATH"] = f"{Path(sys.executable).parent}:{graph.environment['PATH']}"

    def start(name: str, *arguments: str) -> Launched:
        started.append(Launched(graph, tmp_path / f"launch-{len(started)}.log", share / "launch" / name, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def stand_ins(graph: Any, folder: Path) -> dict[str, Path]:
    """Programs named ros2 and rviz2 that only write down how they were called; {name: file in which they do}."""
    calls = {name: folder / f"{name}.calls" for name in ("ros2", "rviz2")}
    for name, place in (("ros2", folder / "bin"), ("rviz2", folder / "prefix" / "lib" / "rviz2")):
        place.mkdir(parents=True)
        program = place / name
        program.write_text(f'#!/bin/sh\necho "$@" > {calls[name]}.part\nmv {calls[name]}.part {calls[name]}\n')
        program.chmod(0o755)
    index = folder / "prefix" / "share" / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True)
    (index / "rviz2").touch()
    graph.environment["PATH"] = f"{folder / 'bin'}:{graph.environment['PATH']}"
    graph.environment["AMENT_PREFIX_PATH"] = f"{folder / 'prefix'}:{os.environ['AMENT_PREFIX_PATH']}"
    return calls


def test_demo_runs_becomes_active_and_ends_cleanly(launch: Any, graph: Any) -> None:
    _, tiny = default_model()
    launched = launch("demo.launch.py", "namespace:=robot1", "seed:=3")
    client = graph_state(graph, "/robot1/adatoken3d")
    graph.wait(lambda: client() == "active", "the node is active", timeout=120)
    assert parameter(graph, "/robot1/demo_camera", "seed") == 3
    assert (
        "a tiny model with random weights" if tiny else "the small model that comes with the package"
    ) in launched.log
    launched.stop()
    assert launched.log.count("process has finished cleanly") == 2, launched.log


def test_budgeted_questions_to_the_launched_demo_at_ten_hertz(launch: Any, graph: Any, tmp_path: Path) -> None:
    """The answer's figures are those of the asker's clock; how far apart they get is benchmarks/responsiveness.py."""
    content = yaml.safe_load((ROOT / "config" / "demo_camera.yaml").read_text())
    content["/**"]["ros__parameters"]["rate"] = 10.0
    parameters = tmp_path / "ten_hertz.yaml"
    parameters.write_text(yaml.safe_dump(content))
    launched = launch("demo.launch.py", f"camera_params_file:={parameters}")

    def ask(budget: float) -> tuple[Answer, float]:
        request = AskScene.Request(question="How many chairs are there?", latency_budget_ms=budget)
        began = time.monotonic()
        answer = graph.call(AskScene, "/adatoken3d/ask", request).answer
        return answer, (time.monotonic() - began) * 1e3

    graph.wait(lambda: ask(0.0)[0].status == Answer.OK, "an answer about a scene", timeout=120)
    frames = graph.collect(Image, "/depth/image", 10)
    budgets = [10.0**power for power in (4.0, 3.0, 2.5, 2.0) for _ in range(5)]
    between = []
    for budget in budgets:
        answer, asked = ask(budget)
        assert answer.status in (Answer.OK, Answer.TRUNCATED), answer.status_message
        assert answer.latency_budget_ms == pytest.approx(budget)
        assert answer.budget_met == (answer.total_ms <= budget)
        assert 0 < answer.total_ms <= asked
        between.append(asked - answer.total_ms)
    assert frames, launched.log
    assert min(between) < 10, between  # all of them are, where nothing else runs
    launched.stop()


def test_the_readme_s_launch_to_the_letter(launch: Any, graph: Any, tmp_path: Path) -> None:
    """Except for the checkpoint's path; RViz is a stand-in. Started by itself once, the node is left to others then."""
    calls = stand_ins(graph, tmp_path)
    (given,) = [given for given in launches() if "model" in given]
    words = [f"{name}:={value}" for name, value in {**given, "model": str(tiny_checkpoint())}.items()]
    launched = launch("adatoken3d.launch.py", *words, "pose_source:=pose_topic")
    state = graph_state(graph, "/adatoken3d")
    graph.wait(lambda: state() == "active", "the node is active", timeout=120)
    assert parameter(graph, "/adatoken3d", "scene.max_depth") == 4.0
    for topic in REALSENSE.values():
        graph.wait(lambda topic=topic: graph.node.count_subscribers(topic), f"a subscription to {topic}")
    graph.wait(calls["rviz2"].exists, "RViz is started")
    assert "-f map" in calls["rviz2"].read_text()
    for label in ("deactivate", "cleanup", "configure"):
        assert graph.transition(label), launched.log
    assert state() == "inactive" and state() == "inactive"
    launched.stop()
    assert "process has finished cleanly" in launched.log and "Traceback" not in launched.log


def test_in_a_namespace_with_compressed_images(launch: Any, graph: Any, tmp_path: Path) -> None:
    """The log's level holds there, RViz is in the scene's frame and shows what comes."""
    calls = stand_ins(graph, tmp_path)
    arguments = ["camera:=zed", "transport:=compressed", "namespace:=robot1", "log_level:=error", "scene_frame:=odom"]
    arguments += [f"model:={tiny_checkpoint()}", "pose_source:=static", "rviz:=true", "base_to_camera:=1 2 3 0 0 0"]
    launched = launch("adatoken3d.launch.py", *arguments)
    state = graph_state(graph, "/robot1/adatoken3d")
    graph.wait(lambda: state() == "active", "the node is active", timeout=120)
    assert parameter(graph, "/robot1/adatoken3d", "scene.frame_id") == "odom"
    assert list(parameter(graph, "/robot1/adatoken3d", "pose.base_to_camera")) == [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    image = "/zed/zed_node/rgb/color/rect/image"
    graph.wait(lambda: graph.node.count_subscribers(f"{image}/compressed"), "the compressed image is subscribed to")
    assert "[INFO] [robot1.adatoken3d]" not in launched.log and "configured: model" not in launched.log
    graph.wait(calls["rviz2"].exists, "RViz is started")
    _, view, _, frame, *rest = calls["rviz2"].read_text().split()
    assert frame == "odom" and "rgb/image/compressed" in topics_of(yaml.safe_load(Path(view).read_text()))
    assert f"rgb/image/compressed:={image}/compressed" in rest
    launched.stop()


def test_a_parameter_file_that_is_not_there_ends_the_launch(launch: Any) -> None:
    launched = launch("adatoken3d.launch.py", "params_file:=/nope.yaml")
    assert launched.process.wait(timeout=60) != 0
    assert "the parameter file /nope.yaml is not there" in launched.log and "process started" not in launched.log


def test_without_autostart_the_node_waits(launch: Any, graph: Any) -> None:
    launched = launch("adatoken3d.launch.py", "autostart:=false", "use_sim_time:=true")
    assert parameter(graph, "/adatoken3d", "use_sim_time") is True
    assert graph_state(graph, "/adatoken3d")() == "unconfigured"
    launched.stop()
    assert "process has finished cleanly" in launched.log


def test_bag_waits_for_the_node_and_rviz_gets_the_view(launch: Any, graph: Any, tmp_path: Path) -> None:
    calls = stand_ins(graph, tmp_path)
    arguments = (f"model:={tiny_checkpoint()}", "pose_source:=pose_topic", "bag:=/data/my bag", "rviz:=true")
    launched = launch("adatoken3d.launch.py", *arguments)
    state = graph_state(graph, "/adatoken3d")
    assert not calls["ros2"].exists() or state() == "active"
    graph.wait(calls["ros2"].exists, "the bag is played", timeout=120)
    assert state() == "active"
    assert calls["ros2"].read_text() == "bag play --clock 100 /data/my bag\n"
    assert parameter(graph, "/adatoken3d", "use_sim_time") is True
    graph.wait(calls["rviz2"].exists, "RViz is started")
    view = calls["rviz2"].read_text().split()
    assert view[0] == "-d" and view[1].endswith("share/adatoken3d/config/adatoken3d.rviz")
    assert view[2:4] == ["-f", "map"]
    launched.stop()


def graph_state(graph: Any, node: str) -> Any:
    from lifecycle_msgs.srv import GetState

    return lambda: str(graph.call(GetState, f"{node}/get_state").current_state.label)
