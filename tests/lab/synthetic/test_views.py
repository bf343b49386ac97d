# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lab.synthetic.camera import look_at
from adatoken3d_ros.lab.synthetic.furnished import assemble, make_room
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, colour_names, load_pack
from adatoken3d_ros.lab.synthetic.items import CEILING, FIRST_ITEM, FLOOR, WALL
from adatoken3d_ros.lab.synthetic.layout import TALL
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import choose_views, noisy_colour, noisy_depth, orbit, render_views, sights
from adatoken3d_ros.scene.frames import check_rigid
from adatoken3d_ros.scene.geometry import backproject

K = np.array([[50.0, 0, 40], [0, 50, 30], [0, 0, 1]])
PACK = load_pack()
CRATE = PACK["BlendSwap-CC-0/crate"]


def test_an_empty_room_by_hand() -> None:
    renderer = Renderer(assemble((4.0, 4.0, 2.5), []))
    _, depth, ids = renderer.render(K, 81, 131, look_at(np.array([0.0, 0, 1]), np.array([1.0, 0, 1])))
    # The wall at x = 2, z-depth 2, from row 30 - 37 (the ceiling at 1.5 m above) to row 30 + 25 (the floor 1 m below).
    assert depth[30, 40] == pytest.approx(2.0, abs=1e-5) and ids[30, 40] == WALL
    assert ids[54, 40] == WALL and ids[56, 40] == FLOOR
    assert depth[80, 40] == pytest.approx(50 / 50, rel=1e-5)
    _, _, ids = renderer.render(K, 81, 61, look_at(np.array([0.0, 0, 1]), np.array([0.5, 0, 2.0])))
    assert (ids == CEILING).any()


def test_an_item_is_where_it_stands_and_in_its_colour() -> None:
    # The crate is about 0.6 m wide; its near face is at x = 1 - 0.3.
    room = assemble((6.0, 6.0, 2.5), [(CRATE, "blue", (1.0, 0.0, 0.0), 0.0, FLOOR)])
    rgb, depth, ids = Renderer(room).render(K, 81, 61, look_at(np.array([-1.0, 0, 0.3]), np.array([1.0, 0, 0.3])))
    assert ids[30, 40] == FIRST_ITEM
    assert depth[30, 40] == pytest.approx(2 - CRATE.size[0] / 2, abs=0.03)
    seen = rgb[ids == FIRST_ITEM].mean(axis=0)
    assert seen[2] > 2 * seen[0]
    low, high = np.argwhere(ids == FIRST_ITEM).min(axis=0), np.argwhere(ids == FIRST_ITEM).max(axis=0)
    width = CRATE.size[1] * 50 / (2 - CRATE.size[0] / 2)
    assert high[1] - low[1] == pytest.approx(width, abs=2)


def test_pixels_of_an_item_lie_in_its_box() -> None:
    room = make_room(8)
    for view in render_views(room, count=3):
        frame = view.frame
        v, u = np.mgrid[0 : view.ids.shape[0], 0 : view.ids.shape[1]]
        xyz = backproject(frame.depth, u, v, frame.K, frame.T_world_camera)
        for item in room.items:
            points = xyz[view.ids == item.instance]
            assert (points >= np.array(item.low) - 2e-3).all() and (points <= np.array(item.high) + 2e-3).all()
        assert np.abs(xyz[view.ids == FLOOR][:, 2]).max(initial=0) < 1e-3
        assert not np.isnan(frame.depth).any() and (view.ids >= 0).all()  # the room is closed


def test_same_seed_same_bytes() -> None:
    def picture(seed: int, noise: bool) -> list[bytes]:
        views = render_views(make_room(2), seed=seed, count=2, width=80, height=60, noise=noise)
        return [b for v in views for b in (v.frame.rgb.tobytes(), v.frame.depth.tobytes(), v.ids.tobytes())]

    assert picture(0, True) == picture(0, True)
    assert picture(0, True) != picture(1, True)
    assert picture(0, True) != picture(0, False)


def test_views_show_most_of_the_items() -> None:
    shown = total = 0
    for seed in range(8):
        room = make_room(seed)
        views = render_views(room, count=8, width=160, height=120)
        for view in views:
            eye = view.frame.T_world_camera[:3, 3]
            assert 0.99 < eye[2] < 1.71
            assert (np.abs(eye[:2]) < np.array(room.size[:2]) / 2 - 0.25).all()
        seen = sights(views, np.random.default_rng(0))
        shown += sum(i.instance in seen and seen[i.instance].pixels >= 120 for i in room.items)
        total += len(room.items)
    assert shown / total > 0.8


