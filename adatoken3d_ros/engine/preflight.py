# SPDX-License-Identifier: Apache-2.0
"""What a model will need of memory, before anything of it is loaded, and what would fit where that is too much.

    weights      of every tensor, the linear layers of the language model in the bits that they are kept in
    keys         2 x layers x key width x rows x bytes of a number, twice: the prefill's own and those that decoding
                 reads from; rows: a question about as many views as there may be, its words and its answer
    activations  rows x (6 hidden + 3 intermediate + queries + 2 keys) x bytes of a number, or of the vision tower
                 VIEWS_AT_ONCE x patches x 16 widths, whichever is more
    scene        views x patches x 2 feature widths x 4 bytes: features and places, float32

Libraries (about 0.5 GB) are in memory already when this is asked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.official_layout import linear_weights
from adatoken3d_ros.lmm.quantized.formats import BITS, fits, stored_bytes

WORDS = 256  # rows of prompt and question beside the scene
VIEWS_AT_ONCE = 8  # that go through the vision tower together (`VisionTower.forward`)
_SLACK = 1.05  # of the weights: the largest tensor in transit, and the allocator's


@dataclass(frozen=True)
class Need:
    """Bytes; see the module's text."""

    weights: int
    keys: int
    activations: int
    scene: int

    @property
    def total(self) -> int:
        return ceil(self.weights * _SLACK) + self.keys + self.activations + self.scene

    def __str__(self) -> str:
        parts = ((name, getattr(self, name)) for name in ("weights", "keys", "activations", "scene"))
        return f"{gb(self.total)} ({', '.join(f'{name} {gb(size)}' for name, size in parts)})"


def need(
    model: SpatialLMM,
    dtype: torch.dtype,
    *,
    quantization: str = "none",
    max_views: int,
    question_views: int = 0,
    max_new_tokens: int = 64,
) -> Need:
    """What a model needs.

    Args:
        model: may be without weights (`registry.outline`). dtype: of its weights and products.
        quantization: of its linear layers. max_views, question_views, max_new_tokens: the settings of these names.
    """
    wide, sizes, size = dtype.itemsize, model.sizes, model.decoder.size
    few = set(linear_weights(model)) if quantization != "none" else set()
    weights = 0
    for name, tensor in model.named_parameters():
        short = name in few and fits(tuple(tensor.shape), quantization)
        weights += stored_bytes(tensor.numel(), quantization) if short else tensor.numel() * wide
    patches = sizes.patches.patches if sizes.tokens == "voxels" else -(-sizes.max_spatial_tokens // sizes.num_views)
    asked = min(max_views, question_views or sizes.num_views)
    spatial = min(asked * patches, sizes.max_spatial_tokens)
    rows = min(spatial + 2 * asked + WORDS + max_new_tokens, sizes.context_length)
    inside = rows * (6 * size.hidden + 3 * size.intermediate + size.queries + 2 * size.keys)
    tower = min(VIEWS_AT_ONCE, max_views) * sizes.patches.patches * 16 * model.vision.width
    return Need(
        weights=weights,
        keys=2 * 2 * size.n_layers * size.keys * rows * wide,
        activations=max(inside, tower) * wide,
        scene=max_views * patches * 2 * sizes.feature_width * 4,
    )


def remedies(
    model: SpatialLMM, dtype: torch.dtype, free: int, kinds: Sequence[str], *, max_views: int, **asked: Any
) -> list[str]:
    """What would fit into `free` bytes, as settings: another of `kinds`, fewer views, or both.

    Args:
        kinds: quantisations in the order of preference, that which is set first. asked: as for `need`.
    """
    found = []
    for place, kind in enumerate(kinds):
        said = [f"model.quantization: {kind}"] if place else []

        def total(views: int, kind: str = kind) -> int:
            return need(model, dtype, quantization=kind, max_views=views, **asked).total

        if place and total(max_views) <= free:
            found.append(f"{said[0]} ({gb(total(max_views))})")
        elif views := bisect_right(range(1, max_views), free, key=total):
            found.append(f"{', '.join([*said, f'scene.max_views: {views}'])} ({gb(total(views))})")
    return found


def fewer_bits(kind: str, than: str) -> bool:
    """Whether one quantisation takes less than another; `none` has sixteen bits at least."""
    return BITS[kind] < BITS.get(than, 16)


def short_of_memory(what: str, needed: Need, free: int, device: str) -> str:
    """What is said where it does not fit."""
    return f"{what} needs {needed} on {device}, {gb(free)} are free"


def gb(size: float) -> str:
    """Bytes for people, 10^9 of them."""
    return f"{size / 1e9:.2f} GB"
