# SPDX-License-Identifier: Apache-2.0
"""What a matrix becomes in eight or four bits, and how it lies in a file: the same on every machine.

    int8  weight int8 (out, in), weight_scale float32 (out,): W = weight * scale
    fp8   weight float8_e4m3fn (out, in), weight_scale float32 (out,): W = weight * scale
    int4  weight uint8 (out, in / 2), two to a byte, the even column low; weight_scale, weight_zero bfloat16
          (out, in / GROUP): W = (weight - 8) * scale + zero within each group of columns

Each value is rounded to the nearest (no data is needed for it); scales of int4 are rounded first, so that the values
fit those that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

KINDS = ("int8", "int4", "fp8")
GROUP = 32  # columns that share a scale in int4
SCALE, ZERO = "_scale", "_zero"  # what the names of a weight's other tensors add to its own
BITS = {"int8": 8.0, "fp8": 8.0, "int4": 4 + 32 / GROUP}  # of a weight, scales of groups included
_OF_DTYPE = {"I8": "int8", "F8_E4M3": "fp8", "U8": "int4"}
_ROWS = 128  # that are converted at a time: what lies between stays in a processor's cache, or near it
_TINY = torch.finfo(torch.float32).tiny

Parts = dict[str, Tensor]  # "" is the weight itself, else SCALE, ZERO


def quantise(weight: Tensor, kind: str) -> Parts:
    """(out, in) of any float dtype -> its parts, on the same device.

    Raises:
        ValueError: for a width that `fits` does not allow.
    """
    if not fits(weight.shape, kind):
        raise ValueError(f"a matrix {tuple(weight.shape)} has no {kind}: its width is no multiple of {GROUP}")
    rows: Callable[[Tensor], Parts] = {"int8": _int8, "int4": _int4, "fp8": _fp8}[kind]
    first = rows(weight[:_ROWS].float())
    if len(weight) <= _ROWS:
        return first
    parts = {name: part.new_empty((len(weight), *part.shape[1:])) for name, part in first.items()}
    for start in range(0, len(weight), _ROWS):
        for name, part in (rows(weight[start : start + _ROWS].float()) if start else first).items():
            parts[name][start : start + _ROWS] = part
    return parts


def fits(shape: tuple[int, ...], kind: str) -> bool:
    """Whether a matrix of that shape can be had in that kind; others stay as they are."""
    return len(shape) == 2 and (kind != "int4" or shape[1] % GROUP == 0)


def restore(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that the parts stand for."""
    weight, scale = parts[""], parts[SCALE].float()
    if weight.dtype is not torch.uint8:
        return (weight.float() * scale[:, None]).to(dtype)
    grouped = nibbles(weight).unflatten(1, (scale.shape[1], -1)).float() - 8
    return (grouped * scale[..., None] + parts[ZERO].float()[..., None]).flatten(1).to(dtype)


def nibbles(packed: Tensor) -> Tensor:
    """(out, in / 2) uint8 -> (out, in) uint8 from 0 to 15."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def kind_of(dtype: str) -> str:
    """The kind of a weight by its dtype in safetensors; empty for one that is not of this file's making."""
    return _OF_DTYPE.get(dtype, "")


def stored_bytes(numbers: int, kind: str) -> int:
    """Bytes that so many weights take; scales of rows, a thousandth of that, are left out."""
    return round(numbers * BITS[kind] / 8)


def _int8(rows: Tensor) -> Parts:
    scale = (rows.abs().amax(1) / 127).clamp_min(_TINY)
    return {"": (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), SCALE: scale}


def _fp8(rows: Tensor) -> Parts:
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = (rows.abs().amax(1) / most).clamp_min(_TINY)
    return {"": (rows / scale[:, None]).clamp_(-most, most).to(torch.float8_e4m3fn), SCALE: scale}


def _int4(rows: Tensor) -> Parts:
    grouped = rows.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-20).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    levels = ((grouped - zero.float()[..., None]) / scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
    flat = levels.flatten(1).to(torch.uint8)
    return {"": flat[:, ::2] | (flat[:, 1::2] << 4), SCALE: scale, ZERO: zero}
