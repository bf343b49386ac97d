# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import cv2
import numpy as np
import pytest

from adatoken3d_ros.scene.sharpness import BlurFilter, sharpness

PERIOD = 33_000_000  # nanoseconds


def picture(seed: int = 0, blur: int = 0, contrast: float = 1.0) -> np.ndarray:
    """Squares of all sizes, as a room has them; blurred along its rows by a camera that turns."""
    rng = np.random.default_rng(seed)
    image = np.full((240, 320, 3), 120, np.uint8)
    for _ in range(60):
        x, y, size = rng.integers(0, 300), rng.integers(0, 220), rng.integers(4, 60)
        image[y : y + size, x : x + size] = 120 + contrast * rng.integers(-100, 100, 3)
    return cv2.blur(image, (blur, 1)) if blur else image


def test_sharpness_by_hand() -> None:
    """Columns 0 and 200: the Laplacian is 400 or -400 everywhere, its variance 160,000; the image's is 10,000."""
    columns = np.zeros((8, 8, 3), np.uint8)
    columns[:, 1::2] = 200
    assert sharpness(columns) == pytest.approx(160_000 / 10_001)
    assert sharpness(np.full((8, 8, 3), 77, np.uint8)) == 0.0


def test_blur_counts_and_contrast_hardly() -> None:
    sharp, dim, blurred = sharpness(picture()), sharpness(picture(contrast=0.3)), sharpness(picture(blur=9))
    assert dim == pytest.approx(sharp, rel=0.2)
    assert blurred < 0.6 * sharp


def show(seen: BlurFilter, count: int, start: int = 0, **options: int) -> None:
    for i in range(start, start + count):
        seen.look(picture(i, **options), i * PERIOD)


def test_a_blurred_picture_waits_for_a_sharper_one_but_not_for_ever() -> None:
    blur = BlurFilter(0.6, wait=0.1)
    show(blur, 10)
    assert not blur.better_waits()
    waited = 0
    for i in range(10, 20):
        show(blur, 1, i, blur=15)
        if not blur.better_waits():
            break
        waited += 1
    assert waited == 3, "the fourth could only be followed by one after 0.1 s"
    blur.settled()
    show(blur, 1, 30)
    assert not blur.better_waits()


def test_without_anything_to_compare_with_every_picture_will_do() -> None:
    blur = BlurFilter(0.6, wait=0.5)
    show(blur, 3)
    show(blur, 1, 3, blur=15)
    assert blur.better_waits()
    fresh = BlurFilter(0.6, wait=0.5)
    show(fresh, 2)
    show(fresh, 1, 2, blur=15)
    assert not fresh.better_waits()
    # Stamps that go back begin anew.
    blur.look(picture(1, blur=15), 0)
    assert not blur.better_waits()


def test_pictures_too_rare_for_the_wait_are_not_waited_for() -> None:
    blur = BlurFilter(0.6, wait=0.5)
    for i in range(5):
        blur.look(picture(i), i * 10**9)
    blur.look(picture(5, blur=15), 5 * 10**9)
    assert not blur.better_waits()
    # Pictures that are not looked at count: one will come soon.
    for i in range(15):
        blur.expect(5 * 10**9 + i * PERIOD)
    blur.look(picture(6, blur=15), 5 * 10**9 + 15 * PERIOD)
    assert blur.better_waits()


def test_of_several_pictures_of_one_moment_none_is_blurred() -> None:
    blur = BlurFilter(0.6, wait=0.5)
    for i in range(60):
        blur.look(picture(i), i * PERIOD)
        blur.settled()  # this direction was kept, or is not wanted
        blur.look(picture(i, blur=15), i * PERIOD + 1)  # one that shows little
        assert not blur.better_waits()
    # A camera after it is judged as any.
    show(blur, 20, 100)
    show(blur, 1, 120, blur=15)
    assert blur.better_waits()


def test_it_can_be_switched_off() -> None:
    blur = BlurFilter(0.0, wait=0.5)
    show(blur, 10)
    show(blur, 1, 10, blur=15)
    assert not blur.better_waits()
