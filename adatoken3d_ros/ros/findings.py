# SPDX-License-Identifier: Apache-2.0
"""What is wrong with what was seen of a running graph, and the command that mends it. Pure: no ROS import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adatoken3d_ros.ros.wiring import TOPICS
from adatoken3d_ros.text import quoted

OK, WARNING, ERROR = "ok", "warning", "error"
SLOW = 1.0  # Hz; an input that comes less often makes a scene of gaps
LATE = 1.0  # seconds between a stamp and its arrival; clocks of two machines, or a bag without --clock
SEGMENT = 2**19  # bytes of shared memory that Fast DDS gives a process by itself
PROFILE_SHM = 3 * 2**24  # bytes of /dev/shm that a camera, the node and one more need with config/fastdds_shm.xml
FASTDDS = "rmw_fastrtps_cpp"
PROFILES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` is a command or what else to do, empty where nothing is wrong."""

    level: str
    about: str
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Input:
    """A topic that the node listens to.

    Attributes:
        topic: its name on the graph. kind: the type that the node asks for.
        needed: whether there is no scene without it. streamed: images, clouds or poses, which ought to keep coming.
        publishers: nodes that publish it, in full.
        mismatches: publishers that cannot reach the node, in words.
        others: other topics of that type which somebody publishes.
        count: messages that came in `seconds`. size: bytes of one. frame: its header's.
        age: seconds by which its stamp was behind the clock, None without a stamp.
    """

    topic: str
    kind: str
    needed: bool = True
    streamed: bool = True
    publishers: Sequence[str] = ()
    mismatches: Sequence[str] = ()
    others: Sequence[str] = ()
    count: int = 0
    seconds: float = 1.0
    size: int = 0
    frame: str = ""
    age: float | None = None


def of_input(one: Input) -> list[Finding]:
    """Whether it is published, fits, and comes."""
    if not one.publishers:
        level = ERROR if one.needed else OK
        text = f"nobody publishes it ({one.kind})" + ("" if one.needed else "; it is not needed")
        return [Finding(level, one.topic, text, _instead(one) if one.needed else "")]
    if one.mismatches:
        return [Finding(ERROR, one.topic, text, _mend_of(text)) for text in one.mismatches]
    who = ", ".join(one.publishers)
    if not one.count:
        if not one.streamed:
            return [Finding(OK, one.topic, f"published by {who}; nothing new in {one.seconds:.0f} s")]
        text = f"{who} publishes it, but nothing came in {one.seconds:.0f} s"
        mend = f"look whether the driver runs and sees its sensor: ros2 topic hz {one.topic}"
        return [Finding(ERROR if one.needed else WARNING, one.topic, text, mend)]
    found, rate = [], one.count / one.seconds
    if one.streamed and rate < SLOW:
        text = f"{rate:.2f} messages a second, less than {SLOW:g}"
        found.append(Finding(WARNING, one.topic, text, "raise the rate in the driver, or look for lost messages below"))
    if len(one.publishers) > 1 and one.streamed:
        text = f"{len(one.publishers)} publishers: {who}"
        found.append(Finding(WARNING, one.topic, text, "stop one of them, or remap it to another topic"))
    if one.age is not None and abs(one.age) > LATE:
        when = f"{one.age:.1f} s old" if one.age > 0 else f"{-one.age:.1f} s in the future"
        mend = (
            "set both machines' clocks by NTP (chronyc tracking); for a bag: ros2 bag play --clock, use_sim_time:=true"
        )
        found.append(Finding(WARNING, one.topic, f"its stamps are {when} as they come", mend))
    return found or [Finding(OK, one.topic, f"{rate:.1f} messages a second from {who}")]


