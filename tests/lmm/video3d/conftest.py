# SPDX-License-Identifier: Apache-2.0
"""One tiny checkpoint of the family for all its tests; tests that change files make their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.lmm.video3d import checkpoint
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("video3d"), seed=1, layers=4)


@pytest.fixture(scope="session")
def loaded(tiny_path: Path) -> tuple[Video3D, PreTrainedTokenizerFast, checkpoint.LoadReport]:
    return checkpoint.load(tiny_path)


@pytest.fixture(scope="session")
def model(loaded) -> Video3D:
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded) -> PreTrainedTokenizerFast:
    return loaded[1]
