# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the node in one table: declared, described, range-checked and validated from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from adatoken3d_ros.ros.inputs.poses import pose_from_numbers
from adatoken3d_ros.text import quoted, shown

# When a parameter is read, and so until when it may be changed.
START = "start"  # when the process starts: read-only
CONFIGURE = "configure"  # by configure: may be changed while the node is unconfigured
ACTIVATE = "activate"  # by activate: may be changed while the node is not active
ANY_TIME = "any time"  # by the next question or tick

_CHANGEABLE = {
    CONFIGURE: ("unconfigured", "clean the node up first"),
    ACTIVATE: ("unconfigured", "inactive", "deactivate the node first"),
}


@dataclass(frozen=True)
class Spec:
    """One parameter.

    Attributes:
        name: dots group parameters.
        default: also tells the type.
        description: for people, with the unit.
        read: one of START, CONFIGURE, ACTIVATE, ANY_TIME.
        low, high: inclusive range of a number.
        choices: allowed values of a string.
        check: raises ValueError with a reason for a value that the range cannot exclude.
    """

    name: str
    default: Any
    description: str
    read: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[Any], object] | None = field(default=None, compare=False)

    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows."""
        parts = [self.description]
        if self.choices:
            parts.append(f"One of: {', '.join(self.choices)}.")
        parts.append(f"Read by: {self.read}." if self.read != ANY_TIME else "May be changed at any time.")
        descriptor = ParameterDescriptor(name=self.name, description=" ".join(parts), read_only=self.read == START)
        if self.low is not None and self.high is not None:
            if isinstance(self.default, int):
                descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high), step=0)]
            else:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(self.low), to_value=float(self.high), step=0.0)
                ]
        return descriptor

    def problem(self, value: Any) -> str:
        """Why `value` cannot be used; empty if it can."""
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            return f"{self.name} must be finite, got {quoted(value)}"
        if self.low is not None and self.high is not None and not self.low <= value <= self.high:
            return f"{self.name} must be between {self.low} and {self.high}, got {value}"
        if self.choices and value not in self.choices:
            return f"{self.name} must be one of {', '.join(self.choices)}, got {quoted(value)}"
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as error:
                return f"{self.name}: {error}"
        return ""


def _three_numbers(value: Sequence[float]) -> None:
    if len(value) != 3:
        raise ValueError(f"x y z are three numbers, got {quoted(list(value))}")


def local_file(value: str) -> None:
    """Raises ValueError unless `value` is empty or the absolute path of a file of this machine."""
    if "://" in value or "\0" in value or (value and not Path(value).is_absolute()):
        raise ValueError(f"must be an absolute path on this machine, got {quoted(value)}")


def _not_blank(value: str) -> None:
    if not value.strip():
        raise ValueError("must not be empty")


def _device(value: str) -> None:
    kind, _, index = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"must be auto, cpu, cuda or cuda:<n>, got {quoted(value)}")


SPECS: tuple[Spec, ...] = (
    Spec("autostart", False, "Configure and activate the node by itself when it starts.", START),
    Spec("model.path", "", "Directory of the checkpoint; empty: the small model in the package.", CONFIGURE),
    Spec("model.vision_path", "", "Directory of the vision tower, if the checkpoint has none.", CONFIGURE),
    Spec("model.dtype", "auto", "Number type of the weights; auto: float32 on a CPU, bfloat16 on a GPU.", CONFIGURE,
         choices=("auto", "float32", "float16", "bfloat16")),
    Spec("model.device", "auto", "Where the model runs: auto, cpu, cuda or cuda:<n>.", CONFIGURE, check=_device),
    Spec("model.template", "llava_v1", "Prompt template.", CONFIGURE, choices=("llava_v1", "vicuna_v1")),
    Spec("model.upstream_numerics", False, "Compute as LLaVA-3D was published: geometry, positions and clicks in "
         "bfloat16, missing depth kept as a point at the camera, a random cap on the tokens.", CONFIGURE),
    Spec("seed", 0, "Seed of everything random in an answer.", CONFIGURE, low=0, high=2**31 - 1),
    Spec("strategy", "ours", "Pruning strategy: its name, or the path of a strategy file (.yaml). "
         "A name means the file of that name in the model's folder strategies/, where there is one.", ANY_TIME,
         check=_not_blank),
    Spec("question_policy", "queue", "What happens to a question that comes during another.", ANY_TIME,
         choices=("queue", "replace", "reject")),
    Spec("queue_limit", 8, "Questions that may wait under the policy queue.", ANY_TIME, low=0, high=1000),
    Spec("latency_budget_ms", 0.0, "Latency budget of a question that brings none, milliseconds; 0: no limit.",
         ANY_TIME, low=0.0, high=3.6e6),
    Spec("budget.infeasible", "best_effort", "What happens to a question whose latency budget no plan can keep: it is "
         "answered by the fastest one, or refused.", CONFIGURE, choices=("best_effort", "refuse")),
    Spec("budget.warm_up", True, "Measure how fast the model runs here when it is loaded, for seconds; without it a "
         "latency budget only ends the answer.", CONFIGURE),
    Spec("budget.cache", "", "Directory where that measurement is kept for the next start; empty: nowhere.", CONFIGURE),
    Spec("budget.reuse", "off", "Keep the scene's keys and values for the next question; prefix: of all its tokens, "
         "and nothing is pruned then.", CONFIGURE, choices=("off", "prefix")),
    Spec("budget.background", 0.5, "Largest share of the time that is spent on preparing the scene while nobody asks "
         "(its tokens and prefix, views whose encoding a question interrupted); encoding a key frame as it comes does "
         "not count.", CONFIGURE, low=0.0, high=1.0),
    Spec("max_new_tokens", 64, "Longest answer of a question that does not say, tokens.", ANY_TIME, low=1, high=4096),
    Spec("click_question", "What is this?", "Question that is asked about a point on clicked_point.", ANY_TIME,
         check=_not_blank),
    Spec("scene.frame_id", "map", "Frame of the scene: gravity-aligned, z up.", CONFIGURE, check=_not_blank),
    Spec("scene.directory", "", "Directory that scene.file must lie in, an absolute path; empty: adatoken3d in "
         "$ROS_HOME or ~/.ros.", START, check=local_file),
    Spec("scene.file", "", "File of the services save_scene and load_scene, an absolute path.", ANY_TIME,
         check=local_file),
    Spec("scene.max_views", 20, "Key frames that are kept; beyond it, the one goes that is missed least: that alone "
         "shows few voxels, is far away, is old.", CONFIGURE, low=1, high=1000),
    Spec("scene.max_voxels", 20000, "Occupied voxels that are kept, as far as dropping views can do it.", CONFIGURE,
         low=1, high=10**7),
    Spec("scene.near", 5.0, "A view this far from the newest counts half when it is decided which one goes, metres.",
         CONFIGURE, low=0.01, high=1e6),
    Spec("scene.far", 0.0, "No view is kept this far from the newest, metres; 0: any distance.", CONFIGURE, low=0.0,
         high=1e6),
    Spec("scene.max_age", 0.0, "No view is kept that is this much older than the newest, seconds; 0: any age.",
         CONFIGURE, low=0.0, high=1e9),
    Spec("scene.question_views", 0, "Views that a question is about where more are kept, chosen by what they cover; 0: "
         "as many as the model was trained with.", CONFIGURE, low=0, high=1000),
    Spec("scene.min_translation", 0.15, "A view this far from all kept ones is a key frame, metres.", CONFIGURE,
         low=0.0, high=100.0),
    Spec("scene.min_rotation", 10.0, "A view turned this much from all kept ones is a key frame, degrees.", CONFIGURE,
         low=0.0, high=180.0),
    Spec("scene.min_gain", 0.02, "Share of such a view that must lie where nothing was seen yet, unless the scene has "
         "changed.", CONFIGURE, low=0.0, high=1.0),
    Spec("scene.min_sharpness", 0.5, "A frame less sharp than this share of the recent ones' median is blurred and is "
         "passed over for a sharper one; 0: none is.", CONFIGURE, low=0.0, high=1.0),
    Spec("scene.sharpness_wait", 0.5, "Longest wait for a sharper frame, seconds.", CONFIGURE, low=0.0, high=60.0),
    Spec("scene.change_interval", 1.0, "Seconds between two looks at whether a known place has changed.", CONFIGURE,
         low=0.0, high=1e6),
    Spec("scene.min_change", 8, "A known place has changed if so many patches lie where nothing was, or so many voxels "
         "are looked through.", CONFIGURE, low=1, high=10**6),
    Spec("scene.carving", True, "Take out of the scene what a newer key frame looks through.", CONFIGURE),
    Spec("scene.max_depth", 10.0, "Depth beyond this is not used, metres.", CONFIGURE, low=0.01, high=1000.0),
    Spec("scene.origin", [0.0, 0.0, 0.0], "Point of the scene frame that the model sees as its origin (floor in mid "
         "room), metres.", CONFIGURE, check=_three_numbers),
    Spec("scene.origin_mode", "auto", "Whether that origin stays, or follows the floor and the middle of what has been "
         "seen, in whole voxels.", CONFIGURE, choices=("fixed", "auto")),
    Spec("scene.on_time_jump", "clear", "What becomes of the scene when stamps jump back (a bag that starts again).",
         ANY_TIME, choices=("clear", "keep")),
    Spec("pose.source", "tf", "Where the camera's pose comes from: TF at the stamp, the topic odom, the topic pose, or "
         "pose.static.", ACTIVATE, choices=("tf", "odometry", "pose_topic", "static")),
    Spec("pose.static", [0.0] * 6, "Camera optical frame in the scene frame, for the source static: x y z roll pitch "
         "yaw or x y z qx qy qz qw, metres and radians.", ACTIVATE, check=pose_from_numbers),
    Spec("pose.base_to_camera", [0.0] * 6, "Camera optical frame in the frame whose pose the source gives: x y z roll "
         "pitch yaw or x y z qx qy qz qw, metres and radians; all six zeros: as TF says for odometry, else no "
         "difference.", ACTIVATE, check=pose_from_numbers),
    Spec("pose.tolerance", 0.02, "How far the nearest pose may be from the image where none can be interpolated; "
         "neighbours up to ten times this apart are interpolated between, seconds.", ACTIVATE, low=0.0, high=10.0),
    Spec("pose.timeout", 0.5, "An image waits for its pose until another one this much newer has come, seconds.",
         ACTIVATE, low=0.0, high=60.0),
    Spec("pose.depth_to_rgb", [0.0] * 6, "Frame of the depth images or clouds in the colour camera's optical frame, "
         "where the two differ: x y z roll pitch yaw or x y z qx qy qz qw, metres and radians; all zeros: as TF says.",
         ACTIVATE, check=pose_from_numbers),
    Spec("sync.slop", 0.01, "Largest difference between the stamps of colour and depth, seconds.", ACTIVATE, low=0.0,
         high=1.0),
    Spec("input.source", "rgbd", "What frames are made of: colour and depth images; organised coloured clouds on "
         "points; clouds on points beside a camera's images; coloured clouds on points alone.", ACTIVATE,
         choices=("rgbd", "organised_points", "points_with_camera", "points")),
    Spec("input.transport", "raw", "Message type of both images: sensor_msgs/Image or CompressedImage.",
         ACTIVATE, choices=("raw", "compressed")),
    Spec("input.rectified", False, "The images are rectified already: P of CameraInfo counts, not K and D.", ACTIVATE),
    Spec("qos.reliability", "auto", "Reliability that is asked of the inputs' publishers; auto: what they offer; "
         "best_effort matches any, but large images get lost with the default transport.", ACTIVATE,
         choices=("auto", "reliable", "best_effort")),
    Spec("diagnostics.period", 1.0, "Seconds between two messages on /diagnostics.", ANY_TIME, low=0.05, high=60.0),
    Spec("diagnostics.stale_after", 5.0, "An input that has been silent for this long is an error, half of it a "
         "warning, seconds.", ANY_TIME, low=0.1, high=3600.0),
    Spec("diagnostics.min_rate", 0.0, "Images or clouds a second below which an input is a warning, below half of it "
         "an error; 0: rates are only told.", ANY_TIME, low=0.0, high=1000.0),
)  # fmt: skip


def at_start(error: ParameterException) -> str:
    """What to say, in one line, of a parameter that cannot be used at the start."""
    text = str(error)
    hint = ": a number with a decimal point is wanted" if "INTEGER" in text and "DOUBLE" in text else ""
    return text + hint


class Parameters:
    """Declares the table on a node, refuses what cannot be used, and reads values.

    Args:
        node: the node that carries the parameters.
        state: returns the node's lifecycle state, such as 'unconfigured'.
        checks: {name: check} for what only the running node can tell; a check raises ValueError or OSError.

    Raises:
        rclpy.exceptions.InvalidParameterValueException, InvalidParameterTypeException: for a bad value given at start.
    """

    def __init__(self, node: Node, state: Callable[[], str], checks: Mapping[str, Callable[[Any], object]]) -> None:
        self._node = node
        self._checks = checks
        self._state = state
        self._specs = {spec.name: spec for spec in SPECS}
        self._declared = False
        node.add_on_set_parameters_callback(self._check)
        node.declare_parameters("", [(spec.name, spec.default, spec.descriptor()) for spec in SPECS])
        self._declared = True

    def __getitem__(self, name: str) -> Any:
        return self._node.get_parameter(name).value

    def _check(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            spec = self._specs.get(parameter.name)
            reason = "" if spec is None else self._problem(spec, parameter.value)
            if reason:
                return SetParametersResult(successful=False, reason=shown(reason))
        return SetParametersResult(successful=True)

    def _problem(self, spec: Spec, value: Any) -> str:
        reason = spec.problem(value) or self._too_late(spec)
        if not reason and spec.name in self._checks:
            try:
                self._checks[spec.name](value)
            except (ValueError, OSError) as error:
                return f"{spec.name}: {error}"
        return reason

    def _too_late(self, spec: Spec) -> str:
        if not self._declared or spec.read not in _CHANGEABLE:
            return ""
        *allowed, advice = _CHANGEABLE[spec.read]
        state = self._state()
        return "" if state in allowed else f"{spec.name} is read by {spec.read} and the node is {state}: {advice}"
