# SPDX-License-Identifier: Apache-2.0
"""What the sources may use of rclpy: what Humble, Jazzy and Kilted all have. Only the last two are run."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "adatoken3d_ros").rglob("*.py"), *(ROOT / "launch").glob("*.py")])
OF_ROS = [path for path in SOURCES if {"ros", "launch"} & set(path.relative_to(ROOT).parts)]

# Names of rclpy (functions, methods, classes) that came after Humble and that mean nothing else.
NOT_IN_HUMBLE = frozenset(
    (
        "AsyncParameterClient",
        "EventsExecutor",
        "InitContextManager",
        "LoggingService",
        "ParameterEventHandler",
        "TimerInfo",
        "TypeDescriptionService",
        "TypeHash",
        "actual_call_time",
        "add_parameter_callback",
        "add_parameter_event_callback",
        "add_post_set_parameters_callback",
        "add_pre_set_parameters_callback",
        "configure_introspection",
        "count_clients",
        "count_services",
        "expected_call_time",
        "get_fully_qualified_node_names",
        "get_logger_level",
        "get_publisher_count",
        "load_parameter_file",
        "parameter_dict_from_yaml_file",
        "remove_parameter_callback",
        "remove_post_set_parameters_callback",
        "remove_pre_set_parameters_callback",
        "services_are_ready",
        "topic_type_hash",
        "wait_for_node",
        "wait_for_services",
    )
)
# Keywords of calls that came after Humble, by the name of what is called.
KEYWORDS_NOT_IN_HUMBLE = {
    "Node": {"enable_logger_service"},
    "PublisherEventCallbacks": {"incompatible_type", "matched"},
    "SubscriptionEventCallbacks": {"incompatible_type", "matched"},
    "call": {"timeout_sec"},
    "create_node": {"enable_logger_service"},
    "create_timer": {"autostart"},
    "shutdown": {"wait_for_threads"},
}


def called(node: ast.AST) -> str:
    """The last name of what is called; empty for anything but a call."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def newer_than_humble(source: str) -> Iterator[str]:
    """What a source uses of rclpy that Humble has not, and the context managers that only Kilted has: `line: name`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in NOT_IN_HUMBLE:
            yield f"{node.lineno}: {node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rclpy":
            yield from (f"{node.lineno}: {alias.name}" for alias in node.names if alias.name in NOT_IN_HUMBLE)
        elif isinstance(node, ast.Call):
            newer = KEYWORDS_NOT_IN_HUMBLE.get(called(node), set())
            yield from (f"{node.lineno}: {word.arg}" for word in node.keywords if word.arg in newer)
        elif isinstance(node, ast.With | ast.AsyncWith):
            entered = {called(item.context_expr) for item in node.items}
            yield from (f"{node.lineno}: with {name}" for name in sorted(entered & {"init", "create_node"}))


def test_what_is_newer_is_found() -> None:
    source = """
from rclpy.executors import EventsExecutor
with rclpy.init(args=[]):
    node.create_timer(0.1, tick, autostart=False)
    node.get_fully_qualified_node_names()
"""
    assert sorted(newer_than_humble(source)) == [
        "2: EventsExecutor",
        "3: with init",
        "4: autostart",
        "5: get_fully_qualified_node_names",
    ]


@pytest.mark.parametrize("path", OF_ROS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_humble_has_what_is_used(path: Path) -> None:
    assert list(newer_than_humble(path.read_text(encoding="utf-8"))) == []


def test_the_syntax_is_that_of_python_3_10() -> None:
    """Humble's Python. Where there is none, ruff's target version in pyproject.toml looks after it."""
    found = [shutil.which("python3.10"), *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))]
    program = "import sys\nfor name in sys.argv[1:]: compile(open(name, encoding='utf-8').read(), name, 'exec')"
    for python in filter(None, found):
        command = [python, "-S", "-c", program, *map(str, SOURCES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "command not found" not in done.stderr:  # a shim of a Python that is not chosen
            assert done.returncode == 0, done.stderr
            return
    pytest.skip("no Python 3.10 here")
