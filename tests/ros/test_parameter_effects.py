# SPDX-License-Identifier: Apache-2.0
"""What the node makes of its parameters: the inputs, the model that is loaded, and an active node.

What a session makes of them is told by tests/engine/test_session_settings.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PointStamped
from live_node import Live
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import TransitionCallbackReturn
from ros_graph import Camera, synthetic_frame
from std_srvs.srv import Trigger

from adatoken3d_ros.engine.autosave import Versions
from adatoken3d_ros.engine.events import Answered
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import ACTIVATE, ANY_TIME, CONFIGURE, SETTINGS, Setting

STAMP = 1_700_000_000_000_000_000


# --- what the inputs make of messages ---------------------------------------------------------------------------------


def listen(live: Live) -> dict[str, Any]:
    """What inputs with the node's parameters subscribe to, and what they make of five images and a jump back."""
    offers: list[Any] = []
    jumps: list[int] = []
    group = ReentrantCallbackGroup()
    inputs = Inputs(
        live.node, live.node.parameters, lambda draw, view: offers.append(draw), group, lambda: jumps.append(1)
    )
    known = set(live.node.subscriptions)
    inputs.start()
    subscribed = {s.topic_name: s for s in live.node.subscriptions if s not in known}
    found: dict[str, Any] = {
        "topics": {(topic, s.msg_type.__name__) for topic, s in subscribed.items()},
        "reliability": {s.qos_profile.reliability.name for s in subscribed.values()},
        "depth": {topic: s.qos_profile.depth for topic, s in subscribed.items()},
    }

    def show(seconds: float, posed: bool) -> None:
        rgb, depth, K, T = synthetic_frame(1)
        for topic, message in camera_messages(STAMP, rgb, depth, K, T).items():
            late = {"/pose": 0.01, "/depth/image": 0.005}.get(topic, 0.0)
            ns_to_stamp(message.header.stamp, STAMP + round((seconds + late) * 1e9))
            if topic.startswith("/depth") and any(live.node.parameters["pose.depth_to_rgb"]):
                message.header.frame_id = "camera_beside"
            if topic in subscribed and (posed or topic != "/pose"):
                subscribed[topic].callback(message)

    try:
        if {"/rgb/image", "/depth/image"} <= subscribed.keys() and ("/rgb/image", "Image") in found["topics"]:
            for i in range(4):
                show(0.1 * i, posed=True)
            show(0.9, posed=False)
            show(1.0, posed=False)
            found["waiting"] = inputs.state().values["pairs.waiting"]
            frames = []
            for offer in offers:
                frame = offer()
                frames.append((frame.T_world_camera.tolist(), frame.K.tolist(), float(np.nansum(frame.depth))))
            found["frames"] = frames
            for i in range(3):
                show(-100.0 + 0.1 * i, posed=True)
            found["cleared"] = len(jumps)
    finally:
        inputs.stop()
    return found


def camera_messages(stamp_ns: int, rgb: Any, depth: Any, K: Any, T: Any) -> dict[str, Any]:
    """{topic: message} of one frame."""
    found = Camera.messages(Camera, stamp_ns, rgb, depth, K, T)  # type: ignore[arg-type]  # needs no publishers
    for info in (found["rgb_info"], found["depth_info"]):
        info.p[0] = 60.0  # K says 50
    topics = {"pose": "/pose", "rgb_info": "/rgb/camera_info", "depth_info": "/depth/camera_info"}
    return {topics.get(name, f"/{name}/image"): message for name, message in found.items()}


