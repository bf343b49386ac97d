# SPDX-License-Identifier: Apache-2.0
"""Looks at a running graph for some seconds: the node, what it listens to, its transforms, and what it says itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from rcl_interfaces.srv import GetParameters
from rclpy.context import Context
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.ros.connection import Connection
from adatoken3d_ros.ros.findings import (
    ERROR,
    OK,
    WARNING,
    Finding,
    Input,
    Transforms,
    of_input,
    of_shared_memory,
    of_transforms,
)
from adatoken3d_ros.ros.inputs.accounting import NOT_YET
from adatoken3d_ros.ros.inputs.conversions import ConversionError, stamp_to_ns
from adatoken3d_ros.ros.inputs.poses import PoseError
from adatoken3d_ros.ros.inputs.subscriptions import mismatches, node_of
from adatoken3d_ros.ros.inputs.topics import NEEDED
from adatoken3d_ros.ros.inputs.transforms import TransformTree
from adatoken3d_ros.settings import DEFAULTS

FRAMED = (Image, CompressedImage, PointCloud2)  # what is of the camera
KINDS = (*FRAMED, CameraInfo, Odometry, PoseStamped)
MODEL = ("model.path", "model.vision_path", "model.device", "model.dtype", "model.quantization")
SIZES = ("scene.max_views", "scene.question_views", "max_new_tokens")  # what memory depends on
READ = ("input.source", "pose.source", "scene.frame_id", *MODEL, *SIZES)
REPLY_SECONDS = 3.0
ACTIVE = "active"
START = (
    "ros2 launch adatoken3d adatoken3d.launch.py camera:=realsense, or without a ROS installation: "
    "python -m adatoken3d_ros.ros.node --ros-args -p autostart:=true"
)
_LEVELS = {DiagnosticStatus.OK: OK, DiagnosticStatus.WARN: WARNING}


def type_name(kind: Any) -> str:
    """Such as sensor_msgs/msg/Image."""
    package, group, *_ = kind.__module__.split(".")
    return f"{package}/{group}/{kind.__name__}"


class Examination:
    """What a graph shows of one node.

    Args:
        name: of the node, in full. seconds: how long messages are counted. profile: path of fastdds_shm.xml.
        context: see Connection.

    Attributes:
        loaded: whether the node has its model.
        settings: values of the node's parameters in READ; without it, their defaults.
    """

    def __init__(self, name: str, seconds: float, profile: Path, context: Context | None = None) -> None:
        self._name, self._seconds, self._profile = name, seconds, profile
        self._connection = Connection(name, context)
        self._node = self._connection.node
        self._tree = TransformTree(cache_ns=None)
        self._counted: dict[str, list[bytes]] = {}  # topic -> its messages; only the first is kept whole
        self._ages: dict[str, list[float]] = {}
        self._said: dict[str, DiagnosticStatus] = {}
        self.settings: dict[str, Any] = {name: DEFAULTS[name] for name in READ}
        self.loaded = False
        self._listen(DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=10))
        for topic, durability in (("/tf", DurabilityPolicy.VOLATILE), ("/tf_static", DurabilityPolicy.TRANSIENT_LOCAL)):
            take = partial(self._on_transforms, topic.endswith("static"))
            self._listen(TFMessage, topic, take, QoSProfile(depth=100, durability=durability))
        self._connection.start()

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def findings(self, progress: Callable[[str], object] = lambda step: None) -> list[Finding]:
        """Looks for as long as it takes, told each step; the node's state first, then what concerns its inputs."""
        progress("looking for the node")
        found, state = self._node_itself()
        progress(f"counting messages for {self._seconds:g} s")
        inputs = self._inputs(state)
        if state == "unconfigured" and (loading := self._loading()):
            found[-1] = Finding(ERROR, "node", f"{self._name} is {state}, {loading}", "wait until it is active")
        for one in inputs:
            found += of_input(one)
        if self.settings["pose.source"] == "tf":
            found += of_transforms(self._transforms(inputs))
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        found += of_shared_memory(inputs, os.environ, free, str(self._profile))
        return found + self._own_words()

    # --- the node -----------------------------------------------------------------------------------------------------

    def _node_itself(self) -> tuple[list[Finding], str]:
        """What is there of it, and its state; empty without it."""
        domain = self._node.context.get_domain_id()
        wait_until(lambda: self._name in self._nodes(), min(self._seconds, REPLY_SECONDS))
        names = self._nodes()
        others = sorted({name for name in names if "_client_" not in name and not name.startswith("/_")})
        if self._name not in names:
            seen = f"there are {', '.join(others)}" if others else "no node is there"
            text = f"no {self._name} on ROS_DOMAIN_ID {domain}; {seen}"
            mend = START if others else f"{START}; if it runs already: export ROS_DOMAIN_ID=N as it has it"
            return [Finding(ERROR, "node", text, mend)], ""
        found = []
        if names.count(self._name) > 1:
            text = f"{names.count(self._name)} nodes are named {self._name}, and each may answer"
            found.append(Finding(WARNING, "node", text, "give one another name: namespace:=robot2"))
        try:
            state = self._connection.state(REPLY_SECONDS)
            client: Any = self._node.create_client(GetParameters, f"{self._name}/get_parameters")
            request = GetParameters.Request(names=list(READ))
            values = self._connection.call(client, request, REPLY_SECONDS, "reply").values
        except (TimeoutError, ConnectionError) as error:
            return [*found, Finding(ERROR, "node", f"{self._name} does not reply: {error}", "start it again")], ""
        if len(values) != len(READ):  # rclpy gives none where one is not declared
            text = (
                f"{self._name} is no node that answers questions, or one of another version: its parameters are others"
            )
            return [*found, Finding(ERROR, "node", text, "name the node: --node NAME, --namespace NAME")], ""
        self.settings |= dict(zip(READ, map(parameter_value_to_python, values), strict=True))
        self.loaded = state in ("inactive", ACTIVE)
        if state != ACTIVE:
            verb = "activate" if state == "inactive" else "configure"
            mend = f"ros2 lifecycle set {self._name} {verb}, or start it with -p autostart:=true"
            return [*found, Finding(ERROR, "node", f"{self._name} is {state}, not active", mend)], state
        return [*found, Finding(OK, "node", f"{self._name} is active on ROS_DOMAIN_ID {domain}")], state

    def _nodes(self) -> list[str]:
        return [f"{space.rstrip('/')}/{name}" for name, space in self._node.get_node_names_and_namespaces()]

    def _loading(self) -> str:
        """What the node says of a model that it is loading; empty if it is not."""
        said = self._said.get("model", DiagnosticStatus())
        values = {one.key: one.value for one in said.values}
        return said.message if values.get("load_progress", NOT_YET) != NOT_YET else ""

    def _own_words(self) -> list[Finding]:
        """What the node says on /diagnostics that is not well."""
        found = []
        for name, status in sorted(self._said.items()):
            level = _LEVELS.get(status.level, ERROR)
            if level != OK:
                found.append(Finding(level, f"it says of its {name}", status.message, "see docs/faults.md"))
        return found

    # --- what it listens to -------------------------------------------------------------------------------------------

    def _inputs(self, state: str) -> list[Input]:
        """The node's topics, and what comes on them; where it is not active, those that it would have by default."""
        kinds, needed = {type_name(kind): kind for kind in KINDS}, NEEDED[self.settings["input.source"]]
        by_default = {f"/{name}" for name in needed}
        if state == ACTIVE:
            space, _, name = self._name.rpartition("/")
            listened = self._node.get_subscriber_names_and_types_by_node(name, space or "/")
            pairs = [(topic, kinds[one]) for topic, types in listened for one in types if one in kinds]
        else:
            images = {"rgb/image": Image, "depth/image": Image, "points": PointCloud2}
            pairs = [(f"/{name}", images.get(name, CameraInfo)) for name in needed]
        for topic, kind in pairs:
            self._count(topic, kind)
        began = time.monotonic()
        wait_until(lambda: False, self._seconds)
        return [self._seen(topic, kind, time.monotonic() - began, by_default) for topic, kind in sorted(pairs, key=str)]

    def _count(self, topic: str, kind: Any) -> None:
        """Subscribes as any publisher can be heard, without decoding."""
        offered = self._node.get_publishers_info_by_topic(topic)
        reliable = bool(offered) and all(i.qos_profile.reliability == ReliabilityPolicy.RELIABLE for i in offered)
        profile = QoSProfile(
            depth=10, reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        )
        counted: list[bytes] = []
        self._counted[topic] = counted

        def take(data: bytes) -> None:
            if len(counted) < 2:
                header = deserialize_message(data, kind).header
                now = self._node.get_clock().now().nanoseconds
                self._ages.setdefault(topic, []).append((now - stamp_to_ns(header.stamp)) / 1e9)
            counted.append(b"" if counted else data)

        self._listen(kind, topic, take, profile, raw=True)

    def _seen(self, topic: str, kind: Any, seconds: float, by_default: set[str]) -> Input:
        counted, name = self._counted[topic], type_name(kind)
        message = deserialize_message(counted[0], kind) if counted else None
        mine = [
            info.qos_profile
            for info in self._node.get_subscriptions_info_by_topic(topic)
            if node_of(info) == self._name
        ]
        writers = self._node.get_publishers_info_by_topic(topic)
        graph = self._node.get_topic_names_and_types()
        same = [other for other, types in graph if name in types and other != topic]
        return Input(
            topic,
            name,
            needed=kind is not CameraInfo or topic in by_default,
            streamed=kind is not CameraInfo,
            publishers=sorted({node_of(info) for info in writers}),
            mismatches=[text for profile in mine[:1] for text in mismatches(self._node, topic, name, profile)],
            others=sorted(other for other in same if self._node.count_publishers(other)),
            count=len(counted),
            seconds=seconds,
            size=len(counted[0]) if counted else 0,
            frame=message.header.frame_id if message is not None and kind in FRAMED else "",
            age=min(self._ages.get(topic, ()), key=abs, default=None),
        )

    def _transforms(self, inputs: list[Input]) -> Transforms:
        scene, camera = self.settings["scene.frame_id"], next((one.frame for one in inputs if one.frame), "")
        frames = self._tree.frames()
        connected = scene in frames and camera in frames and self._tree.connected(scene, camera)
        root = self._tree.root(camera) if camera in frames else ""
        return Transforms(scene, camera, frames, connected, root)

    # --- callbacks, in the connection's thread ------------------------------------------------------------------------

    def _listen(self, kind: Any, topic: str, callback: Callable[[Any], None], profile: QoSProfile, **more: Any) -> None:
        self._node.create_subscription(kind, topic, callback, profile, **more)

    def _on_transforms(self, static: bool, message: TFMessage) -> None:
        for transform in message.transforms:
            with suppress(ConversionError, PoseError):  # the node tells of these
                self._tree.add(transform, static=static)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name, _, task = status.name.partition(": ")
            if name == self._name.lstrip("/") and task:
                self._said[task] = status


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it became true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def examine(
    name: str, seconds: float, profile: Path, progress: Callable[[str], object]
) -> tuple[list[Finding], bool, dict[str, Any]]:
    """All findings, whether the node has its model, and its parameters in READ."""
    with closing(Examination(name, seconds, profile)) as examination:
        found = examination.findings(progress)
        return found, examination.loaded, examination.settings
