# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weights are kept in eight or four bits, by torch's own kernels.

Which kernel a machine gets is found out by a product whose result is known: one that is missing, or that gives wrong
numbers on this processor, is not used. Where none is left the weights are restored for each product, which is right and
slow, and is logged once.

    int8  CPU: rows of x are rounded to eight bits, too (each by its own largest value), integer products, exact sums.
          CUDA: weights alone; few rows by `_weight_int8pack_mm`, many by a product with the restored weights.
    int4  weights alone, products in bfloat16: `_weight_int4pack_mm_for_cpu`, and `_weight_int4pack_mm` on CUDA.
    fp8   CUDA: rows rounded to fp8 as well, `_scaled_mm`. CPU: restored for each product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from adatoken3d_ros.lmm.quantized.formats import GROUP, SCALE, ZERO, Parts, nibbles, quantise, restore
from adatoken3d_ros.text import shown

logger = logging.getLogger(__name__)

_FEW = 16  # rows up to which a product is bound by reading the weights
_TILES = 8  # inner tiles of CUDA's four-bit layout
_TOLERANCE = 0.05  # relative difference of a kernel that is right; rounding rows to eight bits makes 0.015
_LEAST = 1e-12  # a row of zeros has no largest value to divide by
# (major, minor) of the first GPUs that have the instructions.
_NEEDED = {"int8": (7, 0), "int4": (8, 0), "fp8": (8, 9)}

Product = Callable[["QuantizedLinear", Tensor], Tensor]


class DeviceLacks(ValueError):
    """A quantisation that a device has no instructions for; the message says what to take instead."""


