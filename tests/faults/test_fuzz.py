# SPDX-License-Identifier: Apache-2.0
"""Ten thousand spoilt messages and requests through the real conversions and checks: only documented errors come out.

Hypothesis chooses what is spoilt and a seed; the rest is drawn from the seed, which is much faster than drawing bytes.
"""

from __future__ import annotations

import array
import math
import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy")

from ros_messages import at, cloud_message, image, info, pose_message, transform

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.engine.requests import InvalidRequest
from adatoken3d_ros.engine.session import SceneSession, SessionConfig
from adatoken3d_ros.model.prompt import CONTROL_WORDS, MAX_CLICKS, TEMPLATES, parse_boxes
from adatoken3d_ros.ros import conversions as c
from adatoken3d_ros.ros.pictures import LazyFrame
from adatoken3d_ros.ros.poses import BufferedPose, PoseError, TfPose, pose_from_numbers
from adatoken3d_ros.ros.questions import question_of
from adatoken3d_ros.ros.streams import STREAMS, Pair
from adatoken3d_ros.scene.frames import FrameError, PosedFrame

FRAMES, COMPRESSED, CLOUDS, VIRTUAL, POSES, REQUESTS = 4000, 1000, 1700, 300, 1000, 2000
assert FRAMES + COMPRESSED + CLOUDS + VIRTUAL + POSES + REQUESTS == 10_000

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, -1e300, 1e9, 5e-324, math.nan, math.inf, -math.inf]
SIZES = [0, 1, 2, 5, 6, 7, 8, 9, 255, 640, 2**31 - 1, 2**31, 2**32 - 1]
WIDTH, HEIGHT = 8, 6

Spoil = Callable[[Any, random.Random], None]


def fuzz(n: int, **draws: Any) -> Callable[[Any], Any]:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    once = settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    return lambda test: once(given(seed=SEEDS, **draws)(test))


def number(rng: random.Random) -> float:
    return rng.choice(NUMBERS) if rng.random() < 0.7 else rng.gauss(0, 10 ** rng.uniform(-3, 6))


def put(part: str, field: str, choices: list[Any]) -> Spoil:
    def spoil(m: Any, rng: random.Random) -> None:
        if getattr(m, part) is not None:
            setattr(getattr(m, part), field, rng.choice(choices))

    return spoil


def spoil_data(part: str) -> Spoil:
    def spoil(m: Any, rng: random.Random) -> None:
        data = bytes(getattr(m, part).data)
        how = rng.randrange(4)
        if how == 0:
            data = data[: rng.randrange(len(data) + 1)]
        elif how == 1:
            data += rng.randbytes(rng.randrange(1, 40))
        elif how == 2:
            data = rng.randbytes(len(data))
        else:
            data = bytes([rng.choice([0, 255, 127, 128])]) * len(data)
        getattr(m, part).data = array.array("B", data)

    return spoil


def spoil_numbers(part: str, field: str) -> Spoil:
    def spoil(m: Any, rng: random.Random) -> None:
        if getattr(m, part) is None:
            return
        values = list(getattr(getattr(m, part), field))
        if values and rng.random() < 0.6:
            values[rng.randrange(len(values))] = number(rng)
        else:
            values = [number(rng) for _ in range(rng.choice([0, 1, 4, 5, 8, 9, 12, 14, len(values)]))]
        setattr(getattr(m, part), field, values)

    return spoil


