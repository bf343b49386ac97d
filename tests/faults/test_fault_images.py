# SPDX-License-Identifier: Apache-2.0
"""Faults of images: said with their values, nothing else lost, and the next good frame works."""

from __future__ import annotations

import array
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rig import LIMIT, STEP_NS, MakeRig, check_that_all_is_well
from ros_messages import image

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.ros.outputs import diagnostics


def depth_of(values: Any) -> Any:
    """A depth image (48, 64): float32 metres or uint16 millimetres."""
    values = np.asarray(values)
    kind = "32FC1" if values.dtype == np.float32 else "16UC1"
    return image(kind, 64, 48, values.itemsize * 64, values.tobytes())


def set_depth(messages: dict[str, Any], values: Any) -> None:
    header = messages["depth"].header
    messages["depth"] = depth_of(values)
    messages["depth"].header = header


HALF = (np.arange(64) < 32)[None, :] & np.ones((48, 1), bool)
BAD_DEPTHS = [
    pytest.param(np.float32(math.nan), id="nan"),
    pytest.param(np.float32(math.inf), id="inf"),
    pytest.param(np.float32(-math.inf), id="minus-inf"),
    pytest.param(np.float32(-1.5), id="negative"),
    pytest.param(np.uint16(0), id="zero"),
    pytest.param(np.uint16(65535), id="saturated"),
]


@pytest.mark.parametrize("value", BAD_DEPTHS)
def test_bad_depth(make_rig: MakeRig, value: Any) -> None:
    """In half of the image it costs that half; everywhere it costs the frame, and the status says so."""
    rig = make_rig(scene__max_depth=100.0)
    good = np.full((48, 64), 2000 if value.dtype == np.uint16 else 2.0, value.dtype)
    messages = rig.messages(0)
    set_depth(messages, np.where(HALF, value, good))
    rig.send(messages)
    assert rig.fates == ["key_frame"]
    views, xyz = rig.scene()
    # The camera looks along +x from (0, 0, 1): the left half of the picture would be at y > 0.
    assert len(xyz) > 10 and np.allclose(xyz[:, 0], 2.0, atol=1e-3) and (xyz[:, 1] < 0.05).all()
    messages = rig.messages(1)
    set_depth(messages, np.full((48, 64), value))
    rig.send(messages)
    assert rig.fates[-1] == "no_depth"
    report = rig.report()
    assert report.level == diagnostics.ERROR and "no valid depth: none between 0 and 100 m" in report.message
    check_that_all_is_well(rig, (views, xyz))


def test_a_camera_inside_an_object(make_rig: MakeRig) -> None:
    """Whether it sees nothing or a surface a millimetre away: what it saw before stays, and it goes on afterwards."""
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    for index, millimetres in ((1, 0), (2, 1)):
        messages = rig.messages(index)
        set_depth(messages, np.full((48, 64), millimetres, np.uint16))
        rig.send(messages)
    assert rig.fates[1] == "no_depth" and any("no valid depth" in line for line in rig.node.log)
    assert np.isfinite(rig.scene()[1]).all()
    check_that_all_is_well(rig, before)


# --- images


def cut(messages: dict[str, Any], name: str, n: int) -> None:
    messages[name].data = messages[name].data[:-n]


def resize(messages: dict[str, Any], width: int, height: int) -> None:
    """All four messages agree on a size; the pixels are what little data there is, which comes later."""
    for name, step in (("rgb", 3 * width), ("depth", 2 * width), ("rgb_info", 0), ("depth_info", 0)):
        messages[name].width, messages[name].height, messages[name].step = width, height, step
    messages["rgb"].data = array.array("B", bytes(3 * width * height)) if height == 1 else array.array("B")


BAD_FRAMES = [
    pytest.param(lambda m: setattr(m["rgb"], "width", 63), "63x48", id="wrong-size"),
    pytest.param(lambda m: setattr(m["depth"], "height", 0), "64x0", id="no-size"),
    pytest.param(lambda m: setattr(m["rgb"], "encoding", "yuv422"), "'yuv422'", id="wrong-encoding"),
    pytest.param(lambda m: setattr(m["depth"], "encoding", "8UC1"), "'8UC1'", id="wrong-depth-encoding"),
    pytest.param(lambda m: setattr(m["rgb"], "step", 7), "step 7", id="wrong-step"),
    pytest.param(lambda m: cut(m, "depth", 5), "6139 bytes", id="wrong-length"),
    pytest.param(lambda m: setattr(m["rgb"], "data", array.array("B")), "0 bytes", id="no-data"),
    pytest.param(lambda m: setattr(m["rgb_info"], "k", [0.0] * 9), "not calibrated", id="not-calibrated"),
    pytest.param(lambda m: setattr(m["rgb_info"], "k", [math.nan] * 9), "nan", id="nan-calibration"),
    # 50 * 50 - 2500 * 1 = 0: positive focal lengths, and no inverse.
    pytest.param(
        lambda m: setattr(m["rgb_info"], "k", [50, 2500, 31.5, 1, 50, 23.5, 0, 0, 1]), "not the matrix", id="singular"
    ),
    pytest.param(
        lambda m: setattr(m["depth_info"], "k", [0.03, 0, 31.5, 0, 50, 23.5, 0, 0, 1]), "fx=0.03", id="focal-length"
    ),
    pytest.param(lambda m: resize(m, 3000, 1), "3000x1 pixels is too narrow", id="narrow"),
    pytest.param(lambda m: resize(m, 10_000, 5000), "10000x5000 pixels is too large", id="large"),
    pytest.param(
        lambda m: [setattr(m["rgb_info"], side, 2**32 - 1) for side in ("width", "height")],
        "4294967295x4294967295",
        id="large-calibration",
    ),
]


