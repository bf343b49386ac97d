# SPDX-License-Identifier: Apache-2.0
"""Small models to be trained from nothing, in the layouts of published ones.

An architecture that can be one has a module `untrained` in its folder, found as its loader is: by a config.json, or by
what its spatial tokens are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.registry import Architecture, known
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchPoints
from adatoken3d_ros.text import quoted

Tokens = Literal["voxels", "views"]


@dataclass(frozen=True)
class ModelSize:
    """What can be chosen about the model.

    Attributes:
        layers, width, heads, intermediate: of the language model; its heads are width / heads wide.
        rope_theta: base of the rotary frequencies. Large, because a word must find its tokens wherever they stand:
            with the usual 10,000, positions up to 1,000 turn most of a small head's dimensions.
        image_size, taps: of the vision tower. voxel_size: metres. views: of a scene. max_tokens: of a scene.
        tokens: what a spatial token is, see `ModelSizes`; it decides the architecture.
        kv_heads: key heads that the heads share; 0: each has its own.
        detector: whether the vision tower has a detector.
    """

    layers: int = 12
    width: int = 192
    heads: int = 4
    intermediate: int = 512
    rope_theta: float = 1e8
    image_size: int = 224
    taps: tuple[int, ...] = (0, 3, 5, 7)
    voxel_size: float = 0.2
    views: int = 8
    max_tokens: int = 1600
    context_length: int = 2048
    tokens: Tokens = "voxels"
    kv_heads: int = 0
    detector: bool = False


def common_content(size: ModelSize, vocab_size: int) -> dict[str, Any]:
    """What the config.json of any of them says but for the tower's sizes, by the names of published ones."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": size.width,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads or size.heads,
        "max_position_embeddings": size.context_length,
        "tokenizer_model_max_length": size.context_length,
        "hidden_act": "silu",
        "rope_theta": size.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
    }


class Untrained(Protocol):
    """What such a module has.

    Attributes:
        TOKENS: what its spatial tokens are.
        PROMPT_WORDS: that stand in every prompt.
        ANSWER_LEAD: stands before an answer, so that its first word is the token that it is within a sentence.
        LEARNS_PLACES: whether places and clicks are embedded by weights.
    """

    TOKENS: Tokens
    PROMPT_WORDS: Sequence[str]
    ANSWER_LEAD: str
    LEARNS_PLACES: bool

    def tokenizer(self, words: Iterable[str]) -> Any:
        """In which these are single tokens."""
        ...

    def load_tokenizer(self, directory: Path) -> tuple[Any, Path]:
        """Of a checkpoint, and its file; raises ValueError for one that is damaged."""
        ...

    def config_content(self, size: ModelSize, vocab_size: int) -> dict[str, Any]:
        """The config.json of a model of that size and vocabulary, the tokens that were added included."""
        ...

    def make(self, content: Mapping[str, Any]) -> SpatialLMM:
        """The model with random weights; raises ConfigError for a config.json of none."""
        ...

    def make_tower(self, content: Mapping[str, Any]) -> VisionTower:
        """Its vision tower alone."""
        ...

    def begin(self, model: SpatialLMM, generator: torch.Generator) -> None:
        """Sets what has better first weights than random ones outside of the language model."""
        ...

    def widened(self, name: str, old: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A tensor of a model with fewer channels a patch, by its name in the model, for one with more: what it
        computes of the former channels stays about the same, the added ones say nothing yet."""
        ...

    def official_names(self, model: SpatialLMM) -> dict[str, str]:
        """{name in the model: name in the checkpoint} of every tensor."""
        ...

    def place_tokens(self, frame: PosedFrame, geometry: PatchGeometry, max_depth: float) -> PatchPoints:
        """Where the tokens of a view are, one for each of these patches."""
        ...


def padded(old: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The tensor with zeros behind it along each axis."""
    new = old.new_zeros(shape)
    new[tuple(slice(n) for n in old.shape)] = old
    return new


def trainable(tokens: str) -> Untrained:
    """The architecture whose spatial tokens are such; raises ValueError if there is none."""
    for architecture in known():
        if architecture.untrained and tokens == (one := _module(architecture)).TOKENS:
            return one
    raise ValueError(f"no model is trained from nothing whose tokens are {quoted(tokens)}")


def trainable_of(content: Mapping[str, Any]) -> Untrained:
    """The architecture of a config.json; raises ValueError if it is none that is trained from nothing."""
    for architecture in known():
        if architecture.untrained and architecture.made(dict(content)):
            return _module(architecture)
    raise ValueError(f"model_type {quoted(content.get('model_type'))} is none that is trained from nothing")


def _module(architecture: Architecture) -> Untrained:
    return cast(Untrained, import_module(architecture.untrained))
