# SPDX-License-Identifier: Apache-2.0
"""Which patches are in a box, what a box is to the head, and which one it means: by hand, and slowly beside."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from adatoken3d_ros.lmm.interface import Placeholder
from adatoken3d_ros.lmm.text_places import CLICK_MARK, PromptError
from adatoken3d_ros.lmm.video3d import checkpoint
from adatoken3d_ros.lmm.video3d.grounding import ground, inside
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.places import median_points, parts_of
from adatoken3d_ros.lmm.video3d.position import cells, sine
from adatoken3d_ros.lmm.video3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig

SEEING_Y = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1], [0, 0, 0, 1]])  # 1 m high, along +y
K = np.array([[100.0, 0, 51], [0, 100, 51], [0, 0, 1]])


@pytest.fixture(scope="session")
def pointing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Video3D, Any]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("pointing"), seed=2, layers=2, grounds=True)
    return checkpoint.load(path)[:2]


def frame(depth: np.ndarray) -> PosedFrame:
    rgb = np.random.default_rng(0).integers(0, 255, (*depth.shape, 3), dtype=np.uint8)
    return PosedFrame(rgb, depth.astype(np.float32), K, SEEING_Y, stamp_ns=1)


def test_probabilities_by_hand():
    query, objects = torch.tensor([2.0, 0.0]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    parts = [math.exp(c / 0.5) for c in (1, 0, -1)]
    expected = torch.tensor([part / sum(parts) for part in parts])
    torch.testing.assert_close(ground(query, objects, 0.5), expected)


def test_points_in_boxes():
    points = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [torch.nan] * 3])
    boxes = torch.tensor([[0.5, 0, 0, 1.0, 0, 0], [0, 0, 0, 0.5, 1, 1], [9, 9, 9, 1, 1, 1]])
    assert inside(points, boxes).tolist() == [[True, True, False], [True, False, False], [False] * 3]


def test_parts_of_tokens():
    assert parts_of(2, 1).tolist() == [[0, 1, 2, 3]]
    # Middles of three patches on a line of two tokens: 1/3, 1, 5/3.
    assert parts_of(3, 2).tolist() == [[0, -1, -1, -1], [1, 2, -1, -1], [3, -1, 6, -1], [4, 5, 7, 8]]
    published = parts_of(27, 14)
    assert published.shape == (196, 4) and sorted(published[published >= 0]) == [*range(27 * 27)]
    row, column = np.divmod(published, 27)
    tokens = np.where(
        published < 0, np.arange(196)[:, None], (2 * row + 1) * 14 // 54 * 14 + (2 * column + 1) * 14 // 54
    )
    assert (tokens == np.arange(196)[:, None]).all()


def test_a_patch_is_where_most_of_it_is():
    depth = np.full((4, 4), 2.0)
    depth[0, :2], depth[1, 0] = 1.0, 8.0  # patch 0: 1, 1, 8, 2 m
    depth[:2, 2:] = [[np.nan, 1.0], [3.0, 0.0]]  # patch 1: two of four
    depth[2:, :2] = [[5.0, np.nan], [0.0, 0.0]]  # patch 2: one of four
    pinhole = replace(frame(depth), K=np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1]]))
    found = median_points(pinhole, PatchGeometry(4, 4, 2, 2), max_depth=9.0)
    # x is depth times column, y the depth, z is 1 less depth times row: of an even number the lower middle.
    np.testing.assert_allclose(found[:2], [[0, 1, -1], [3 * 1, 1, -2]])
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[3], [4, 2, -5])


def slowly(model: Video3D, frames: list[PosedFrame], boxes: np.ndarray) -> torch.Tensor:
    """Box by box, view by view, patch by patch, pixel by pixel: a patch counts where half of its pixels are inside."""
    objects = []
    for box in boxes:
        members = []
        for one in frames:
            with torch.no_grad():
                projected = model.projector(model.vision([one.rgb])[0])
            for row in range(7):
                for column in range(7):
                    count = 0
                    for v in range(14 * row, 14 * row + 14):
                        for u in range(14 * column, 14 * column + 14):
                            z = float(one.depth[v, u])
                            point = np.array([(u - K[0, 2]) / K[0, 0] * z, z, 1 - (v - K[1, 2]) / K[1, 1] * z])
                            count += bool((np.abs(point - box[:3]) <= box[3:] / 2).all())
                    if count >= 14 * 14 / 2:
                        members.append(projected[7 * row + column])
        mean = torch.stack(members).mean(dim=0) if members else torch.zeros(64)
        cell = cells(torch.from_numpy(box[:3]).float(), model.config.low, model.config.high, 0.1)
        objects.append(mean + sine(cell, 64))
    return torch.stack(objects)


def test_objects_are_means_of_patches_as_slowly(pointing):
    model, _ = pointing
    slope = np.linspace(1.0, 3.0, 102)[:, None] + np.zeros(102)
    near = np.where(np.hypot(*(np.mgrid[:102, :102] - 40)) < 25, 1.2, 2.5)
    frames = [frame(slope), replace(frame(near), stamp_ns=2)]
    boxes = np.array([[0, 2.0, 0.7, 3, 1.0, 9], [-0.2, 1.2, 1.2, 0.5, 0.2, 0.5], [5, 5, 5, 1, 1, 1.0]])
    config = PatchConfig(model.sizes.patches)
    features = model.encode_images([one.rgb for one in frames]).flatten(0, 1)
    parts = torch.from_numpy(np.concatenate([model.place_tokens(one, config).parts for one in frames]))
    assert features.shape == (32, 64 + 4 * 32) and parts.shape == (32, 4, 3)
    found = model.object_tokens(features, parts, torch.from_numpy(boxes).float())
    expected = slowly(model, frames, boxes)
    assert (expected[0] - found[2]).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    state = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        query = model.head.query(model.language.model.norm(state))
        scores = [functional.cosine_similarity(query, model.head.obj(one), dim=0) for one in expected]
        scores.append(functional.cosine_similarity(query, model.head.obj(model.head.zero_target), dim=0))
    chances = model.point_at(state, found)
    torch.testing.assert_close(chances, (torch.stack(scores) / 0.07).softmax(0), atol=1e-4, rtol=0)


def test_tokens_are_the_same_with_a_head(pointing, model):
    images = [frame(np.ones((102, 102))).rgb]
    features, places = pointing[0].encode_images(images)[0], torch.ones(16, 3)
    with_head = pointing[0].scene_tokens(features, places)
    torch.testing.assert_close(with_head, pointing[0].scene_tokens(features[:, :64], places))
    assert model.encode_images(images).shape == (1, 16, 64)
    assert model.place_tokens(frame(np.ones((102, 102))), PatchConfig(model.sizes.patches)).parts is None


def test_wording(pointing):
    model, tokenizer = pointing
    assert model.description("Where is the chair?") is None
    text = model.description(" Locate: the red CHAIR ")
    assert text is not None and text.splitlines() == [
        "Identify the object according to the following description.",
        "The red chair",
        "There may be no corresponding object, or there may be one or more objects.",
    ]
    own = "Identify the object according to the following description.\nThe TV."
    assert model.description(own) == own
    prompt = model.ground_prompt(tokenizer, f"{own} near {CLICK_MARK}", n_clicks=1)
    texts = [one.kind if isinstance(one, Placeholder) else tokenizer.decode(list(one)) for one in prompt.pieces]
    assert prompt.points and texts == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "image",
        "\n",
        f"{own} near ",
        "click",
        "<|im_end|>\n<|im_start|>assistant\n<ground>",
    ]
    assert not model.prompt(tokenizer, own).points
    for bad in ("locate:", "LOCATE: "):
        with pytest.raises(PromptError, match="nothing is described"):
            model.description(bad)
    with pytest.raises(PromptError, match="<ground>"):
        model.ground_prompt(tokenizer, "the <ground> there")
