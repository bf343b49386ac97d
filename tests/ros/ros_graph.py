# SPDX-License-Identifier: Apache-2.0
"""A ROS graph for one test: a domain that nobody else uses, the node in a process of its own, waits with a deadline."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
import yaml
from geometry_msgs.msg import PoseStamped
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, Image

from adatoken3d_ros.cli import demo
from adatoken3d_ros.ros.outputs.fill import fill_camera_info, fill_image, fill_pose, ns_to_stamp
from adatoken3d_ros.ros.wiring import NODE, Wiring

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0  # seconds; long, for slow machines: no test waits this long unless something is wrong
STOP_SECONDS = 10.0  # the watchdogs' one to two, on a machine that has other work as well; less than a hang takes
_NEXT = itertools.count(os.getpid())
OWN_TOPICS = {"rgb": "/rgb/image", "depth": "/depth/image", "rgb_info": "/rgb/camera_info",
              "depth_info": "/depth/camera_info", "pose": "/pose"}  # fmt: skip
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def claim_domain() -> tuple[int, socket.socket]:
    """A domain from 1 to 101 that nobody else on this machine has; free again when the socket closes.

    The one that comes next is another one: what ran in a test's own process may be seen for a while after its end.
    """
    return demo.claim_domain(next(_NEXT) % 101 + 1 for _ in range(101))


def launch_words(wiring: Wiring, namespace: str = "", log_level: str = "info") -> list[str]:
    """As launch_ros gives what a launch starts to the node's process."""
    words = ["--ros-args", "-r", f"__node:={NODE}", "--log-level", f"{wiring.logger}:={log_level}"]
    words += ["-r", f"__ns:=/{namespace}"] if namespace else []
    for file in wiring.files:
        words += ["--params-file", str(file)]
    for name, value in wiring.parameters.items():
        words += ["-p", f"{name}:={value if isinstance(value, str) else yaml.safe_dump(value).splitlines()[0]}"]
    for pair in wiring.remappings:
        words += ["-r", ":=".join(pair)]
    return words


