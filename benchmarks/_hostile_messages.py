# SPDX-License-Identifier: Apache-2.0
"""Valid messages and what spoils them: images, calibrations, compressed images, clouds, poses, questions.

Everything is drawn from a seed. Messages are plain fields, so that no type of ROS stands between the attack and what is
attacked; the real ones go over DDS in `_ros_hostile`.
"""

from __future__ import annotations

import array
import math
import random
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from adatoken3d_ros.lmm.llava3d.prompt import CONTROL_WORDS, TEMPLATES
from adatoken3d_ros.lmm.text_places import MAX_CLICKS
from adatoken3d_ros.ros.inputs import conversions as c
from adatoken3d_ros.ros.inputs.pictures import LazyFrame, Pair
from adatoken3d_ros.ros.inputs.poses import BufferedPose, PoseError, TfPose, pose_from_numbers
from adatoken3d_ros.scene.frames import PosedFrame
from benchmarks._hostile import ROOT

sys.path.append(str(ROOT / "tests" / "ros"))

from ros_messages import at, cloud_message, image, info, pose_message, transform

NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    0.03,
    1e-300,
    1e300,
    -1e300,
    1e6,
    1e9,
    1e20,
    1e30,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
]
SIZES = [0, 1, 2, 5, 6, 7, 8, 9, 255, 640, 2**31 - 1, 2**31, 2**32 - 1]
WIDTH, HEIGHT = 8, 6

Spoil = Callable[[Any, random.Random], None]


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


SHAPES = [(3000, 1), (1, 3000), (20_000, 1), (5, 2000), (64, 48), (2000, 2), (1, 1)]


def resize(m: Any, width: int, height: int) -> None:
    """A valid image of a strange shape, with its calibration; of the geometry, too, if it is an image."""
    if not hasattr(m.rgb, "step") or not hasattr(m.depth, "step"):
        return
    m.rgb = SimpleNamespace(**vars(m.rgb) | {"width": width, "height": height, "step": 3 * width})
    m.depth = SimpleNamespace(**vars(m.depth) | {"width": width, "height": height, "step": 2 * width})
    m.rgb.data = array.array("B", bytes(3 * width * height))
    m.depth.data = array.array("B", (1500).to_bytes(2, "little") * (width * height))
    for part in filter(None, (m.info, m.depth_info)):
        part.width, part.height = width, height


def focal(calibration: Any, rng: random.Random) -> None:
    """Positive focal lengths, and yet of no camera: tiny, huge, or of a singular matrix."""
    if calibration is None:
        return
    k = [*calibration.k, *[0.0] * 9][:9]
    k[0], k[4] = (rng.choice([0.03, 1e-9, 5.0, 1e9, 1e30]) for _ in "xy")
    if rng.random() < 0.3:
        k = [1.0] * 9
    calibration.k = k


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
# Those that passed each check, and yet broke something behind it.
HARD_SPOILS: list[Spoil] = [
    lambda m, rng: setattr(m, "pose", at(number(rng), number(rng) % 360)),
    lambda m, rng: m.pose.__setitem__((rng.randrange(3), 3), number(rng)),
    lambda m, rng: resize(m, *rng.choice(SHAPES)),
    lambda m, rng: focal(rng.choice([m.info, m.depth_info]), rng),
]


def lazy_frame(m: Any, source: str, stamp_ns: int = 1_000_000_000) -> LazyFrame:
    pair = Pair(stamp_ns, stamp_ns, m.rgb, m.depth)
    return LazyFrame(source, pair, m.info, m.depth_info, m.pose, m.T, m.rectified, m.is_map)


