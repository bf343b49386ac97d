# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D as what it adds to its parents: positions on CLIP's patches, a projector, clicks, and the splice into Llama.

The way of the data, C wide in the vision tower and D wide in the language model:

    rgb (V views) -> encode_images      (V, P, C)  +  position_embedding(xyz)  (V, P, C)      metres, before pooling
    -> mean over voxels (scene.token_map)  (M, C)  -> project  (M, D)
    -> splice: [text | M spatial tokens | text with clicks]  (1, S, D)  -> language model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaForCausalLM

from adatoken3d_ros.lmm.identity import model_identity, tensor_digest, weights_identity
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.lmm.llava3d.prompt import Placeholder, PromptIds
from adatoken3d_ros.lmm.vision.tower import VisionTower


class SpliceError(ValueError):
    """Prompt, spatial tokens and clicks that do not go together, or not into the context."""


@dataclass(frozen=True, eq=False)
class Spliced:
    """One input of the language model, [text | spatial block | question].

    Attributes:
        embeds: (1, S, D) in the language model's dtype.
        spatial_start: row of the first spatial token.
        n_spatial: rows of the spatial block.
        n_question: rows after the spatial block.
    """

    embeds: torch.Tensor
    spatial_start: int
    n_spatial: int
    n_question: int

    @property
    def n_tokens(self) -> int:
        """S, all rows."""
        return int(self.embeds.shape[1])


@dataclass(frozen=True, eq=False)
class SplicedBatch:
    """B inputs of different length, padded on the left so that all end in the last row.

    Attributes:
        embeds: (B, S, D), zero in padding rows.
        attention_mask: (B, S) int64, 1 for real rows.
        position_ids: (B, S) int64, counted from each sample's first real row; 0 in padding rows.
        spatial_start: (B,) row of the first spatial token, counted from the sample's first real row.
        n_spatial: (B,) rows of the spatial block.
        n_tokens: (B,) real rows.
    """

    embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    spatial_start: tuple[int, ...]
    n_spatial: tuple[int, ...]
    n_tokens: tuple[int, ...]


