# SPDX-License-Identifier: Apache-2.0
"""Points of the room as pixels of a view, and boxes in answers as boxes in the room."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from adatoken3d_ros.lmm.interface import SeenViews
from adatoken3d_ros.lmm.qwen3vl.places import lift_boxes, tell_poses, write_clicks
from adatoken3d_ros.lmm.text_places import CLICK_MARK

GRID = (5, 10)
FORWARD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1], [0, 0, 0, 1]])  # 1 m high, looks along y


def make_seen() -> SeenViews:
    """Two views of a wall 4 m away, tokens 0.2 m apart; in the second, 1 m to the right, a post stands 2 m away."""
    xyz, view, cell = [], [], []
    for k in range(2):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                post = k == 1 and column in (4, 5)
                scale = 0.5 if post else 1.0
                xyz.append([k + (column - 4.5) * 0.2 * scale, 4.0 * scale, 1 - (row - 2) * 0.2 * scale])
                view.append(k)
                cell.append(row * GRID[1] + column)
    poses = (FORWARD, FORWARD + np.eye(4)[0][:, None] * np.array([0, 0, 0, 1.0]))
    return SeenViews(np.array(xyz), np.array(view), np.array(cell), (GRID, GRID), poses)


SEEN = make_seen()


def test_a_point_is_a_pixel_of_the_view_that_shows_it() -> None:
    clicks = np.array([[-0.9, 4.0, 1.4], [1.05, 2.0, 1.0]])
    text = write_clicks(f"What is {CLICK_MARK} beside {CLICK_MARK}?", clicks, SEEN)
    assert text == "What is the point [50, 100] in image 1 beside the point [550, 500] in image 2?"
    assert write_clicks("What is it?", clicks[1:], SEEN) == (
        "The question is about the point [550, 500] in image 2. What is it?"
    )
    assert write_clicks("What?", clicks[:0], SEEN) == "What?"
    assert write_clicks(CLICK_MARK, clicks[:1], None) == "the point [500, 500] in image 1"


def test_of_the_views_that_show_a_point_the_nearest_tells_it_to_the_pixel() -> None:
    """The second camera comes 2 m nearer to the wall; where the post hides the wall from it, the first one tells."""
    nearer = FORWARD.copy()
    nearer[:3, 3] = [0.0, 2.0, 1.0]
    wall = SEEN.view == 0
    half = np.stack([SEEN.xyz[wall][:, 0] / 2, SEEN.xyz[wall][:, 1], 1 + (SEEN.xyz[wall][:, 2] - 1) / 2], axis=1)
    post = SEEN.cell[wall] % GRID[1] >= 8  # at the right, half a metre away
    half[post] = nearer[:3, 3] + (half[post] - nearer[:3, 3]) / 4
    xyz = np.concatenate([SEEN.xyz[wall], half])
    seen = SeenViews(xyz, SEEN.view, SEEN.cell, (GRID, GRID), (FORWARD, nearer))

    def told(x: float, z: float) -> str:
        return write_clicks(CLICK_MARK, np.array([[x, 4.0, z]]), seen)

    # A token of the second view is 0.1 m wide and high on the wall: 100 and 200 thousandths.
    assert told(0.03, 1.02) == "the point [530, 460] in image 2"
    assert told(-0.45, 1.2) == "the point [50, 100] in image 2"
    assert told(0.43, 1.0) == "the point [715, 500] in image 1", "hidden in the second"
    assert told(-0.9, 1.4) == "the point [50, 100] in image 1", "beside the second"
    # In the middle of nowhere: the nearest token.
    lost = write_clicks(CLICK_MARK, np.array([[0.1, 9.0, 1.0]]), seen)
    assert lost == "the point [550, 500] in image 1"


def test_a_point_is_told_in_metres_to_who_knows_where_the_views_are() -> None:
    click = np.array([[1.05, 2.0, -0.001]])
    assert write_clicks(f"What is {CLICK_MARK}?", click, SEEN, coordinates=True).endswith(
        " in image 2 at (1.05, 2.00, 0.00)?"
    )


def test_poses_in_plain_words_by_hand() -> None:
    turned = np.eye(4)  # looks up along z
    turned[:3, 3] = [-0.004, 1.255, 10.0]
    tilted = np.eye(4)
    tilted[:3, 2] = [-np.cos(np.pi / 6), 0.0, -np.sin(np.pi / 6)]
    assert tell_poses([FORWARD, turned, tilted]) == (
        "Places are (x, y, z) in metres, z up; directions are degrees from the x axis towards the y axis, seen from "
        "above. Image 1: from (0.00, 0.00, 1.00), looking towards 90 degrees. "
        "Image 2: from (0.00, 1.25, 10.00), looking straight up. "
        "Image 3: from (0.00, 0.00, 0.00), looking towards 180 degrees, 30 degrees down.\n"
    )
    nearly = np.eye(4)
    nearly[:3, 2] = [1.0, -1e-4, 1e-4]
    assert "looking towards 0 degrees." in tell_poses([nearly]), "not 360, and level"
    assert tell_poses([]) == ""


def answer(**fields: object) -> str:
    return f"There it is: ```json\n[{json.dumps({'label': 'post', **fields})}]\n```"


def test_a_box_of_pixels_is_where_its_tokens_are() -> None:
    """The wall that the box shows beside the post is not part of it."""
    [box] = lift_boxes(answer(bbox_2d=[340, 0, 660, 1000], image=2), SEEN)
    np.testing.assert_allclose(box, [1.0, 2.0, 1.0, 0.1, 0.0, 0.4], atol=1e-9)
    assert lift_boxes(answer(bbox_2d=[340, 0, 660, 1000]), SEEN) == [box], "the last view"
    [wall] = lift_boxes(answer(bbox_2d=[300, 1000, 0, 0], image=1), SEEN)
    np.testing.assert_allclose(wall, [-0.7, 4.0, 1.0, 0.4, 0.0, 0.8], atol=1e-9)
    [small] = lift_boxes(answer(bbox_2d=[449, 499, 451, 501], image=2), SEEN)
    np.testing.assert_allclose(small, [0.95, 2.0, 1.0, 0, 0, 0], atol=1e-9)
    [over] = lift_boxes(answer(bbox_2d=[-200, -50, 220, 1200], image=1), SEEN)
    np.testing.assert_allclose(over, [-0.8, 4.0, 1.0, 0.2, 0.0, 0.8], atol=1e-9)


def test_where_a_view_has_no_depth_there_is_no_box() -> None:
    there = ~((SEEN.view == 1) & (SEEN.cell % GRID[1] < 4))
    holes = SeenViews(SEEN.xyz[there], SEEN.view[there], SEEN.cell[there], SEEN.grids, SEEN.poses)
    assert lift_boxes(answer(bbox_2d=[10, 10, 60, 60], image=2), holes) == []
    empty = replace(holes, xyz=SEEN.xyz[:0], view=SEEN.view[:0], cell=SEEN.cell[:0])
    assert lift_boxes(answer(bbox_2d=[10, 10, 600, 600], image=2), empty) == []


def test_a_box_of_nine_numbers_is_turned_into_the_room() -> None:
    [box] = lift_boxes(answer(bbox_3d=[0.5, -0.25, 3.0, 0.4, 0.6, 1.0, 0, 0, 0], image=2), SEEN)
    np.testing.assert_allclose(box, [1.5, 3.0, 1.25, 0.4, 1.0, 0.6], atol=1e-9)
    [turned] = lift_boxes(answer(bbox_3d=[0, 0, 3.0, 0.4, 0.6, 1.0, 0, 0.5, 0], image=1), SEEN)
    np.testing.assert_allclose(turned, [0.0, 3.0, 1.0, 1.0, 0.4, 0.6], atol=1e-9)
    # A quarter about x, then one about y: (0.4, 0.6, 1.0) -> (0.4, 1.0, 0.6) -> (0.6, 1.0, 0.4) along the camera's.
    [twice] = lift_boxes(answer(bbox_3d=[0, 0, 3.0, 0.4, 0.6, 1.0, 0.5, 0.5, 0], image=1), SEEN)
    np.testing.assert_allclose(twice, [0.0, 3.0, 1.0, 0.6, 0.4, 1.0], atol=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"bbox_2d": [1, 2, 3]},
        {"bbox_2d": [1, 2, 3, 4], "image": 3},
        {"bbox_2d": [1, 2, 3, 4], "image": 0},
        {"bbox_2d": [1, 2, 3, 1e9]},
        {"bbox_2d": ["a", 2, 3, 4]},
        {"bbox_2d": [True, 2, 3, 4]},
        {"bbox_2d": [1100, 0, 1300, 500]},
        {"bbox_2d": [0, -90, 500, -10]},
        {"bbox_3d": [0, 0, 3, -1, 1, 1, 0, 0, 0]},
        {"bbox_3d": [0, 0, -3, 1, 1, 1, 0, 0, 0]},
        {"box": [1, 2, 3, 4]},
    ],
    ids=str,
)
def test_what_is_no_box_gives_none(fields) -> None:
    assert lift_boxes(answer(**fields), SEEN) == []
    assert lift_boxes("[1, 2, 3, 4] {", SEEN) == []


@pytest.mark.parametrize("inside", ["1" * 5000, "1," * 5000, "1 " * 5000, "1.2.3, 4, 5, 6"])
def test_an_answer_that_runs_away_is_read_at_once(inside: str) -> None:
    """Backtracking over its digits would take longer than any deadline."""
    for end in ("}", "]}"):
        assert lift_boxes('{"bbox_2d": [' + inside + end, SEEN) == []
