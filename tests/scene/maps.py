# SPDX-License-Identifier: Apache-2.0
"""Views of random or chosen points, and token maps that hold them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from adatoken3d_ros.scene.spatial_tokens import SpatialTokens
from adatoken3d_ros.scene.token_map import TokenMap


def view(seed: int, n: int = 40, channels: int = 5, extent: float = 1.0) -> tuple[int, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    xyz = (torch.rand(n, 3, generator=g) - 0.5) * extent
    return seed, torch.randn(n, channels, generator=g), xyz, torch.randint(0, 256, (n, 3), generator=g).to(torch.uint8)


def built(views: list[tuple[int, Tensor, Tensor, Tensor]], **options: bool) -> TokenMap:
    token_map = TokenMap(**options)
    for v in views:
        token_map.add_view(*v)
    return token_map


def assert_same(a: SpatialTokens, b: SpatialTokens, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.voxel, b.voxel)
    assert torch.equal(a.count, b.count)
    assert_close(a.features, b.features, atol=tolerance, rtol=tolerance)
    assert_close(a.xyz, b.xyz, atol=tolerance, rtol=tolerance)
    assert (a.rgb.int() - b.rgb.int()).abs().max() <= 1


# --- pooling ---------------------------------------------------------------------------------------------------------


def single(key: int, *xs: float) -> tuple[int, Tensor, Tensor, Tensor]:
    """A view with a patch at each (x, 0, 0), all with the feature `key`."""
    xyz = torch.tensor([[x, 0.0, 0.0] for x in xs])
    return key, torch.full((len(xs), 2), float(key)), xyz, torch.zeros(len(xs), 3, dtype=torch.uint8)
