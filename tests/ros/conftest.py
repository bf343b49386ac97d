# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a ROS graph on a domain of its own, and the tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ros_graph import Graph


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    """A graph for one test."""
    made = Graph(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """A graph for the tests of one file that leave the node as they found it."""
    made = Graph(tmp_path_factory.mktemp("graph"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint, whose answers never end by themselves: tests cancel them in the middle."""
    from safetensors.torch import load_file, save_file

    from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint

    path = Path(write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][2] = 0.0  # the end of the answer
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
