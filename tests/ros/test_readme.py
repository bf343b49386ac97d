# SPDX-License-Identifier: Apache-2.0
"""docs/node.md says what the node has: names are compared with the running node; files that the README names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("rclpy")

from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.action import get_action_server_names_and_types_by_node
from ros_graph import Graph

ROOT = Path(__file__).parents[2]
NODE = (ROOT / "docs" / "node.md").read_text(encoding="utf-8")


# What every lifecycle node has.
COMMON = re.compile(
    r"/(rosout|\w*parameter\w*|transition_event|\w+_state|get_available_\w+|get_transition_graph"
    r"|get_type_description)$|/_action/"
)


def names_in_the_readme() -> set[tuple[str, str, str]]:
    """(kind, full name, last part of the type); types are listed as the names are, alternatives with `or`."""
    found = set()
    for kind, names, types in re.findall(r"^\| (sub|pub|srv|action) \| (.*?) \| (.*?) \|", NODE, re.MULTILINE):
        each = [name.strip(" `").replace("~/", "adatoken3d/") for name in names.split(",")]
        for name, alternatives in zip(each, types.split(","), strict=True):
            for one in alternatives.split(" or "):
                found.add((kind, f"/{name.lstrip('/')}", one.strip().rpartition("/")[2]))
    return found


def names_of_the_node(graph: Graph) -> set[tuple[str, str, str]]:
    ways = {
        "sub": graph.node.get_subscriber_names_and_types_by_node,
        "pub": graph.node.get_publisher_names_and_types_by_node,
        "srv": graph.node.get_service_names_and_types_by_node,
        "action": lambda name, space: get_action_server_names_and_types_by_node(graph.node, name, space),
    }
    return {
        (kind, name, one.rpartition("/")[2])
        for kind, look in ways.items()
        for name, types in look("adatoken3d", "/")
        for one in types
        if not COMMON.search(name)
    }


TF = {("/tf", "TFMessage"), ("/tf_static", "TFMessage")}


def test_the_table_of_names_is_the_running_nodes(graph: Graph, tiny_model: Path) -> None:
    graph.start_node(tiny_model)
    assert graph.transition("configure")
    seen: set[tuple[str, str, str]] = set()
    for source, pose, transport, expected in (
        ("rgbd", "pose_topic", "raw", {("/pose", "PoseStamped"), ("/depth/image", "Image")}),
        ("rgbd", "odometry", "compressed", {*TF, ("/odom", "Odometry"), ("/depth/image", "CompressedImage")}),
        ("points", "pose_with_covariance", "raw", {("/points", "PointCloud2"), ("/pose", "PoseWithCovarianceStamped")}),
    ):
        request = SetParameters.Request()
        for name, text in (("input.source", source), ("pose.source", pose), ("input.transport", transport)):
            value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=text)
            request.parameters.append(Parameter(name=name, value=value))
        assert all(r.successful for r in graph.call(SetParameters, "/adatoken3d/set_parameters", request).results)
        assert graph.transition("activate")

        def subscribed(expected: set[tuple[str, str]] = expected) -> bool:
            seen.update(names_of_the_node(graph))
            return {("sub", *one) for one in expected} <= seen

        graph.wait(subscribed, f"subscriptions of {expected}")
        assert graph.transition("deactivate")

    def complete() -> bool:
        seen.update(names_of_the_node(graph))
        return seen >= names_in_the_readme()

    graph.wait(complete, "the README's names")
    assert seen == names_in_the_readme()


def test_the_files_that_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
