# SPDX-License-Identifier: Apache-2.0
"""From the arguments of a launch to what the node is given: parameters, topics, names. Imports neither ROS nor launch.

What wins, from weak to strong: the package's config/adatoken3d.yaml, config/cameras/<camera>.yaml, the user's parameter
file, the launch arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adatoken3d_ros.files import read_file
from adatoken3d_ros.settings import BY_NAME, DEFAULTS
from adatoken3d_ros.text import described

NODE = "adatoken3d"
CAMERAS = ("realsense", "zed", "oakd", "orbbec", "azure", "gazebo")
EVERY_NODE = "/**"  # the one key of a parameter file that is read at the start of a node and by `ros2 param load`
# What a node's command begins with: signals are kept for it until it has taken them over, a moment after its start, in
# which they would end it with a traceback (see signals.leave_at_once).
HELD_BACK = "env --block-signal=INT,TERM"
LAUNCH = "launch"  # section of a camera's file with the values of launch arguments
COMPRESSED = {"rgb_topic": "compressed", "depth_topic": "compressedDepth"}  # as image_transport's plugins name them
TRANSPORTS = ("compressed", "compressedDepth", "theora", "zstd")


@dataclass(frozen=True)
class Argument:
    """A launch argument; empty means that it was not given."""

    name: str
    description: str
    choices: tuple[str, ...] = ()
    default: str = ""


# Launch argument -> the node's own (relative) topic name.
TOPICS = {
    "rgb_topic": "rgb/image",
    "rgb_info_topic": "rgb/camera_info",
    "depth_topic": "depth/image",
    "depth_info_topic": "depth/camera_info",
    "points_topic": "points",
    "odom_topic": "odom",
    "pose_topic": "pose",
}
# CameraInfo of an image: in its namespace unless it is given.
INFO_OF = {"rgb_info_topic": "rgb_topic", "depth_info_topic": "depth_topic"}
# Launch argument -> the parameter that it sets.
PARAMETERS = {
    "model": "model.path",
    "vision_path": "model.vision_path",
    "pose_source": "pose.source",
    "input_source": "input.source",
    "transport": "input.transport",
    "rectified": "input.rectified",
    "reliability": "qos.reliability",
    "scene_frame": "scene.frame_id",
    "base_to_camera": "pose.base_to_camera",
}
BOOLEAN = ("true", "false")


def _of_setting(argument: str) -> Argument:
    setting = BY_NAME[PARAMETERS[argument]]
    unless = "compressed if a topic ends so, else " if argument == "transport" else ""
    choices = ("", *(BOOLEAN if setting.default is False else setting.choices))
    description = f"Parameter {setting.name}; empty: {unless}as the parameter file says. {setting.description}"
    return Argument(argument, description, choices if len(choices) > 1 else ())


ARGUMENTS = (
    Argument("namespace", "Namespace of the node and of its topics."),
    Argument(
        "camera",
        "Camera whose driver's topics and settings are taken, from the package's config/cameras folder; what else is "
        "given goes before.",
        ("", *CAMERAS),
    ),
    Argument("params_file", "Parameter file of the node; empty: the package's config/adatoken3d.yaml."),
    *map(_of_setting, PARAMETERS),
    Argument(
        "namespaced_tf",
        "Listen to tf and tf_static in the namespace, where namespaced robots publish them, instead of /tf.",
        BOOLEAN,
        "false",
    ),
    Argument("rviz", "Start RViz with the package's view.", BOOLEAN, "false"),
    Argument(
        "autostart",
        "Configure (load the model) and activate the node, once; false: leave that to a lifecycle manager.",
        BOOLEAN,
        "true",
    ),
    Argument(
        "use_sim_time",
        "Take the time from /clock; empty: only when a bag is played or the camera is simulated.",
        ("", *BOOLEAN),
    ),
    Argument(
        "log_level",
        "Least severe messages that the node logs.",
        ("debug", "info", "warn", "error", "fatal"),
        "info",
    ),
    Argument("bag", "Bag to play with --clock as soon as the node is active; empty: live topics."),
    *(
        Argument(name, f"CameraInfo for '{topic}'; empty: camera_info beside {INFO_OF[name]}.")
        if name in INFO_OF
        else Argument(name, f"Topic to use for the node's '{topic}'; empty: the camera's, else that name.")
        for name, topic in TOPICS.items()
    ),
)


@dataclass(frozen=True)
class Wiring:
    """What the processes of a launch are started with.

    Attributes:
        files: parameter files, later ones win.
        parameters: of the node, over the files.
        remappings: (name in the node, name on the graph), of the node and of RViz.
        view_remappings: further ones of RViz.
        scene_frame: frame of the scene.
        compressed: whether the images come compressed.
        logger: the node's logger.
        sim_time: whether time comes from /clock.
    """

    files: tuple[Path, ...]
    parameters: dict[str, Any]
    remappings: tuple[tuple[str, str], ...]
    view_remappings: tuple[tuple[str, str], ...]
    scene_frame: str
    compressed: bool
    logger: str
    sim_time: bool


def wire(given: Mapping[str, str], config: Path, pushed_namespace: str = "") -> Wiring:
    """What a launch with these arguments starts.

    Args:
        given: values of launch arguments; those that are missing count as empty.
        config: the package's config folder.
        pushed_namespace: of the group that the launch file is included in.

    Raises:
        FileNotFoundError: for a parameter file that is not there; names it.
        ValueError: for values that cannot be used, or not together; names them.
    """
    unknown = set(given) - {argument.name for argument in ARGUMENTS}
    if unknown:
        raise ValueError(f"there is no launch argument {', '.join(sorted(unknown))}")
    said = {name: value for name, value in given.items() if value}
    files, from_camera = [config / "adatoken3d.yaml"], {}
    if "camera" in said:
        files.append(config / "cameras" / f"{said['camera']}.yaml")
        from_camera = read_parameters(files[-1], LAUNCH)
    if "params_file" in said:
        files.append(Path(said["params_file"]))
    settings = {name: value for file in files for name, value in read_parameters(file, NODE).items()}
    value = {**{name: str(topic) for name, topic in from_camera.items()}, **said}

    topics = _topics(value, settings.get("input.transport") == "compressed")
    parameters: dict[str, Any] = {p: _value(name, said[name]) for name, p in PARAMETERS.items() if name in said}
    if topics.compressed:
        parameters["input.transport"] = "compressed"
    sim_time = "bag" in said or value.get("use_sim_time", "").lower() == "true"
    # The node does it by itself, once. A launch that asked for it would also activate what somebody configures later,
    # and its Ctrl-C would end in a traceback while it waits for the node's service.
    parameters |= {"use_sim_time": sim_time, "autostart": said.get("autostart") != "false"}
    remappings = [(TOPICS[name], topic) for name, topic in topics.names.items()]
    if said.get("namespaced_tf") == "true":
        remappings += [("/tf", "tf"), ("/tf_static", "tf_static")]
    view = []
    if topics.compressed and "rgb_topic" in topics.names:
        own, topic = TOPICS["rgb_topic"], topics.names["rgb_topic"]
        remappings_of_view = {own: base_topic(topic), f"{own}/compressed": topic}
        view = list(remappings_of_view.items())
    namespace = [part for text in (pushed_namespace, said.get("namespace", "")) for part in text.split("/") if part]
    if said.get("namespace", "").startswith("/"):
        namespace = [part for part in said["namespace"].split("/") if part]
    return Wiring(
        files=tuple(files),
        parameters=parameters,
        remappings=tuple(remappings),
        view_remappings=tuple(view),
        scene_frame=str({**DEFAULTS, **settings, **parameters}["scene.frame_id"]),
        compressed=topics.compressed or settings.get("input.transport") == "compressed",
        logger=".".join([*namespace, NODE]),
        sim_time=sim_time,
    )


@dataclass(frozen=True)
class _Topics:
    names: dict[str, str]  # launch argument -> name on the graph, where it is not the node's own
    compressed: bool  # because the names say so


def _topics(value: Mapping[str, str], compressed: bool) -> _Topics:
    """Topics by argument. Raises ValueError for images of which one is raw and one compressed."""
    names = {name: value[name] for name in TOPICS if value.get(name)}
    images = [name for name in COMPRESSED if name in names]
    by_name = [name for name in images if names[name] != base_topic(names[name])]
    transport = value.get("transport", "")
    if transport == "raw" and by_name:
        raise ValueError(f"transport is raw, but {by_name[0]} is {names[by_name[0]]}")
    wanted = transport == "compressed" or (not transport and compressed)
    if wanted:
        for name in images:
            if name not in by_name:
                names[name] += f"/{COMPRESSED[name]}"
    elif by_name and by_name != images:
        both = ", ".join(f"{name} {names[name]}" for name in images)
        raise ValueError(f"both images must be raw or both compressed, but the topics are {both}")
    for info, image in INFO_OF.items():
        if info not in names and image in names:
            names[info] = info_topic(names[image])
    return _Topics(names, transport == "compressed" or bool(by_name))


def base_topic(topic: str) -> str:
    """Name of the raw image whose compressed form a topic is; the topic itself if it is none."""
    head, _, last = topic.rpartition("/")
    return head if head and last in TRANSPORTS else topic


def info_topic(image: str) -> str:
    """Where the CameraInfo of an image topic is, raw or compressed: beside it, in its namespace."""
    return base_topic(image).rpartition("/")[0] + "/camera_info" if "/" in base_topic(image) else "camera_info"


def compressed_view(view: str) -> str:
    """RViz' view, a text, with the compressed form of the colour image."""
    return view.replace(f"Value: {TOPICS['rgb_topic']}\n", f"Value: {TOPICS['rgb_topic']}/compressed\n")