def of_shared_memory(inputs: Iterable[Input], environment: Mapping[str, str], free: int, profile: str) -> list[Finding]:
    """Whether large messages go through memory that they fit into.

    Args:
        environment: of this process. free: bytes of /dev/shm. profile: path of fastdds_shm.xml.
    """
    about = "shared memory"
    middleware = environment.get("RMW_IMPLEMENTATION") or FASTDDS
    if middleware != FASTDDS:
        return [Finding(OK, about, f"not looked at: the middleware is {middleware}")]
    given = next((f"{name}={environment[name]}" for name in PROFILES if environment.get(name)), "")
    sizes: Counter[str] = Counter()  # of one message on each topic, by publisher: they share its segment
    for one in inputs:
        for who in one.publishers:
            sizes[who] += one.size
    who, together = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    if given:
        if free < PROFILE_SHM:
            text = f"{free / 2**20:.0f} MiB of /dev/shm are free, and {given}"
            return [Finding(WARNING, about, text, "give a container more: docker run --shm-size=256m")]
        return [Finding(OK, about, f"{given}; {free / 2**20:.0f} MiB of /dev/shm are free")]
    if together <= SEGMENT:
        return [Finding(OK, about, "Fast DDS's half a megabyte is enough for what came")]
    text = f"what {who} sends at once has {together / 2**20:.2f} MiB, Fast DDS has room for 0.50: messages get lost"
    mend = f"in every terminal: export {PROFILES[0]}={profile} (on Jazzy {PROFILES[1]})"
    return [Finding(WARNING, about, text, mend)]


@dataclass(frozen=True)
class Transforms:
    """What /tf and /tf_static hold: the names, whether a way leads from `camera` to `scene`, and the camera's root."""

    scene: str
    camera: str
    frames: Sequence[str] = ()
    connected: bool = False
    root: str = ""


def of_transforms(seen: Transforms) -> list[Finding]:
    """Whether the camera's pose can come from TF."""
    about = "TF"
    if not seen.frames:
        mend = "start what publishes the robot's transforms, or: pose_source:=odometry odom_topic:=/odom"
        return [Finding(ERROR, about, "nothing came on /tf or /tf_static", mend)]
    if seen.scene not in seen.frames:
        near = next((name for name in ("map", "odom", "world") if name in seen.frames), "")
        mend = f"start localisation or mapping, or take another frame: scene_frame:={near or seen.frames[0]}"
        return [Finding(ERROR, about, f"no frame {quoted(seen.scene)}, only {', '.join(seen.frames)}", mend)]
    if not seen.camera:
        return [
            Finding(OK, about, f"{len(seen.frames)} frames, {quoted(seen.scene)} among them; no image named its own")
        ]
    if seen.connected:
        return [Finding(OK, about, f"a way leads from {quoted(seen.camera)} to {quoted(seen.scene)}")]
    root = seen.root or seen.camera
    mend = (
        f"start what says where {root} is on the robot, or: ros2 run tf2_ros static_transform_publisher "
        f"--x 0.1 --z 0.3 --frame-id base_link --child-frame-id {root}"
    )
    return [Finding(ERROR, about, f"no way leads from {quoted(seen.camera)} to {quoted(seen.scene)}", mend)]


def of_memory(
    free: int, needed: str = "", what: str = "", device: str = "cpu", problem: str = "", instead: Sequence[str] = ()
) -> list[Finding]:
    """Whether a model that is not loaded yet fits.

    Args:
        free: bytes. needed: what `what` needs, in words; empty: it is not known.
        problem: that it does not fit. instead: what would, as settings.
    """
    if problem:
        mend = f"end other programs, or take {'; or '.join(instead) or 'a smaller model (docs/models.md): model:=DIR'}"
        return [Finding(ERROR, "memory", problem, mend)]
    text = f"{free / 1e9:.2f} GB are free" + ("" if device == "cpu" else f" on {device}")
    return [Finding(OK, "memory", f"{text}, {what} needs {needed}" if needed else text)]


def _instead(one: Input) -> str:
    """What might be meant by a topic that nobody publishes."""
    argument = next((name for name, topic in TOPICS.items() if one.topic == f"/{topic}"), "")
    if one.others:
        which = f"{argument}:=" if argument else "as the topic of "
        return f"give the node one of these, {which}{' or '.join(one.others)}"
    return "start the camera's driver; ros2 topic list -t shows what there is"


def _mend_of(mismatch: str) -> str:
    """The advice within `subscriptions.mismatches`' text, as a command where it is one."""
    _, _, advice = mismatch.rpartition(": ")
    if "qos_overrides" in advice:
        name, _, value = advice.removeprefix("set ").partition(" to ")
        return f"start the node with reliability:=auto, or -p {name}:={value}"
    if "publishes" in mismatch and "is asked for" in mismatch:
        return "remap to a topic of that type (transport:=compressed for CompressedImage, input_source:=... for clouds)"
    return advice
