# SPDX-License-Identifier: Apache-2.0
"""Parameter files, launch files as text, the RViz view and the profile of the middleware, against the node."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")

from rcl_interfaces.srv import ListParameters
from sensor_msgs.msg import Image
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.ros import wiring
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
    readme = (ROOT / "docs" / "node.md").read_text()
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
        "/depth/image",
        "/clicked_point",
        *(f"/adatoken3d/{name}" for name in ("retained_tokens", "scene_tokens", "markers", "goal")),
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
    assert shown["Exit layers"]["Channel Name"] == "last_layer"
    assert {name for name, display in shown.items() if not display["Value"]} == {"TF", "Depth", "Exit layers"}