def convert(m: Any, source: str) -> list[PosedFrame]:
    """A message's way into the scene, in the worker's thread. Raises ConversionError or FrameError."""
    lazy = lazy_frame(m, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's about values that are refused afterwards
        frames = lazy.frames()
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


def compressed(rng: random.Random, pixels: Any, kind: str, fmt: str, prefix: bytes = b"") -> Any:
    data = bytearray(prefix + cv2.imencode(kind, pixels)[1].tobytes())
    for _ in range(rng.choice([0, 0, 1, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    end = rng.choice([len(data)] * 2 + [rng.randrange(len(data) + 1)])
    header = SimpleNamespace(frame_id="camera")
    return SimpleNamespace(format=fmt, data=array.array("B", bytes(data[:end])), header=header)


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


def images(rng: random.Random, spoils: list[Spoil]) -> Any:
    m = frame_messages(rng)
    for spoil in spoils:
        spoil(m, rng)
    return m


RAW_ONLY = FRAME_SPOILS[6:12]  # what only raw images have


def compressed_images(rng: random.Random, spoils: list[Spoil]) -> Any:
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
        if spoil not in RAW_ONLY:
            spoil(m, rng)
    return m


def png_bomb(side: int, bits: int = 8) -> bytes:
    """A black picture of side x side grey pixels: a thousandth of its size."""
    packer = zlib.compressobj(1)
    row = bytes(1 + side * bits // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def cloud_frame(rng: random.Random, source: str) -> Any:
    m = frame_messages(rng)
    depth = np.array([rng.uniform(0.5, 3.0) for _ in range(WIDTH * HEIGHT)], np.float32).reshape(HEIGHT, WIDTH)
    colour = np.frombuffer(rng.randbytes(3 * WIDTH * HEIGHT), np.uint8).reshape(HEIGHT, WIDTH, 3)
    m.depth = cloud_message(colour, depth, np.array(m.info.k).reshape(3, 3))
    m.info.d = []
    m.source = source
    return m


def clouds(rng: random.Random, spoils: list[Spoil], source: str) -> Any:
    m = cloud_frame(rng, source)
    for spoil in spoils:
        spoil(m, rng)
    return m


def poses(rng: random.Random) -> bool:
    """Spoilt poses and transforms into both buffers; whether any was refused. What they give is finite."""
    buffered, tree, static, refused = BufferedPose("map"), TfPose("map"), rng.random() < 0.5, False
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
                refused = True
                assert str(error)
    for source in (buffered, tree):
        frame = rng.choice(["camera", "base", "", "nowhere"])
        try:
            T = source.lookup(rng.randrange(0, 4), frame, final=rng.random() < 0.5)
        except PoseError as error:
            refused = True
            assert str(error)
        else:
            assert np.isfinite(T).all()
    try:
        pose_from_numbers([number(rng) for _ in range(rng.choice([0, 5, 6, 7, 8]))])
    except ValueError as error:
        refused = True
        assert str(error)
    return refused


WORDS = [
    *CONTROL_WORDS, *TEMPLATES["llava_v1"], "USER:", "ASSISTANT:", "</S>", "<IMAGE>", "{question}", "{}", "%s",
    "What is", "chair? ", "\N{CHAIR}", "a" * 3000, "", " ", "\n", "\t",
    "[1, 2, 3]", "[nan, 1, 2]", "[1 2]", "[", "[1,2,3,4,5,6]", "]", "]]", "\N{MINUS SIGN}1", "0x1", "1e999",
    "\N{OBJECT REPLACEMENT CHARACTER}", "\ud800", "\0", "\x1b[31m", "\u202e", "e\u0301", "\uffff",
]  # fmt: skip
PLANES = [0, 0x300, 0x2000, 0x4E00, 0xD7FF, 0xDF00, 0xFE00, 0x1F600]
BUDGETS = [0.0, -1.0, 1e-30, 1e-3, 250.0, 3e38, math.nan, math.inf, -math.inf]
DEFAULTS: dict[str, Any] = {"latency_budget_ms": 0.0, "max_new_tokens": 1}


def request(rng: random.Random, words: list[str]) -> Any:
    """A question as a client may send it."""
    count = rng.choice([0, 0, 1, 2, MAX_CLICKS, MAX_CLICKS + 1])
    spoilt = rng.random() < 0.3
    clicks = [[number(rng) if spoilt else rng.uniform(-5, 5) for _ in "xyz"] for _ in range(count)]
    return SimpleNamespace(
        question=" ".join([*words, *(chr(rng.choice(PLANES) + rng.randrange(300)) for _ in range(rng.randrange(4)))]),
        clicks=[SimpleNamespace(x=x, y=y, z=z) for x, y, z in clicks],
        latency_budget_ms=rng.choice(BUDGETS) if rng.random() < 0.5 else 0.0,
        max_new_tokens=rng.choice([0, 1, 2, 4097, 2**32 - 1]) if rng.random() < 0.3 else 0,
        strategy="",
        without=[SimpleNamespace(x=number(rng), y=0.0, z=1.0) for _ in range(rng.choice([0, 0, 0, 1, 3]))],
        only=[SimpleNamespace(x=number(rng), y=0.0, z=1.0) for _ in range(rng.choice([0, 0, 0, 1, 3]))],
        candidates=[" ".join(words)] * rng.choice([0, 0, 0, 1, 65]),
    )
