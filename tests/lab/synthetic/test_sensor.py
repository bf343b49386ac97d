# SPDX-License-Identifier: Apache-2.0
"""Cameras of everyday: colours, depth, textures, and where somebody looks."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.sensor import (
    kinect_depth,
    motion,
    photographed,
    seen_of,
    sensed_views,
    sheared,
    streak,
)
from adatoken3d_ros.lab.synthetic.texture import TRAINED, factors, value_noise


def test_views_follow_from_the_seed_and_are_told_a_little_wrong() -> None:
    renderer = Renderer(make_room(3), TRAINED)
    views, again = sensed_views(renderer, 3, 4), sensed_views(renderer, 3, 4)
    assert 1 <= len(views) <= 4
    for one, other in zip(views, again, strict=True):
        np.testing.assert_array_equal(one.frame.rgb, other.frame.rgb)
        np.testing.assert_array_equal(one.frame.depth, other.frame.depth)
    frame = views[0].frame
    rgb, depth, ids = renderer.render(frame.K, 320, 240, frame.T_world_camera)
    # A degree and a centimetre off, so most of what is seen is the same, but not all.
    assert 0.8 < float((ids == views[0].ids).mean()) < 1
    both = np.isfinite(depth) & np.isfinite(frame.depth)
    assert 0 < float(np.median(np.abs(depth - frame.depth)[both])) < 0.05


def test_some_rooms_are_seen_in_part() -> None:
    rng = np.random.default_rng(0)
    counts = [seen_of(8, rng) for _ in range(400)]
    assert 0.25 < np.mean([c < 8 for c in counts]) < 0.45 and (min(counts), max(counts)) == (2, 8)
    assert seen_of(1, rng) == 1


def test_depth_comes_in_steps_and_has_holes() -> None:
    rng = np.random.default_rng(0)
    depth = np.full((120, 160), 2.0, np.float32)
    measured = kinect_depth(depth, np.full((120, 160, 3), 128, np.uint8), rng)
    found = measured[np.isfinite(measured)]
    assert 0.5 < len(found) / depth.size < 1
    # At two metres the step is 2.85 mm times four, give or take what noise adds to the distance.
    levels = np.unique(found)
    assert np.median(np.diff(levels)) < 0.0125 and abs(float(np.median(found)) - 2) < 0.012
    dark = kinect_depth(depth, np.zeros((120, 160, 3), np.uint8), np.random.default_rng(0))
    assert np.isnan(dark).mean() > np.isnan(measured).mean() + 0.1


def test_a_photograph_differs_but_shows_the_same() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200
    shot = photographed(image, np.random.default_rng(1))
    assert shot.shape == image.shape and shot.dtype == np.uint8 and not np.array_equal(shot, image)
    assert float(shot[:, 40:].mean()) > float(shot[:, :24].mean()) + 60


def test_blur_and_shutter_move_light_and_make_none() -> None:
    kernel = streak(5, 0.0)
    assert kernel.sum() == pytest.approx(1) and (np.flatnonzero(kernel.sum(axis=1)) == len(kernel) // 2).all()
    line = np.zeros((41, 41, 1), np.float32)
    line[:, 20] = 1
    moved = sheared(line[..., 0], 8)
    assert int(moved[0].argmax()) - int(moved[40].argmax()) == pytest.approx(-8, abs=1)
    np.testing.assert_allclose(motion((0, 0, np.pi / 2), np.array([1, 2, 3])) @ (1, 0, 0, 1), (1, 3, 3, 1), atol=1e-12)


def test_textures_keep_colours_and_differ_between_surfaces() -> None:
    grid = np.stack(np.meshgrid(*[np.linspace(0, 3, 40)] * 2, [0.5]), axis=-1).reshape(-1, 3).astype(np.float32)
    noise = value_noise(grid * 5, 7)
    assert float(np.abs(noise).max()) <= 1 and float(noise.std()) > 0.15
    np.testing.assert_array_equal(noise, value_noise(grid * 5, 7))
    near = value_noise((grid * 5 + np.float32(1e-3)).astype(np.float32), 7)
    assert float(np.abs(noise - near).max()) < 0.01  # smooth
    ids = np.repeat(np.arange(10, dtype=np.int16), len(grid) // 10)
    found = factors(grid, ids, np.random.default_rng(0))
    spread = [float(found[ids == k].std()) for k in range(10)]
    assert 0 < sum(s == 0 for s in spread) < 10  # some stay plain
    assert float(np.abs(found.mean() - 1)) < 0.03
