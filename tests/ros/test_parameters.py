# SPDX-License-Identifier: Apache-2.0
"""Every parameter that the nodes declare: what it says of itself, what it refuses and why, and what it changes.

Both nodes run in this process. A parameter that is declared and not in one of the tables below fails a test.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PointStamped
from lifecycle_msgs.srv import GetState
from live_node import Live
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from ros_graph import Camera, claim_domain, synthetic_frame
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger

from adatoken3d_ros.engine import runtime
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.events import Answered
from adatoken3d_ros.engine.loading import ModelSettings
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.ros.demo_camera import DemoCamera
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.node import SceneNode
from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from adatoken3d_ros.ros.parameters import ACTIVATE, ANY_TIME, CONFIGURE, SPECS, START
from adatoken3d_ros.ros.scene_services import inside
from adatoken3d_ros.scene.frames import PosedFrame
from tests.engine.scenes import ask, load_scene

STAMP = 1_700_000_000_000_000_000
SPEC = {spec.name: spec for spec in SPECS}
GIVEN = {  # to demo_camera, other than its defaults
    "rate": 20.0,
    "width": 64,
    "height": 48,
    "field_of_view": 90.0,
    "seed": 3,
    "depth_encoding": "32FC1",
    "reliability": "best_effort",
    "world_frame": "world",
    "camera_frame": "eye",
}
OVERRIDE = "qos_overrides./rgb/image.subscription."


@pytest.fixture(scope="module")
def ros(tiny_model: Path) -> Iterator[Live]:
    domain, lock = claim_domain()
    before = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE")
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    arguments = ["--ros-args"]
    for name, value in GIVEN.items():
        arguments += ["-p", f"demo_camera:{name}:={value}"]
    # One participant has one type for each topic: the camera's are elsewhere.
    for topic in ("rgb/image", "depth/image", "rgb/camera_info", "depth/camera_info", "pose", "odom"):
        arguments += ["-r", f"demo_camera:{topic}:=demo/{topic}"]
    arguments += ["-p", f"adatoken3d:{OVERRIDE}depth:=3", "-p", f"adatoken3d:scene.directory:={tempfile.gettempdir()}"]
    rclpy.init(args=arguments, domain_id=domain)
    executor = SingleThreadedExecutor()
    node, camera, tester = SceneNode(), DemoCamera(), Node("tester", use_global_arguments=False)
    for one in (node, tester):
        executor.add_node(one)
    live = Live(node, tester, executor, tiny_model, camera=camera)
    live.put({"model.path": str(tiny_model), "pose.source": "pose_topic", "budget.warm_up": False})
    live.started = {name: node.get_parameter(name).value for name in SPEC}
    yield live
    node.close()
    camera.destroy_node()
    tester.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()
    lock.close()
    if before is None:
        del os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"]
    else:
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = before


@pytest.fixture
def live(ros: Live) -> Iterator[Live]:
    """The nodes with the parameters that they started with, the scene node unconfigured."""
    assert ros.node.lifecycle_state == "unconfigured"
    yield ros
    if ros.node.lifecycle_state == "active":
        ros.node.trigger_deactivate()
    if ros.node.lifecycle_state == "inactive":
        ros.node.trigger_cleanup()
    ros.put({name: value for name, value in ros.started.items() if SPEC[name].read != START})


# --- what a session does, by frames that are shown to it --------------------------------------------------------------


def drive() -> list[PosedFrame]:
    """A walk along a wall, a turn, a look at the floor, a blurred frame, a box that comes and goes."""
    frames = []

    def add(seconds: float, y: float, *, turn: float = 0.0, floor: bool = False, blur: bool = False, box: bool = False):
        rgb, depth, K, T = synthetic_frame(len(frames))
        c, s = math.cos(turn), math.sin(turn)
        T[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ T[:3, :3]
        if floor:
            T[:3, :3] = np.array([[0.0, -1, 0], [-1, 0, 0], [0, 0, -1]])  # straight down
        T[:3, 3] = (0.0, y, 1.0)
        metres = np.full(depth.shape, 1.6 if floor else 2.0, np.float32)
        if box:
            metres[12:36, 20:44] = 1.0
        rgb = np.full_like(rgb, 90) + (np.arange(64) % 40).astype(np.uint8)[:, None] if blur else rgb
        frames.append(PosedFrame(rgb, metres, K, T, STAMP + round(seconds * 1e9)))

    for i in range(4):
        add(0.1 * i, 0.5 * i)
    add(0.4, 1.5, turn=0.6)
    add(0.5, 1.5, floor=True)
    add(0.6, 3.0, blur=True)
    add(0.65, 3.1)
    add(1.8, 3.1, box=True)
    add(3.0, 3.1)
    return frames


def behaviour(live: Live, cache: Path) -> dict[str, Any]:
    """What a session that is made of the node's parameters does."""
    session = load_scene(ModelSettings.from_parameters(live.node.parameters))
    verdicts = []
    for frame in drive():
        verdicts.append(session.observe(frame).value)
        session.encode_pending()
    found: dict[str, Any] = {"verdicts": verdicts, "latency": session.controller.latency is not None}
    found["cache"] = sorted(path.name for path in cache.iterdir())
    if session.poses:
        tokens = session.memory.question_tokens(10_000)
        found.update(
            views=sorted(session.poses),
            voxels=len(session.tokens() or ()),
            asked=session.memory.asked.keys(),
            origin=session.memory.origin.round(6).tolist(),
            tokens=float(tokens.features.double().abs().sum() + tokens.position.double().abs().sum()),
            prompt=session.prompt(Question("What?"))[0].pieces,
        )
    answer = ask(session, Question("What?", max_new_tokens=4))
    found.update(strategy=answer.strategy, seed=answer.seed)
    found["hurried"] = session.runtime.ask(
        session, Question("What?", max_new_tokens=4, latency_budget_ms=1e-3)
    ).status.name
    return found


