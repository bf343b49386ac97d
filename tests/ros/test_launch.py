# SPDX-License-Identifier: Apache-2.0
"""Launch files, parameter files and the RViz view against the node. What needs `launch_ros` is skipped without it."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from rcl_interfaces.srv import ListParameters
from sensor_msgs.msg import Image
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.cli.demo import default_model, tiny_checkpoint
from adatoken3d_ros.ros.parameters import SPECS

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted((ROOT / "launch").glob("*.launch.py"))
PARAMETERS = sorted((ROOT / "config").glob("*.yaml"))
RVIZ = ROOT / "config" / "adatoken3d.rviz"


def by_name(path: Path) -> str:
    return path.name


def sections(path: Path) -> dict[str, dict[str, Any]]:
    """{node: its parameters} of a parameter file."""
    content = yaml.safe_load(path.read_text())
    return {node.removeprefix("/**/"): body["ros__parameters"] for node, body in content.items()}


@pytest.mark.parametrize("path", LAUNCH, ids=by_name)
def test_launch_file_compiles(path: Path) -> None:
    compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("path", LAUNCH, ids=by_name)
def test_launch_file_runs_nothing_but_nodes_and_the_bag_player(path: Path) -> None:
    text = path.read_text()
    for word in ("eval(", "exec(", "urllib", "requests", "http", "pip ", "__file__", "os.getcwd"):
        assert word not in text, word


@pytest.mark.parametrize("path", PARAMETERS, ids=by_name)
def test_parameters_of_the_scene_node_are_declared_and_valid(path: Path) -> None:
    specs = {spec.name: spec for spec in SPECS}
    for name, value in sections(path)["adatoken3d"].items():
        assert name in specs, f"{path.name}: {name} is no parameter of the node"
        assert type(value) is type(specs[name].default), f"{path.name}: {name} is a {type(value).__name__}"
        assert specs[name].problem(value) == ""


def test_default_file_holds_defaults() -> None:
    defaults = {spec.name: spec.default for spec in SPECS}
    given = sections(ROOT / "config" / "adatoken3d.yaml")["adatoken3d"]
    assert given == {name: defaults[name] for name in given}


def test_both_nodes_of_the_demo_take_their_sections(graph: Any, tmp_path: Path) -> None:
    """In a namespace too, and every key of the camera's section is one of its parameters."""
    content = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    content["/**/demo_camera"]["ros__parameters"]["width"] = 96
    content["/**/adatoken3d"]["ros__parameters"]["queue_limit"] = 3
    changed = tmp_path / "demo.yaml"
    changed.write_text(yaml.safe_dump(content))
    for namespace in ("", "robot1"):
        arguments = ["--ros-args", "--params-file", str(changed), "-r", f"__ns:=/{namespace}"]
        for module, node, name, value in (
            ("demo_camera", "demo_camera", "width", 96),
            ("node", "adatoken3d", "queue_limit", 3),
        ):
            process = graph.start(f"adatoken3d_ros.ros.{module}", *arguments)
            prefix = f"{'/' if namespace else ''}{namespace}/{node}"
            assert parameter(graph, prefix, name) == value
            if node == "demo_camera":
                known = graph.call(ListParameters, f"{prefix}/list_parameters").result.names
                assert set(sections(changed)[node]) <= set(known)
            process.stop()


