# SPDX-License-Identifier: Apache-2.0
"""Faults that need processes: who shares the graph with the node, and what ends it. One node while it lives."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from ros_graph import STOP_SECONDS, Camera, Graph, Process, synthetic_frame
from test_fault_processes import ALONE

# The middleware of a process whose peers were stopped and killed is of no use to the tests that come after, nor what
# other tests have left in it to these: `test_fault_processes.py` runs this file in a process of its own.
pytestmark = pytest.mark.skipif(ALONE not in os.environ, reason="run by test_fault_processes.py")

NAME = "/adatoken3d"
LONG = 120.0  # seconds until a wait fails: a model is loaded on a busy machine
FOLDER = Path(__file__).parent
STAMPS = itertools.count(1_700_000_000_000_000_000, 2_000_000_000)


class Live:
    """A node that starts by itself and what it says; it is started anew when it has been killed."""

    def __init__(self, graph: Graph, model: Path) -> None:
        self.graph = graph
        self.model = model
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics", 10)
        self.camera = Camera(graph)
        self.process: Process = self.start()

    def start(self) -> Process:
        self.diagnostics.clear()
        self.process = self.graph.start_node(
            self.model, autostart="true", diagnostics__period=0.1, budget__warm_up="false"
        )
        return self.process

    def status(self, task: str) -> Any:
        for array in reversed(self.diagnostics):
            for status in array.status:
                if status.name == f"adatoken3d: {task}":
                    return status
        return DiagnosticStatus()

    def until(self, task: str, text: str) -> None:
        self.graph.wait(lambda: text in self.status(task).message, f"{text!r} in the status of {task}", LONG)

    def see(self, index: int) -> None:
        """A frame that becomes a view; sent until it has arrived, because a new node's inputs take a while to match."""
        before = len(self.diagnostics)
        key_frames = self.key_frames()

        def seen() -> bool:
            if len(self.diagnostics) > self._looked + 5:
                self._looked = len(self.diagnostics)
                self.camera.send(self.camera.messages(next(STAMPS), *synthetic_frame(index)))
            return self.key_frames() > key_frames

        self._looked = before - 10
        self.graph.wait(self.camera.matched, "the node's inputs", LONG)
        self.graph.wait(seen, "a key frame", LONG)

    def key_frames(self) -> int:
        return self.value("scene", "key_frames")

    def value(self, task: str, key: str) -> int:
        return next((int(pair.value) for pair in self.status(task).values if pair.key == key), 0)

    def send_question(self, text: str, max_new_tokens: int = 4) -> Any:
        request = AskScene.Request(question=text, max_new_tokens=max_new_tokens)
        return self.graph.client(AskScene, f"{NAME}/ask").call_async(request)

    def ask(self, text: str = "What is there?") -> Answer:
        return self.graph.result(self.send_question(text), "an answer", LONG).answer


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Live]:
    graph = Graph(tmp_path_factory.mktemp("graph"))
    try:
        made = Live(graph, tiny_model)
        made.see(0)
        yield made
    finally:
        graph.close()


def test_statuses_of_a_node_that_waits(live: Live) -> None:
    """Figures that there are not yet are n/a, and an input that is missing is named."""
    values = {pair.key: pair.value for pair in live.status("latency").values}
    assert values["total_ms.p50"] == values["total_ms.p99"] == values["budgets_missed"] == "n/a"
    assert "rate_hz.rgb/image" in {pair.key for pair in live.status("inputs").values}
    live.until("inputs", "has been silent for")
    live.graph.wait(lambda: live.status("inputs").level == DiagnosticStatus.ERROR, "silence to be an error", LONG)
    live.see(1)
    assert live.ask().status == Answer.TRUNCATED
    live.graph.wait(lambda: "median" in live.status("latency").message, "the latency of an answer", LONG)


def test_two_nodes_of_one_name(live: Live) -> None:
    """The older one says that there is another; when that has gone, all is as before."""
    twin = live.graph.start_node()
    try:
        live.until("model", "2 nodes have this node's name")
        # Both say so, each in its own time; one that is interrupted while it starts does not say good-bye.
        for process in (live.process, twin):
            live.graph.wait(lambda process=process: "2 nodes are named /adatoken3d" in process.log, "a warning", LONG)
        live.graph.wait(lambda: live.status("model").level == DiagnosticStatus.WARN, "a warning", LONG)
    finally:
        ended = twin.stop(signal.SIGINT)
    assert ended[0] == 0, twin.log
    live.until("model", "ready")
    assert live.ask().status == Answer.TRUNCATED


def test_a_client_that_disappears(live: Live) -> None:
    """Its questions are answered and published all the same, and the next one's turn comes."""
    published = live.graph.collect(Answer, f"{NAME}/answer", 10)
    client = live.graph.start_script(FOLDER / "vanishing_client.py")
    live.graph.wait(lambda: "asked" in client.log, "questions that were asked", LONG)
    client.kill()
    assert live.ask("And mine?").status == Answer.TRUNCATED
    asked = ["And mine?", "Over the action?", "Over the service?"]
    live.graph.wait(lambda: len(published) >= 3, "the answers that nobody waits for", LONG)
    assert sorted(answer.question for answer in published) == asked
    assert {answer.status for answer in published} == {Answer.TRUNCATED}
    live.until("model", "ready")


def test_killed_during_an_answer_and_during_the_load(live: Live) -> None:
    """SIGKILL leaves nothing behind that would hold up the next start; SIGTERM answers what it owes."""
    live.send_question("What was lost?", 3000)
    live.until("model", "answering")
    live.process.kill()
    live.start()
    live.until("model", "loading")
    live.process.kill()
    live.start()
    live.until("model", "ready")
    live.see(0)
    assert live.ask().status == Answer.TRUNCATED
    owed = live.send_question("What is owed?", 3000)
    live.until("model", "answering")
    status, seconds = live.process.stop(signal.SIGTERM)
    assert status == 0 and seconds < STOP_SECONDS, live.process.log
    assert live.graph.result(owed, "the answer that was owed").answer.status == Answer.CANCELLED


def test_a_subscriber_that_never_reads(live: Live) -> None:
    """It holds up nobody: frames become views, questions are answered, and diagnostics go on.

    The last of these tests: after its reader was killed, the middleware of this process has been seen to hear no more.
    """
    live.start()
    live.see(0)
    silent = live.graph.start_script(FOLDER / "silent_subscriber.py")
    stat = Path(f"/proc/{silent.popen.pid}/stat")
    live.graph.wait(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a subscriber that stopped", LONG)
    for i in range(12):
        if i % 3 == 0:
            live.see(2 + i)
        got = live.ask(f"Number {i}?")
        assert got.status == Answer.TRUNCATED, got.status_message
    count = len(live.diagnostics)
    live.graph.wait(lambda: len(live.diagnostics) > count + 5, "diagnostics", LONG)
    silent.kill()
    assert live.ask().status == Answer.TRUNCATED
