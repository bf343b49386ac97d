# SPDX-License-Identifier: Apache-2.0
"""What is wrong with topics whose messages are used all the same: told with who writes to them, for some seconds."""

from __future__ import annotations

import threading
import time

from rclpy.node import Node

from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.outputs.diagnostics import RATE_SECONDS
from adatoken3d_ros.text import quoted


class TopicWarnings:
    """One warning for each stream, the last one. `add` belongs to the executor's thread, `texts` to any.

    Args:
        node: knows the graph, and writes the log.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._found: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def _name(self, stream: str) -> str:
        """As it is on the graph, where it may be called so already."""
        return stream if stream.startswith("/") else str(self._node.resolve_topic_name(stream))

    def publishers(self, stream: str) -> list[str]:
        """The nodes that write to a stream, as far as the graph tells."""
        found = self._node.get_publishers_info_by_topic(self._name(stream))
        return sorted(f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in found)

    def add(self, stream: str, text: str) -> None:
        """Something is wrong now; an empty text: nothing is any more."""
        name = self._name(stream)
        if not text:
            with self._lock:
                self._found.pop(name, None)
            return
        writers = self.publishers(stream)
        who = f"; it has {len(writers)} publishers: {quoted(writers)}" if len(writers) > 1 else ""
        text = f"{name}: {text}{who}"
        with self._lock:
            self._found[name] = time.monotonic(), text
        self._node.get_logger().warning(text, throttle_duration_sec=WARN_SECONDS)

    def texts(self) -> tuple[str, ...]:
        """What was wrong in the last RATE_SECONDS."""
        now = time.monotonic()
        with self._lock:
            return tuple(text for _, (then, text) in sorted(self._found.items()) if now - then <= RATE_SECONDS)

    def clear(self) -> None:
        """The inputs start anew."""
        with self._lock:
            self._found.clear()
