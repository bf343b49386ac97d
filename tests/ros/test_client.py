# SPDX-License-Identifier: Apache-2.0
"""The client against a scripted node in another process, on a ROS domain of its own."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")

import rclpy
from adatoken3d.msg import Answer
from rclpy.context import Context

from adatoken3d_ros.cli.demo import claim_domain
from adatoken3d_ros.cli.processes import Processes
from adatoken3d_ros.ros import connection
from adatoken3d_ros.ros.client import LifecycleError, SceneClient

FAKE = [sys.executable, str(Path(__file__).with_name("fake_scene_node.py"))]


@pytest.fixture(scope="module")
def domain() -> Iterator[int]:
    number, claim = claim_domain()
    with claim, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_DOMAIN_ID", str(number))
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        yield number


@pytest.fixture(scope="module")
def processes(domain: int) -> Iterator[Processes]:
    with Processes() as processes:
        processes.start("fake", FAKE)
        yield processes


@pytest.fixture
def client(processes: Processes) -> Iterator[SceneClient]:
    with SceneClient() as client:
        yield client


def test_answer_comes_back_with_what_was_asked(client: SceneClient) -> None:
    answer = client.ask("say a chair", clicks=[(1, 2.5, -3)], latency_budget_ms=250, max_new_tokens=7)
    assert (answer.text, answer.status) == ("a chair", Answer.OK)
    assert answer.status_message == "1,2.5,-3"
    assert (answer.latency_budget_ms, answer.retained_tokens) == (250.0, 7)


def test_questions_from_several_threads(client: SceneClient) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = client.ask(f"say {number}").text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(8)}


def test_stream_yields_the_text_in_pieces(client: SceneClient) -> None:
    stream = client.stream("say four chairs")
    pieces = list(stream)
    assert "".join(pieces) == "four chairs"
    assert stream.answer is not None and stream.answer.text == "four chairs"
    assert client.cancel() == 0


def test_stages_are_told_that_have_no_text_yet(client: SceneClient) -> None:
    client.ask("say that you are there")
    stages: list[str] = []
    stream = client.stream("say four chairs")
    stream.on_stage = stages.append
    assert stream.result().text == "four chairs"
    # The result comes by another way than the feedback, and may be there before the last of it.
    assert stages and stages == ["queue", "prefill", "decode"][: len(stages)]


def test_result_reads_a_stream_to_its_end(client: SceneClient) -> None:
    assert client.stream("say yes").result().text == "yes"


def test_cancelling_a_stream_ends_it_with_an_answer(client: SceneClient) -> None:
    stream = client.stream("endless")
    assert set(next(stream)) == {"x"}
    assert stream.stage == "decode"
    stream.cancel()
    assert stream.result().status == Answer.CANCELLED


def test_client_cancels_what_is_open(client: SceneClient) -> None:
    streams = [client.stream("endless"), client.stream("endless")]
    assert client.cancel() == 2
    assert [stream.result().status for stream in streams] == [Answer.CANCELLED] * 2


def test_leaving_a_stream_cancels_it(client: SceneClient) -> None:
    with client.stream("endless") as stream:
        next(stream)
    assert stream.result().status == Answer.CANCELLED


def test_stream_out_of_time(client: SceneClient) -> None:
    client.stream("say that you are there").result()  # discovery takes its own time
    stream = client.stream("endless", timeout=1.0)
    with pytest.raises(TimeoutError, match=r"no answer within 1.0 s: /adatoken3d has the request and is still busy"):
        stream.result()


def test_refused_stream(client: SceneClient) -> None:
    with pytest.raises(RuntimeError, match="/adatoken3d refused the question"):
        client.stream("refuse").result()


def test_node_that_is_still_answering(client: SceneClient) -> None:
    client.ask("say that you are there")
    with pytest.raises(TimeoutError, match=r"no answer within 0.5 s: /adatoken3d has the request and is still busy"):
        client.ask("hang", timeout=0.5)


def test_no_such_node_names_those_that_are_there(processes: Processes) -> None:
    with SceneClient("elsewhere", "robot1") as client:
        # The graph is known once the node that is there has been seen.
        assert client.node.wait_for_node("/adatoken3d", timeout=30.0)
        with pytest.raises(
            TimeoutError, match=r"no node /robot1/elsewhere on .*the nodes there are /adatoken3d; start"
        ):
            client.ask("say hello", timeout=0.2)


def test_life_cycle(client: SceneClient) -> None:
    assert client.state() == "unconfigured"
    client.configure()
    assert client.state() == "inactive"
    client.activate()
    assert client.state() == "active"
    client.deactivate()
    with pytest.raises(LifecycleError, match="/adatoken3d could not activate: it is 'inactive'"):
        client.activate()
    client.cleanup()
    assert client.state() == "unconfigured"
    with pytest.raises(LifecycleError, match="could not deactivate: it is 'unconfigured'"):
        client.deactivate()


def test_refusal_to_clear_is_an_error_with_the_reason(client: SceneClient) -> None:
    with pytest.raises(RuntimeError, match="not today"):
        client.clear()


def test_diagnostics_of_a_task(client: SceneClient) -> None:
    while not client.diagnostics("scene"):
        client.state()
    assert client.diagnostics("scene") == {"key_frames": "3"}
    assert client.diagnostics("no such task") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clicks": [(1, 2)]}, r"three numbers.*\(1, 2\)"),
        ({"clicks": [(1, 2, "x")]}, "could not convert"),
        ({"max_new_tokens": -1}, "got -1"),
        ({"question": 3}, "must be text, got 3"),
    ],
)
def test_bad_arguments(client: SceneClient, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client.ask(**{"question": "say x", **arguments})


def test_closed_client_says_so(processes: Processes) -> None:
    client = SceneClient()
    client.close()
    client.close()
    with pytest.raises(ConnectionError, match="closed"):
        client.ask("say x")


def test_foreign_context_is_left_open(processes: Processes) -> None:
    context = Context()
    rclpy.init(context=context)
    with SceneClient(context=context) as client:
        assert client.ask("say x").text == "x"
    assert context.ok()
    context.shutdown()


def test_shut_down_under_the_client(processes: Processes) -> None:
    context = Context()
    rclpy.init(context=context)
    with SceneClient(context=context) as client:
        client.state()
        context.shutdown()
        with pytest.raises(ConnectionError, match="ROS was shut down"):
            client.ask("say x")


def test_process_that_forgets_to_close_ends_well(processes: Processes) -> None:
    # The timer keeps the client's thread busy, as a robot does.
    code = (
        "from adatoken3d_ros.ros.client import SceneClient\n"
        "client = SceneClient()\n"
        "client.node.create_timer(0.0005, lambda: None)\n"
        "print(client.ask('say bye').text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "bye", "")


def test_node_that_dies_while_it_answers(domain: int) -> None:
    with Processes() as processes:
        processes.start("mortal", [*FAKE, "--ros-args", "-r", "__ns:=/mortal"])
        with SceneClient(namespace="mortal") as client, pytest.raises((ConnectionError, TimeoutError)):
            client.ask("die", timeout=3.0)


def test_lost_replies_do_not_lose_the_question(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "AGAIN_SECONDS", 0.1)
    processes.start("lossy", [*FAKE, "lossy", "--ros-args", "-r", "__node:=lossy"])
    with SceneClient("lossy") as client:
        assert client.ask("say that you are there").text == "that you are there"
        assert client.state() == "unconfigured"


@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        (
            Answer(text="two", data_age=1.25, retained_tokens=30, spatial_tokens=200),
            "two (1.2 s old, 30 of 200 tokens)\n",
        ),
        (
            Answer(status=Answer.NO_SCENE, data_age=math.nan, status_message="nothing has come on /rgb/image"),
            "no answer: nothing has come on /rgb/image\n",
        ),
    ],
)
def test_the_example_of_the_readme(
    answer: Answer, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the node says, a person can read it."""
    readme = Path(__file__).parents[2] / "docs" / "robot.md"
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "SceneClient" in one)
    monkeypatch.setattr("adatoken3d_ros.ros.client.SceneClient", lambda: nullcontext(Asked(answer)))
    exec(compile(code, str(readme), "exec"), {})
    assert capsys.readouterr().out == printed


class Asked:
    """A client whose answer is known."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def ask(self, question: str, latency_budget_ms: float) -> Answer:
        return self._answer
