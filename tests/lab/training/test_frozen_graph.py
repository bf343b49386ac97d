# SPDX-License-Identifier: Apache-2.0
"""A graph written here byte by byte is read, its weights become the network's, and what is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.lab.training import frozen_graph
from adatoken3d_ros.lab.training.frozen_graph import GraphError, constants, detector_weights
from adatoken3d_ros.lmm.vision.ssd import CLASSES, SsdMobileNet


def _field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return bytes([number << 3, content])
    length = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
    return bytes([number << 3 | 2]) + length + content


def _node(name: str, values: np.ndarray, dtype: int = 1) -> bytes:
    shape = b"".join(_field(2, _field(1, edge)) for edge in values.shape)
    tensor = _field(1, dtype) + _field(2, shape) + _field(4, values.astype("<f4").tobytes())
    entry = _field(1, b"value") + _field(2, _field(8, tensor))
    return _field(1, _field(1, name.encode()) + _field(2, b"Const") + _field(5, entry))


def test_constants_are_read_by_name() -> None:
    weights = np.arange(40, dtype=np.float32).reshape(2, 4, 5)
    graph = _node("a/weights", weights) + _node("steps", np.ones(2), dtype=3) + _field(4, b"versions")
    found = constants(graph)
    assert list(found) == ["a/weights"]
    np.testing.assert_array_equal(found["a/weights"], weights)


@pytest.mark.parametrize("damage", [lambda g: g[:-3], lambda g: b"\x0b" + g, lambda g: b"\xff" * 12])
def test_a_damaged_graph_is_refused_by_its_name(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(damage(_node("a", np.ones(3))))
    with pytest.raises(GraphError, match=r"graph\.pb does not hold SSD-MobileNetV2: (a |wire)"):
        detector_weights(path)


def test_another_graph_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(_node("FeatureExtractor/MobilenetV2/Conv/weights", np.ones((3, 3, 3, 32))))
    with pytest.raises(GraphError, match=r"graph\.pb does not hold SSD-MobileNetV2"):
        detector_weights(path)


def _published(network: SsdMobileNet) -> dict[str, np.ndarray]:
    """The graph's constants that fold into this network: (h, w, in, out), 91 labels, batch normalisation apart."""
    extra = ((256, 512), (128, 256), (128, 256), (64, 128))
    names = {"stem": "Conv", "last": "Conv_1"}
    for k in range(17):
        theirs = f"expanded_conv_{k}" if k else "expanded_conv"
        names.update({f"blocks.{k}.{part}": f"{theirs}/{part}" for part in ("expand", "depthwise", "project")})
    for k, (narrow, wide) in enumerate(extra):
        widened = f"layer_19_2_Conv2d_{k + 2}_3x3_s2_{wide}"
        names[f"extra.{k}.narrow"] = f"layer_19_1_Conv2d_{k + 2}_1x1_{narrow}"
        names[f"extra.{k}.depthwise"], names[f"extra.{k}.widen"] = f"{widened}_depthwise", widened
    state, found = {n: v.numpy() for n, v in network.state_dict().items()}, {}
    for ours, theirs in names.items():
        if f"{ours}.weight" not in state:  # the first block does not widen
            continue
        weight, bias = state[f"{ours}.weight"], state[f"{ours}.bias"]
        root = f"FeatureExtractor/MobilenetV2/{theirs}"
        gain, mean, variance = (np.linspace(a, b, len(bias), dtype=np.float32) for a, b in ((1, 2), (-1, 1), (3, 1)))
        factor = gain / np.sqrt(variance + 1e-3)
        depthwise = ours.endswith("depthwise")
        plain = (weight / factor[:, None, None, None]).transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
        found[f"{root}/{'depthwise_weights' if depthwise else 'weights'}"] = plain
        parts = {"gamma": gain, "beta": bias + mean * factor, "moving_mean": mean, "moving_variance": variance}
        found.update({f"{root}/BatchNorm/{name}": value for name, value in parts.items()})
    for k in range(6):
        for ours, theirs, labels in (("boxes", "BoxEncodingPredictor", None), ("classes", "ClassPredictor", CLASSES)):
            for name, kind in (("weight", "weights"), ("bias", "biases")):
                value = state[f"{ours}.{k}.{name}"]
                if labels is not None:
                    value = value.reshape(-1, len(labels), *value.shape[1:])
                    every = np.full((len(value), 91, *value.shape[2:]), np.nan, np.float32)
                    every[:, list(labels.values())] = value
                    value = every.reshape(-1, *value.shape[2:])
                found[f"BoxPredictor_{k}/{theirs}/{kind}"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return found


def test_published_weights_become_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = SsdMobileNet().requires_grad_(False)
    monkeypatch.setattr(frozen_graph, "constants", lambda data: _published(network))
    (tmp_path / "graph.pb").touch()
    found = detector_weights(tmp_path / "graph.pb")
    assert found.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