ENCODINGS = [*c.COLOUR_ENCODINGS, *c.DEPTH_ENCODINGS, "", "8UC1", "yuv422", "bayer_rggb8", "\0", "rgb8 "]
MODELS = [*c.DISTORTION_MODELS, "", "thin_prism"]
FRAME_SPOILS: list[Spoil] = [
    *(put(part, field, SIZES) for part in ("rgb", "depth") for field in ("width", "height", "step")),
    *(put(part, "encoding", ENCODINGS) for part in ("rgb", "depth")),
    *(put(part, "is_bigendian", [0, 1, 255]) for part in ("rgb", "depth")),
    *(spoil_data(part) for part in ("rgb", "depth")),
    *(spoil_numbers(part, field) for part in ("info", "depth_info") for field in "kdp"),
    *(put(part, field, SIZES) for part in ("info", "depth_info") for field in ("width", "height", "binning_x")),
    *(put(part, "distortion_model", MODELS) for part in ("info", "depth_info")),
    lambda m, rng: setattr(m.info.roi, rng.choice(["x_offset", "y_offset", "width", "height"]), rng.choice(SIZES)),
    lambda m, rng: setattr(m, "depth_info", None),
    lambda m, rng: setattr(m, "T", None if rng.random() < 0.5 else at(number(rng))),
    lambda m, rng: setattr(m.depth.header, "frame_id", rng.choice(["", "other", "camera"])),
    lambda m, rng: setattr(m, "rectified", True),
]


def convert(m: Any, source: str) -> list[PosedFrame]:
    """A message's way into the scene, in the worker's thread; empty if it was refused with words."""
    pair = Pair(1_000_000_000, 1_000_000_000, m.rgb, m.depth)
    lazy = LazyFrame(source, pair, m.info, m.depth_info, m.pose, m.T, m.rectified, m.is_map)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's about values that are refused afterwards
            frames = lazy.frames()
    except (c.ConversionError, FrameError) as error:
        assert str(error)
        return []
    for frame in frames:
        assert not (frame.depth <= 0).any() and not np.isinf(frame.depth).any()
    return frames


def frame_messages(rng: random.Random) -> Any:
    K = [5.0, 0.0, 3.5, 0.0, 5.0, 2.5, 0.0, 0.0, 1.0]
    depth = np.array([rng.randrange(500, 3000) for _ in range(WIDTH * HEIGHT)], np.uint16)
    infos = [info(width=WIDTH, height=HEIGHT, k=list(K), d=[0.1, 0, 0, 0, 0]) for _ in range(2)]
    m = SimpleNamespace(
        rgb=image("rgb8", WIDTH, HEIGHT, 3 * WIDTH, rng.randbytes(3 * WIDTH * HEIGHT)),
        depth=image("16UC1", WIDTH, HEIGHT, 2 * WIDTH, depth.tobytes()),
        info=infos[0], depth_info=infos[1], pose=at(1.0), T=None, rectified=False, is_map=False,
    )  # fmt: skip
    m.rgb.header = SimpleNamespace(frame_id="camera")
    m.depth.header = SimpleNamespace(frame_id="camera")
    return m


@fuzz(FRAMES, spoils=st.lists(st.sampled_from(FRAME_SPOILS), max_size=3))
def test_images_and_calibrations(seed: int, spoils: list[Spoil]) -> None:
    rng = random.Random(seed)
    m = frame_messages(rng)
    for spoil in spoils:
        spoil(m, rng)
    assert convert(m, "rgbd") or spoils


