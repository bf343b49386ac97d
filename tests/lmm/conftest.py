# SPDX-License-Identifier: Apache-2.0
"""One tiny checkpoint for all tests of the model; tests that change files make their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.lmm.safetensors_files import LoadReport


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1, layers=3, kv_heads=2)


@pytest.fixture(scope="session")
def loaded(tiny_path: Path) -> tuple[Llava3D, PreTrainedTokenizerFast, LoadReport]:
    return checkpoint.load(tiny_path)


@pytest.fixture(scope="session")
def model(loaded) -> Llava3D:
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded) -> PreTrainedTokenizerFast:
    return loaded[1]


@pytest.fixture
def path(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))