class Process:
    """A program of the package, started with its output in a file."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self, *signals: signal.Signals) -> tuple[int, float]:
        """Sends the signals one after the other; returns the exit status and the seconds that it took."""
        begin = time.monotonic()
        for number in signals or (signal.SIGINT,):
            self.popen.send_signal(number)
        try:
            status = self.popen.wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the process did not end after {signals}; its log:\n{self.log}")
        return status, time.monotonic() - begin

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


class Graph:
    """A node of the test's own, and the processes that it started, all on one domain."""

    def __init__(self, folder: Path) -> None:
        self.domain, self._lock = claim_domain()
        self._folder = folder
        self._processes: list[Process] = []
        self._clients: dict[str, Any] = {}
        self.environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(self.domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        # Discovery is set up by the environment of whoever initialises the context.
        before = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE")
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        self.context = Context()
        rclpy.init(args=[], context=self.context, domain_id=self.domain)
        self.node = Node("tester", context=self.context, use_global_arguments=False)
        if before is None:
            del os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"]
        else:
            os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = before
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._executor.shutdown()
        self.node.destroy_node()
        self.context.try_shutdown()
        self._lock.close()

    # --- waiting

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = DEADLINE) -> Any:
        """Spins until the condition is true and returns its value; fails with the processes' logs."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            self._executor.spin_once(timeout_sec=0.02)
            if time.monotonic() > deadline:
                logs = "\n".join(process.log for process in self._processes)
                pytest.fail(f"{what}: not within {timeout} s; the logs:\n{logs}")
        return value

    def result(self, future: Any, what: str, timeout: float = DEADLINE) -> Any:
        self.wait(future.done, what, timeout)
        return future.result()

    # --- talking

    def client(self, kind: Any, name: str) -> Any:
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, name)
        client = self._clients[name]
        self.wait(client.service_is_ready, f"service {name}")
        return client

    def call(self, kind: Any, name: str, request: Any = None, timeout: float = DEADLINE) -> Any:
        client, request = self.client(kind, name), kind.Request() if request is None else request
        lost, future = self._lost_replies(), client.call_async(request)
        # A server that has not found the client's reader yet drops its reply, and says so.
        self.wait(lambda: future.done() or self._lost_replies() > lost, f"a reply of {name}", timeout)
        future = future if future.done() else client.call_async(request)
        return self.result(future, f"a reply of {name}", timeout)

    def _lost_replies(self) -> int:
        return sum(process.log.count("failed to send response") for process in self._processes)

    def collect(self, kind: Any, topic: str, qos: Any = LATCHED) -> list[Any]:
        """A list that grows by each message on the topic."""
        messages: list[Any] = []
        self.node.create_subscription(kind, topic, messages.append, qos)
        return messages

    # --- the node

    def start(self, module: str, *arguments: str) -> Process:
        """A module of the package as a program."""
        return self._run("-m", module, *arguments)

    def start_script(self, path: Path, *arguments: str) -> Process:
        return self._run(str(path), *arguments)

    def _run(self, *arguments: str) -> Process:
        log = self._folder / f"process-{len(self._processes)}.log"
        process = Process(list(arguments), self.environment, log)
        self._processes.append(process)
        return process

    def start_node(self, model: Path | str = "", **parameters: Any) -> Process:
        """The scene node; `pose__source="static"` gives the parameter pose.source."""
        given = {"model__path": str(model), "pose__source": "pose_topic", **parameters}
        return self.start("adatoken3d_ros.ros.node", "--ros-args", *self._words(given))

    def start_launched(self, wiring: Wiring, **parameters: Any) -> Process:
        """What a launch starts, with some parameters as tests need them."""
        return self.start("adatoken3d_ros.ros.node", *launch_words(wiring), *self._words(parameters))

    def _words(self, parameters: Mapping[str, Any]) -> list[str]:
        # Files of scenes may lie where pytest's own folders are.
        given = {"scene__directory": tempfile.gettempdir(), "max_new_tokens": 8, **parameters}
        words = [("-p", f"{name.replace('__', '.')}:={value}") for name, value in given.items() if value != ""]
        return [word for pair in words for word in pair]

    def state(self) -> str:
        return str(self.call(GetState, "/adatoken3d/get_state").current_state.label)

    def transition(self, wanted: str | int) -> bool:
        """Asks for a transition by its label or its id; whether it was made."""
        request = ChangeState.Request()
        if isinstance(wanted, int):
            request.transition.id = wanted
        else:
            request.transition.label = wanted
        return bool(self.call(ChangeState, "/adatoken3d/change_state", request).success)


class Camera:
    """Publishes RGB-D frames with calibration and pose, each under one stamp.

    Args:
        qos: of all publishers.
        topics: {what: topic} where they differ from the node's own names.
        frame: of images and calibrations.
    """

    frame = "camera"

    def __init__(
        self,
        graph: Graph,
        *,
        qos: int | QoSProfile = 10,
        topics: Mapping[str, str] | None = None,
        frame: str = "camera",
    ) -> None:
        self._graph = graph
        self.frame = frame
        create, name = graph.node.create_publisher, {**OWN_TOPICS, **(topics or {})}
        self.rgb = create(Image, name["rgb"], qos)
        self.depth = create(Image, name["depth"], qos)
        self.rgb_info = create(CameraInfo, name["rgb_info"], qos)
        self.depth_info = create(CameraInfo, name["depth_info"], qos)
        self.pose = create(PoseStamped, name["pose"], qos)

    def matched(self) -> bool:
        publishers = (self.rgb, self.depth, self.rgb_info, self.depth_info, self.pose)
        return all(publisher.get_subscription_count() for publisher in publishers)

    def messages(self, stamp_ns: int, rgb: Any, depth: Any, K: Any, T: Any) -> dict[str, Any]:
        """The five messages; a test may spoil one before it sends them."""
        height, width = depth.shape
        found = {
            "pose": PoseStamped(),
            "rgb_info": fill_camera_info(CameraInfo(), K, width, height),
            "depth_info": fill_camera_info(CameraInfo(), K, width, height),
            "rgb": fill_image(Image(), rgb, "rgb8"),
            "depth": fill_image(Image(), depth, "16UC1" if depth.dtype == np.uint16 else "32FC1"),
        }
        fill_pose(found["pose"].pose, T)
        for name, message in found.items():
            ns_to_stamp(message.header.stamp, stamp_ns)
            message.header.frame_id = "map" if name == "pose" else self.frame
        return found

    def send(self, messages: dict[str, Any]) -> None:
        for name, message in messages.items():
            getattr(self, name).publish(message)


def synthetic_frame(index: int) -> tuple[Any, Any, Any, Any]:
    """(rgb, depth in mm, K, T_world_camera) of a coloured wall 2 m in front of a camera that moves sideways."""
    rng = np.random.default_rng(index)
    rgb = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    depth = rng.integers(1900, 2100, (48, 64)).astype(np.uint16)
    K = np.array([[50.0, 0.0, 31.5], [0.0, 50.0, 23.5], [0.0, 0.0, 1.0]])
    T = np.eye(4)
    # Optical frame in a z-up world: right is -y, down is -z, forward is x.
    T[:3, :3] = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    T[:3, 3] = (0.0, 0.5 * index, 1.0)
    return rgb, depth, K, T