# Parameter: another value, what it changes, and what else is set for both.
SESSION: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "model.template": ("vicuna_v1", "prompt", {}),
    "model.upstream_numerics": (True, "tokens", {"scene.origin_mode": "fixed"}),
    "seed": (7, "seed", {}),
    "budget.warm_up": (True, "latency", {}),
    "budget.cache": ("CACHE", "cache", {"budget.warm_up": True}),
    "budget.infeasible": ("refuse", "hurried", {"budget.warm_up": True}),
    "budget.reuse": ("prefix", "strategy", {}),
    "scene.max_views": (2, "views", {}),
    "scene.max_voxels": (150, "views", {}),
    "scene.near": (0.01, "views", {"scene.max_views": 4}),
    "scene.far": (1.0, "views", {}),
    "scene.max_age": (0.35, "views", {}),
    "scene.question_views": (2, "asked", {}),
    "scene.min_translation": (0.7, "verdicts", {}),
    "scene.min_rotation": (120.0, "verdicts", {"scene.min_translation": 2.0}),
    "scene.min_gain": (0.9, "verdicts", {}),
    "scene.min_sharpness": (0.0, "verdicts", {}),
    "scene.sharpness_wait": (0.0, "verdicts", {}),
    "scene.change_interval": (1000.0, "verdicts", {}),
    "scene.min_change": (1_000_000, "verdicts", {}),
    "scene.carving": (False, "voxels", {}),
    "scene.max_depth": (0.5, "verdicts", {}),
    "scene.origin": ([1.0, 2.0, 0.5], "origin", {"scene.origin_mode": "fixed"}),
    "scene.origin_mode": ("fixed", "origin", {}),
}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Any:
    return registry.load(tiny_model)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    """The model is read once; how fast it runs is made up, so slow that no budget can be kept."""

    def made_up(model: Any, tokenizer: Any, strategy: Any, cache: Path | None, progress: Any) -> tuple[Any, bool]:
        if cache is not None:
            (cache / "speed").write_text("")
        seconds = {"encode": [1.0], "tokens": [1.0, 0.0, 0.0], "prefill": [1.0, 0, 0, 0, 0], "decode": [1.0, 0.0]}
        return LatencyModel(seconds), False

    monkeypatch.setattr(registry, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(runtime, "latency_model", made_up)


@pytest.mark.parametrize("name", SESSION)
def test_what_a_session_makes_of_it(live: Live, quick: None, tmp_path: Path, name: str) -> None:
    value, changed, also = SESSION[name]
    live.put(also)
    if str(also) not in live.behaved:
        live.behaved[str(also)] = behaviour(live, tmp_path)
    before = live.behaved[str(also)]
    live.put({name: str(tmp_path) if value == "CACHE" else value})
    after = behaviour(live, tmp_path)
    assert before[changed] != after.get(changed), before[changed]


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
    """model.path, model.dtype, budget.background, budget.infeasible: each as it was given."""

    def look() -> tuple[str, str, float, bool]:
        assert live.configure(), live.node.engine.problem
        worker = live.node.engine.worker
        assert worker is not None
        future = worker.call(
            lambda session: (session.runtime.model_id.partition("@")[0], str(session.runtime.model.dtype))
        )
        name, dtype = live.wait(future.done, "the session") and future.result()
        share, refuses = live.node.engine.thread.duty.share, worker.refuse_late
        live.node.trigger_cleanup()
        return name, dtype, share, refuses

    before = look()
    shutil.copytree(live.model, tmp_path / "another")
    live.put({"model.path": str(tmp_path / "another"), "model.dtype": "bfloat16", "budget.background": 0.25})
    live.put({"budget.infeasible": "refuse"})
    after = look()
    assert before == (live.model.name, "torch.float32", 0.5, False)
    assert after == ("another", "torch.bfloat16", 0.25, True)


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
    assert live.node.engine.worker is not None
    live.node.engine.worker.submit_frame(lambda: PosedFrame(rgb, depth.astype(np.float32) / 1e3, K, T, STAMP))
    live.wait(lambda: live.node.outputs.scene.poses, "a scene")


def test_what_an_active_node_makes_of_it(live: Live, tmp_path: Path) -> None:
    """Those that may change at any time, each with what it changes; the others are refused with when they may."""
    answering(live, tmp_path)
    node, worker = live.node, live.node.engine.worker
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
        "diagnostics.period": (0.5, period),
        "diagnostics.stale_after": (3600.0, lambda: reports()["inputs"].level),
        "diagnostics.min_rate": (1000.0, rates),
    }
    assert looks.keys() | {"scene.on_time_jump"} == {spec.name for spec in SPECS if spec.read == ANY_TIME}
    for name, (value, look) in looks.items():
        before = look()
        live.put({name: value})
        after = look()
        assert before != after, f"{name}: {before}"
        live.put({name: live.started[name]})
    for spec in SPECS:
        if spec.read in (CONFIGURE, ACTIVATE):
            result = live.set(spec.name, another(spec))
            assert (
                not result.successful and f"{spec.name} is read by {spec.read} and the node is active" in result.reason
            )
    live.tester.destroy_subscription(heard)
    live.tester.destroy_publisher(clicks)