MAX_PARAMETER_BYTES = 2**20


def read_parameters(file: Path, node: str) -> dict[str, Any]:
    """{parameter: value} of a node in a parameter file, sections for all nodes first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no parameter file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the parameter file {file} is not there")
    try:
        content = yaml.safe_load(bytes(read_file(file, MAX_PARAMETER_BYTES)))
        sections = {key: dict(body["ros__parameters"] or {}) for key, body in (content or {}).items()}
    except Exception as error:  # PyYAML lets IndexError, RecursionError and others through
        raise ValueError(f"{file} is no parameter file: {described(error)[:300]}") from error
    wild = "" if node == LAUNCH else EVERY_NODE
    keys = [key for key in sections if key == wild or key.rpartition("/")[2] == node]
    return {name: value for key in sorted(keys, key=len) for name, value in _flat(sections[key])}


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(argument: str, text: str) -> Any:
    """The parameter's value. Raises ValueError, which names the argument."""
    if argument == "rectified":
        return text == "true"
    if argument != "base_to_camera":
        return text
    try:
        numbers = [float(number) for number in text.strip("[]").replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"base_to_camera: {error}") from error
    if len(numbers) not in (6, 7):
        raise ValueError(f"base_to_camera is x y z roll pitch yaw or x y z qx qy qz qw, got {text!r}")
    return numbers
