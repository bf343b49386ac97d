# SPDX-License-Identifier: Apache-2.0
"""The Video-3D LLM family: a grid of tokens for each view, with sines of its places, read by Qwen2.

The way of the data, D wide in the language model:

    rgb (V views) -> encode_images  (V, G * G, D): vision tower, projector, and 2 x 2 of its patches made one
    places -> lift_places           (V, G * G, 3): they stay places, a token's are never averaged with another's
    -> the views' tokens            (M, D) + sine of the place
       and beside a token, for a grounding head, what the tower says of the patches in it, and their places
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
from adatoken3d_ros.lmm.video3d.grounding import GroundingHead, inside
from adatoken3d_ros.lmm.video3d.places import PARTS, mean_points, median_points, parts_of
from adatoken3d_ros.lmm.video3d.position import cells, sine
from adatoken3d_ros.lmm.video3d.prompt import DEFAULT_TEMPLATE, build_ground_prompt, build_prompt, described
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints

_CHUNK = 8  # views that are projected at a time, each 11 MB before its patches are pooled
_PROJECTED = 4096  # patches in boxes that are projected at a time


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
        self.head = None if config.grounding is None else GroundingHead(width, config.grounding)
        self.takes_clicks, self.grounds = config.coord_token is not None, self.head is not None
        parts = PARTS if self.grounds else 0
        self.sizes = ModelSizes(
            patches=replace(self.vision.geometry, rows=config.grid, columns=config.grid),
            feature_width=width + parts * vision_width,
            voxel_size=VOXEL_SIZE,
            num_views=config.num_views,
            max_spatial_tokens=config.num_views * config.grid**2,
            context_length=config.context_length,
            tokens="views",
            parts=parts,
        )
        self.shape_hash = config.hash()

    def place_tokens(self, frame: PosedFrame, config: PatchConfig) -> PatchPoints:
        averaged = self.config.average_missing_depth
        points = mean_points(frame, self.sizes.patches, config.max_depth, with_missing=averaged)
        if not self.grounds:
            return points
        parts = median_points(frame, self.vision.geometry, config.max_depth)
        numbers = parts_of(self.config.patches, self.config.grid)
        return replace(points, parts=np.where(numbers[..., None] >= 0, parts[numbers], np.float32(np.nan)))

    def encode_images(
        self, rgb: Sequence[NDArray[np.uint8]], *, should_stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """V images (H, W, 3) uint8 -> (V, G * G, D + K * C) float32 tokens, row-major, without places.

        Behind the D of a token are the C of the tower for each of its K patches; K is 0 without a grounding head.
        """
        found = [torch.empty(0, self.config.grid**2, self.sizes.feature_width)]
        for at in range(0, len(rgb), _CHUNK):
            patches = super().encode_images(rgb[at : at + _CHUNK], should_stop=should_stop)
            tokens = self._pooled(patches)
            if self.grounds:
                numbers = torch.tensor(parts_of(self.config.patches, self.config.grid), device=patches.device)
                tower = patches.float()[:, numbers].masked_fill(numbers[..., None] < 0, 0.0)
                tokens = torch.cat([tokens, tower.flatten(2).to(tokens.device)], dim=-1)
            found.append(tokens)
        return torch.cat(found[1:] or found)

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
        features = features[:, : self.decoder.size.hidden].to(self.device)
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

    def description(self, question: str) -> str | None:
        return described(question)

    def ground_prompt(self, tokenizer: Any, description: str, *, n_clicks: int = 0) -> PromptIds:
        return build_ground_prompt(tokenizer, description, n_clicks=n_clicks)

    @torch.no_grad()
    def object_tokens(self, features: Tensor, parts: Tensor, boxes: Tensor) -> Tensor:
        """(N, D) float32: the mean of the projected patches whose place is in the box, and the sine of its centre."""
        width = self.decoder.size.hidden
        boxes, parts = boxes.to(self.device), parts.to(self.device)
        held = inside(parts.reshape(-1, 3), boxes)
        total = torch.zeros(len(boxes), width, device=self.device)
        for patches in held.any(dim=0).nonzero()[:, 0].split(_PROJECTED):
            tower = features[(patches // parts.shape[1]).to(features.device), width:].to(self.device)
            tower = tower.unflatten(1, (parts.shape[1], -1))[torch.arange(len(patches)), patches % parts.shape[1]]
            total += held[:, patches].float() @ self._projected(tower).float()
        return total / held.sum(dim=1).clamp(min=1)[:, None] + self._sine(boxes[:, :3])

    @torch.no_grad()
    def point_at(self, state: Tensor, objects: Tensor) -> Tensor:
        if self.head is None:
            return super().point_at(state, objects)
        chances: Tensor = self.head(self.language.model.norm(state), objects)
        return chances

    def splice(
        self, prompt: PromptIds, spatial: Tensor, clicks: Tensor | None = None, *, where: ViewTokens | None = None
    ) -> Spliced:
        """Puts tokens and clicks into the embedded text, with a newline behind the last token of each row of a grid.

        Newlines have no place; at a gate one goes with the last token of its line, but for the last one, which is read
        with the question. A row of which no token is left has none.

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
        layout = Layout(start, len(spatial), total, rows=start + tokens, closing=_closing(start + tokens))
        return Spliced(torch.cat(rows)[None], layout)


def _closing(rows: Tensor) -> Tensor:
    """(N,) the newline behind the line of each token, given the rows (N,) of the tokens; -1 for those of the last."""
    gap = torch.cat([rows[1:] - rows[:-1] > 1, rows.new_zeros(1, dtype=torch.bool)])
    ends = rows[gap] + 1
    line = torch.cat([gap.new_zeros(1), gap[:-1]]).cumsum(0)
    return torch.cat([ends, ends.new_full((1,), -1)])[line]