def another(spec: Any) -> Any:
    """A good value that is not the default."""
    if spec.choices:
        return next(choice for choice in spec.choices if choice != spec.default)
    if isinstance(spec.default, bool):
        return not spec.default
    if isinstance(spec.default, list):
        return [0.5] * len(spec.default)
    if isinstance(spec.default, int | float):
        return type(spec.default)(spec.low if spec.default != spec.low else spec.high)
    return {"model.device": "cpu", "scene.file": "/tmp/x"}.get(spec.name, "something_else")


# --- what every parameter says of itself, and what it refuses ---------------------------------------------------------

ELSEWHERE = {  # parameters of the scene node in no table above: the test that flips them
    **dict.fromkeys(("model.path", "model.dtype", "budget.background"), "test_the_model_and_its_number_type"),
    **dict.fromkeys(("model.device", "model.vision_path"), "test_what_cannot_be_loaded_is_refused_by_configure"),
    "autostart": "test_what_is_read_at_the_start_is_refused_later",
    "scene.directory": "test_scene_files_lie_in_one_directory",
    "scene.frame_id": "test_the_frame_of_the_scene",
    "use_sim_time": "test_simulated_time",
    "start_type_description_service": "test_what_is_read_at_the_start_is_refused_later",
}


def test_every_declared_parameter_is_in_a_table(live: Live) -> None:
    declared = {name for name in live.node.list_parameters([], 0).names if not name.startswith("qos_overrides.")}
    any_time = {spec.name for spec in SPECS if spec.read == ANY_TIME}  # one test holds that these are all looked at
    assert declared == SESSION.keys() | INPUTS.keys() | any_time | ELSEWHERE.keys()
    assert all(test in globals() for test in ELSEWHERE.values())
    ours = set(live.camera.list_parameters([], 0).names) - {"use_sim_time", "start_type_description_service"}
    assert {name for name in ours if not name.startswith("qos_overrides.")} == GIVEN.keys()


def described(descriptor: ParameterDescriptor, value: Any) -> None:
    assert len(descriptor.description) > 10, descriptor.name
    if isinstance(value, int) and not isinstance(value, bool):
        assert len(descriptor.integer_range) == 1, descriptor.name
    if isinstance(value, float):
        assert len(descriptor.floating_point_range) == 1, descriptor.name


def test_every_parameter_is_described_with_its_range(live: Live) -> None:
    for node, names in ((live.node, SPEC.keys()), (live.camera, GIVEN.keys())):
        for name in names:
            described(node.describe_parameter(name), node.get_parameter(name).value)


