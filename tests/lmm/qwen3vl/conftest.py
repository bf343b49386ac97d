# SPDX-License-Identifier: Apache-2.0
"""One tiny checkpoint, and transformers' own model on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.interface import Spliced, ViewTokens
from adatoken3d_ros.lmm.qwen3vl.model import Qwen3VL
from adatoken3d_ros.lmm.qwen3vl.tiny import write_tiny_checkpoint

SIZES = ((96, 128), (96, 128), (120, 90))  # heights and widths of the views; the last is made smaller


class Original:
    """transformers' model, asked as its processor asks it."""

    def __init__(self, path: Path) -> None:
        self.model: Any = Qwen3VLForConditionalGeneration.from_pretrained(path, attn_implementation="sdpa").eval()
        kept = json.loads((path / "preprocessor_config.json").read_text())
        kept.pop("image_processor_type")
        self.images = Qwen2VLImageProcessorPil(**kept)

    def inputs(self, prompt: Any, rgb: list[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """A prompt of ours with all patches of the images."""
        pixels = self.images(rgb, input_data_format="channels_last", return_tensors="pt")
        config, ids = self.model.config, []
        for piece in prompt.pieces:
            if isinstance(piece, tuple):
                ids += piece
                continue
            for _, rows, columns in pixels["image_grid_thw"].tolist():
                n = rows * columns // config.vision_config.spatial_merge_size**2
                ids += [config.vision_start_token_id, *[config.image_token_id] * n, config.vision_end_token_id]
        found = torch.tensor([ids])
        return {
            "input_ids": found,
            "attention_mask": torch.ones_like(found),
            "mm_token_type_ids": (found == config.image_token_id).int(),
            **pixels,
        }


def splice_views(model: Qwen3VL, prompt: Any, rgb: list[NDArray[np.uint8]]) -> Spliced:
    """All tokens of the images in the model's input."""
    features = model.encode_views(rgb)
    grids = tuple(model.grid(*image.shape[:2]) for image in rgb)
    view = torch.cat([torch.full((len(f),), k) for k, f in enumerate(features)])
    where = ViewTokens(view, torch.cat([torch.arange(len(f)) for f in features]), grids)
    return model.splice(prompt, model.scene_tokens(torch.cat(features), torch.empty(0)), where=where)


@pytest.fixture(scope="session")
def qwen_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("qwen3vl"), seed=3, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def qwen(qwen_path: Path) -> tuple[Qwen3VL, Any]:
    model, tokenizer, _ = registry.load(qwen_path)
    return model, tokenizer


@pytest.fixture(scope="session")
def original(qwen_path: Path) -> Original:
    return Original(qwen_path)


@pytest.fixture(scope="session")
def rgb() -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]
