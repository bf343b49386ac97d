# SPDX-License-Identifier: Apache-2.0
"""Weights of the published detector SSD-MobileNetV2 out of TensorFlow's frozen graph, without TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.lmm.protobuf import fields
from adatoken3d_ros.lmm.vision.ssd import CLASSES, SsdMobileNet

_BATCH_NORM_EPS = 1e-3
_ROOT = "FeatureExtractor/MobilenetV2/"
_LABELS = 91  # of the published head, the background included


class GraphError(ValueError):
    """A file that is no such graph; the message names what is wrong."""


def _part(data: bytes, *path: int) -> bytes:
    """What the last field of each number holds, one inside the other; b"" where there is none."""
    for number in path:
        data = next((v for n, v in reversed(list(fields(data))) if n == number and isinstance(v, bytes)), b"")
    return data


def constants(data: bytes) -> dict[str, NDArray[np.float32]]:
    """The float tensors of a frozen graph by name (GraphDef: node 1; NodeDef: name 1, attr 5; AttrValue: tensor 8;
    TensorProto: dtype 1, tensor_shape 2, tensor_content 4).

    Raises:
        ValueError: for a file that is no such graph.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for number, node in fields(data):
        if number != 1 or not isinstance(node, bytes):
            continue
        for field, entry in fields(node):
            if field != 5 or not isinstance(entry, bytes) or _part(entry, 1) != b"value":
                continue
            tensor = _part(entry, 2, 8)
            sizes = [dict(fields(d)).get(1, 0) for n, d in fields(_part(tensor, 2)) if n == 2 and isinstance(d, bytes)]
            shape = [s for s in sizes if isinstance(s, int)]
            content = _part(tensor, 4)
            if dict(fields(tensor)).get(1) == 1 and len(content) == 4 * math.prod(shape) > 0:
                found[_part(node, 1).decode()] = np.frombuffer(content, "<f4").reshape(shape)
    return found


def detector_weights(path: Path) -> dict[str, Tensor]:
    """Weights by the names of `SsdMobileNet`.

    Raises:
        GraphError: if the file is another graph. OSError: if it cannot be read.
    """
    data = path.read_bytes()
    state: dict[str, Tensor] = {}

    def fold(theirs: str, ours: str, kind: str = "weights") -> None:
        weight = torch.from_numpy(values[f"{_ROOT}{theirs}/{kind}"].copy()).double()
        # (h, w, in, out) of a convolution, (h, w, channels, 1) of one for each channel
        weight = weight.permute((2, 3, 0, 1) if kind == "depthwise_weights" else (3, 2, 0, 1))
        gain, bias, mean, variance = (
            torch.from_numpy(values[f"{_ROOT}{theirs}/BatchNorm/{name}"].copy()).double()
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        factor = gain / torch.sqrt(variance + _BATCH_NORM_EPS)
        state[f"{ours}.weight"] = (weight * factor[:, None, None, None]).float().contiguous()
        state[f"{ours}.bias"] = (bias - mean * factor).float()

    try:
        values = constants(data)
        fold("Conv", "stem")
        for number in range(17):
            theirs = "expanded_conv" + (f"_{number}" if number else "")
            if number:
                fold(f"{theirs}/expand", f"blocks.{number}.expand")
            fold(f"{theirs}/depthwise", f"blocks.{number}.depthwise", "depthwise_weights")
            fold(f"{theirs}/project", f"blocks.{number}.project")
        fold("Conv_1", "last")
        for k, (narrow, wide) in enumerate(((256, 512), (128, 256), (128, 256), (64, 128))):
            widened = f"layer_19_2_Conv2d_{k + 2}_3x3_s2_{wide}"
            fold(f"layer_19_1_Conv2d_{k + 2}_1x1_{narrow}", f"extra.{k}.narrow")
            fold(f"{widened}_depthwise", f"extra.{k}.depthwise", "depthwise_weights")
            fold(widened, f"extra.{k}.widen")
        for k in range(6):
            state.update(_head(values, f"BoxPredictor_{k}/BoxEncodingPredictor", f"boxes.{k}"))
            state.update(_head(values, f"BoxPredictor_{k}/ClassPredictor", f"classes.{k}", list(CLASSES.values())))
        SsdMobileNet().load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise GraphError(f"{path} does not hold SSD-MobileNetV2: {error}") from error
    return state


def _head(
    values: Mapping[str, NDArray[np.float32]], theirs: str, ours: str, labels: list[int] | None = None
) -> dict[str, Tensor]:
    """A head's weight and bias, of some of the labels alone."""
    weight = torch.from_numpy(values[f"{theirs}/weights"].copy()).permute(3, 2, 0, 1)
    bias = torch.from_numpy(values[f"{theirs}/biases"].copy())
    if labels is not None:
        weight = weight.unflatten(0, (-1, _LABELS))[:, labels].flatten(0, 1)
        bias = bias.unflatten(0, (-1, _LABELS))[:, labels].flatten()
    return {f"{ours}.weight": weight.contiguous(), f"{ours}.bias": bias}
