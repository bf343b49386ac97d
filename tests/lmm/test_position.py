# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import torch
from torch import nn

from adatoken3d_ros.lmm.llava3d.position import PositionMLP


def _by_hand() -> PositionMLP:
    mlp = PositionMLP(2)
    with torch.no_grad():
        mlp.lift.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        mlp.lift.bias.zero_()
        mlp.out.weight.copy_(torch.tensor([[2.0, 5.0], [3.0, 7.0]]))
        mlp.out.bias.copy_(torch.tensor([10.0, 20.0]))
    return mlp


def test_numbers_by_hand():
    # (3, 1, 9) -> (3, 1) -> mean 2, variance 1 -> (1, -1) / sqrt(1 + 1e-5) -> (s, 0) -> (10 + 2s, 20 + 3s)
    s = 1 / math.sqrt(1 + 1e-5)
    out = _by_hand()(torch.tensor([[3.0, 1.0, 9.0], [1.0, 3.0, -9.0]]))
    torch.testing.assert_close(out, torch.tensor([[10 + 2 * s, 20 + 3 * s], [10 + 5 * s, 20 + 7 * s]]))


def test_same_as_the_four_layers_in_a_row():
    torch.manual_seed(0)
    mlp = PositionMLP(16)
    reference = nn.Sequential(mlp.lift, mlp.norm, nn.ReLU(), mlp.out)
    xyz = torch.randn(2, 5, 3)
    torch.testing.assert_close(mlp(xyz), reference(xyz))


def test_coordinates_keep_millimetres_in_a_bfloat16_module():
    mlp = _by_hand().to(torch.bfloat16)
    with torch.no_grad():  # the sign of the first number, -0.2 or +0.2, is decided by 4 mm at 4 m
        mlp.lift.weight.copy_(torch.tensor([[100.0, 0, 0], [0, 0, 0]]))
        mlp.lift.bias.copy_(torch.tensor([-400.0, 0.25]))
    near, far = mlp(torch.tensor([[4.0, 0, 0], [4.005, 0, 0]]))
    assert near.dtype == torch.bfloat16
    assert near.tolist() == [15.0, 27.0] and far.tolist() == [12.0, 23.0]


def test_no_points_and_one_point():
    mlp = PositionMLP(8)
    assert mlp(torch.zeros(0, 3)).shape == (0, 8)
    assert mlp(torch.zeros(3, dtype=torch.float64)).shape == (8,)
