# SPDX-License-Identifier: Apache-2.0
"""Points of the room as pixels of a view, and boxes in answers as boxes in the room."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adatoken3d_ros.lmm.interface import SeenViews
from adatoken3d_ros.lmm.qwen3vl.places import lift_boxes, write_clicks
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


def test_a_box_of_nine_numbers_is_turned_into_the_room() -> None:
    [box] = lift_boxes(answer(bbox_3d=[0.5, -0.25, 3.0, 0.4, 0.6, 1.0, 0, 0, 0], image=2), SEEN)
    np.testing.assert_allclose(box, [1.5, 3.0, 1.25, 0.4, 1.0, 0.6], atol=1e-9)
    [turned] = lift_boxes(answer(bbox_3d=[0, 0, 3.0, 0.4, 0.6, 1.0, 0, 0.5, 0], image=1), SEEN)
    np.testing.assert_allclose(turned, [0.0, 3.0, 1.0, 1.0, 0.4, 0.6], atol=1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"bbox_2d": [1, 2, 3]},
        {"bbox_2d": [1, 2, 3, 4], "image": 3},
        {"bbox_2d": [1, 2, 3, 4], "image": 0},
        {"bbox_2d": [1, 2, 3, 1e9]},
        {"bbox_2d": ["a", 2, 3, 4]},
        {"bbox_2d": [True, 2, 3, 4]},
        {"bbox_3d": [0, 0, 3, -1, 1, 1, 0, 0, 0]},
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
