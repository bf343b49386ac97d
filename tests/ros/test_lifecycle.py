# SPDX-License-Identifier: Apache-2.0
"""States, bad models, and the end of the process at any moment."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from ros_graph import STOP_SECONDS, Camera, Graph, synthetic_frame

NAME = "/adatoken3d"


def ask(graph: Graph, question: str = "What?") -> Answer:
    return graph.call(AskScene, f"{NAME}/ask", AskScene.Request(question=question)).answer


def test_every_state_answers_and_the_way_round_works_twice(graph: Graph, tiny_model: Path, tmp_path: Path) -> None:
    process = graph.start_node(tiny_model, scene__directory=tmp_path, scene__autosave_period=3600.0)
    assert graph.state() == "unconfigured"
    assert "unconfigured, waiting for a launch file, or for 'ros2 lifecycle set /adatoken3d configure'" in process.log
    refused = ask(graph)
    assert refused.status == Answer.ERROR and "unconfigured" in refused.status_message
    assert (refused.strategy, refused.model_id) == ("", "")
    for invalid in ("activate", Transition.TRANSITION_ACTIVATE, 99):
        assert not graph.transition(invalid)
        assert graph.state() == "unconfigured"
    for turn in (1, 2):
        request = ChangeState.Request()
        request.transition.label = "configure"
        configured = graph.client(ChangeState, f"{NAME}/change_state").call_async(request)
        meanwhile = [ask(graph).status_message]
        while not configured.done():
            meanwhile.append(ask(graph).status_message)
        assert all("not active" in message for message in meanwhile)
        assert graph.result(configured, "the model to be loaded").success
        assert graph.state() == "inactive"
        assert "inactive" in ask(graph).status_message
        assert graph.transition("activate")
        nothing = ask(graph)
        assert nothing.status == Answer.NO_SCENE and "rgb/image" in nothing.status_message
        camera = Camera(graph)
        graph.wait(camera.matched, "the inputs")
        camera.send(camera.messages(10**18, *synthetic_frame(0)))
        graph.wait(lambda: ask(graph).status == Answer.TRUNCATED, "an answer")
        assert graph.transition("deactivate")
        graph.wait(lambda camera=camera: not camera.rgb.get_subscription_count(), "the inputs to stop")
        assert graph.transition("cleanup")
        assert len(list(tmp_path.glob("*.scene"))) == turn, "what is given up is saved before"
    assert graph.transition("shutdown")
    assert graph.state() == "finalized"
    status, seconds = process.stop(signal.SIGTERM)
    assert status == 0 and seconds < STOP_SECONDS, process.log


def test_bad_models_and_parameters_are_refused_by_name(graph: Graph, tiny_model: Path, tmp_path: Path) -> None:
    from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
    from rcl_interfaces.srv import SetParameters

    process = graph.start_node()
    diagnostics: list[Any] = graph.collect(DiagnosticArray, "/diagnostics", 10)

    def give(path: Path | str, name: str = "model.path") -> None:
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=str(path))
        request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
        (result,) = graph.call(SetParameters, f"{NAME}/set_parameters", request).results
        assert result.successful, result.reason

    truncated = tmp_path / "truncated"
    shutil.copytree(tiny_model, truncated)
    weights = next(iter(sorted(truncated.glob("*.safetensors"))))
    weights.write_bytes(weights.read_bytes()[:-1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, named in (
        ("/no/such/model", "/no/such/model"),
        (empty, str(empty)),
        (truncated, weights.name),
    ):
        give(path)
        assert not graph.transition("configure")
        assert graph.state() == "unconfigured"
        assert named in process.log.splitlines()[-1]
        assert named in ask(graph).status_message
        graph.wait(
            lambda named=named: any(named in s.message for s in diagnostics[-1].status) if diagnostics else False,
            "the reason in the diagnostics",
        )
    give(tiny_model)
    give("static", "pose.source")
    assert graph.transition("configure")
    assert process.stop()[0] == 0


HIDE = """
import sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden)
"""


def test_packages_that_are_missing_are_named_with_the_line_that_installs_them(graph: Graph, tmp_path: Path) -> None:
    """As on a robot whose workspace was built, which needs neither."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    graph.environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), graph.environment["PYTHONPATH"]])
    process = graph.start_node()
    assert not graph.transition("configure")
    assert graph.state() == "unconfigured"
    assert "has no torch, transformers; this installs" in process.log
    assert re.search(r" -m pip install -r \S+/requirements\.txt", process.log)
    assert "has no torch" in ask(graph).status_message
    assert process.stop()[0] == 0


def test_autostart_brings_it_up(graph: Graph, tiny_model: Path) -> None:
    process = graph.start_node(tiny_model, autostart="true", diagnostics__period=0.05)
    graph.wait(lambda: graph.state() == "active", "the node to be active")
    # In the middle of an answer, and more than once.
    camera = Camera(graph)
    graph.wait(camera.matched, "the inputs")
    camera.send(camera.messages(10**18, *synthetic_frame(0)))
    graph.wait(lambda: ask(graph).status == Answer.TRUNCATED, "an answer")
    answers = graph.collect(Answer, f"{NAME}/answer")
    graph.wait(lambda: answers, "the last answer, latched")
    request = AskScene.Request(question="What?", max_new_tokens=3000)  # the question that was just cut
    pending = graph.client(AskScene, f"{NAME}/ask").call_async(request)
    model = model_status(graph)
    graph.wait(lambda: "answering" in model(), "the model to be answering")
    status, seconds = process.stop(signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert status == 0 and seconds < STOP_SECONDS, process.log
    answer = graph.result(pending, "the answer that was owed").answer
    assert answer.status == Answer.CANCELLED


@pytest.mark.parametrize("label", ["configure", "shutdown"])
def test_a_transition_asked_for_while_it_starts_by_itself(graph: Graph, tiny_model: Path, label: str) -> None:
    """It comes too early or too late; either way the node is whole afterwards."""
    graph.start_node(tiny_model, autostart="true")
    if graph.transition(label):
        assert label == "shutdown" and graph.state() == "finalized"
        return
    graph.wait(lambda: graph.state() == "active", "the node to be active")
    assert ask(graph).status == Answer.NO_SCENE


def model_status(graph: Graph) -> Callable[[], str]:
    """What /diagnostics says of the model, from now on; nothing until it has spoken."""
    seen = graph.collect(DiagnosticArray, "/diagnostics", 10)
    return lambda: next((s.message for s in seen[-1].status if s.name.endswith("model")), "") if seen else ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_the_model_loads(graph: Graph, tiny_model: Path, number: signal.Signals) -> None:
    process = graph.start_node(tiny_model, autostart="true", diagnostics__period=0.05)
    model = model_status(graph)
    graph.wait(lambda: "loading" in model() or "ready" in model(), "the load to begin")
    status, seconds = process.stop(number)
    assert status == 0 and seconds < STOP_SECONDS, process.log


def test_a_bad_parameter_at_the_start_ends_with_a_reason(graph: Graph) -> None:
    process = graph.start_node(queue_limit=-3)
    assert process.popen.wait(timeout=60) == 1
    assert "queue_limit" in process.log
    whole = graph.start_node(scene__max_depth=4)
    assert whole.popen.wait(timeout=60) == 1
    assert len(whole.log.splitlines()) == 1 and "decimal point" in whole.log
    whole = graph.start_node(scene__max_depth=4)
    assert whole.popen.wait(timeout=60) == 1
    (line,) = whole.log.splitlines()
    assert "scene.max_depth" in line and "decimal point" in line
