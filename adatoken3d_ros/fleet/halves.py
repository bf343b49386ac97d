# SPDX-License-Identifier: Apache-2.0
"""Numbers in 16 bits, and what these take on the way without a loss."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from adatoken3d_ros.text import shown

HALVES = {torch.float16: "F16", torch.bfloat16: "BF16"}
_LEVEL = 6  # of zlib; a Huffman code alone is the same at each
_MOST_HALF = 6e4  # above it a number has no 16 bits of the usual kind


class BodyError(ValueError):
    """What came is no body of this format, of another model, or too large; the message names what is wrong."""


def halved(values: Tensor) -> Tensor:
    """Numbers in 16 bits: of more digits where they are small enough, else of more range."""
    small = not values.numel() or float(values.abs().max()) <= _MOST_HALF
    return values.to(torch.float16 if small else torch.bfloat16)


def coded(features: Tensor) -> dict[str, Tensor]:
    """Numbers of 16 bits as two tensors of bytes, `high` and `low`, of which nothing is lost.

    Sign, exponent and first digits of a model's features come unequally often: a Huffman code takes about seven tenths
    of their bytes. The later digits are as good as random and stay as they are, but where features of bfloat16 are
    told as float16, whose last digits are none.
    """
    pairs = features.contiguous().view(torch.uint8).reshape(-1, 2).numpy()
    planes = {"high": pairs[:, 1], "low": pairs[:, 0]}
    packers = {name: zlib.compressobj(_LEVEL, strategy=zlib.Z_HUFFMAN_ONLY) for name in planes}
    found = {name: packers[name].compress(plane.tobytes()) + packers[name].flush() for name, plane in planes.items()}
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in found.items()}


def decoded(high: Tensor, low: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
    """As they were before `coded`; no more is unpacked than that takes. Raises BodyError for other bytes."""
    count = shape[0] * shape[1]
    dtype = next(one for one, called in HALVES.items() if called == kind)
    pairs = np.empty((count, 2), np.uint8)
    for column, name, plane in ((1, "high", high), (0, "low", low)):
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(plane.numpy().tobytes(), count + 1)
        except zlib.error as error:
            raise BodyError(f"{name} cannot be unpacked: {shown(error, 80)}") from error
        if len(data) != count or not unpacker.eof or unpacker.unused_data:
            raise BodyError(f"{name} holds another number of bytes than {count}")
        pairs[:, column] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(pairs.reshape(-1)).view(dtype).reshape(shape)
