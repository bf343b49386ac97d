# SPDX-License-Identifier: Apache-2.0
"""A graph written here byte by byte is read, and what is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adatoken3d_ros.lab.training.frozen_graph import GraphError, constants, detector_weights


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
def test_a_damaged_graph_is_refused(damage: object) -> None:
    with pytest.raises(GraphError):
        constants(damage(_node("a", np.ones(3))))


def test_another_graph_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(_node("FeatureExtractor/MobilenetV2/Conv/weights", np.ones((3, 3, 3, 32))))
    with pytest.raises(GraphError, match=r"graph\.pb does not hold SSD-MobileNetV2"):
        detector_weights(path)