def compressed(rng: random.Random, pixels: Any, kind: str, fmt: str, prefix: bytes = b"") -> Any:
    data = bytearray(prefix + cv2.imencode(kind, pixels)[1].tobytes())
    for _ in range(rng.choice([0, 0, 1, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    end = rng.choice([len(data)] * 2 + [rng.randrange(len(data) + 1)])
    header = SimpleNamespace(frame_id="camera")
    return SimpleNamespace(format=fmt, data=array.array("B", bytes(data[:end])), header=header)


@fuzz(COMPRESSED, spoils=st.lists(st.sampled_from(FRAME_SPOILS[6:]), max_size=1))
def test_compressed_images(seed: int, spoils: list[Spoil]) -> None:
    rng = random.Random(seed)
    m = frame_messages(rng)
    colour = np.frombuffer(rng.randbytes(3 * WIDTH * HEIGHT), np.uint8).reshape(HEIGHT, WIDTH, 3)
    inverse = np.frombuffer(rng.randbytes(2 * WIDTH * HEIGHT), np.uint16).reshape(HEIGHT, WIDTH)
    with np.errstate(over="ignore"):
        parameters = b"\0\0\0\0" + np.array([number(rng), number(rng)]).astype("<f4").tobytes()
    depth_format = rng.choice(["16UC1; compressedDepth png", "32FC1; compressedDepth png", "16UC1; png", ""])
    m.rgb = compressed(rng, colour, rng.choice([".jpg", ".png"]), rng.choice(["jpeg", "png", "rgb8; jpeg", "?"]))
    prefix = parameters if "compressedDepth" in depth_format else b""
    m.depth = compressed(rng, rng.choice([inverse, inverse, colour]), ".png", depth_format, prefix)
    for spoil in spoils:
        if spoil not in FRAME_SPOILS[6:12]:  # what only raw images have
            spoil(m, rng)
    convert(m, "rgbd")


def spoil_field(m: Any, rng: random.Random) -> None:
    field = rng.choice(m.depth.fields or [SimpleNamespace()])
    name = rng.choice(["name", "offset", "datatype", "count"])
    setattr(
        field, name, rng.choice(["x", "rgb", "rgba", "intensity", "r", ""]) if name == "name" else rng.choice(SIZES)
    )


CLOUD_SPOILS: list[Spoil] = [
    *(put("depth", name, [*SIZES, 20 * WIDTH, 24]) for name in ("width", "height", "point_step", "row_step")),
    put("depth", "is_bigendian", [True]),
    put("depth", "fields", [[]]),
    spoil_data("depth"),
    spoil_data("depth"),
    spoil_field,
    spoil_field,
    lambda m, rng: m.depth.fields.pop(rng.randrange(len(m.depth.fields))) if m.depth.fields else None,
    lambda m, rng: setattr(m, "info", None if m.source == "organised_points" else m.info),
    lambda m, rng: setattr(m, "T", at(number(rng))),
    spoil_numbers("info", "k"),
]


def cloud_frame(rng: random.Random, source: str) -> Any:
    m = frame_messages(rng)
    depth = np.array([rng.uniform(0.5, 3.0) for _ in range(WIDTH * HEIGHT)], np.float32).reshape(HEIGHT, WIDTH)
    colour = np.frombuffer(rng.randbytes(3 * WIDTH * HEIGHT), np.uint8).reshape(HEIGHT, WIDTH, 3)
    m.depth = cloud_message(colour, depth, np.array(m.info.k).reshape(3, 3))
    m.info.d = []
    m.source = source
    return m


def spoil_cloud(m: Any, rng: random.Random, spoils: list[Spoil]) -> None:
    for spoil in spoils:
        spoil(m, rng)


@fuzz(
    CLOUDS,
    spoils=st.lists(st.sampled_from(CLOUD_SPOILS), max_size=3),
    source=st.sampled_from(["organised_points", "points_with_camera"]),
)
def test_clouds(seed: int, spoils: list[Spoil], source: str) -> None:
    rng = random.Random(seed)
    m = cloud_frame(rng, source)
    spoil_cloud(m, rng, spoils)
    assert convert(m, source) or spoils


@fuzz(VIRTUAL, spoils=st.lists(st.sampled_from(CLOUD_SPOILS), min_size=1, max_size=3), is_map=st.booleans())
def test_clouds_that_are_drawn_into_pictures(seed: int, spoils: list[Spoil], is_map: bool) -> None:
    rng = random.Random(seed)
    m = cloud_frame(rng, "points")
    spoil_cloud(m, rng, spoils)
    m.is_map = is_map
    convert(m, "points")


@fuzz(POSES, static=st.booleans())
def test_poses(seed: int, static: bool) -> None:
    rng = random.Random(seed)
    buffered, tree = BufferedPose("map"), TfPose("map")
    for stamp in (1, 2, rng.randrange(-5, 2**40)):
        message = pose_message(stamp, at(float(stamp), rng.uniform(0, 360)), rng.choice(["", "map", "map", "odom"]))
        edge = transform(stamp, rng.choice(["map", "base", "camera"]), rng.choice(["base", "camera", "map"]), at(1.0))
        for _ in range(rng.randrange(3)):
            part = rng.choice([message.pose.position, message.pose.orientation, edge.transform.rotation])
            setattr(part, rng.choice("xyz"), number(rng))
        for add in (
            lambda m=message: buffered.add(m),
            lambda e=edge: tree.tree.add(e, static=static),
        ):
            try:
                add()
            except (PoseError, c.ConversionError) as error:
                assert str(error)
    for source in (buffered, tree):
        try:
            T = source.lookup(
                rng.randrange(0, 4), rng.choice(["camera", "base", "", "nowhere"]), final=rng.random() < 0.5
            )
        except PoseError as error:
            assert str(error)
        else:
            assert np.isfinite(T).all()
    try:
        pose_from_numbers([number(rng) for _ in range(rng.choice([0, 5, 6, 7, 8]))])
    except ValueError as error:
        assert str(error)


WORDS = [
    *CONTROL_WORDS, *TEMPLATES["llava_v1"], "USER:", "ASSISTANT:", "</S>", "<IMAGE>", "{question}", "{}", "%s",
    "What is", "chair? ", "\N{CHAIR}", "a" * 3000, "", " ", "\n", "\t",
    "[1, 2, 3]", "[nan, 1, 2]", "[1 2]", "[", "[1,2,3,4,5,6]", "]", "]]", "\N{MINUS SIGN}1", "0x1", "1e999",
    "\N{OBJECT REPLACEMENT CHARACTER}", "\ud800", "\0", "\x1b[31m", "\u202e", "e\u0301", "\uffff",
]  # fmt: skip
PLANES = [0, 0x300, 0x2000, 0x4E00, 0xD7FF, 0xDF00, 0xFE00, 0x1F600]
BUDGETS = [0.0, -1.0, 1e-30, 1e-3, 250.0, 3e38, math.nan, math.inf, -math.inf]
DEFAULTS = {"latency_budget_ms": 0.0, "max_new_tokens": 1}


@pytest.fixture(scope="module")
def session(loaded: tuple[Any, Any]) -> SceneSession:
    """It has seen a wall."""
    made = SceneSession(*loaded, SessionConfig(max_new_tokens=1))
    rgb = np.zeros((48, 64, 3), np.uint8)
    K = np.array([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])
    made.observe(PosedFrame(rgb, np.full((48, 64), 2.0, np.float32), K, np.eye(4), 1_000_000_000))
    made.encode_pending()
    return made


@fuzz(REQUESTS, words=st.lists(st.sampled_from(WORDS), max_size=5))
def test_requests(session: SceneSession, seed: int, words: list[str]) -> None:
    rng = random.Random(seed)
    count = rng.choice([0, 0, 1, 2, MAX_CLICKS, MAX_CLICKS + 1])
    spoilt = rng.random() < 0.3
    clicks = [[number(rng) if spoilt else rng.uniform(-5, 5) for _ in "xyz"] for _ in range(count)]
    request = SimpleNamespace(
        question=" ".join([*words, *(chr(rng.choice(PLANES) + rng.randrange(300)) for _ in range(rng.randrange(4)))]),
        clicks=[SimpleNamespace(x=x, y=y, z=z) for x, y, z in clicks],
        latency_budget_ms=rng.choice(BUDGETS) if rng.random() < 0.5 else 0.0,
        max_new_tokens=rng.choice([0, 1, 4096, 4097, 2**32 - 1]) if rng.random() < 0.3 else 0,
    )
    question = question_of(request, DEFAULTS)
    try:
        session._prompt(question)
    except InvalidRequest as error:
        assert str(error)
        asked = session.ask(question)
        assert asked.status == Status.INVALID_REQUEST and asked.status_message
    else:
        if request.max_new_tokens in (0, 1) and rng.random() < 0.05:
            assert session.ask(question).status in (Status.OK, Status.TRUNCATED, Status.INVALID_REQUEST)
    assert all(math.isfinite(v) for box in parse_boxes(question.text) for v in box)


def test_every_kind_of_source_is_fuzzed() -> None:
    assert set(STREAMS) == {"rgbd", "organised_points", "points_with_camera", "points"}
