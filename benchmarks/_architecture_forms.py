# SPDX-License-Identifier: Apache-2.0
"""The three forms that are compared: checkpoints with random weights, trained ones, and what their logits are held to.

The oracles build the language model's input anew, slowly, token by token, and leave the rest to transformers' own
model; of the package they use only where a picture's patches are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm.llava3d import tiny as llava3d
from adatoken3d_ros.lmm.qwen3vl import tiny as qwen3vl
from adatoken3d_ros.lmm.video3d import tiny as video3d
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.patches import PatchConfig
from adatoken3d_ros.weights import embedded_path

# Nothing moves in a rendered room, so nothing is carved out of it.
CONFIG = SessionConfig(key_frames=KeyFrameConfig(min_translation=0.0, min_rotation=0.0, carving=None))
_SMALL_VISION = {"vision_layers": 3, "vision_hidden_size": 32, "vision_heads": 4}


@dataclass(frozen=True, eq=False)
class Form:
    """An architecture in its published layout.

    Attributes:
        write: makes a checkpoint with random weights. large, quick: its sizes for times, and for a test.
        views: of a room in the large and in the quick case.
        trained: directory of trained weights; None, or not there: there are none.
        oracle: (checkpoint, scene, frames, question) -> logits (V,) after the prompt, unpruned.
        compared: what the oracle is, in words.
    """

    write: Callable[..., Path]
    large: dict[str, Any]
    quick: dict[str, Any]
    views: tuple[int, int]
    trained: Path | None
    oracle: Callable[[Path, Scene, Sequence[PosedFrame], str], Tensor]
    compared: str


def new_scene(model: Any, tokenizer: Any, frames: Sequence[PosedFrame]) -> Scene:
    """A scene of an engine of its own that has seen the frames.

    Raises:
        ValueError: if one of the frames was not taken.
    """
    scene = Engine(model, tokenizer).open(CONFIG)
    for frame in frames:
        scene.observe(frame)
    scene.encode_pending()
    if len(scene.memory) != len(frames):
        raise ValueError(f"{len(scene.memory)} of {len(frames)} frames became views")
    return scene


# --- oracles ---


def _text(model: Any, ids: Sequence[int]) -> list[Tensor]:
    return [model.language.model.embed_tokens.weight[i] for i in ids]


def _last_logits(model: Any, rows: Sequence[Tensor]) -> Tensor:
    logits: Tensor = model.language(inputs_embeds=torch.stack(list(rows))[None], logits_to_keep=1).logits[0, -1]
    return logits.float()


@torch.no_grad()
def voxel_means(path: Path, scene: Scene, frames: Sequence[PosedFrame], question: str) -> Tensor:
    """Every patch with its place by itself, put into its voxel's list; a list's mean is a token."""
    model: Any = scene.runtime.model
    origin, edge = scene.memory.origin, model.sizes.voxel_size
    heaps: dict[tuple[int, ...], list[Tensor]] = {}
    for frame in frames:
        points = model.place_tokens(frame, PatchConfig(model.sizes.patches))
        features = model.encode_images([frame.rgb])[0]
        for patch in np.flatnonzero(points.valid):
            place = torch.from_numpy(points.xyz[patch].astype(np.float64) - origin).float()
            voxel = tuple(torch.round(place / edge).long().tolist())
            heaps.setdefault(voxel, []).append(features[patch] + model.position(place))
    rows: list[Tensor] = []
    for piece in model.prompt(scene.runtime.tokenizer, question).pieces:
        if isinstance(piece, tuple):
            rows += _text(model, piece)
        else:
            rows += [model.projector(torch.stack(heaps[voxel]).mean(0)) for voxel in sorted(heaps)]
    return _last_logits(model, rows)


@torch.no_grad()
def rows_of_views(path: Path, scene: Scene, frames: Sequence[PosedFrame], question: str) -> Tensor:
    """View after view, row by row, token by token, a newline after each row; sines by the formula."""
    model: Any = scene.runtime.model
    config, grid, width = model.config, model.config.grid, model.decoder.size.hidden
    third = width // 3
    low, high = (np.array(corner) for corner in (config.low, config.high))

    def wave(place: np.ndarray) -> Tensor:
        cell = np.rint((np.clip(place, low, high) - low).astype(np.float32) / np.float32(config.cell))
        angles = cell[:, None] / 10_000.0 ** (2 * (np.arange(third) // 2) / third)
        waves = np.where(np.arange(third) % 2 == 0, np.sin(angles), np.cos(angles)).reshape(-1)
        return torch.from_numpy(np.pad(waves, (0, width - 3 * third))).float()

    rows: list[Tensor] = []
    for piece in model.prompt(scene.runtime.tokenizer, question).pieces:
        if isinstance(piece, tuple):
            rows += _text(model, piece)
            continue
        for frame in frames:
            points = model.place_tokens(frame, PatchConfig(model.sizes.patches))
            features = model.encode_images([frame.rgb])[0]
            for row in range(grid):
                seen = [row * grid + k for k in range(grid) if points.valid[row * grid + k]]
                rows += [features[k] + wave(points.xyz[k].astype(np.float64) - scene.memory.origin) for k in seen]
                rows += [model.newline] if seen else []
    return _last_logits(model, rows)


@torch.no_grad()
def whole_original(path: Path, scene: Scene, frames: Sequence[PosedFrame], question: str) -> Tensor:
    """transformers' own model of pictures and text, from pixels on."""
    original: Any = Qwen3VLForConditionalGeneration.from_pretrained(path, attn_implementation="sdpa").eval()
    kept = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
    kept.pop("image_processor_type")
    ours: Any = scene.runtime.model
    kept["size"] = {**kept["size"], "longest_edge": ours.settings.pixels[1]}
    pixels = Qwen2VLImageProcessorPil(**kept)(
        [frame.rgb for frame in frames], input_data_format="channels_last", return_tensors="pt"
    )
    config, ids = original.config, list[int]()
    for piece in ours.prompt(scene.runtime.tokenizer, question).pieces:
        if isinstance(piece, tuple):
            ids += piece
            continue
        for _, rows, columns in pixels["image_grid_thw"].tolist():
            n = rows * columns // config.vision_config.spatial_merge_size**2
            ids += [config.vision_start_token_id, *[config.image_token_id] * n, config.vision_end_token_id]
    found = torch.tensor([ids])
    logits: Tensor = original(
        input_ids=found,
        attention_mask=torch.ones_like(found),
        mm_token_type_ids=(found == config.image_token_id).int(),
        logits_to_keep=1,
        **pixels,
    ).logits[0, -1]
    return logits.float()


# --- the three ---

FORMS: dict[str, Form] = {
    "llava3d": Form(
        llava3d.write_tiny_checkpoint,
        {"layers": 12, "hidden_size": 768, "intermediate_size": 2048, "heads": 12, "image_size": 336, **_SMALL_VISION},
        {"layers": 5},
        (14, 3),
        embedded_path(),
        voxel_means,
        "transformers' Llama on voxels averaged patch by patch",
    ),
    "video3d": Form(
        video3d.write_tiny_checkpoint,
        {
            "layers": 12,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "heads": 12,
            "kv_heads": 2,
            "image_size": 384,
            **_SMALL_VISION,
        },
        {"layers": 5, "image_size": 384},
        (8, 2),
        Path(__file__).parent / "data" / "video3d_small",
        rows_of_views,
        "transformers' Qwen2 on views spliced token by token",
    ),
    "qwen3vl": Form(
        qwen3vl.write_tiny_checkpoint,
        {"layers": 12, "hidden_size": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "view_pixels": 320 * 240},
        {"layers": 5, "view_pixels": 320 * 240},
        (5, 2),
        None,
        whole_original,
        "transformers' own Qwen3-VL, from pixels on",
    ),
}