class QuantizedLinear(nn.Module):
    """y = x W^T + b of a matrix in few bits.

    Args:
        kind: one of `formats.KINDS`. parts: of the matrix, on the device where the products are made.
        dtype: of what `weight` gives. bias: of the layer, or None.

    Attributes:
        kind, in_features, out_features: as given.
        kernel: name of what makes its products.
    """

    data: Tensor
    bias: nn.Parameter | None

    def __init__(self, kind: str, parts: Parts, dtype: torch.dtype, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        device = parts[""].device
        self.kind, self._dtype = kind, dtype
        self.out_features = len(parts[""])
        self.in_features = parts[""].shape[1] * (2 if kind == "int4" else 1)
        self.register_parameter("bias", bias)
        self.kernel = kernel_of(kind, device.type, str(device)) if device.type != "meta" else "restored"
        if self.kernel.startswith("int4") and self.out_features % 16:
            self.kernel = "restored"
        prepare, self._product = _KERNELS[self.kernel]
        for name, part in prepare(parts).items():
            self.register_buffer(name, part, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) that products are made with, restored: for what looks at weights, not for products."""
        if self.kernel.startswith("int4"):
            return self._product(self, torch.eye(self.in_features, device=self.data.device)).T.to(self._dtype)
        return restore(self.parts(), self._dtype)

    def parts(self) -> Parts:
        """As given, where the kernel keeps them so."""
        return {"" if name == "data" else name: part for name, part in self.named_buffers()}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        rows = self._product(self, x.reshape(-1, self.in_features))
        if self.bias is not None:
            rows = rows + self.bias
        return rows.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind} by {self.kernel}"


def check_device(kind: str, device: torch.device) -> None:
    """Raises DeviceLacks for a GPU without the instructions."""
    if device.type != "cuda":
        return
    found, needed = torch.cuda.get_device_capability(device), _NEEDED[kind]
    if found < needed:
        others = [name for name, least in _NEEDED.items() if found >= least]
        instead = f"model.quantization: {others[0]}" if others else "model.quantization: none"
        raise DeviceLacks(
            f"model.quantization {kind} needs a GPU of compute capability {needed[0]}.{needed[1]}, "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: take {instead}"
        )


@cache
def kernel_of(kind: str, device_type: str, device: str) -> str:
    """The first kernel of a kind that makes a right product on a device; `restored`, logged, where none does."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=random)
    weight[0] = torch.tensor([1.0, -1.0]).repeat(64)  # the largest sums there can be: processors without the wide
    x = torch.randn(3, 128, generator=random)  # integer products saturate on them
    x[0] = weight[0]
    expected = x @ weight.T
    for name in _CHOICES.get((kind, device_type), ()):
        try:
            probe: Any = QuantizedLinear.__new__(QuantizedLinear)
            nn.Module.__init__(probe)
            parts = {part: tensor.to(device) for part, tensor in quantise(weight, kind).items()}
            reference = x @ restore(quantise(weight, kind), torch.float32).T
            prepare, product = _KERNELS[name]
            for part, tensor in prepare(parts).items():
                setattr(probe, part, tensor)
            found = product(probe, x.to(device, torch.bfloat16)).float().cpu()
            off = float((found - reference).norm() / expected.norm())
            if off <= _TOLERANCE:
                return name
            problem = f"its products are off by {off:.2g}"
        except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
            problem = shown(error, 200)
        logger.warning("%s on %s: the kernel %s is not used: %s", kind, device, name, problem)
    logger.warning("%s on %s: weights are restored for each product, which is slow", kind, device)
    return "restored"


# --- the kernels: what they keep of the parts, and the product of rows (n, in) -> (n, out) ----------------------------


def _as_they_are(parts: Parts) -> dict[str, Tensor]:
    return {name or "data": part for name, part in parts.items()}


def _restored(layer: Any, x: Tensor) -> Tensor:
    return x @ restore(layer.parts(), x.dtype).T


def _int8_rows(layer: Any, x: Tensor) -> Tensor:
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp_min(_LEAST)
    sums = torch._int_mm((x / scale).round().to(torch.int8), layer.data.T)
    return sums.float() * scale * layer._scale


def _int8_weights(layer: Any, x: Tensor) -> Tensor:
    if len(x) > _FEW:
        return (x @ layer.data.T.to(x.dtype)) * layer._scale.to(x.dtype)
    return torch._weight_int8pack_mm(x, layer.data, layer._scale.to(x.dtype))


def _fp8_rows(layer: Any, x: Tensor) -> Tensor:
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = (x.float().abs().amax(1, keepdim=True) / most).clamp_min(_LEAST)
    rows = (x.float() / scale).to(torch.float8_e4m3fn)
    product: Tensor = torch._scaled_mm(
        rows, layer.data.T, scale_a=scale, scale_b=layer._scale[None], out_dtype=torch.bfloat16
    )
    return product


def _int4_for_cpu(parts: Parts) -> dict[str, Tensor]:
    packed = torch._convert_weight_to_int4pack_for_cpu(nibbles(parts[""]).int(), 1)
    return {"data": packed, "scales": _scales(parts)}


def _int4_for_cuda(parts: Parts) -> dict[str, Tensor]:
    levels = nibbles(parts[""])
    packed = torch._convert_weight_to_int4pack((levels[:, ::2] << 4 | levels[:, 1::2]).contiguous(), _TILES)
    return {"data": packed, "scales": _scales(parts)}


def _scales(parts: Parts) -> Tensor:
    """(in / GROUP, out, 2) as both four-bit kernels want them."""
    return torch.stack([parts[SCALE].T, parts[ZERO].T], dim=-1).contiguous()


def _int4_cpu(layer: Any, x: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), layer.data, GROUP, layer.scales)


def _int4_cuda(layer: Any, x: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x.bfloat16(), layer.data, GROUP, layer.scales)


_KERNELS: dict[str, tuple[Callable[[Parts], dict[str, Tensor]], Product]] = {
    "restored": (_as_they_are, _restored),
    "int8_rows": (_as_they_are, _int8_rows),
    "int8_weights": (_as_they_are, _int8_weights),
    "fp8_rows": (_as_they_are, _fp8_rows),
    "int4_cpu": (_int4_for_cpu, _int4_cpu),
    "int4_cuda": (_int4_for_cuda, _int4_cuda),
}
_CHOICES = {
    ("int8", "cpu"): ("int8_rows",),
    ("int8", "cuda"): ("int8_weights",),
    ("int4", "cpu"): ("int4_cpu",),
    ("int4", "cuda"): ("int4_cuda",),
    ("fp8", "cuda"): ("fp8_rows",),
}
