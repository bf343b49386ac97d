# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D as what it adds to its parents: positions on CLIP's patches, a projector, clicks, and the splice into Llama.

The way of the data, C wide in the vision tower and D wide in the language model:

    rgb (V views) -> encode_images  (V, P, C)      places -> lift_places  (V, P, C)
    -> means over voxels (scene.token_map)  (M, C)  -> position's last layer, sum, project  (M, D)
    -> splice: [text | M spatial tokens | text with clicks]  (1, S, D)  -> language model
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lmm.interface import (
    ModelSizes,
    Placeholder,
    PromptIds,
    SpatialLMM,
    Spliced,
    SpliceError,
    ViewTokens,
)
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.lmm.llava3d.prompt import DEFAULT_TEMPLATE, build_prompt
from adatoken3d_ros.lmm.text_places import move_boxes, parse_boxes


class Llava3D(SpatialLMM):
    """Vision tower, position MLP, projector, click encoder and language model; see the module's text for the shapes.

    Built directly it has random weights; `checkpoint.load` is the way to a trained one. Do not cast it with
    `.to(dtype)`, which would round the rotary frequencies too: `checkpoint.load` takes the dtype.
    """

    takes_clicks = True

    def __init__(self, config: Llava3DConfig) -> None:
        super().__init__()
        self.config = config
        vision_width, width = int(config.vision.hidden_size), int(config.language.hidden_size)
        self.vision = config.make_tower()
        self.position = PositionMLP(vision_width)
        self.projector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.click = PositionMLP(width)
        self.language = LlamaForCausalLM(config.language)
        self.decoder = Decoder(self.language)
        self.sizes = ModelSizes(
            patches=self.vision.geometry,
            feature_width=vision_width,
            voxel_size=config.voxel_size,
            num_views=config.num_views,
            max_spatial_tokens=config.max_spatial_tokens,
            context_length=config.context_length,
        )
        self.shape_hash = config.hash()

    def lift_places(self, xyz: torch.Tensor) -> torch.Tensor:
        return self.position.hidden(xyz.to(self.device))

    def scene_tokens(self, features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if places.shape[1]:
            features = features + self.position.finish(places)
        return self.project(features)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(M, C) pooled patch features -> (M, D) spatial tokens in the language model's space."""
        parameter = next(self.projector.parameters())
        tokens: torch.Tensor = self.projector(features.to(parameter.device, parameter.dtype))
        return tokens

    def embed_clicks(self, xyz: torch.Tensor) -> torch.Tensor:
        """(n, 3) metres in the model's frame -> (n, D); n may be 0."""
        vectors: torch.Tensor = self.click(xyz.to(self.device))
        return vectors

    def prompt(self, tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = "") -> PromptIds:
        return build_prompt(tokenizer, question, n_clicks=n_clicks, template=template or DEFAULT_TEMPLATE)

    def boxes(self, text: str) -> list[tuple[float, ...]]:
        return parse_boxes(text)

    def move_boxes(self, text: str, by: Sequence[float]) -> str:
        return move_boxes(text, by)

    def splice(
        self,
        prompt: PromptIds,
        spatial: torch.Tensor,
        clicks: torch.Tensor | None = None,
        *,
        where: ViewTokens | None = None,
    ) -> Spliced:
        """Puts the spatial tokens and click vectors into the embedded text.

        Args:
            prompt: from `build_prompt`.
            spatial: (M, D) from `project`, M >= 1.
            clicks: (n, D) from `embed_clicks`, one for every click of the prompt.
            where: of no use to it.

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
                rows.append(self.decoder.embed(torch.tensor(piece, dtype=torch.int64, device=self.device)))
        return Spliced(torch.cat(rows)[None], Layout(start, n_spatial, total))
