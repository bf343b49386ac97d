# SPDX-License-Identifier: Apache-2.0
"""The real node as a target: whoever attacks it has an own context, and knows how to ask whether it is still whole."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rclpy
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import GetParameters, ListParameters, SetParameters
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import String
from std_srvs.srv import Trigger

from adatoken3d_ros.cli.processes import ProcessError
from benchmarks._hostile import MEMORY, PATIENCE, Loss
from benchmarks._ros import NAME, NODE, Bench, unaccounted
from benchmarks._ros_camera import Camera

DEEP = QoSProfile(depth=1000)  # of the attacker's own ends: what is lost there is not the node's doing
LONGEST = 2000  # characters of a text of the node that repeats what came from outside
ANSWERED = (Answer.OK, Answer.TRUNCATED, Answer.UNSURE)
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")  # line ends and tabs are the log's own


class Crash(AssertionError):
    """The node ended, wrote a traceback, or takes gigabytes."""


class Target:
    """A node that sees and answers; `good` says whether it still does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.patience = float(args.patience)
        self._temporary = TemporaryDirectory(prefix="adatoken3d-hostile-")
        self.folder = Path(self._temporary.name)
        self.file = self.folder / "scene.safetensors"
        self.bench = Bench(
            args.model,
            show=False,
            scene__max_views=6,
            scene__directory=self.folder,
            max_new_tokens=4,
            scene__file=self.file,
            qos__reliability="reliable",
        )
        self.bench.__enter__()
        self.context = Context()
        rclpy.init(args=[], context=self.context)
        self.node = Node("attacker", context=self.context, use_global_arguments=False, start_parameter_services=False)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._clients: dict[str, Any] = {}
        self.stream: Any = ActionClient(
            self.node, AskSceneStream, f"{NAME}/ask_stream", goal_service_qos_profile=DEEP,
            result_service_qos_profile=DEEP, cancel_service_qos_profile=DEEP,
        )  # fmt: skip
        self.question = self.node.create_publisher(String, "/question", DEEP)
        self.answers: list[Any] = []
        latched = QoSProfile(depth=1000, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.node.create_subscription(Answer, f"{NAME}/answer", self.answers.append, latched)
        self.camera = Camera(self.node, "images", width=64, height=48, points=1, speed=0.5)
        self.second = Camera(self.node, "images", width=64, height=48, points=1, speed=0.5)  # silent but in storms
        self._seen = 0
        self._read = 0
        self.bench.counters()  # begins to listen
        ready = [self.camera.matched, self.question.get_subscription_count, self.stream.server_is_ready]
        self.spin(lambda: all(is_ready() for is_ready in ready), 120.0)
        self.good()

    def close(self) -> None:
        self._executor.shutdown()
        self.stream.destroy()
        self.node.destroy_node()
        self.context.try_shutdown()
        self.bench.__exit__(None, None, None)
        self._temporary.cleanup()

    # --- waiting and calling

    def spin(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Whether the condition became true. Raises Crash if the node ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._executor.spin_once(timeout_sec=0.02)
            try:
                self.bench.processes.check()
            except ProcessError as error:
                raise Crash(str(error)) from error
            if time.monotonic() > deadline:
                return False
        return True

    def client(self, kind: Any, name: str) -> Any:
        if name not in self._clients:
            made: Any = self.node.create_client(kind, f"{NAME}/{name}", qos_profile=DEEP)
            if not self.spin(made.service_is_ready, self.patience):
                raise Loss(f"no service {name}")
            self._clients[name] = made
        return self._clients[name]

    def call(self, kind: Any, name: str, request: Any = None) -> Any:
        """A reply. Raises Loss if there is none."""
        future = self.client(kind, name).call_async(kind.Request() if request is None else request)
        if not self.spin(future.done, self.patience):
            raise Loss(f"no reply of {name}")
        return future.result()

    # --- whether it is whole

    def good(self) -> None:
        """A good frame is taken and a good question answered; raises Loss or Crash."""
        began, key_frames, sent = time.monotonic(), self._count("key_frame"), 0.0

        def taken() -> bool:
            nonlocal sent
            if time.monotonic() - sent > 0.5:  # again: what is under way of a storm may still push it aside
                sent = time.monotonic()
                self._seen += 1
                self.camera.send(self._seen, float(self._seen))
            return self._count("key_frame") > key_frames

        if not self.spin(taken, self.patience):
            raise Loss(f"good frames are not taken: {self.bench.client.diagnostics('scene')}")
        answer = self.call(AskScene, "ask", AskScene.Request(question="What is there?", max_new_tokens=2)).answer
        if answer.status not in ANSWERED:
            raise Loss(f"a good question is answered {answer.status}: {answer.status_message}")
        if time.monotonic() - began > self.patience:
            raise Loss(f"a good frame and a question took {time.monotonic() - began:.0f} s")
        self.words()

    def accounted(self) -> None:
        """Raises Loss unless every message has met its fate."""
        missing = {name: count for name, count in unaccounted(self.bench.settled()).items() if count}
        if missing:
            raise Loss(f"not accounted for: {missing}")

    def words(self) -> None:
        """Looks through what the node has written since; raises Crash for a traceback, AssertionError for raw text."""
        log = self.bench.processes.log(NODE).read_text(errors="replace")
        new, self._read = log[self._read :], len(log)
        for sign in ("Traceback", '  File "'):  # Python's own, and the frames of a defect that the node has told of
            if sign in new:
                raise Crash(new[max(0, new.index(sign) - LONGEST // 4) :][:LONGEST])
        if self.bench.rss_mb() * 1e6 > MEMORY:
            raise Crash(f"it takes {self.bench.rss_mb():.0f} MB")
        for line in new.splitlines():
            assert len(line) <= 2 * LONGEST, f"a line of {len(line)} characters in the log: {line[:200]}"
            assert not line.startswith("[FATAL] b"), f"a forged line in the log: {line[:200]}"
        clean(new, None)

    def _count(self, fate: str) -> int:
        return int(self.bench.client.diagnostics("scene").get(f"frames.{fate}", "0"))

    # --- its state

    def state(self) -> str:
        return str(self.call(GetState, "get_state").current_state.label)

    def transition(self, number: int, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.id, request.transition.label = number, label
        return bool(self.call(ChangeState, "change_state", request).success)

    def activate(self) -> None:
        """Brings it up from wherever it is."""
        if self.state() == "unconfigured":
            self.transition(1, "")
        if self.state() == "inactive":
            self.transition(3, "")
        if (state := self.state()) != "active":
            raise Loss(f"it cannot be brought up again, it is {state}")
        self.spin(self.camera.matched, PATIENCE)

    def parameter_names(self) -> list[str]:
        return list(self.call(ListParameters, "list_parameters").result.names)

    def parameters(self, names: list[str]) -> list[Any]:
        return list(self.call(GetParameters, "get_parameters", GetParameters.Request(names=names)).values)

    def set_parameters(self, parameters: list[Any]) -> list[Any]:
        return list(self.call(SetParameters, "set_parameters", SetParameters.Request(parameters=parameters)).results)

    def trigger(self, name: str) -> Any:
        return self.call(Trigger, name)


def clean(text: str, longest: int | None = LONGEST) -> str:
    """The text; AssertionError if it is raw or too long."""
    assert longest is None or len(text) <= longest, f"a text of {len(text)} characters: {text[:100]!r}"
    raw = _RAW.search(text)
    assert raw is None, f"{raw.group()!r} in {text[max(0, raw.start() - 50) : raw.end() + 50]!r}"
    return text