@pytest.mark.parametrize("name", SPEC)
def test_what_cannot_be_used_is_refused_with_the_reason(live: Live, name: str) -> None:
    spec, bad = SPEC[name], []
    if spec.low is not None and spec.high is not None:
        kind = type(spec.default)
        bad = [kind(spec.low - 1), kind(spec.high + max(1, abs(spec.high) / 2))]
        bad += [math.nan, math.inf] if kind is float else []
    elif spec.choices:
        bad = ["nonsense", ""]
    elif isinstance(spec.default, list):
        bad = [[1.0], [math.nan] * len(spec.default)]
    elif spec.check is not None:
        files = ("scene.file", "scene.directory")
        bad = ["  "] if name not in files else ["relative/path", "https://example.org/scene"]
    bad.append({bool: "text", str: 3, int: "text", float: "text", list: "text"}[type(spec.default)])  # another type
    for value in bad:
        result = live.set(name, value)
        assert not result.successful and len(result.reason) > 10, value
        assert any(text in result.reason for text in (name, "read-only", "Wrong parameter type"))
        assert live.node.get_parameter(name).value == live.started[name]


def test_scene_files_lie_in_one_directory(live: Live, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "file").symlink_to(Path.home() / ".bashrc")
    above = f"{tempfile.gettempdir()}/../etc/scene"
    for path in ("/etc/passwd", str(tmp_path / "out" / "scene"), str(tmp_path / "file"), above, tempfile.gettempdir()):
        result = live.set("scene.file", path)
        assert not result.successful and "must lie in scene.directory" in result.reason and path in result.reason
    live.put({"scene.file": str(tmp_path / "later")})
    (tmp_path / "later").symlink_to(tmp_path / "out" / "scene")  # set first, then made to lead elsewhere
    assert live.configure()
    for service in ("save_scene", "load_scene"):
        response = live.call(Trigger, service)
        assert not response.success and "must lie in scene.directory" in response.message
    result = live.set("scene.directory", "/")
    assert not result.successful and "read-only" in result.reason


def test_where_scene_files_lie_unless_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROS_HOME", str(tmp_path))
    assert inside("", str(tmp_path / "adatoken3d" / "room")) == tmp_path / "adatoken3d" / "room"
    monkeypatch.delenv("ROS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inside("", str(tmp_path / ".ros" / "adatoken3d" / "room")).name == "room"
    with pytest.raises(ValueError, match="must lie in scene.directory"):
        inside("", str(tmp_path / ".ros" / "room"))


def test_what_is_read_at_the_start_is_refused_later(live: Live) -> None:
    for name in ("autostart", "start_type_description_service"):
        result = live.set(name, not live.node.get_parameter(name).value)
        assert not result.successful and "read-only" in result.reason


def test_the_frame_of_the_scene(live: Live) -> None:
    def frame() -> str:
        live.node.inputs.start()
        try:
            assert live.node.inputs.poses is not None
            return live.node.inputs.poses.scene_frame
        finally:
            live.node.inputs.stop()

    assert frame() == "map"
    live.put({"scene.frame_id": "world"})
    assert frame() == "world"


def test_poses_that_cannot_be_had_are_told_before_the_model_is_loaded(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(live.node.engine, "start", never)
    live.put({"pose.source": "tf", "input.source": "points", "pose.base_to_camera": BESIDE})
    assert not live.configure()
    assert "pose.base_to_camera" in live.node.engine.problem and live.node.engine.worker is None


def test_simulated_time(live: Live) -> None:
    clock = live.node.get_clock()
    assert not clock.ros_time_is_active
    assert live.set("use_sim_time", True).successful and clock.ros_time_is_active
    assert live.set("use_sim_time", False).successful and not clock.ros_time_is_active
    assert not live.set("use_sim_time", "text").successful
    assert live.call(GetState, "get_state").current_state.label == "unconfigured"


# --- demo_camera ------------------------------------------------------------------------------------------------------


def test_the_camera_does_what_it_was_given_and_refuses_changes(live: Live) -> None:
    camera, seen = live.camera, {}
    for name in ("rgb", "depth", "rgb_info"):
        getattr(camera, f"_{name}").publish = lambda message, name=name: seen.setdefault(name, message)
    poses: list[Any] = []
    camera._pose.publish = poses.append  # type: ignore[method-assign]
    camera._publish()
    rgb: Image = seen["rgb"]
    info: CameraInfo = seen["rgb_info"]
    assert (rgb.width, rgb.height, rgb.header.frame_id) == (64, 48, "eye")
    assert seen["depth"].encoding == "32FC1" and poses[0].header.frame_id == "world"
    assert info.k[0] == pytest.approx(32.0), "half the width over the tangent of 45 degrees"
    assert camera._timer.timer_period_ns == 50_000_000
    assert camera._rgb.qos_profile.reliability.name == "BEST_EFFORT"
    assert camera._room.seed == 3
    for name, value in GIVEN.items():
        for other in (value, "text"):
            result = camera.set_parameters([Parameter(name, value=other)])[0]
            assert not result.successful and "read-only" in result.reason