@pytest.mark.parametrize(("spoil", "named"), BAD_FRAMES)
def test_a_bad_frame(make_rig: MakeRig, spoil: Any, named: str) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    messages = rig.messages(1)
    spoil(messages)
    rig.send(messages)
    report = rig.report()
    assert report.level == diagnostics.ERROR and named in report.message, report.message
    assert named in rig.node.log[-1]
    assert rig.fates[-1].startswith("error: ") and rig.inputs.fates["error"] == 1
    check_that_all_is_well(rig, before)


def test_a_compressed_bomb(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 x 20,000 pixels in 48 kB, with a CameraInfo that agrees or not: refused by its header, never decoded."""
    import cv2
    from ros_messages import png_of

    rig = make_rig(input__transport="compressed")

    def good(index: int) -> dict[str, Any]:
        messages = rig.messages(index)
        rgb, depth = (np.frombuffer(messages[name].data, kind) for name, kind in (("rgb", "u1"), ("depth", "<u2")))
        for name, pixels in (("rgb", rgb.reshape(48, 64, 3)), ("depth", depth.reshape(48, 64))):
            compress(messages, name, cv2.imencode(".png", pixels)[1].tobytes())
        return messages

    rig.send(good(0))
    before = rig.scene()
    decode, decoded = cv2.imdecode, []
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: (decoded.append(len(data)), decode(data, flags))[1])
    for index, name in enumerate(("rgb", "depth", "rgb"), start=1):
        messages = good(index)
        compress(messages, name, png_of(20_000, 20_000))
        if index == 3:
            for info_name in ("rgb_info", "depth_info"):
                messages[info_name].width = messages[info_name].height = 20_000
        rig.send(messages)
        assert rig.report().level == diagnostics.ERROR and "20000x20000" in rig.report().message
        assert not decoded
    check_that_all_is_well(rig, before, good)


def compress(messages: dict[str, Any], name: str, data: bytes) -> None:

    header, kind = messages[name].header, "16UC1; png" if name == "depth" else "png"
    messages[name] = SimpleNamespace(header=header, format=kind, data=array.array("B", data))


def test_a_frame_whose_encoding_fails(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs that frame, with what went wrong; it is not tried again, and no question fails by it."""
    rig = make_rig()
    rig.send(rig.messages(0))
    before, tries = rig.scene(), []

    def fail(rgb: Any, **_: Any) -> Any:
        tries.append(len(rgb))
        raise RuntimeError("shapes cannot be multiplied")

    with monkeypatch.context() as patch:
        rig.worker.call(lambda session: patch.setattr(session.runtime.model, "encode_images", fail)).result(LIMIT)
        rig.send(rig.messages(1))
        assert rig.fates[-1].startswith("error: the view at") and tries == [1]
        report = rig.report()
        assert report.level == diagnostics.ERROR and "shapes cannot be multiplied" in report.message
        assert rig.ask().status == Status.TRUNCATED and tries == [1]
    assert rig.inputs.fates["error"] == 1
    check_that_all_is_well(rig, before)


@pytest.mark.parametrize("kind", ["bad-frame", "bad-stamp"])
def test_a_camera_that_stands_still_is_well_again(make_rig: MakeRig, kind: str) -> None:
    """The next frame is not needed, so it is only checked; that it is good shows all the same."""
    rig = make_rig()
    rig.send(rig.messages(0))
    bad = rig.messages(0, after_ns=STEP_NS if kind == "bad-frame" else 10**18)
    bad["rgb"].step = 7
    rig.send(bad)
    assert rig.report().level == diagnostics.ERROR
    rig.send(rig.messages(0, after_ns=2 * STEP_NS))
    assert rig.fates[-1] == "too_similar" and rig.report().level == diagnostics.OK


def test_what_only_a_conversion_finds_is_not_forgotten_for_a_frame_that_was_only_checked(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.send(rig.messages(0))
    blind = rig.messages(1)
    set_depth(blind, np.zeros((48, 64), np.uint16))
    rig.send(blind)
    rig.send(rig.messages(0, after_ns=2 * STEP_NS))
    assert rig.fates == ["key_frame", "no_depth", "too_similar"] and rig.report().level == diagnostics.ERROR
    rig.send(rig.messages(3))
    assert rig.report().level == diagnostics.OK


def test_frames_are_counted_while_somebody_reads_the_counts(make_rig: MakeRig) -> None:
    inputs = make_rig().inputs
    inputs.frame_done("key_frame")
    for fate, count in inputs.fates.items():  # a fate that is new would else end this with a RuntimeError
        inputs.frame_done("nothing_new")
        assert (fate, count) == ("key_frame", 1)
    assert inputs.fates == {"key_frame": 1, "nothing_new": 1}


def test_a_size_that_changes_in_mid_stream(make_rig: MakeRig) -> None:
    """Without its calibration the new size is refused by name, with it the camera goes on in the new size."""
    rig = make_rig()
    rig.send(rig.messages(0))
    before = rig.scene()
    smaller = rig.messages(1, size=(32, 24))
    rig.send({name: smaller[name] for name in ("pose", "rgb", "depth")})
    assert rig.report().level == diagnostics.ERROR
    assert "image is 32x24 but its CameraInfo describes 64x48" in rig.report().message
    rig.send(rig.messages(2, size=(32, 24)))
    assert rig.fates[-1] == "key_frame"
    check_that_all_is_well(rig, before)
