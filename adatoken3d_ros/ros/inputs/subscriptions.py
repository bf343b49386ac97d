# SPDX-License-Identifier: Apache-2.0
"""The subscriptions to the node's inputs, whose quality of service goes with what their publishers offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile

from adatoken3d_ros.ros.inputs.qos import AUTO, RELIABILITY, mismatches, override, requested

QUEUE_DEPTH = 10  # messages that the middleware keeps for us while a callback runs


@dataclass
class _Subscribed:
    """A subscription, and what it is made of, so that it can be made anew."""

    kind: Any
    callback: Callable[[Any], None]
    profile: QoSProfile
    fixed: bool  # the profile is not to be changed
    subscription: Any

    @property
    def type_name(self) -> str:
        """Such as sensor_msgs/msg/Image."""
        package, group, *_ = self.kind.__module__.split(".")
        return f"{package}/{group}/{self.kind.__name__}"


class Subscriptions:
    """Subscriptions by the node's own topic names, from `add` to `clear`.

    Args:
        node: carries them. group: their callback group.
    """

    def __init__(self, node: Node, group: CallbackGroup) -> None:
        self._node = node
        self._group = group
        self._all: dict[str, _Subscribed] = {}

    def name(self, topic: str) -> str:
        """A topic as it is on the graph, after remapping."""
        return str(self._node.resolve_topic_name(topic))

    def names(self) -> dict[str, str]:
        """{topic: its name on the graph} of all, in the order in which they were added."""
        return {topic: self.name(topic) for topic in self._all}

    def add(
        self,
        kind: Any,
        topic: str,
        callback: Callable[[Any], None],
        reliability: str = AUTO,
        profile: QoSProfile | None = None,
    ) -> None:
        """Subscribes with a reliability (see `qos.requested`), or with a profile as it is.

        Raises ValueError for an override of the quality of service that cannot be.
        """
        fixed = profile is not None or reliability != AUTO
        if profile is None:
            wanted = requested(self._node, topic, reliability, QUEUE_DEPTH)
        else:
            wanted = override(self._node, topic, profile)
        subscription = self._node.create_subscription(kind, topic, callback, wanted, callback_group=self._group)
        self._all[topic] = _Subscribed(kind, callback, wanted, fixed, subscription)

    def follow_publishers(self) -> None:
        """A camera that comes later may offer less than was asked for: then less is asked for, and the log says so."""
        for topic, old in list(self._all.items()):
            if old.fixed or old.profile.reliability == RELIABILITY["best_effort"]:
                continue  # best effort goes with any publisher: there is no way back
            if requested(self._node, topic, AUTO, QUEUE_DEPTH).reliability == RELIABILITY["best_effort"]:
                self._node.destroy_subscription(old.subscription)
                self.add(old.kind, topic, old.callback)
                self._node.get_logger().info(f"{self.name(topic)} is offered best_effort, and now asked for so")

    def unheard(self) -> set[str]:
        """Topics that nobody publishes."""
        return {topic for topic in self._all if not self._node.count_publishers(self.name(topic))}

    def mismatches(self) -> list[str]:
        """Publishers that cannot reach the node, in words, with both sides' values."""
        return [
            text
            for topic, subscribed in self._all.items()
            for text in mismatches(self._node, topic, subscribed.type_name, subscribed.profile)
        ]

    def clear(self) -> None:
        """Ends all of them."""
        for subscribed in self._all.values():
            self._node.destroy_subscription(subscribed.subscription)
        self._all.clear()
