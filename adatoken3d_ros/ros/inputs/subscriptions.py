# SPDX-License-Identifier: Apache-2.0
"""The subscriptions to the node's inputs, whose quality of service goes with what their publishers offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

RELIABILITY = {"reliable": ReliabilityPolicy.RELIABLE, "best_effort": ReliabilityPolicy.BEST_EFFORT}
DURABILITY = {"volatile": DurabilityPolicy.VOLATILE, "transient_local": DurabilityPolicy.TRANSIENT_LOCAL}
AUTO = "auto"
# What a value may be, by policy. A depth of 0 would let the middleware choose.
POLICIES: dict[str, Mapping[str, Enum] | None] = {
    "history": {"keep_last": HistoryPolicy.KEEP_LAST, "keep_all": HistoryPolicy.KEEP_ALL},
    "depth": None,
    "reliability": RELIABILITY,
}
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


def requested(node: Node, topic: str, reliability: str, depth: int) -> QoSProfile:
    """The profile of a subscription.

    Args:
        topic: as the node names it.
        reliability: `reliable`, `best_effort`, or `auto`: reliable unless some publisher of the topic is not. A
            reliable subscription gets nothing from a best-effort publisher, a best-effort one loses large images.
        depth: messages that are kept.

    Raises ValueError as `override`.
    """
    if reliability == AUTO:
        offered = [info.qos_profile.reliability for info in node.get_publishers_info_by_topic(topic)]
        reliability = "best_effort" if RELIABILITY["best_effort"] in offered else "reliable"
    return override(node, topic, QoSProfile(depth=depth, reliability=RELIABILITY[reliability]))


def node_of(info: Any) -> str:
    """The node of a publisher or subscription that the graph tells of; it may know these before their node's name."""
    if info.node_name == "_NODE_NAME_UNKNOWN_":  # rmw's word
        return "a node whose name is not known yet"
    return f"{info.node_namespace.rstrip('/')}/{info.node_name}"


def mismatches(node: Node, topic: str, kind: str, profile: QoSProfile) -> list[str]:
    """What keeps publishers of a topic from reaching the subscription, in words, with both sides' values.

    Args:
        topic: as the node names it. kind: its type, such as sensor_msgs/msg/Image. profile: the subscription's.
    """
    found = []
    for info in node.get_publishers_info_by_topic(topic):
        offered = info.qos_profile
        who = f"{node.resolve_topic_name(topic)}: {node_of(info)}"
        if info.topic_type != kind:
            found.append(f"{who} publishes {info.topic_type}, and {kind} is asked for")
            continue
        given, wanted = (offered.reliability, offered.durability), (profile.reliability, profile.durability)
        if (given[1], wanted[1]) == (DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL):
            advice = "its publisher has to offer transient_local"
        elif (given[0], wanted[0]) == (ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE):
            advice = f"set qos_overrides.{node.resolve_topic_name(topic)}.subscription.reliability to best_effort"
        else:
            continue
        asked = f"{in_words(profile)} is asked for, which do not go together"
        found.append(f"{who} offers {in_words(offered)}, and {asked}: {advice}")
    return sorted(set(found))


def in_words(profile: QoSProfile) -> str:
    """Reliability and durability, such as 'best_effort, volatile'."""
    return f"{_name(RELIABILITY, profile.reliability)}, {_name(DURABILITY, profile.durability)}"


def _name(policies: Mapping[str, Enum], value: Any) -> str:
    return next((name for name, policy in policies.items() if policy == value), str(value))


def override(node: Node, topic: str, profile: QoSProfile) -> QoSProfile:
    """Puts into `profile` what was given for a subscription in `qos_overrides.<topic>.subscription.<policy>`.

    rclpy's own overriding declares these parameters with the profile's values and finds them there the next time, so
    that a profile which a node changes while it runs would count once. Here they are not set unless somebody sets them.

    Args:
        topic: as the node names it; the parameter has the resolved name, such as /rgb/image.

    Raises:
        ValueError: for a value that is no such policy; names the parameter and the value.
    """
    resolved = node.resolve_topic_name(topic)
    for policy, choices in POLICIES.items():
        name = f"qos_overrides.{resolved}.subscription.{policy}"
        if not node.has_parameter(name):
            description = f"Overrides the {policy} of the subscription to {resolved}; not set: as the node chooses."
            node.declare_parameter(
                name, descriptor=ParameterDescriptor(description=description, read_only=True, dynamic_typing=True)
            )
        value = node.get_parameter(name).value
        if value is not None:
            setattr(profile, policy, _checked(name, value, choices))
    return profile


def _checked(name: str, value: Any, choices: Mapping[str, Enum] | None) -> Any:
    if choices is None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a number of messages, at least 1, got {value!r}")
        return value
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]
