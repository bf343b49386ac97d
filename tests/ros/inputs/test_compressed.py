# SPDX-License-Identifier: Apache-2.0
"""Compressed images: their sizes off the headers, their pixels, and what is refused before it is decoded."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import png_of

from adatoken3d_ros.ros.inputs import compressed as c
from adatoken3d_ros.ros.inputs.conversions import ConversionError
from adatoken3d_ros.scene.frames import MAX_SIDE


def compressed(fmt: str, data: Any) -> Any:
    return SimpleNamespace(format=fmt, data=np.frombuffer(bytes(data), np.uint8))


def jpeg_head(width: int, height: int, *before: bytes) -> bytes:
    """A jpeg that ends behind its start of frame; `before` are whole segments."""
    return b"\xff\xd8" + b"".join(before) + b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", height, width) + bytes(10)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png_of(7, 5), (7, 5)),
        (jpeg_head(640, 480), (640, 480)),
        # A thumbnail of 9 x 9 in an application segment, filling, a marker without a length.
        (jpeg_head(640, 480, b"\xff\xe1\x00\x17" + jpeg_head(9, 9)), (640, 480)),
        (jpeg_head(640, 480, b"\xff\xff\xff\x01"), (640, 480)),
    ],
)
def test_a_size_is_read_off_the_header(data: bytes, size: tuple[int, int]) -> None:
    assert c.picture_size(data) == size


@pytest.mark.parametrize("kind", [".png", ".jpg"])
@pytest.mark.parametrize("size", [(1, 1), (31, 7), (300, 200)])
def test_the_header_says_what_is_decoded(kind: str, size: tuple[int, int]) -> None:
    data = cv2.imencode(kind, np.zeros((size[1], size[0], 3), np.uint8))[1].tobytes()
    assert c.picture_size(data) == size
    for options in ([cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]):
        again = cv2.imencode(".jpg", np.zeros((size[1], size[0]), np.uint8), options)[1].tobytes()
        assert c.picture_size(again) == size


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (c.PNG_SIGNATURE + bytes(8), "no header"),
        (b"RIFF\x00\x00\x00\x00WEBP", "52494646"),
        (b"\xff\xd8" + b"\xff" * 100_000, "does not say its size"),
        (b"\xff\xd8\xff\xda\x00\x02", "does not say its size"),
        (jpeg_head(640, 480)[:9], "does not say its size"),
    ],
)
def test_a_header_without_a_size_is_refused(data: bytes, named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        c.picture_size(data)


BOMBS = [
    pytest.param("png", png_of(20_000, 20_000), "20000x20000", id="png"),
    pytest.param("jpeg", jpeg_head(65_535, 65_535), "65535x65535", id="jpeg"),
    pytest.param("png", png_of(3000, 1), "3000x1", id="a-line"),
]


@pytest.mark.parametrize(("fmt", "data", "named"), BOMBS)
def test_a_bomb_is_refused_by_its_size_and_never_decoded(
    monkeypatch: pytest.MonkeyPatch, fmt: str, data: bytes, named: str
) -> None:
    assert len(data) < 500_000
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    for prefix, full in ((b"", fmt), (bytes(12), f"16UC1; compressedDepth {fmt}")):
        message = compressed(full, prefix + data)
        reads = (c.compressed_to_metres, c.depth_shape) if prefix else (c.compressed_to_rgb, c.colour_shape)
        for read in reads:
            with pytest.raises(ConversionError, match=named):
                read(message)


def test_the_largest_side_is_read() -> None:
    message = compressed("png", png_of(MAX_SIDE, MAX_SIDE // 8))
    assert c.colour_shape(message) == (MAX_SIDE // 8, MAX_SIDE)
    assert c.depth_shape(compressed("16UC1; compressedDepth png", bytes(12) + png_of(7, 5, bits=16))) == (5, 7)


def test_a_picture_of_another_size_than_its_header_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ConversionError, match="no readable picture"):
        c.compressed_to_rgb(compressed("png", png_of(7, 5)))


def test_png_and_jpeg_come_out_as_rgb() -> None:
    red = np.full((8, 8, 3), (0, 0, 200), np.uint8)  # OpenCV writes BGR
    png = c.compressed_to_rgb(compressed("bgr8; png compressed bgr8", cv2.imencode(".png", red)[1]))
    assert (png == (200, 0, 0)).all()
    jpeg = c.compressed_to_rgb(compressed("jpeg", cv2.imencode(".jpg", red)[1]))
    assert np.abs(jpeg.astype(int) - (200, 0, 0)).max() <= 3


def test_compressed_depth() -> None:
    depth = np.array([[0, 1500], [65535, 65534]], np.uint16)
    png = cv2.imencode(".png", depth)[1].tobytes()
    expected = np.array([[np.nan, 1.5], [np.nan, 65.534]], np.float32)
    np.testing.assert_array_equal(c.compressed_to_metres(compressed("16UC1; png", png)), expected)
    with_header = compressed("16UC1; compressedDepth png", bytes(12) + png)
    np.testing.assert_array_equal(c.compressed_to_metres(with_header), expected)


def test_compressed_float_depth_is_quantised_inverse_depth() -> None:
    # With a = 1000 and b = 0: 500 means 1000 / 500 = 2 m.
    header = bytes(4) + np.array([1000.0, 0.0], "<f4").tobytes()
    png = cv2.imencode(".png", np.array([[0, 500, 250]], np.uint16))[1].tobytes()
    found = c.compressed_to_metres(compressed("32FC1; compressedDepth png", header + png))
    np.testing.assert_array_equal(found, np.array([[np.nan, 2.0, 4.0]], np.float32))


@pytest.mark.parametrize("data", [b"", b"nothing", b"\xff\xd8\xff\xe0 truncated"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ConversionError):
        c.compressed_to_rgb(compressed("jpeg", data))


def test_eight_bit_depth_is_refused() -> None:
    png = cv2.imencode(".png", np.zeros((2, 2), np.uint8))[1]
    with pytest.raises(ConversionError, match="uint8"):
        c.compressed_to_metres(compressed("16UC1; png", png))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.sampled_from(["32FC1; compressedDepth png", "16UC1; png"]), st.binary(max_size=200))
def test_random_compressed_images_raise_nothing_else(fmt: str, data: bytes) -> None:
    for prefix in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"):
        for convert in (c.compressed_to_rgb, c.compressed_to_metres):
            try:
                convert(compressed(fmt, prefix + data))
            except ConversionError:
                continue
