# SPDX-License-Identifier: Apache-2.0
"""Matrices in few bits: by hand, the error of rounding, and products against restored matrices."""

from __future__ import annotations

import pytest
import torch

from adatoken3d_ros.lmm.quantized import linear
from adatoken3d_ros.lmm.quantized.formats import GROUP, KINDS, SCALE, ZERO, fits, nibbles, quantise, restore
from adatoken3d_ros.lmm.quantized.linear import DeviceLacks, QuantizedLinear, check_device, kernel_of


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand() -> None:
    parts = quantise(torch.tensor([[1.27, -0.5, 0.0], [0.0, 0.0, 0.0]]), "int8")
    assert parts[""].tolist() == [[127, -50, 0], [0, 0, 0]]
    assert parts[SCALE].tolist() == pytest.approx([0.01, 0.0], abs=1e-9)
    assert restore(parts, torch.float32)[0].tolist() == pytest.approx([1.27, -0.5, 0.0])


def test_int4_by_hand() -> None:
    row = torch.linspace(-4, 3.5, 16).repeat_interleave(2)[None]  # sixteen levels of half a unit, each twice
    parts = quantise(row, "int4")
    assert parts[SCALE].tolist() == [[0.5]] and parts[ZERO].tolist() == [[0.0]]
    assert parts[""].tolist() == [[level | level << 4 for level in range(16)]]
    assert nibbles(parts[""]).tolist() == [[level for level in range(16) for _ in range(2)]]
    assert torch.equal(restore(parts, torch.float32), row)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.08)])
def test_the_error_is_that_of_rounding(kind: str, most: float) -> None:
    weight = matrix(2 * 1024 + 5, 2 * GROUP)  # more rows than are converted at a time
    parts = quantise(weight, kind)
    assert (restore(parts, torch.float32) - weight).norm() / weight.norm() < most
    for row in (0, 1024, 2052):  # each by itself
        assert all(
            torch.equal(part[0], parts[name][row]) for name, part in quantise(weight[row : row + 1], kind).items()
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
def test_products_are_those_of_the_restored_matrix(kind: str, dtype: torch.dtype, rows: int) -> None:
    parts = quantise(matrix(48, 2 * GROUP), kind)
    x, bias = matrix(rows, 2 * GROUP, 1).to(dtype), torch.nn.Parameter(matrix(1, 48, 2)[0].to(dtype))
    layer = QuantizedLinear(kind, parts, dtype, bias)
    expected = x.float() @ restore(parts, torch.float32).T + bias.float()
    found = layer(x[None])
    assert found.shape == (1, rows, 48) and found.dtype is dtype
    assert (found[0].float() - expected).norm() / expected.norm() < (0.02 if kind == "int8" else 0.01)
    assert layer.weight.dtype is dtype and layer.weight.shape == (48, 2 * GROUP)
    assert (layer.weight.float() - restore(parts, torch.float32)).abs().max() < 0.02


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    layer = QuantizedLinear("int8", quantise(matrix(48, 64), "int8"), torch.float32)
    x = matrix(9, 64, 1)
    assert torch.equal(layer(x)[3:4], layer(x[3:4]))


def test_a_matrix_that_no_kernel_takes_is_restored() -> None:
    assert not fits((48, GROUP + 1), "int4") and fits((48, GROUP + 1), "int8") and not fits((48,), "int8")
    parts = quantise(matrix(10, GROUP), "int4")  # the kernel wants rows in sixteens
    layer, x = QuantizedLinear("int4", parts, torch.float32), matrix(2, GROUP, 1)
    assert layer.kernel == "restored"
    torch.testing.assert_close(layer(x), x @ restore(parts, torch.float32).T)


def test_a_kernel_with_wrong_products_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.float() @ b.float()).clamp(-2 * 127**2, 2 * 127**2).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    kernel_of.cache_clear()
    try:
        assert kernel_of("int8", "cpu", "cpu") == "restored"
    finally:
        kernel_of.cache_clear()
    assert "the kernel int8_rows is not used: its products are off by" in caplog.text and "slow" in caplog.text


def test_a_gpu_without_the_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(linear.torch.cuda, "get_device_name", lambda _: "Old")
    with pytest.raises(DeviceLacks, match="int4 needs .* 8.0, Old has 7.5: take model.quantization: int8"):
        check_device("int4", torch.device("cuda"))
    check_device("int8", torch.device("cuda"))
    check_device("fp8", torch.device("cpu"))
