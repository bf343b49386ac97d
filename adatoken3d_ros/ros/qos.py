# SPDX-License-Identifier: Apache-2.0
"""Quality of service that can be overridden by parameters, as ROS 2 names them."""

from __future__ import annotations

from enum import Enum
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

# What a value may be, by policy. A depth of 0 would let the middleware choose.
POLICIES: dict[str, dict[str, Enum] | None] = {
    "history": {"keep_last": HistoryPolicy.KEEP_LAST, "keep_all": HistoryPolicy.KEEP_ALL},
    "depth": None,
    "reliability": {"reliable": ReliabilityPolicy.RELIABLE, "best_effort": ReliabilityPolicy.BEST_EFFORT},
}


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


def _checked(name: str, value: Any, choices: dict[str, Enum] | None) -> Any:
    if choices is None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a number of messages, at least 1, got {value!r}")
        return value
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]
