# SPDX-License-Identifier: Apache-2.0
"""The detector's shape, its boxes before training says anything, and how they become evidence of patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adatoken3d_ros.lmm.vision import ssd
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLiteConfig, EfficientNetTower


@pytest.fixture(scope="module")
def silent() -> ssd.SsdMobileNet:
    """One that predicts no offset, and of every class the score 0.5."""
    network = ssd.SsdMobileNet().eval().requires_grad_(False)
    for head in (*network.boxes, *network.classes):
        for parameter in head.parameters():
            parameter.zero_()
    return network


def test_the_boxes_begin_as_the_published_anchors(silent: ssd.SsdMobileNet) -> None:
    with FlopCounterMode(display=False) as counter:
        boxes, scores = silent(torch.zeros(1, 3, ssd.SIZE, ssd.SIZE))
    assert counter.get_total_flops() == ssd.FLOPS
    # 19, 10, 5, 3, 2 and 1 cells along an edge
    assert boxes.shape == (1, 3 * 361 + 6 * (100 + 25 + 9 + 4 + 1), 4) and scores.shape == (1, 1917, 30)
    assert (scores == 0.5).all()
    sizes = (boxes[0, :, 2:] - boxes[0, :, :2]) * ssd.SIZE
    # width, height in pixels of the published graph
    assert sizes[:3].flatten().tolist() == pytest.approx([30, 30, 84.8528, 42.4264, 42.4264, 84.8528], abs=1e-3)
    first = 3 * 361
    assert sizes[first].tolist() == pytest.approx([105, 105])
    assert sizes[first + 5].tolist() == pytest.approx([125.499, 125.499], abs=1e-3)
    assert boxes[0, -6].tolist() == pytest.approx([0.025, 0.025, 0.975, 0.975])


@pytest.mark.parametrize(("edge", "stride", "before"), [(300, 2, 0), (75, 2, 1), (19, 1, 1), (2, 2, 0)])
def test_zeros_lie_where_tensorflow_puts_them(edge: int, stride: int, before: int) -> None:
    x = torch.ones(1, 1, edge, edge)
    padded = ssd._same(x, stride)
    assert (padded.shape[2] - 3) // stride + 1 == -(-edge // stride)
    assert int((padded[0, 0, :, edge // 2] != 0).int().argmax()) == before


def test_a_patch_takes_the_best_box_that_it_is_in() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.3, 0.3], [0.6, 0.6, 1.0, 1.0]]])
    scores = torch.zeros(1, 3, 2)
    scores[0, 0, 0], scores[0, 1, 0], scores[0, 1, 1], scores[0, 2, 1] = 0.5, 0.9, 0.3, 0.05
    found = ssd.painted(boxes, scores, 4).unflatten(1, (4, 4))[0]
    # Patch (1, 1) is in the middle of the first two boxes. The third says too little.
    assert found[1, 1].tolist() == pytest.approx([0.9, 0.3])
    # (0, 1) is 0.25 above the first box's middle, whose half is 0.25 and half a patch 0.125: two thirds of the way.
    assert found[0, 1].tolist() == pytest.approx([0.5 * (1 - 0.6 * (2 / 3) ** 2), 0.0])
    assert (found[3] == 0).all()
    assert ssd.painted(boxes[:, :0], scores[:, :0], 4).shape == (1, 16, 2)


def test_the_tower_appends_evidence_to_its_own_features(silent: ssd.SsdMobileNet) -> None:
    torch.manual_seed(0)
    tower = EfficientNetTower(EfficientNetLiteConfig(96, (0, 3), detector=True)).eval()
    tower.tower.detector = silent
    plain = EfficientNetTower(EfficientNetLiteConfig(96, (0, 3))).eval()
    plain.tower.load_state_dict({k: v for k, v in tower.tower.state_dict().items() if "detector" not in k})
    rgb = [np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)]
    both = tower(rgb)
    assert both.shape == (1, 36, 43 + 30) == (1, 36, tower.width)
    assert torch.equal(both[..., :43], plain(rgb))
    assert 0.4 * ssd.EVIDENCE < float(both[..., 43:].max()) <= 0.5 * ssd.EVIDENCE and float(both[..., 43:].min()) == 0
    content = EfficientNetLiteConfig(96, (0, 3), detector=True).to_dict()
    assert EfficientNetLiteConfig.from_dict(content).detector
    assert "detector" not in EfficientNetLiteConfig(96, (0, 3)).to_dict()  # shapes of models without stay what they are
    assert tower.flops_per_view == plain.flops_per_view + ssd.FLOPS
