# SPDX-License-Identifier: Apache-2.0
"""A robot's node over DDS whose shared engine is not there yet, falls silent and is killed: node, engine and whoever
asks are processes of their own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("uvicorn", reason="without the extra fleet")

from ros_graph import Graph, Process, synthetic_frame
from seeing_node import STAMP, VIEWS, SeeingNode

from adatoken3d_ros.engine.answer import Status
from tests.fleet.shared import free_port

ENGINE = Path(__file__).parent / "engine_process.py"
BUDGET_MS = 4000.0


def requests(engine: Process) -> list[list[str]]:
    """Path, bodies and status of each."""
    told = engine.log.rpartition("\n")[0]  # the last line may be on its way
    return [line.split() for line in told.splitlines() if line.startswith("/v1/")]


def bodies(engine: Process) -> int:
    """Of the scene that it was sent so far, again or not."""
    return sum(int(count) for _, count, _ in requests(engine))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fallback", ["embedded", ""])
def test_while_the_engine_is_away_a_question_is_answered_in_time_and_then_only_what_is_missing_is_sent(
    fallback: str, graph: Graph, tiny_model: Path
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    more = {"scene__min_sharpness": 0.0, "model__self_test": False, "budget__warm_up": False}
    node = SeeingNode(graph, tiny_model, engine__url=address, engine__fallback=fallback, **more)

    def start() -> Process:
        engine = graph.start_script(ENGINE, str(tiny_model), str(port))
        graph.wait(lambda: str(port) in engine.log.splitlines(), "the engine")
        return engine

    def away() -> Any:
        answer = node.ask(latency_budget_ms=BUDGET_MS)
        assert answer.budget_met and answer.total_ms <= BUDGET_MS, answer.status_message
        assert address in answer.status_message
        if fallback:
            assert Status(answer.status).answered and answer.model_id.startswith("embedded"), answer.status_message
            assert "answered by the fallback: " in answer.status_message
        else:
            assert answer.status == Status.ERROR and "the shared engine did not answer: " in answer.status_message
        return answer

    def there(engine: Process, sent: int, *, before: bool = True) -> Any:
        """An answer of the engine's, to which so many bodies were sent in all, `before` anybody asked."""
        if before:
            graph.wait(lambda: bodies(engine) == sent, "the scene to be made whole")
        answer = node.ask()
        assert Status(answer.status).answered and answer.model_id.startswith("tiny"), answer.status_message
        assert bodies(engine) == sent, requests(engine)
        return answer

    away()  # it was never there
    engine = start()
    first = there(engine, VIEWS)
    engine.popen.send_signal(signal.SIGSTOP)  # nothing of it is heard, as over a link that is gone
    node.camera.send(node.camera.messages(STAMP + VIEWS * 100_000_000, *synthetic_frame(VIEWS)))
    graph.wait(lambda: node.key_frames() == VIEWS + 1, "a key frame meanwhile")
    late = away()
    assert late.as_of.nanosec > first.as_of.nanosec or not fallback
    engine.popen.send_signal(signal.SIGCONT)
    whole = there(engine, VIEWS + 1)
    assert whole.as_of.nanosec > first.as_of.nanosec
    engine.kill()  # -9, and all that it held
    away()
    again = there(start(), VIEWS + 1, before=False)
    assert (again.status, again.text, again.spatial_tokens) == (whole.status, whole.text, whole.spatial_tokens)
