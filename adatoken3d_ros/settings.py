# SPDX-License-Identifier: Apache-2.0
"""Every setting: its name, default, unit, range, meaning and until when it may be changed, each said here alone.

The node's parameters (`ros/parameters.py`), options of the command line (`cli/options.py`), choices of the launch
arguments (`ros/wiring.py`), defaults of the engine's configuration and docs/node.md's table (`scripts/readme_table.py`)
are made from `SETTINGS`. Neither ROS nor torch is imported.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adatoken3d_ros.text import quoted

# When a setting is read, and so until when it may be changed.
START = "start"  # when the process starts: read-only
CONFIGURE = "configure"  # by configure: may be changed while the node is unconfigured
ACTIVATE = "activate"  # by activate: may be changed while the node is not active
ANY_TIME = "any time"  # by the next question or tick

QUATERNION_TOLERANCE = 0.02  # by how much the length of a quaternion may differ from 1
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", tuple: "a list of numbers"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dots group settings.
        default: also tells the type: bool, int, float, str or a tuple of floats.
        read: one of START, CONFIGURE, ACTIVATE, ANY_TIME.
        description: for people, with the unit.
        low, high: inclusive range of a number.
        choices: allowed values of a text.
        check: raises ValueError with a reason for a value that the range cannot exclude.
    """

    name: str
    default: Any
    read: str
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[Any], object] | None = field(default=None, compare=False)

    def plain(self, value: Any) -> Any:
        """`value` in the default's type: integers as floats where floats are wanted, lists and arrays as tuples.

        Raises:
            ValueError: for a value of another type, outside the range or refused by the check; names the setting.
        """
        kind = type(self.default)
        if kind is tuple and isinstance(value, list | tuple | array) and all(map(_is_number, value)):
            value = tuple(float(number) for number in value)
        elif kind is float and _is_number(value):
            value = float(value)
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.name} must be {_KINDS[kind]}, got {quoted(value)}")
        if problem := self.problem(value):
            raise ValueError(problem)
        return value

    def problem(self, value: Any) -> str:
        """Why `value`, which has the right type, cannot be used; empty if it can."""
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _three_numbers(value: Sequence[float]) -> None:
    if len(value) != 3:
        raise ValueError(f"x y z are three numbers, got {quoted(list(value))}")


def check_pose(numbers: Sequence[float]) -> None:
    """Raises ValueError unless `numbers` are x y z roll pitch yaw or x y z qx qy qz qw, a unit quaternion."""
    if len(numbers) not in (6, 7) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a pose is x y z roll pitch yaw or x y z qx qy qz qw, got {quoted(list(numbers))}")
    if len(numbers) == 7 and not abs((length := math.hypot(*numbers[3:])) - 1.0) <= QUATERNION_TOLERANCE:
        raise ValueError(f"quaternion {tuple(numbers[3:])} has length {length:.4g}, not 1")


def _not_blank(value: str) -> None:
    if not value.strip():
        raise ValueError("must not be empty")


def _device(value: str) -> None:
    kind, _, index = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"must be auto, cpu, cuda or cuda:<n>, got {quoted(value)}")


def _local_path(value: str) -> None:
    if "://" in value or "\0" in value or (value and not Path(value).is_absolute()):
        raise ValueError(f"must be an absolute path on this machine, got {quoted(value)}")


def _url(value: str) -> None:
    parts = urlsplit(value)
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password)
    if value and not (parts.scheme in ("http", "https") and parts.hostname and plain and parts.port != 0):
        raise ValueError(f"must be http://HOST:PORT or https://HOST:PORT, got {quoted(value)}")


def _fallback(value: str) -> None:
    if value != "embedded":
        _local_path(value)


def _robot_name(value: str) -> None:
    if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,63}", value):
        raise ValueError(f"at most 64 of A-Z a-z 0-9 . _ ~ -, got {quoted(value)}")


def _map_id(value: str) -> None:
    if len(value) > 128 or value != value.strip() or not value.isprintable():
        raise ValueError(f"at most 128 printable characters, no spaces around them, got {quoted(value)}")