def test_arguments_set_parameters_and_topics_of_the_node() -> None:
    """Also where launch is not installed."""
    tree = ast.parse((ROOT / "launch" / "adatoken3d.launch.py").read_text())
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    declared: dict[str, dict[str, ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DeclareLaunchArgument":
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else "each topic"
            declared[name] = {keyword.arg: keyword.value for keyword in node.keywords}
    fixed = {"namespace", "params_file", "model", "rviz", "autostart", "use_sim_time", "log_level", "bag"}
    assert set(declared) == {*fixed, *tables["PARAMETERS"], "each topic"}
    assert all("description" in options for options in declared.values())
    specs = {spec.name: spec for spec in SPECS}
    for argument, name in tables["PARAMETERS"].items():
        if specs[name].choices:
            assert ast.literal_eval(declared[argument]["choices"]) == ["", *specs[name].choices]
    assert {"rgb_topic", "depth_topic", "points_topic"} <= set(tables["TOPICS"])
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{topic}`" in readme for topic in tables["TOPICS"].values())


def parameter(graph: Any, node: str, name: str) -> Any:
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python

    reply = graph.call(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=[name]))
    return parameter_value_to_python(reply.values[0])


def test_shared_memory_profile_is_well_formed() -> None:
    root = ElementTree.parse(ROOT / "config" / "fastdds_shm.xml").getroot()
    space = "{http://www.eprosima.com}"
    segment = root.find(f".//{space}segment_size")
    assert segment is not None and int(segment.text or 0) == 16 * 2**20
    named = {element.text for element in root.iter(f"{space}transport_id")}
    assert named == {"large_shared_memory", "network"}


def test_shared_memory_profile_carries_images(graph: Any, tmp_path: Path) -> None:
    """Between two processes with the profile; an XML error would make the middleware fall back or refuse."""
    os.environ.pop("FASTRTPS_DEFAULT_PROFILES_FILE", None)
    graph.environment["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds_shm.xml")
    graph.environment["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds_shm.xml")
    from sensor_msgs.msg import Image

    process = graph.start("adatoken3d_ros.ros.demo_camera", "--ros-args", "-p", "width:=640", "-p", "height:=480")
    images = graph.collect(Image, "/rgb/image", 10)
    graph.wait(lambda: len(images) >= 2, "two images")
    assert "XMLPARSER" not in process.log and "Error" not in process.log


def topics_of(content: Any) -> Iterator[str]:
    """Every topic that an RViz configuration names."""
    if isinstance(content, dict):
        topic = content.get("Topic")
        if isinstance(topic, dict):
            yield topic["Value"]
        for value in content.values():
            yield from topics_of(value)
    elif isinstance(content, list):
        for value in content:
            yield from topics_of(value)


def test_view_shows_topics_of_the_node(graph: Any) -> None:
    view = yaml.safe_load(RVIZ.read_text())
    graph.start_node()
    graph.start("adatoken3d_ros.ros.demo_camera")
    graph.collect(MarkerArray, "/adatoken3d/markers")
    wanted = {f"/{topic}" for topic in topics_of(view)}
    assert wanted == {
        "/rgb/image",
        "/clicked_point",
        *(f"/adatoken3d/{name}" for name in ("retained_tokens", "scene_tokens", "markers")),
    }

    def names() -> set[str]:
        return {name for name, _ in graph.node.get_topic_names_and_types()}

    graph.wait(lambda: wanted <= names(), f"topics {wanted}")


def test_view_colours_tokens_by_contribution() -> None:
    manager = yaml.safe_load(RVIZ.read_text())["Visualization Manager"]
    assert manager["Global Options"]["Fixed Frame"] == "map"
    shown = {display["Name"]: display for display in manager["Displays"]}
    retained = shown["Retained tokens"]
    assert (retained["Color Transformer"], retained["Channel Name"]) == ("Intensity", "contribution")
    assert shown["Scene tokens"]["Color Transformer"] == "RGB8"
    assert all(display["Value"] for name, display in shown.items() if name != "TF")


# --- with launch_ros --------------------------------------------------------------------------------------------------


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
    content = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    content["/**/demo_camera"]["ros__parameters"]["rate"] = 10.0
    parameters = tmp_path / "ten_hertz.yaml"
    parameters.write_text(yaml.safe_dump(content))
    launched = launch("demo.launch.py", f"params_file:={parameters}")

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


def test_scene_node_alone_with_remaps_and_overrides(launch: Any, graph: Any) -> None:
    arguments = ("model:=" + str(tiny_checkpoint()), "pose_source:=odometry", "rgb_topic:=/camera/color/image_raw")
    launched = launch("adatoken3d.launch.py", *arguments)
    state = graph_state(graph, "/adatoken3d")
    graph.wait(lambda: state() == "active", "the node is active", timeout=120)
    assert parameter(graph, "/adatoken3d", "pose.source") == "odometry"
    publisher = graph.node.create_publisher(Image, "/camera/color/image_raw", 10)
    graph.wait(publisher.get_subscription_count, "the remapped topic is subscribed to")
    launched.stop()
    assert "process has finished cleanly" in launched.log


def test_without_autostart_the_node_waits(launch: Any, graph: Any) -> None:
    launched = launch("adatoken3d.launch.py", "autostart:=false", "use_sim_time:=true")
    assert parameter(graph, "/adatoken3d", "use_sim_time") is True
    assert graph_state(graph, "/adatoken3d")() == "unconfigured"
    launched.stop()
    assert "process has finished cleanly" in launched.log


def test_bag_waits_for_the_node_and_rviz_gets_the_view(launch: Any, graph: Any, tmp_path: Path) -> None:
    """With programs of the same names that only write down how they were called."""
    calls = {name: tmp_path / f"{name}.calls" for name in ("ros2", "rviz2")}
    for name, folder in (("ros2", tmp_path / "bin"), ("rviz2", tmp_path / "prefix" / "lib" / "rviz2")):
        folder.mkdir(parents=True)
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "$@" > {calls[name]}.part\nmv {calls[name]}.part {calls[name]}\n')
        program.chmod(0o755)
    index = tmp_path / "prefix" / "share" / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True)
    (index / "rviz2").touch()
    graph.environment["PATH"] = f"{tmp_path / 'bin'}:{graph.environment['PATH']}"
    graph.environment["AMENT_PREFIX_PATH"] = f"{tmp_path / 'prefix'}:{os.environ['AMENT_PREFIX_PATH']}"

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
    launched.stop()


def graph_state(graph: Any, node: str) -> Any:
    from lifecycle_msgs.srv import GetState

    return lambda: str(graph.call(GetState, f"{node}/get_state").current_state.label)
