# SPDX-License-Identifier: Apache-2.0
"""A detector of everyday things in photographs, SSD on MobileNetV2, as evidence for each patch of what it shows.

The network is the published one (Liu et al. 2016, arXiv:1512.02325; Sandler et al. 2018, arXiv:1801.04381), trained on
photographs of COCO, with batch normalisation folded into the convolutions and only the classes of `CLASSES`. Its boxes
are not thinned out: a patch takes the best of all boxes that it is in.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 300
FLOPS = 2114831968.0  # operations (two a multiply-add) on a picture
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels from -1 to 1
EVIDENCE = 3.0  # of a detection that is sure, as a channel beside others of deviation 1
# Classes of COCO by the number in its label map.
CLASSES = {
    **{"person": 1, "bicycle": 2, "bench": 15, "cat": 17, "dog": 18, "backpack": 27, "suitcase": 33},
    **{"sports ball": 37, "bottle": 44, "cup": 47, "bowl": 51, "chair": 62, "couch": 63, "potted plant": 64},
    **{"bed": 65, "dining table": 67, "toilet": 70, "tv": 72, "laptop": 73, "mouse": 74, "keyboard": 76},
    **{"cell phone": 77, "microwave": 78, "oven": 79, "toaster": 80, "sink": 81, "refrigerator": 82},
    **{"book": 84, "vase": 86, "teddy bear": 88},
}
# expansion, stride of the first, channels, blocks
_STAGES = ((1, 1, 16, 1), (6, 2, 24, 2), (6, 2, 32, 3), (6, 2, 64, 4), (6, 1, 96, 3), (6, 2, 160, 3), (6, 1, 320, 1))
_TAPPED = 13  # the block whose widened input is the finest map that boxes are predicted from
_EXTRA = ((256, 512), (128, 256), (128, 256), (64, 128))
_WIDTHS = (576, 1280, *(wide for _, wide in _EXTRA))
_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
_RATIOS = (1.0, 2.0, 0.5, 3.0, 1 / 3)
_CENTRE, _EXTENT = 10.0, 5.0  # what predicted offsets are divided by
_LEAST = 0.1  # score below which a box says nothing
_BOXES = 64  # of an image that are painted, the surest
_EDGE = 0.6  # by how much the evidence of a box is less at its edge than in its middle


def _same(x: Tensor, stride: int) -> Tensor:
    """Zeros around x for a 3 x 3 convolution, where TensorFlow puts them: of an odd number the last is at the end."""
    pads = [max((math.ceil(n / stride) - 1) * stride + 3 - n, 0) for n in (x.shape[3], x.shape[2])]
    return functional.pad(x, [half for pad in pads for half in (pad // 2, pad - pad // 2)])


class _Depthwise(nn.Conv2d):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels, channels, 3, stride, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu6(super().forward(_same(x, self.stride[0])))


class _Block(nn.Module):
    """Inverted bottleneck."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Conv2d(channels, wide, 1) if expansion > 1 else None
        self.depthwise = _Depthwise(wide, stride)
        self.project = nn.Conv2d(wide, width, 1)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its widened input, and what it gives."""
        wide = x if self.expand is None else functional.relu6(self.expand(x))
        out: Tensor = self.project(self.depthwise(wide))
        return wide, x + out if self.residual else out


class _Coarser(nn.Module):
    """A map of half the size."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, narrow, 1)
        self.depthwise = _Depthwise(narrow, 2)
        self.widen = nn.Conv2d(narrow, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu6(self.widen(self.depthwise(functional.relu6(self.narrow(x)))))


class SsdMobileNet(nn.Module):
    """Pictures to boxes with the scores of each of `CLASSES`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        self.blocks = nn.ModuleList()
        channels = 32
        for expansion, stride, width, count in _STAGES:
            for k in range(count):
                self.blocks.append(_Block(channels, width, expansion, stride if k == 0 else 1))
                channels = width
        self.last = nn.Conv2d(channels, _WIDTHS[1], 1)
        self.extra = nn.ModuleList()
        channels = _WIDTHS[1]
        for narrow, wide in _EXTRA:
            self.extra.append(_Coarser(channels, narrow, wide))
            channels = wide
        counts = [3] + [len(_RATIOS) + 1] * (len(_WIDTHS) - 1)
        self.boxes = nn.ModuleList(nn.Conv2d(w, 4 * n, 3, padding=1) for w, n in zip(_WIDTHS, counts, strict=True))
        self.classes = nn.ModuleList(
            nn.Conv2d(w, len(CLASSES) * n, 3, padding=1) for w, n in zip(_WIDTHS, counts, strict=True)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(V, 3, 300, 300) RGB from -1 to 1 -> boxes (V, A, 4) as x0, y0, x1, y1 in parts of the picture, and scores
        (V, A, K) from 0 to 1."""
        x = functional.relu6(self.stem(_same(pixels, 2)))
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            wide, x = block(x)
            if number == _TAPPED:
                maps.append(wide)
        maps.append(functional.relu6(self.last(x)))
        for part in self.extra:
            maps.append(part(maps[-1]))
        offsets = torch.cat([_rows(head(m), 4) for head, m in zip(self.boxes, maps, strict=True)], dim=1)
        scores = torch.cat([_rows(head(m), len(CLASSES)) for head, m in zip(self.classes, maps, strict=True)], dim=1)
        anchors = _anchors([m.shape[2] for m in maps]).to(offsets.device)
        middle = anchors[:, :2] + offsets[..., [1, 0]] / _CENTRE * anchors[:, 2:]
        half = anchors[:, 2:] * torch.exp(offsets[..., [3, 2]] / _EXTENT) / 2
        return torch.cat([middle - half, middle + half], dim=2), scores.sigmoid()


def _rows(x: Tensor, width: int) -> Tensor:
    """(V, n * width, h, w) -> (V, h * w * n, width)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, width)


def _anchors(sides: list[int]) -> Tensor:
    """(A, 4) middle x, y and size x, y, in parts of the picture."""
    found = []
    for number, side in enumerate(sides):
        scale, ratios = _SCALES[number], _RATIOS
        sizes = [(scale * math.sqrt(r), scale / math.sqrt(r)) for r in ratios]
        if number == 0:
            sizes = [(0.1, 0.1), *sizes[1:3]]
        else:
            sizes.append((math.sqrt(scale * _SCALES[number + 1]),) * 2)
        cells = [(k + 0.5) / side for k in range(side)]
        found += [(x, y, *size) for y, x in itertools.product(cells, cells) for size in sizes]
    return torch.tensor(found)


def painted(boxes: Tensor, scores: Tensor, side: int) -> Tensor:
    """Evidence (V, side * side, K) from 0 to 1 of each class in each patch: the best score of the boxes that it is in,
    a little less towards their edges.

    Args:
        boxes: (V, A, 4) as x0, y0, x1, y1 in parts of the picture. scores: (V, A, K).
        side: patches along an edge; patch k is centred on k / side.
    """
    if not boxes.shape[1]:
        return scores.new_zeros(len(scores), side * side, scores.shape[2])
    most = min(_BOXES, boxes.shape[1])
    chosen = scores.amax(dim=2).topk(most, dim=1).indices
    boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    scores = scores.gather(1, chosen[..., None].expand(-1, -1, scores.shape[2]))
    scores = torch.where(scores < _LEAST, 0.0, scores)
    at = torch.arange(side, device=boxes.device) / side
    point = torch.stack([at.repeat(side), at.repeat_interleave(side)], dim=1)
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    # Half a patch is added: a small thing lies between the middles of its patches.
    off = ((point - middle[:, :, None]).abs() / (half + 0.5 / side)[:, :, None]).amax(dim=3)
    weight = torch.where(off < 1, 1 - _EDGE * off**2, 0.0)
    return (weight[..., None] * scores[:, :, None]).amax(dim=1)
