# SPDX-License-Identifier: Apache-2.0
"""Launch files, parameter files and the RViz view against the node. What needs `launch_ros` is skipped without it."""

from __future__ import annotations

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
from test_robot_commands import REALSENSE
from test_wiring import launches
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.cli.demo import default_model, tiny_checkpoint
from adatoken3d_ros.ros import wiring
from adatoken3d_ros.ros.parameters import SPECS
from adatoken3d_ros.ros.wiring import ARGUMENTS, TOPICS, read_parameters

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted((ROOT / "launch").glob("*.launch.py"))
PARAMETERS = sorted((ROOT / "config").rglob("*.yaml"))
NODES = {"demo_camera.yaml": "demo_camera", "nav2.yaml": "lifecycle_manager"}  # those that are not the scene node's
RVIZ = ROOT / "config" / "adatoken3d.rviz"


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", LAUNCH, ids=by_name)
def test_launch_file_compiles(path: Path) -> None:
    compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("path", LAUNCH, ids=by_name)
def test_launch_file_runs_nothing_but_nodes_and_the_bag_player(path: Path) -> None:
    text = path.read_text()
    for word in ("eval(", "exec(", "urllib", "requests", "http", "pip ", "__file__", "os.getcwd"):
        assert word not in text, word


@pytest.mark.parametrize("path", [path for path in PARAMETERS if path.name not in NODES], ids=by_name)
def test_parameters_of_the_scene_node_are_declared_and_valid(path: Path) -> None:
    specs = {spec.name: spec for spec in SPECS}
    for name, value in read_parameters(path, "adatoken3d").items():
        assert name in specs, f"{path.name}: {name} is no parameter of the node"
        assert type(value) is type(specs[name].default), f"{path.name}: {name} is a {type(value).__name__}"
        assert specs[name].problem(value) == ""


def test_default_file_holds_defaults() -> None:
    defaults = {spec.name: spec.default for spec in SPECS}
    given = read_parameters(ROOT / "config" / "adatoken3d.yaml", "adatoken3d")
    assert given == {name: defaults[name] for name in given}


@pytest.mark.parametrize("path", [path for path in PARAMETERS if path.name != "nav2.yaml"], ids=by_name)
def test_a_parameter_file_loads_by_param_load(path: Path) -> None:
    """By what `ros2 param load` calls, for a node in any namespace.

    Jazzy's takes all sections of a file; what is for the launch file alone is refused by the node, name by name.
    """
    from rclpy.parameter_client import AsyncParameterClient

    class Client(AsyncParameterClient):
        def __init__(self, remote_node_name: str) -> None:
            self.remote_node_name = remote_node_name

        def set_parameters(self, parameters: Any, callback: Any = None) -> Any:
            self.loaded = {parameter.name for parameter in parameters}

    client = Client(f"/robot1/{NODES.get(path.name, 'adatoken3d')}")
    client.load_parameter_file(str(path), use_wildcard=True)
    own = set(read_parameters(path, "adatoken3d"))
    assert own and own <= client.loaded <= own | set(read_parameters(path, wiring.LAUNCH))


def test_nav2_s_manager_waits_for_no_bond() -> None:
    content = read_parameters(ROOT / "config" / "nav2.yaml", "lifecycle_manager")
    assert content == {"node_names": ["adatoken3d"], "autostart": True, "bond_timeout": 0.0}


def test_both_nodes_of_the_demo_take_their_files(graph: Any, tmp_path: Path) -> None:
    """In a namespace too, and every key of the camera's file is one of its parameters."""
    for namespace in ("", "robot1"):
        for module, node, file, name, value in (
            ("demo_camera", "demo_camera", "demo_camera.yaml", "width", 96),
            ("node", "adatoken3d", "demo.yaml", "queue_limit", 3),
        ):
            content = yaml.safe_load((ROOT / "config" / file).read_text())
            content["/**"]["ros__parameters"][name] = value
            changed = tmp_path / file
            changed.write_text(yaml.safe_dump(content))
            arguments = ["--ros-args", "--params-file", str(changed), "-r", f"__ns:=/{namespace}"]
            process = graph.start(f"adatoken3d_ros.ros.{module}", *arguments)
            prefix = f"{'/' if namespace else ''}{namespace}/{node}"
            assert parameter(graph, prefix, name) == value
            if node == "demo_camera":
                known = graph.call(ListParameters, f"{prefix}/list_parameters").result.names
                assert set(read_parameters(changed, node)) <= set(known)
            process.stop()


def test_topics_of_a_launch_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{topic}`" in readme for topic in TOPICS.values())
    assert all(argument.description.endswith(".") for argument in ARGUMENTS)


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