SETTINGS: tuple[Setting, ...] = (
    Setting("autostart", False, START, "Configure and activate the node by itself when it starts."),
    Setting("model.path", "", CONFIGURE, "Directory of the checkpoint; empty: the small model in the package."),
    Setting("model.vision_path", "", CONFIGURE, "Directory of the vision tower, if the checkpoint has none."),
    Setting("model.dtype", "auto", CONFIGURE, "Number type of the weights; auto: float32 on a CPU, bfloat16 on a GPU.",
            choices=("auto", "float32", "float16", "bfloat16")),
    Setting("model.quantization", "none", CONFIGURE, "What the weights of the language model's linear layers become "
            "while they are loaded: eight or four bits take a half or a third of the memory of bfloat16; auto: the "
            "most exact that fits, of those that are known to cost at most half a point of right answers.",
            choices=("none", "int8", "int4", "fp8", "auto")),
    Setting("model.self_test", True, CONFIGURE, "Ask the model a made-up question after it is loaded, and refuse one "
            "that gives garbage."),
    Setting("model.decoding", "auto", CONFIGURE, "How answers are written. graph: each decode step in one piece, a "
            "CUDA graph on a GPU, compiled on a CPU when the model is loaded, in a minute; eager: operation by "
            "operation; auto: graph on a GPU, and on a CPU where budget.cache keeps what was compiled.",
            choices=("auto", "graph", "eager")),
    Setting("model.device", "auto", CONFIGURE, "Where the model runs: auto, cpu, cuda or cuda:<n>.", check=_device),
    Setting("model.template", "", CONFIGURE, "Name of one of the model's prompt templates; empty: its own choice."),
    Setting("model.tell_poses", False, CONFIGURE, "Tell the model in words where each view was taken from and where it "
            "looked, scene frame, metres and degrees; only for a model that reads views as pictures."),
    Setting("engine.url", "", CONFIGURE, "Address of a shared engine (adatoken3d serve), http://HOST:PORT or https://; "
            "empty: the model runs in this node.", check=_url),
    Setting("engine.token", "", CONFIGURE, "Token that the shared engine asks for, or the absolute path of a file "
            "with it, which nobody reads among the parameters."),
    Setting("engine.ca_file", "", CONFIGURE, "Certificates (PEM) by which the shared engine's is checked; empty: those "
            "of the system.", check=_local_path),
    Setting("engine.robot", "", CONFIGURE, "What this robot is called at the shared engine; empty: as its host.",
            check=_robot_name),
    Setting("engine.encode", "local", CONFIGURE, "What is sent of a key frame. local: its features in 16 bits, made "
            "here by the vision tower in model.path; picture: a JPEG, and the shared engine encodes it.",
            choices=("local", "picture")),
    Setting("engine.fallback", "", CONFIGURE, "Which model answers here while the shared engine cannot be reached: the "
            "directory of a checkpoint, or embedded for the small model in the package; empty: none, such a question "
            "is an error.", check=_fallback),
    Setting("seed", 0, CONFIGURE, "Seed of everything random in an answer.", low=0, high=2**31 - 1),
    Setting("strategy", "ours", ANY_TIME, "Pruning strategy: its name, or the path of a strategy file (.yaml). A "
            "name means the file of that name in the model's folder strategies/, where there is one.",
            check=_not_blank),
    Setting("question_policy", "queue", ANY_TIME, "What happens to a question that comes during another.",
            choices=("queue", "replace", "reject")),
    Setting("queue_limit", 8, ANY_TIME, "Questions that may wait under the policy queue.", low=0, high=1000),
    Setting("latency_budget_ms", 0.0, ANY_TIME, "Latency budget of a question that brings none, milliseconds; 0: no "
            "limit.", low=0.0, high=3.6e6),
    Setting("budget.infeasible", "best_effort", CONFIGURE, "What happens to a question whose latency budget no plan "
            "can keep: it is answered by the fastest one, or refused.", choices=("best_effort", "refuse")),
    Setting("budget.warm_up", True, CONFIGURE, "Measure how fast the model runs here when it is loaded, for seconds; "
            "without it a latency budget only ends the answer."),
    Setting("budget.cache", "", CONFIGURE, "Directory where that measurement is kept for the next start; empty: "
            "nowhere."),
    Setting("budget.reuse", "off", CONFIGURE, "Keep the scene's keys and values for the next question; prefix: of "
            "all its tokens, and nothing is pruned then.", choices=("off", "prefix")),
    Setting("budget.background", 0.5, CONFIGURE, "Largest share of the time that is spent on preparing the scene "
            "while nobody asks (its tokens and prefix, views whose encoding a question interrupted); encoding a key "
            "frame as it comes does not count.", low=0.0, high=1.0),
    Setting("max_new_tokens", 64, ANY_TIME, "Longest answer of a question that does not say, tokens.",
            low=1, high=4096),
    Setting("unsure_below", 0.0, CONFIGURE, "Confidence below which an answer is UNSURE; 0: only one to a question "
            "that the model does not understand.", low=0.0, high=1.0),
    Setting("click_question", "What is this?", ANY_TIME, "Question that is asked about a point on clicked_point; "
            "the point stands where it says {p}, else beside the text.",
            check=_not_blank),
    Setting("scene.frame_id", "map", CONFIGURE, "Frame of the scene: gravity-aligned, z up.", check=_not_blank),
    Setting("scene.directory", "", START, "Directory that scene.file must lie in, an absolute path; empty: "
            "adatoken3d in $ROS_HOME or ~/.ros.", check=_local_path),
    Setting("scene.file", "", ANY_TIME, "File of the services save_scene and load_scene, an absolute path.",
            check=_local_path),
    Setting("scene.on_load", "replace", ANY_TIME, "Whether load_scene replaces the scene or adds to it; a file of "
            "another map is never added.", choices=("replace", "merge")),
    Setting("scene.map_id", "", CONFIGURE, "Name of the map that the scene frame belongs to: files of another one are "
            "refused; empty: one is made up, or that of a loaded file.", check=_map_id),
    Setting("scene.autosave_period", 0.0, ANY_TIME, "Seconds between two files of the scene that are written by "
            "themselves to scene.directory, if it has changed; 0: none is.", low=0.0, high=1e6),
    Setting("scene.autosave_versions", 3, ANY_TIME, "How many of these files are kept.", low=1, high=1000),
    Setting("scene.restore", False, CONFIGURE, "Begin with the newest of these files that can be used."),
    Setting("scene.max_views", 20, CONFIGURE, "Key frames that are kept; beyond it, the one goes that is missed "
            "least: that alone shows few voxels, is far away, is old.", low=1, high=1000),
    Setting("scene.max_voxels", 20000, CONFIGURE, "Occupied voxels that are kept, as far as dropping views can do it.",
            low=1, high=10**7),
    Setting("scene.near", 5.0, CONFIGURE, "A view this far from the newest counts half when it is decided which one "
            "goes, metres.", low=0.01, high=1e6),
    Setting("scene.far", 0.0, CONFIGURE, "No view is kept this far from the newest, metres; 0: any distance.",
            low=0.0, high=1e6),
    Setting("scene.max_age", 0.0, CONFIGURE, "No view is kept that is this much older than the newest, seconds; 0: "
            "any age.", low=0.0, high=1e9),
    Setting("scene.question_views", 0, CONFIGURE, "Views that a question is about where more are kept, chosen by "
            "what they cover; 0: as many as the model was trained with.", low=0, high=1000),
    Setting("scene.min_translation", 0.15, CONFIGURE, "A view this far from all kept ones is a key frame, metres.",
            low=0.0, high=100.0),
    Setting("scene.min_rotation", 10.0, CONFIGURE, "A view turned this much from all kept ones is a key frame, "
            "degrees.", low=0.0, high=180.0),
    Setting("scene.min_gain", 0.02, CONFIGURE, "Share of such a view that must lie where nothing was seen yet, "
            "unless the scene has changed.", low=0.0, high=1.0),
    Setting("scene.min_sharpness", 0.5, CONFIGURE, "A frame less sharp than this share of the recent ones' median is "
            "blurred and is passed over for a sharper one; 0: none is.", low=0.0, high=1.0),
    Setting("scene.sharpness_wait", 0.5, CONFIGURE, "Longest wait for a sharper frame, seconds.", low=0.0, high=60.0),
    Setting("scene.change_interval", 1.0, CONFIGURE, "Seconds between two looks at whether a known place has changed.",
            low=0.0, high=1e6),
    Setting("scene.min_change", 8, CONFIGURE, "A known place has changed if so many patches lie where nothing was, "
            "or so many voxels are looked through.", low=1, high=10**6),
    Setting("scene.max_disagreement", 0.2, CONFIGURE, "A frame of whose points more than this share would stand in "
            "front of what the views near it measured there (a wrong pose) waits until others agree with it; 0: every "
            "frame is believed.", low=0.0, high=1.0),
    Setting("scene.max_height", 4.0, CONFIGURE, "With that, depth counts as wrong in scale where the floor seems to be "
            "more than this below the camera, metres; 0: it may be at any depth.", low=0.0, high=1000.0),
    Setting("scene.carving", True, CONFIGURE, "Take out of the scene what a newer frame looks through."),
    Setting("scene.max_depth", 10.0, CONFIGURE, "Depth beyond this is not used, metres.", low=0.01, high=1000.0),
    Setting("scene.origin", (0.0, 0.0, 0.0), CONFIGURE, "Point of the scene frame that the model sees as its origin "
            "(floor in mid room), metres.", check=_three_numbers),
    Setting("scene.origin_mode", "auto", CONFIGURE, "Whether that origin stays, or follows the floor and the middle "
            "of what has been seen, in whole voxels.", choices=("fixed", "auto")),
    Setting("scene.on_time_jump", "clear", ANY_TIME, "What becomes of the scene when stamps jump back (a bag that "
            "starts again).", choices=("clear", "keep")),
    Setting("memory.limit_mb", 0.0, CONFIGURE, "Most that a scene may hold in memory, its views, what is known of free "
            "space, what has gone and its prefix together, megabytes; views go by their worth; 0: no limit but those "
            "of each.", low=0.0, high=1e6),
    Setting("memory.tombstones", 64, CONFIGURE, "Things that are remembered after they have gone, the newest.",
            low=0, high=1000),
    Setting("memory.tombstone_age", 3600.0, CONFIGURE, "What went longer ago is forgotten, seconds.",
            low=0.0, high=1e9),
    Setting("memory.moved_within", 300.0, CONFIGURE, "What appears within so many seconds of where a thing like it "
            "went is that thing, moved.", low=0.0, high=1e9),
    Setting("goal.distance", 0.8, CONFIGURE, "How far from what an answer rests on its goal is, metres.",
            low=0.1, high=10.0),
    Setting("goal.clearance", 0.25, CONFIGURE, "Radius of the robot: a goal has so much seen free floor around it, "
            "metres.", low=0.0, high=5.0),
    Setting("goal.height", 1.0, CONFIGURE, "Height of the robot: nothing known hangs lower over a goal, metres.",
            low=0.2, high=5.0),
    Setting("pose.source", "tf", ACTIVATE, "Where the camera's pose comes from: TF at the stamp, the topic odom, the "
            "topic pose (also one with covariance), or pose.static.",
            choices=("tf", "odometry", "pose_topic", "pose_with_covariance", "static")),
    Setting("pose.static", (0.0,) * 6, ACTIVATE, "Camera optical frame in the scene frame, for the source static: x "
            "y z roll pitch yaw or x y z qx qy qz qw, metres and radians.", check=check_pose),
    Setting("pose.base_to_camera", (0.0,) * 6, ACTIVATE, "Camera optical frame in the frame whose pose the source "
            "gives: x y z roll pitch yaw or x y z qx qy qz qw, metres and radians; all six zeros: as TF says for "
            "odometry, else no difference.", check=check_pose),
    Setting("pose.tolerance", 0.02, ACTIVATE, "How far the nearest pose may be from the image where none can be "
            "interpolated; neighbours up to ten times this apart are interpolated between, seconds.",
            low=0.0, high=10.0),
    Setting("pose.timeout", 0.5, ACTIVATE, "An image waits for its pose until another one this much newer has come, "
            "seconds.", low=0.0, high=60.0),
    Setting("pose.max_covariance", 0.0, ACTIVATE, "A pose that comes with a larger variance along or around an axis is "
            "not used, m^2 and rad^2; axes of 1e5 and more are not measured; one of zeros or NaN is not known, and the "
            "pose is believed; 0: any is.", low=0.0, high=1e6),
    Setting("pose.odom_frame", "odom", ACTIVATE, "Frame of the robot's odometry: with the source tf, views move with "
            "it when it jumps in the scene frame, as at the closing of a loop; empty: they stay."),
    Setting("pose.map_jump", 0.1, ACTIVATE, "How far it moves until that counts as a jump, metres, or turns, ten "
            "degrees a metre; 0: views stay.", low=0.0, high=1e3),
    Setting("pose.depth_to_rgb", (0.0,) * 6, ACTIVATE, "Frame of the depth images or clouds in the colour camera's "
            "optical frame, where the two differ: x y z roll pitch yaw or x y z qx qy qz qw, metres and radians; all "
            "zeros: as TF says.", check=check_pose),
    Setting("sync.slop", 0.01, ACTIVATE, "Largest difference between the stamps of colour and depth, seconds.",
            low=0.0, high=1.0),
    Setting("input.source", "rgbd", ACTIVATE, "What frames are made of: colour and depth images; organised coloured "
            "clouds on points; clouds on points beside a camera's images; coloured clouds on points alone.",
            choices=("rgbd", "organised_points", "points_with_camera", "points")),
    Setting("input.transport", "raw", ACTIVATE, "Message type of both images: sensor_msgs/Image or CompressedImage.",
            choices=("raw", "compressed")),
    Setting("input.rectified", False, ACTIVATE, "The images are rectified already: P of CameraInfo counts, not K and "
            "D."),
    Setting("qos.reliability", "auto", ACTIVATE, "Reliability that is asked of the inputs' publishers; auto: what "
            "they offer; best_effort matches any, but large images get lost with the default transport.",
            choices=("auto", "reliable", "best_effort")),
    Setting("diagnostics.period", 1.0, ANY_TIME, "Seconds between two messages on /diagnostics.", low=0.05, high=60.0),
    Setting("diagnostics.stale_after", 5.0, ANY_TIME, "An input that has been silent for this long is an error, half "
            "of it a warning, seconds.", low=0.1, high=3600.0),
    Setting("diagnostics.min_rate", 0.0, ANY_TIME, "Images or clouds a second below which an input is a warning, "
            "below half of it an error; 0: rates are only told.", low=0.0, high=1000.0),
)  # fmt: skip

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


class Settings(Mapping[str, Any]):
    """A value for every setting, by its name: plain values, which can be sent to another process.

    `settings | {"scene.max_views": 5}` are others, with that changed.

    Args:
        given: values other than the defaults.

    Raises:
        ValueError: for a name that no setting has, and for a value that cannot be used; names setting, value and range.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        values = {setting.name: setting.default for setting in SETTINGS}
        for name, value in (given or {}).items():
            if name not in BY_NAME:
                raise ValueError(f"there is no setting {quoted(name)}")
            values[name] = BY_NAME[name].plain(value)
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __or__(self, changes: Mapping[str, Any]) -> Settings:
        return Settings({**self, **changes})

    def __repr__(self) -> str:
        return f"Settings({ {name: value for name, value in self.items() if value != BY_NAME[name].default} })"


DEFAULTS = Settings()
# What the engine's classes have by themselves: whoever makes them in a program shows chosen frames to them, each of
# which counts, and means the origin that is given.
OF_CHOSEN_FRAMES = DEFAULTS | {
    "scene.min_gain": 0.0,
    "scene.min_sharpness": 0.0,
    "scene.origin_mode": "fixed",
    "scene.max_disagreement": 0.0,
}