class Llava3D(nn.Module):
    """Vision tower, position MLP, projector, click encoder and language model; see the module's text for the shapes.

    Built directly it has random weights; `checkpoint.load` is the way to a trained one. Do not cast it with
    `.to(dtype)`, which would round the rotary frequencies too: `checkpoint.load` takes the dtype.
    """

    def __init__(self, config: Llava3DConfig) -> None:
        super().__init__()
        self.config = config
        vision_width, width = int(config.vision.hidden_size), int(config.language.hidden_size)
        self.vision = VisionTower(config)
        self.position = PositionMLP(vision_width)
        self.projector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.click = PositionMLP(width)
        self.language = LlamaForCausalLM(config.language)
        self.loaded_identity: str | None = None  # of the weights as they lie in the files, set by `checkpoint.load`

    @property
    def identity(self) -> str:
        """Tells models of other shape or other weights apart; the same for weights that were loaded in another dtype.

        Without a checkpoint it is computed anew each time: such a model may be in training.
        """
        if self.loaded_identity is not None:
            return self.loaded_identity
        tied = self.config.language.tie_word_embeddings
        named = [(k, v) for k, v in self.state_dict().items() if not (tied and k == "language.lm_head.weight")]
        weights = weights_identity((name, tensor_digest(tensor)) for name, tensor in named)
        return model_identity(self.config.hash(), weights)

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model."""
        return self._embedding.weight.dtype

    @property
    def _embedding(self) -> nn.Embedding:
        return self.language.model.embed_tokens

    def encode_images(self, rgb: Sequence[NDArray[np.uint8]], *, chunk: int = 8) -> torch.Tensor:
        """V images (H, W, 3) uint8 -> (V, P, C) float32 CLIP features of the patches, row-major, without positions."""
        features: torch.Tensor = self.vision(rgb, chunk=chunk)
        return features

    def position_embedding(self, xyz: torch.Tensor) -> torch.Tensor:
        """(..., 3) metres in the model's frame -> (..., C)."""
        embedding: torch.Tensor = self.position(xyz.to(self.device))
        return embedding

    def patch_features(
        self, rgb: Sequence[NDArray[np.uint8]], xyz: torch.Tensor, *, published: bool = False
    ) -> torch.Tensor:
        """V images and (V, P, 3) metres in the model's frame -> (V, P, C) float32, feature + position embedding.

        `published`: features, embedding and sum in bfloat16, as upstream computes them.

        Raises:
            ValueError: if `xyz` does not have a point for every patch of every image.
        """
        expected = (len(rgb), self.vision.patches, 3)
        if tuple(xyz.shape) != expected:
            raise ValueError(f"xyz must be {expected}, a point for every patch, got {tuple(xyz.shape)}")
        if published:
            return (self.encode_images(rgb).bfloat16() + self.position.published(xyz.to(self.device))).float()
        return self.encode_images(rgb) + self.position_embedding(xyz).float()

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(M, C) pooled patch features -> (M, D) spatial tokens in the language model's space."""
        parameter = next(self.projector.parameters())
        tokens: torch.Tensor = self.projector(features.to(parameter.device, parameter.dtype))
        return tokens

    def embed_clicks(self, xyz: torch.Tensor, *, published: bool = False) -> torch.Tensor:
        """(n, 3) metres in the model's frame -> (n, D); n may be 0. `published`: in bfloat16, as upstream does."""
        xyz = xyz.to(self.device)
        vectors: torch.Tensor = self.click.published(xyz) if published else self.click(xyz)
        return vectors

    def splice(self, prompt: PromptIds, spatial: torch.Tensor, clicks: torch.Tensor | None = None) -> Spliced:
        """Puts the spatial tokens and click vectors into the embedded text.

        Args:
            prompt: from `build_prompt`.
            spatial: (M, D) from `project`, M >= 1.
            clicks: (n, D) from `embed_clicks`, one for every click of the prompt.

        Raises:
            SpliceError: for wrong shapes, another number of clicks than the prompt has, or a sequence that is longer
                than the context.
        """
        width = int(self.config.language.hidden_size)
        clicks = spatial.new_zeros((0, width)) if clicks is None else clicks
        for name, block in (("spatial", spatial), ("clicks", clicks)):
            if block.ndim != 2 or block.shape[1] != width:
                raise SpliceError(f"{name} must be (n, {width}), got {tuple(block.shape)}")
        n_spatial = int(spatial.shape[0])
        if n_spatial == 0:
            raise SpliceError("there is no spatial token")
        if len(clicks) != prompt.n_clicks:
            raise SpliceError(f"the prompt has {prompt.n_clicks} clicks, but {len(clicks)} click vectors were given")
        total = prompt.n_tokens + n_spatial
        if total > self.config.context_length:
            raise SpliceError(
                f"{n_spatial} spatial and {prompt.n_tokens} other tokens make {total}, "
                f"more than the context of {self.config.context_length}"
            )
        # Only the text's own ids reach the embedding table; placeholders never become ids.
        rows: list[torch.Tensor] = []
        start = 0
        for piece in prompt.pieces:
            if isinstance(piece, Placeholder):
                if piece.kind == "image":
                    start = sum(len(r) for r in rows)
                    rows.append(spatial.to(self.device, self.dtype))
                else:
                    rows.append(clicks[piece.index : piece.index + 1].to(self.device, self.dtype))
            else:
                rows.append(self._embedding(torch.tensor(piece, dtype=torch.int64, device=self.device)))
        return Spliced(torch.cat(rows)[None], start, n_spatial, total - start - n_spatial)

    def splice_batch(self, samples: Sequence[Spliced]) -> SplicedBatch:
        """Pads B spliced inputs on the left into one batch.

        Raises:
            SpliceError: if there is none.
        """
        if not samples:
            raise SpliceError("a batch needs at least one sample")
        lengths = tuple(sample.n_tokens for sample in samples)
        longest = max(lengths)
        embeds = samples[0].embeds.new_zeros((len(samples), longest, samples[0].embeds.shape[2]))
        for row, sample in enumerate(samples):
            embeds[row, longest - sample.n_tokens :] = sample.embeds[0]
        column = torch.arange(longest, device=embeds.device)[None]
        padding = longest - torch.tensor(lengths, device=embeds.device)[:, None]
        return SplicedBatch(
            embeds=embeds,
            attention_mask=(column >= padding).long(),
            position_ids=(column - padding).clamp_min(0),
            spatial_start=tuple(sample.spatial_start for sample in samples),
            n_spatial=tuple(sample.n_spatial for sample in samples),
            n_tokens=lengths,
        )
