# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: posed views as images, each merged patch a spatial token at the place that its depth gives it.

The way of the data, D wide in the language model, K layers of it with DeepStack:

    rgb (V views) -> encode_images  V x (P, (1 + K) * D): the tokens, and what is added after each of the first K layers
    depth         -> token_points   V x (P, 3): for selection, boxes and RViz; the language model does not read places
    -> splice: [text | for each view: start, its tokens, end | text]  (1, S, D), positions (3, S)  -> language model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lmm.interface import ModelSizes, PromptIds, SeenViews, SpatialLMM, Spliced, SpliceError, ViewTokens
from adatoken3d_ros.lmm.qwen3vl.config import Qwen3VLSettings
from adatoken3d_ros.lmm.qwen3vl.geometry import grid_of, token_points
from adatoken3d_ros.lmm.qwen3vl.places import lift_boxes, tell_poses, write_clicks
from adatoken3d_ros.lmm.qwen3vl.prompt import DEFAULT_TEMPLATE, before_views, build_prompt
from adatoken3d_ros.lmm.qwen3vl.vision import Qwen3VLTower
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints


class Language(nn.Module):
    """The text model and the output layer, which in the original hang on one with the vision tower."""

    def __init__(self, settings: Qwen3VLSettings) -> None:
        super().__init__()
        self.config = settings.language
        self.model = Qwen3VLTextModel(settings.language)
        self.lm_head = nn.Linear(int(self.config.hidden_size), int(self.config.vocab_size), bias=False)
        if settings.tied:
            self.lm_head.weight = self.model.embed_tokens.weight


class Qwen3VL(SpatialLMM):
    """Vision tower and language model of transformers, driven; see the module's text for the shapes.

    Built directly it has random weights; `checkpoint.load` is the way to a trained one. Do not cast it with
    `.to(dtype)`, which would round the rotary frequencies too: `checkpoint.load` takes the dtype.
    """

    takes_clicks = writes_clicks = lifts_boxes = tells_poses = True
    vision: Qwen3VLTower

    def __init__(self, settings: Qwen3VLSettings) -> None:
        super().__init__()
        self.settings = settings
        self.vision = Qwen3VLTower(settings)
        self.language = Language(settings)
        self.decoder = Decoder(self.language)
        self.sizes = ModelSizes(
            patches=settings.geometry,
            feature_width=self.vision.width,
            voxel_size=settings.voxel_size,
            num_views=settings.num_views,
            max_spatial_tokens=settings.num_views * settings.tokens_per_view,
            context_length=settings.context_length,
            tokens="views",
        )
        self.shape_hash = settings.hash()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a view of that size."""
        return grid_of(height, width, self.settings.stride, self.settings.pixels)

    def place_tokens(self, frame: PosedFrame, config: PatchConfig) -> PatchPoints:
        """The places of a view's tokens; see `geometry.token_points`."""
        return token_points(frame, self.grid(*frame.depth.shape), config.max_depth)

    def encode_views(
        self, rgb: Sequence[NDArray[np.uint8]], *, should_stop: Callable[[], bool] | None = None
    ) -> list[Tensor]:
        """Images (H, W, 3) uint8 of any sizes -> (P, (1 + K) * D) float32 each.

        Raises:
            Cancelled: should_stop() was true before one of the tower's layers.
        """
        with self.vision.interruptible(should_stop):
            return [self.vision.view(image) for image in rgb]

    def lift_places(self, xyz: Tensor) -> Tensor:
        """Nothing: the language model does not read places."""
        return torch.zeros(*xyz.shape[:-1], 0, device=self.device)

    def scene_tokens(self, features: Tensor, places: Tensor) -> Tensor:
        return features.to(self.device, self.dtype)

    def prompt(self, tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = "") -> PromptIds:
        return build_prompt(tokenizer, question, n_clicks=n_clicks, template=template or DEFAULT_TEMPLATE)

    def tell_poses(self, tokenizer: Any, prompt: PromptIds, poses: Sequence[NDArray[np.float64]]) -> PromptIds:
        return before_views(tokenizer, prompt, tell_poses(poses)) if poses else prompt

    def write_clicks(
        self, text: str, clicks: NDArray[np.float64], seen: SeenViews | None, *, coordinates: bool = False
    ) -> str:
        return write_clicks(text, clicks, seen, coordinates=coordinates)

    def lift_boxes(self, text: str, seen: SeenViews) -> list[tuple[float, ...]]:
        return lift_boxes(text, seen)

    def splice(
        self, prompt: PromptIds, spatial: Tensor, clicks: Tensor | None = None, *, where: ViewTokens | None = None
    ) -> Spliced:
        """Puts the tokens of the views into the embedded text, each view between its marks.

        Args:
            prompt: from `prompt`.
            spatial: (M, (1 + K) * D) from `scene_tokens`, M >= 1.
            clicks: none, or (0, D).
            where: which tokens of which views these are; None: all of one view.

        Raises:
            SpliceError: for wrong shapes, clicks, or a sequence that is longer than the context.
        """
        width, settings = self.decoder.size.hidden, self.settings
        if spatial.ndim != 2 or spatial.shape[1] != self.vision.width:
            raise SpliceError(f"spatial must be (n, {self.vision.width}), got {tuple(spatial.shape)}")
        if not len(spatial):
            raise SpliceError("there is no spatial token")
        if clicks is not None and len(clicks):
            raise SpliceError(f"{len(clicks)} click vectors for a model that reads points as words")
        if where is None:
            where = ViewTokens.of_one_view(len(spatial))
        if len(where.view) != len(spatial):
            raise SpliceError(f"places in views for {len(where.view)} tokens, there are {len(spatial)}")
        views = range(len(where.grids))  # one that has no token left keeps its number, and its marks
        total = prompt.n_tokens + len(spatial) + 2 * len(views)
        if total > settings.context_length:
            raise SpliceError(
                f"{len(spatial)} spatial and {total - len(spatial)} other tokens make {total}, "
                f"more than the context of {settings.context_length}"
            )
        tokens, *added = spatial.to(self.device, self.dtype).split(width, dim=1)
        marks = self._embedded((settings.vision_start, settings.vision_end))
        blocks, positions, rows = [], [], []
        at = row = 0
        for piece in prompt.pieces:
            if isinstance(piece, tuple):
                blocks.append(self._embedded(piece))
                positions.append(at + torch.arange(len(piece)).expand(3, -1))
                at, row = at + len(piece), row + len(piece)
                continue
            for view in views:
                these = (where.view == view).nonzero()[:, 0]
                height, columns = where.grids[view]
                cell = where.cell[these]
                blocks += [marks[:1], tokens[these.to(tokens.device)], marks[1:]]
                inside = torch.stack([torch.zeros_like(cell), cell // columns, cell % columns]) + at + 1
                after = at + 1 + max(height, columns)
                positions += [torch.full((3, 1), at), inside, torch.full((3, 1), after)]
                rows.append(row + 1 + torch.arange(len(these)))
                at, row = after + 1, row + len(these) + 2
        spatial_rows = torch.cat(rows)
        layout = Layout(
            int(spatial_rows[0]),
            len(spatial),
            row,
            rows=spatial_rows,
            positions=torch.cat(positions, dim=1),
            next_position=at,
            added=tuple(added),
        )
        return Spliced(torch.cat(blocks)[None], layout)

    def _embedded(self, ids: tuple[int, ...]) -> Tensor:
        return self.decoder.embed(torch.tensor(ids, dtype=torch.int64, device=self.device))
