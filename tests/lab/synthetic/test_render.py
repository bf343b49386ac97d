# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adatoken3d_ros.lab.synthetic.render import Renderer, look_at, orbit
from adatoken3d_ros.lab.synthetic.rooms import MAX_OBJECT_HEIGHT, Room, Thing, make_room
from adatoken3d_ros.scene.frames import check_rigid
from adatoken3d_ros.scene.geometry import backproject

K = np.array([[100.0, 0, 40], [0, 100, 30], [0, 0, 1]])
EMPTY = Room(
    seed=0,
    size=(4.0, 4.0, 2.0),
    floor_colours=((200, 200, 200), (100, 100, 100)),
    wall_colour=(10, 20, 30),
    tile=0.5,
    things=(),
)


def test_depth_is_measured_along_the_optical_axis_not_along_the_ray() -> None:
    # From the origin at 1 m height along +x: the wall x = 2 fills rows where |v - 30| < 50, all at z-depth 2.
    _, depth = Renderer(EMPTY).render(K, 81, 61, look_at(np.array([0.0, 0, 1]), np.array([1.0, 0, 1])))
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, 2.0, atol=1e-5)


def test_floor_depth_by_hand() -> None:
    # The same camera with K that sees down to v = 30 + 300 / 3: the floor is hit where 1 m = z * (v - 30) / 50.
    K_wide = np.array([[50.0, 0, 40], [0, 50, 30], [0, 0, 1]])
    _, depth = Renderer(EMPTY).render(K_wide, 81, 131, look_at(np.array([0.0, 0, 1]), np.array([1.0, 0, 1])))
    for v in (56, 80, 130):
        np.testing.assert_allclose(depth[v, 40], 50 / (v - 30), rtol=1e-5)


def test_over_the_walls_there_is_no_depth_and_the_colour_of_the_walls() -> None:
    rgb, depth = Renderer(EMPTY).render(K, 81, 61, look_at(np.array([0.0, 0, 1]), np.array([1.0, 0, 5])))
    assert np.isnan(depth).all()
    assert (rgb == (10, 20, 30)).all()


def test_a_thing_has_its_colour_and_place() -> None:
    box = Thing("red box", "box", (1.0, 0.0, 1.0), (0.4, 0.4, 0.4), (200, 0, 0))
    ball = Thing("blue sphere", "sphere", (1.0, 0.8, 1.0), (0.4, 0.4, 0.4), (0, 0, 200))
    renderer = Renderer(dataclasses.replace(EMPTY, things=(box, ball)))
    rgb, depth = renderer.render(K, 161, 61, look_at(np.array([-1.0, 0, 1]), np.array([1.0, 0, 1])))
    assert depth[30, 40] == pytest.approx(1.8, abs=1e-5)
    assert rgb[30, 40, 0] > 80 and not rgb[30, 40, 1:].any()
    # Left in the image is +y; the nearest point of the sphere's silhouette lies at its centre's depth or before it.
    rgb, depth = renderer.render(K, 81, 61, look_at(np.array([-1.0, 0.8, 1]), np.array([1.0, 0.8, 1])))
    assert depth[30, 40] == pytest.approx(1.8, abs=0.005)
    assert rgb[30, 40, 2] > 80 and not rgb[30, 40, :2].any()


def test_back_projection_lands_on_the_surfaces() -> None:
    room = make_room(3)
    T = orbit(room, 11.0)
    _, depth = Renderer(room).render(K, 81, 61, T)
    v, u = np.mgrid[0:61, 0:81]
    xyz = backproject(depth, u, v, K, T)
    half = np.array(room.size) / 2
    assert (np.abs(xyz[..., :2]) <= half[:2] + 1e-4).all()
    assert (xyz[..., 2] >= -1e-4).all()
    # Most of what an orbiting camera sees is a wall or the floor.
    on_wall = (np.abs(np.abs(xyz[..., :2]) - half[:2]) < 1e-4).any(axis=-1)
    assert (on_wall | (np.abs(xyz[..., 2]) < 1e-4)).mean() > 0.5


def test_same_seed_same_bytes() -> None:
    def picture() -> tuple[bytes, bytes]:
        rgb, depth = Renderer(make_room(5)).render(K, 81, 61, orbit(make_room(5), 3.0))
        return rgb.tobytes(), depth.tobytes()

    assert picture() == picture()


@pytest.mark.parametrize("seed", range(10))
def test_the_camera_stays_in_the_room_and_out_of_things(seed: int) -> None:
    room = make_room(seed)
    poses = [orbit(room, t) for t in np.linspace(-5, 120, 500)]
    for T in poses:
        check_rigid(T)
        assert (np.abs(T[:2, 3]) < np.array(room.size[:2]) / 2 - 0.3).all()
        assert MAX_OBJECT_HEIGHT < T[2, 3] < room.size[2]
    assert max(np.linalg.norm(b[:3, 3] - a[:3, 3]) for a, b in zip(poses, poses[1:], strict=False)) < 0.15


def test_look_at_is_an_upright_optical_frame() -> None:
    T = look_at(np.array([0.0, 0, 1]), np.array([1.0, 0, 1]))
    np.testing.assert_allclose(T[:3, :3], [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], atol=1e-12)
    with pytest.raises(ValueError, match="upward"):
        look_at(np.zeros(3), np.array([0.0, 0, 1]))


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0x4"):
        Renderer(EMPTY).render(K, 0, 4, np.eye(4))
