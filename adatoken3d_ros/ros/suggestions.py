# SPDX-License-Identifier: Apache-2.0
"""Questions with their exact answers, from the demo camera to whoever wants to ask them.

A message is a std_msgs/String whose text is JSON: a list of {"family", "question", "answer"}, newest last.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy, QoSProfile
from std_msgs.msg import String

from adatoken3d_ros.text import quoted

LATCHED = QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)


@dataclass(frozen=True)
class Suggestion:
    """A question and what has to be said, to the letter; family: see `synthetic.questions.FAMILIES`."""

    family: str
    question: str
    answer: str


def to_message(suggestions: Iterable[Any]) -> String:
    """From anything with the three attributes."""
    fields = [{"family": s.family, "question": s.question, "answer": s.answer} for s in suggestions]
    return String(data=json.dumps(fields))


def from_message(message: String) -> list[Suggestion]:
    """Raises ValueError for a text that is none of these lists."""
    try:
        return [Suggestion(**fields) for fields in json.loads(message.data)]
    except TypeError as error:
        raise ValueError(f"{quoted(message.data)} is no list of questions: {error}") from error


class Suggestions:
    """The newest list that the demo camera has published, by a node that somebody else spins."""

    def __init__(self, node: Node, topic: str = "/demo_camera/questions") -> None:
        self._message: String | None = None
        self._arrived = threading.Event()
        node.create_subscription(String, topic, self._on_message, LATCHED)

    def _on_message(self, message: String) -> None:
        self._message = message
        self._arrived.set()

    def newest(self, timeout: float) -> list[Suggestion]:
        """Waits for the first list, at most so many seconds; [] if there is none."""
        self._arrived.wait(timeout)
        return [] if self._message is None else from_message(self._message)
