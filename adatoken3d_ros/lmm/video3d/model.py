# SPDX-License-Identifier: Apache-2.0
"""The Video-3D LLM family: a grid of tokens for each view, with sines of its places, read by Qwen2.

The way of the data, D wide in the language model:

    rgb (V views) -> encode_images  (V, G * G, D): vision tower, projector, and 2 x 2 of its patches made one
    places -> lift_places           (V, G * G, 3): they stay places, a token's are never averaged with another's
    -> the views' tokens            (M, D) + sine of the place
    -> splice: [text | tokens, a newline after each row of a view's grid | text with clicks]  (1, S, D)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2ForCausalLM

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
from adatoken3d_ros.lmm.video3d.config import VOXEL_SIZE, Video3DConfig
from adatoken3d_ros.lmm.video3d.places import mean_points
from adatoken3d_ros.lmm.video3d.position import cells, sine
from adatoken3d_ros.lmm.video3d.prompt import DEFAULT_TEMPLATE, build_prompt
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints

_CHUNK = 8  # views that are projected at a time, each 11 MB before its patches are pooled


class Video3D(SpatialLMM):
    """Vision tower, projector, newline and language model; see the module's text for the shapes.

    Built directly it has random weights; `checkpoint.load` is the way to a trained one. A pixel without depth does not
    count for its token's place, and a token all of whose pixels have none is left out; the original counts it at the
    camera's centre (`average_missing_depth` in config.json).
    """

    def __init__(self, config: Video3DConfig) -> None:
        super().__init__()
        self.config = config
        vision_width, width = int(config.vision.hidden_size), int(config.language.hidden_size)
        self.vision = config.make_tower()
        self.projector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.language = Qwen2ForCausalLM(config.language)
        self.decoder = Decoder(self.language)
        self.takes_clicks = config.coord_token is not None
        self.sizes = ModelSizes(
            patches=replace(self.vision.geometry, rows=config.grid, columns=config.grid),
            feature_width=width,
            voxel_size=VOXEL_SIZE,
            num_views=config.num_views,
            max_spatial_tokens=config.num_views * config.grid**2,
            context_length=config.context_length,
            tokens="views",
        )
        self.shape_hash = config.hash()

    def place_tokens(self, frame: PosedFrame, config: PatchConfig) -> PatchPoints:
        averaged = self.config.average_missing_depth
        return mean_points(frame, self.sizes.patches, config.max_depth, with_missing=averaged)

    def encode_images(
        self, rgb: Sequence[NDArray[np.uint8]], *, should_stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """V images (H, W, 3) uint8 -> (V, G * G, D) float32 tokens, row-major, without places."""
        found = [rgb[at : at + _CHUNK] for at in range(0, len(rgb), _CHUNK)]
        parts = [self._pooled(super(Video3D, self).encode_images(views, should_stop=should_stop)) for views in found]
        return torch.cat(parts) if parts else torch.empty(0, self.config.grid**2, self.decoder.size.hidden)

    def _pooled(self, patches: Tensor) -> Tensor:
        """(V, P, C) patches -> (V, G * G, D): projected, then halved along both edges by bilinear interpolation."""
        with torch.no_grad():
            projected = self._projected(patches)
            square = projected.unflatten(1, (self.config.patches, -1)).permute(0, 3, 1, 2)
            grid = self.config.grid
            pooled = functional.interpolate(square, size=(grid, grid), mode="bilinear")
        return pooled.flatten(2).transpose(1, 2).float()

    def _projected(self, patches: Tensor) -> Tensor:
        parameter = next(self.projector.parameters())
        projected: Tensor = self.projector(patches.to(parameter.device, parameter.dtype))
        return projected

    def merge_patches(self, patches: Tensor) -> Tensor:
        """(M, 4, C) -> (M, D): the mean is what the interpolation is where the patches of a view are even in number."""
        return self._projected(patches).mean(dim=1)

    def lift_places(self, xyz: Tensor) -> Tensor:
        return xyz.to(self.device).float()

    def scene_tokens(self, features: Tensor, places: Tensor) -> Tensor:
        features = features.to(self.device)
        if places.shape[-1]:
            features = features + self._sine(places.to(self.device))
        return features.to(self.dtype)

    def _sine(self, xyz: Tensor) -> Tensor:
        config = self.config
        return sine(cells(xyz, config.low, config.high, config.cell), self.decoder.size.hidden)

    def embed_clicks(self, xyz: Tensor) -> Tensor:
        """(n, 3) metres in the model's frame -> (n, D), the embedding of `<coord>` and the place; n may be 0."""
        if self.config.coord_token is None:
            return super().embed_clicks(xyz)
        token = self.decoder.embed(torch.tensor(self.config.coord_token, device=self.device))
        return (token.float() + self._sine(xyz.to(self.device))).to(self.dtype)

    def prompt(self, tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = "") -> PromptIds:
        return build_prompt(tokenizer, question, n_clicks=n_clicks, template=template or DEFAULT_TEMPLATE)

    def lay_out(self, spatial: Tensor, where: ViewTokens | None) -> tuple[Tensor, Tensor]:
        """The tokens with a newline behind the last one of each row of a grid; without `where` all are in one row."""
        where = ViewTokens.of_one_view(len(spatial)) if where is None else where
        columns = torch.tensor([grid[1] for grid in where.grids], device=where.view.device)[where.view]
        lines = torch.stack([where.view, where.cell // columns], dim=1)
        line = torch.unique_consecutive(lines, dim=0, return_inverse=True)[1].to(self.device)
        tokens = torch.arange(len(spatial), device=self.device) + line
        scene = self.newline.to(self.dtype).repeat(int(tokens[-1]) + 2, 1)
        return scene.index_copy(0, tokens, spatial.to(self.device, self.dtype)), tokens

    def splice(
        self, prompt: PromptIds, spatial: Tensor, clicks: Tensor | None = None, *, where: ViewTokens | None = None
    ) -> Spliced:
        """Puts tokens and clicks into the embedded text, with a newline behind the last token of each row of a grid.

        Newlines have no place and stay at every gate. A row of which no token is left has none.

        Args:
            prompt: from `prompt`.
            spatial: (M, D) from `scene_tokens`, M >= 1.
            clicks: (n, D) from `embed_clicks`, one for every click of the prompt.
            where: which tokens of which views these are; None: all in one row.

        Raises:
            SpliceError: for wrong shapes, another number of clicks than the prompt has, or a sequence that is longer
                than the context.
        """
        width, context = self.decoder.size.hidden, self.sizes.context_length
        clicks = spatial.new_zeros((0, width)) if clicks is None else clicks
        where = ViewTokens.of_one_view(len(spatial)) if where is None else where
        for name, block in (("spatial", spatial), ("clicks", clicks)):
            if block.ndim != 2 or block.shape[1] != width:
                raise SpliceError(f"{name} must be (n, {width}), got {tuple(block.shape)}")
        if len(spatial) == 0:
            raise SpliceError("there is no spatial token")
        if len(where.view) != len(spatial):
            raise SpliceError(f"places in views for {len(where.view)} tokens, there are {len(spatial)}")
        if len(clicks) != prompt.n_clicks:
            raise SpliceError(f"the prompt has {prompt.n_clicks} clicks, but {len(clicks)} click vectors were given")
        scene, tokens = self.lay_out(spatial, where)
        total = prompt.n_tokens + len(scene)
        if total > context:
            raise SpliceError(
                f"{len(scene)} rows of the scene and {prompt.n_tokens} of text make {total}, more than the context of "
                f"{context}"
            )
        rows, start = [], prompt.n_system
        for piece in prompt.pieces:
            if not isinstance(piece, Placeholder):
                rows.append(self.decoder.embed(torch.tensor(piece, dtype=torch.int64, device=self.device)))
            elif piece.kind == "image":
                rows.append(scene)
            else:
                rows.append(clicks[piece.index : piece.index + 1].to(self.device, self.dtype))
        return Spliced(torch.cat(rows)[None], Layout(start, len(spatial), total, rows=start + tokens))
