# SPDX-License-Identifier: Apache-2.0
"""What is asked for, by what publishers offer; and what keeps them apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from adatoken3d_ros.ros.inputs.subscriptions import Subscriptions, in_words, mismatches, requested

RELIABLE, BEST_EFFORT = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
IMAGE = "sensor_msgs/msg/Image"


class Node:
    """A node on a graph that the test makes up."""

    def __init__(self, *offers: QoSProfile, kind: str = IMAGE) -> None:
        self.infos = [
            SimpleNamespace(node_namespace="/", node_name=f"camera{i}", topic_type=kind, qos_profile=offer)
            for i, offer in enumerate(offers)
        ]
        self.overridden: dict[str, Any] = {}
        self.made: list[QoSProfile] = []
        self.log: list[str] = []

    def get_publishers_info_by_topic(self, topic: str) -> list[Any]:
        return self.infos

    def count_publishers(self, topic: str) -> int:
        return len(self.infos) if topic.startswith("/camera/") else 0  # as rclpy's: remappings are not applied

    def resolve_topic_name(self, topic: str) -> str:
        return f"/camera/{topic}"

    def has_parameter(self, name: str) -> bool:
        return True

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(value=self.overridden.get(name))

    def create_subscription(self, kind: Any, topic: str, callback: Any, profile: QoSProfile, **_: Any) -> int:
        self.made.append(profile)
        return len(self.made)

    def destroy_subscription(self, subscription: int) -> None:
        assert 0 < subscription <= len(self.made)

    def get_logger(self) -> Any:
        return SimpleNamespace(info=self.log.append)


def offer(reliability: Any, durability: Any = DurabilityPolicy.VOLATILE) -> QoSProfile:
    return QoSProfile(depth=1, reliability=reliability, durability=durability)


@pytest.mark.parametrize(
    ("offers", "wanted"),
    [
        ((), RELIABLE),
        ((RELIABLE,), RELIABLE),
        ((BEST_EFFORT,), BEST_EFFORT),
        ((RELIABLE, BEST_EFFORT), BEST_EFFORT),
    ],
)
def test_auto_asks_for_what_is_offered(offers: tuple[Any, ...], wanted: Any) -> None:
    node: Any = Node(*map(offer, offers))
    profile = requested(node, "rgb/image", "auto", 10)
    assert (profile.reliability, profile.depth) == (wanted, 10)
    # By hand is by hand, and an override of one topic goes before both.
    assert requested(node, "rgb/image", "reliable", 10).reliability == RELIABLE
    node.overridden["qos_overrides./camera/rgb/image.subscription.reliability"] = "reliable"
    assert requested(node, "rgb/image", "auto", 10).reliability == RELIABLE


def test_a_camera_that_comes_later_is_followed_once() -> None:
    node: Any = Node()
    subscriptions = Subscriptions(node, None)  # type: ignore[arg-type]
    subscriptions.add(Image, "rgb/image", print)
    subscriptions.add(Image, "depth/image", print, "reliable")
    subscriptions.add(Image, "tf", print, profile=offer(RELIABLE))
    assert subscriptions.unheard() == {"rgb/image", "depth/image", "tf"}
    subscriptions.follow_publishers()
    assert [profile.reliability for profile in node.made] == [RELIABLE] * 3
    node.infos = Node(offer(BEST_EFFORT)).infos
    for _ in range(3):
        subscriptions.follow_publishers()
    assert [profile.reliability for profile in node.made[3:]] == [BEST_EFFORT]
    assert node.log == ["/camera/rgb/image is offered best_effort, and now asked for so"]
    assert subscriptions.unheard() == set()
    assert subscriptions.names() == {topic: f"/camera/{topic}" for topic in ("rgb/image", "depth/image", "tf")}
    assert len(subscriptions.mismatches()) == 2


def test_a_fixed_profile_can_be_overridden_too() -> None:
    node: Any = Node()
    node.overridden["qos_overrides./camera/tf.subscription.reliability"] = "best_effort"
    subscriptions = Subscriptions(node, None)  # type: ignore[arg-type]
    subscriptions.add(Image, "tf", print, profile=offer(RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL))
    (profile,) = node.made
    assert (profile.reliability, profile.durability) == (BEST_EFFORT, DurabilityPolicy.TRANSIENT_LOCAL)


def test_what_keeps_them_apart_is_said() -> None:
    node: Any = Node(offer(BEST_EFFORT), offer(RELIABLE))
    (text,) = mismatches(node, "rgb/image", IMAGE, offer(RELIABLE))
    assert text.startswith(
        "/camera/rgb/image: /camera0 offers best_effort, volatile, and reliable, volatile is asked for"
    )
    assert mismatches(node, "rgb/image", IMAGE, offer(BEST_EFFORT)) == []
    latched = mismatches(node, "rgb/image", IMAGE, offer(BEST_EFFORT, DurabilityPolicy.TRANSIENT_LOCAL))
    assert len(latched) == 2 and "best_effort, transient_local is asked for" in latched[0]
    assert "qos_overrides./camera/rgb/image.subscription.reliability to best_effort" in text
    assert "has to offer transient_local" in latched[0]


def test_another_type_is_said() -> None:
    node: Any = Node(offer(RELIABLE), kind="sensor_msgs/msg/CompressedImage")
    (text,) = mismatches(node, "rgb/image", IMAGE, offer(RELIABLE))
    assert "publishes sensor_msgs/msg/CompressedImage, and sensor_msgs/msg/Image is asked for" in text
    subscriptions = Subscriptions(node, None)  # type: ignore[arg-type]
    subscriptions.add(CompressedImage, "rgb/image", print)
    assert subscriptions.mismatches() == []


def test_in_words() -> None:
    assert in_words(offer(BEST_EFFORT, DurabilityPolicy.TRANSIENT_LOCAL)) == "best_effort, transient_local"