def test_sights_by_hand() -> None:
    room = assemble((6.0, 6.0, 2.5), [(CRATE, "blue", (1.0, 0.0, 0.0), 0.0, FLOOR)])
    views = render_views(room, count=4)
    seen = sights(views, np.random.default_rng(0))
    assert set(seen) == {FIRST_ITEM}
    sight, item = seen[FIRST_ITEM], room.items[0]
    assert sight.pixels == max(int((v.ids == FIRST_ITEM).sum()) for v in views)
    assert (sight.low >= np.array(item.low) - 1e-3).all() and (sight.high <= np.array(item.high) + 1e-3).all()
    assert (sight.points >= sight.low - 1e-6).all() and (sight.points <= sight.high + 1e-6).all()


def test_clicks_of_questions_are_on_what_the_views_show() -> None:
    room = make_room(11)
    views = render_views(room, count=6)
    visible = sights(views, np.random.default_rng(0))
    for qa in generate(room, np.random.default_rng(0), visible, per_family=4, families=["class", "box"]):
        v = next(v for v in views if (v.ids == qa.about[0]).any())
        assert v is not None
        points = visible[qa.about[0]].points
        assert np.abs(points - qa.clicks[0]).max(axis=1).min() < 0.0051  # written with two decimals


@pytest.mark.parametrize("name", sorted(COLOURS))
def test_a_colour_can_be_told_in_the_picture(name: str) -> None:
    """By the shade-free part of the colour for hues, by the lightness for white, gray and black."""
    room = assemble((5.0, 5.0, 2.5), [(PACK["Scopia/table4"], name, (1.0, 0.0, 0.0), 0.0, FLOOR)])
    T = look_at(np.array([-0.8, 0, 1.5]), np.array([1.0, 0, 0.6]))
    rgb, _, ids = Renderer(room).render(K, 81, 61, T)
    top = np.median(rgb[ids == FIRST_ITEM], axis=0)
    # Undo the light as the walls around show it: the wall's colour is known to nobody, but that it is pale is.
    white = np.percentile(rgb[ids == WALL], 60, axis=0) / 225
    assert name in colour_names(np.clip(top / white, 0, 255)), (name, top)


def test_depth_noise_is_that_of_the_sensor() -> None:
    flat = np.full((200, 200), 3.0, np.float32)
    noisy = noisy_depth(flat, np.random.default_rng(0))
    assert noisy.dtype == np.float32
    lost = np.isnan(noisy)
    assert lost.mean() < 0.01
    # 1.2 mm + 1.9 mm * 2.6^2 = 14.0 mm
    assert np.std(noisy[~lost] - 3.0) == pytest.approx(0.0140, rel=0.05)
    step = flat.copy()
    step[:, 100:] = 1.5
    noisy = noisy_depth(step, np.random.default_rng(0))
    assert 0.5 < np.isnan(noisy[:, 99:101]).mean() < 0.7
    assert np.isnan(noisy[:, :98]).mean() < 0.01
    assert np.isnan(noisy_depth(np.full((4, 4), 9.0, np.float32), np.random.default_rng(0))).all()
    assert np.isnan(noisy_depth(np.full((4, 4), np.nan, np.float32), np.random.default_rng(0))).all()


def test_colour_noise_keeps_the_picture() -> None:
    rgb = np.full((50, 50, 3), 120, np.uint8)
    noisy = noisy_colour(rgb, np.random.default_rng(0))
    assert noisy.dtype == np.uint8 and abs(float(noisy.mean()) - 120) < 11 and noisy.std() > 1


@pytest.mark.parametrize("seed", range(12))
def test_the_orbiting_camera_stays_in_the_room_and_off_tall_things(seed: int) -> None:
    room = make_room(seed)
    tall = [i.footprint for i in room.items if i.high[2] > TALL]
    poses = [orbit(room, t) for t in np.linspace(-3, 90, 300)]
    for T in poses:
        check_rigid(T)
        assert (np.abs(T[:2, 3]) < np.array(room.size[:2]) / 2 - 0.2).all() and T[2, 3] < room.size[2]
        assert all(box.distance(T[0, 3], T[1, 3]) > 0.05 for box in tall)
    assert max(np.linalg.norm(b[:3, 3] - a[:3, 3]) for a, b in zip(poses, poses[1:], strict=False)) < 0.3
    np.testing.assert_allclose(orbit(room, 0.0), orbit(room, 40.0), atol=1e-6)


def test_as_many_views_as_wanted() -> None:
    renderer = Renderer(make_room(3))
    assert len(choose_views(renderer, np.random.default_rng(0), 5)) == 5