BESIDE = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0]
INPUTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "pose.source": ("odometry", "topics", {}),
    "pose.static": (BESIDE, "frames", {"pose.source": "static"}),
    "pose.base_to_camera": (BESIDE, "frames", {}),
    "pose.tolerance": (0.0005, "frames", {}),
    "pose.timeout": (0.05, "waiting", {}),
    "pose.depth_to_rgb": (BESIDE, "frames", {}),
    "sync.slop": (0.001, "frames", {}),
    "input.source": ("points", "topics", {}),
    "input.transport": ("compressed", "topics", {}),
    "input.rectified": (True, "frames", {}),
    "qos.reliability": ("best_effort", "reliability", {}),
    "scene.on_time_jump": ("keep", "cleared", {}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_the_inputs_make_of_it(live: Live, name: str) -> None:
    value, changed, also = INPUTS[name]
    live.put(also)
    before = listen(live)
    live.put({name: value})
    after = listen(live)
    assert before[changed] and before[changed] != after.get(changed), before[changed]


def test_quality_of_service_is_overridden_at_the_start_and_not_later(live: Live) -> None:
    assert listen(live)["depth"]["/rgb/image"] == 3 != listen(live)["depth"]["/depth/image"]
    names = [name for name in live.node.list_parameters(["qos_overrides"], 0).names]
    assert {name.rpartition(".")[2] for name in names} == {"history", "depth", "reliability"}
    for name in names:
        assert live.node.describe_parameter(name).description
        result = live.set(name, "reliable")
        assert not result.successful and "read-only" in result.reason


# --- what a model that is loaded, and answers, makes of it ------------------------------------------------------------


def test_the_model_and_its_number_type(live: Live, tmp_path: Path) -> None:
    """model.path, model.dtype, model.quantization, budget.background, budget.infeasible: each as it was given."""

    def look() -> tuple[str, str, str, float, bool]:
        assert live.configure(), live.node.engine.problem
        worker = live.node.engine.queue
        assert worker is not None
        future = worker.call(
            lambda session: (
                session.runtime.model_id.partition("@")[0],
                str(session.runtime.model.dtype),
                session.runtime.model.quantization,
            )
        )
        name, dtype, kind = live.wait(future.done, "the session") and future.result()
        share, refuses = live.node.engine.worker.duty.share, worker.refuse_late
        live.node.trigger_cleanup()
        return name, dtype, kind, share, refuses

    before = look()
    shutil.copytree(live.model, tmp_path / "another")
    live.put({"model.path": str(tmp_path / "another"), "model.dtype": "bfloat16", "budget.background": 0.25})
    live.put({"budget.infeasible": "refuse", "model.quantization": "int8"})
    after = look()
    assert before == (live.model.name, "torch.float32", "none", 0.5, False)
    assert after == ("another", "torch.bfloat16", "int8", 0.25, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.device", "cuda:99"), ("model.vision_path", "/no/such/tower"), ("model.path", "/no/such")],
)
def test_what_cannot_be_loaded_is_refused_by_configure(live: Live, name: str, value: str) -> None:
    live.put({name: value})
    assert not live.configure()
    assert value in live.node.engine.problem and live.node.lifecycle_state == "unconfigured"


def answering(live: Live, tmp_path: Path) -> None:
    """Makes the node active, with a scene of one view."""
    live.put({"max_new_tokens": 8})
    assert live.configure(), live.node.engine.problem
    assert live.node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    rgb, depth, K, T = synthetic_frame(0)
    assert live.node.engine.queue is not None
    live.node.engine.queue.submit_frame(lambda: PosedFrame(rgb, depth.astype(np.float32) / 1e3, K, T, STAMP))
    live.wait(lambda: live.node.outputs.scene.poses, "a scene")


def test_what_an_active_node_makes_of_it(live: Live, tmp_path: Path) -> None:
    """Those that may change at any time, each with what it changes; the others are refused with when they may."""
    answering(live, tmp_path)
    node, worker = live.node, live.node.engine.queue
    assert worker is not None

    def policy() -> tuple[str, int]:
        live.ask()
        return worker.policy.value, worker.queue_limit

    def clicked() -> str:
        before = len(answered)
        clicks.publish(PointStamped())
        live.wait(lambda: len(answered) > before, "an answer to the click")
        return answered[-1].answer.question.text

    def reports() -> dict[str, Any]:
        """After inputs that came ten times a second until 6 s ago, however long the rest of the test takes."""
        now = time.monotonic()
        for topic in ("rgb/image", "rgb/camera_info", "depth/image", "pose"):
            node.inputs.record.arrived(topic).clear()
            for i in range(20):
                node.inputs.record.arrived(topic).add(now - 7.9 + 0.1 * i)
        return {status.name.rpartition(" ")[2]: status for status in node.health.report().status}

    def load_again() -> str:
        live.put({"scene.file": str(tmp_path / "again")})
        assert live.call(Trigger, "save_scene").success
        return str(live.call(Trigger, "load_scene").message)

    def saves() -> int:
        node.autosave.tick()
        live.wait(lambda: not node.autosave.busy, "the scene to be saved")
        return node.autosave.saved

    def versions() -> int:
        live.put({"scene.autosave_period": 0.001})
        for _ in range(3):
            node.autosave._state = None
            saves()
        live.put({"scene.autosave_period": 0.0})
        return len(node.autosave.versions.files())

    node.autosave.versions = Versions(tmp_path / "versions", "x")

    def rates() -> str:
        live.put({"diagnostics.stale_after": 3600.0})
        return str(reports()["inputs"].message)

    def period() -> int:
        """Of the timer, after its next tick."""
        told.clear()
        live.wait(lambda: told, "diagnostics")
        (timer,) = {timer for timer in node.timers if timer.callback.__self__ is node.health}
        return int(timer.timer_period_ns)

    answered: list[Answered] = []
    node.events.add(Answered, answered.append)
    told: list[Any] = []
    heard = live.tester.create_subscription(DiagnosticArray, "/diagnostics", told.append, 10)
    clicks = live.tester.create_publisher(PointStamped, "/clicked_point", 10)
    live.wait(clicks.get_subscription_count, "the node's subscription to clicks")

    looks: dict[str, tuple[Any, Callable[[], Any]]] = {
        "strategy": ("none", lambda: live.ask().strategy),
        "question_policy": ("reject", policy),
        "queue_limit": (3, policy),
        "latency_budget_ms": (60_000.0, lambda: live.ask().latency_budget_ms),
        "max_new_tokens": (3, lambda: live.ask().status_message),
        "click_question": ("And this?", clicked),
        "scene.file": (str(tmp_path / "scene"), lambda: live.call(Trigger, "save_scene").message),
        "scene.on_load": ("merge", load_again),
        "scene.autosave_period": (0.001, saves),
        "scene.autosave_versions": (1, versions),
        "diagnostics.period": (0.5, period),
        "diagnostics.stale_after": (3600.0, lambda: reports()["inputs"].level),
        "diagnostics.min_rate": (1000.0, rates),
    }
    assert looks.keys() | {"scene.on_time_jump"} == {setting.name for setting in SETTINGS if setting.read == ANY_TIME}
    for name, (value, look) in looks.items():
        before = look()
        live.put({name: value})
        after = look()
        assert before != after, f"{name}: {before}"
        live.put({name: live.started[name]})
    for setting in SETTINGS:
        if setting.read in (CONFIGURE, ACTIVATE):
            result = live.set(setting.name, another(setting))
            assert (
                not result.successful
                and f"{setting.name} is read by {setting.read} and the node is active" in result.reason
            )
    live.tester.destroy_subscription(heard)
    live.tester.destroy_publisher(clicks)


def another(setting: Setting) -> Any:
    """A good value that is not the default."""
    if setting.choices:
        return next(choice for choice in setting.choices if choice != setting.default)
    if isinstance(setting.default, bool):
        return not setting.default
    if isinstance(setting.default, tuple):
        return [0.5] * len(setting.default)
    if isinstance(setting.default, int | float):
        return type(setting.default)(setting.low if setting.default != setting.low else setting.high)
    possible = {
        "model.device": "cpu",
        "scene.file": "/tmp/x",
        "engine.url": "http://there:8000",
        "engine.ca_file": "/tmp/x",
        "engine.fallback": "embedded",
    }
    return possible.get(setting.name, "something_else")


# tests/ros/inputs/test_corrections.py
OF_POSES = {"pose.max_covariance", "pose.odom_frame", "pose.map_jump"}


def test_no_setting_that_is_read_by_activate_is_left_out() -> None:
    assert INPUTS.keys() | OF_POSES == {setting.name for setting in SETTINGS if setting.read == ACTIVATE} | {
        "scene.on_time_jump"
    }
