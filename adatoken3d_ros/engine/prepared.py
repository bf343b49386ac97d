# SPDX-License-Identifier: Apache-2.0
"""What is computed of a scene before a question comes: its projected tokens, and its prefix in the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.decoder.stem import Stems
from adatoken3d_ros.engine.scene_memory import SceneMemory
from adatoken3d_ros.lmm.interface import SpatialLMM, Spliced, ViewTokens
from adatoken3d_ros.pruning.view import SceneTokens
from adatoken3d_ros.scene.proposals import propose
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens

_PLACE = 64  # bytes of a token beside its features
_TEXT = 512  # rows of a prefix, and of the question on it, that are no tokens of the scene


@dataclass(frozen=True, eq=False)
class Block:
    """M tokens of the scene, what the gate knows of them, and what `SpatialLMM.scene_tokens` made of them."""

    tokens: SpatialTokens
    scene: SceneTokens
    spatial: Tensor

    @property
    def where(self) -> ViewTokens | None:
        """Which tokens of which views they are, where tokens are those of views."""
        view, cell = self.tokens.view, self.tokens.cell
        return None if view is None or cell is None else ViewTokens(view, cell, self.tokens.grids)


@dataclass(frozen=True, eq=False)
class Objects:
    """N boxes (N, 6) around what may be things, centre and size, scene frame, metres, and what
    `SpatialLMM.object_tokens` made of them."""

    boxes: NDArray[np.float64]
    tokens: Tensor


class Prepared:
    """Of one scene as it is; `forget` when it changes.

    Args:
        model: the model. memory: the scene.
        limit: bytes that both may hold; 0: any number.
    """

    def __init__(self, model: SpatialLMM, memory: SceneMemory, limit: float = 0.0) -> None:
        self._model = model
        self._memory = memory
        self._limit = limit
        self._blocks: dict[int, Block] = {}
        self._objects: Objects | None = None
        self.prefix: ScenePrefix | None = None
        self.stems = Stems()

    def forget(self) -> None:
        """The scene has changed."""
        self._blocks.clear()
        self._objects = self.prefix = None
        self.stems.forget()

    @property
    def built(self) -> frozenset[int]:
        """Numbers of tokens for which `block` has nothing left to do."""
        return frozenset(self._blocks)

    def size(self, max_tokens: int | None) -> int:
        """Tokens that `block(max_tokens)` has."""
        most = self._memory.asked.n_tokens
        size = min(most, self._model.sizes.max_spatial_tokens, max_tokens or most)
        if self._limit and size:
            # Places and features before and after the projection, of what is asked, and once more of what has gone.
            width = self._model.sizes.feature_width + self._model.decoder.size.hidden
            size = max(1, min(size, int((self._limit - self._memory.nbytes) / (2 * (4 * width + _PLACE)))))
        return size

    @property
    def nbytes(self) -> int:
        """Of what is kept for questions."""
        held = self.stems.nbytes + (0 if self.prefix is None else self.prefix.cache.held)
        for block in self._blocks.values():
            tokens = block.tokens.features, block.tokens.position, block.spatial
            held += sum(t.numel() * t.element_size() for t in tokens) + len(block.tokens) * _PLACE
        return held

    @property
    def may_keep_prefix(self) -> bool:
        """Whether a prefix of all tokens is within the limit."""
        return self._fits(0)

    @property
    def may_keep_stem(self) -> bool:
        """Whether a stem of all tokens is, were it of all layers: also what it was read from and what came out."""
        return self._fits(2 * self._model.decoder.size.hidden)

    def _fits(self, further: int) -> bool:
        """Whether keys and values of all layers, and so many `further` numbers a row, are within the limit; a stem that
        is there would go for them."""
        if not self._limit:
            return True
        size = self._model.decoder.size
        row = (2 * size.n_layers * size.keys + further) * self._model.dtype.itemsize
        held = self._memory.nbytes + self.nbytes - self.stems.nbytes
        return held + row * (self.size(None) + _TEXT) <= self._limit

    @torch.inference_mode()
    def block(self, max_tokens: int | None) -> Block:
        """At most `max_tokens` of the scene's tokens, at most as many as the model takes."""
        size = self.size(max_tokens)
        if size not in self._blocks:
            block = self.block_of(self._memory.question_tokens(size))
            if self._limit:
                self._blocks.clear()  # one at a time
            _ = block.scene.order  # for all questions, and where there is time ahead of them
            self._blocks[size] = block
        return self._blocks[size]

    def block_of(self, tokens: SpatialTokens) -> Block:
        """Some tokens as a question reads them."""
        spatial = self._model.scene_tokens(tokens.features, tokens.position)
        features = spatial[:, : self._model.decoder.size.hidden]
        return Block(tokens, SceneTokens(tokens.xyz, features, self._memory.clearness(tokens)), spatial)

    @torch.inference_mode()
    def objects(self) -> Objects:
        """What a question that points may mean, of all tokens of the views that it is about, for all such questions."""
        if self._objects is None:
            memory = self._memory
            tokens = memory.question_tokens(memory.asked.n_tokens)
            parts = tokens.xyz.cpu()[:, None] if tokens.parts is None else tokens.parts
            points = parts.reshape(-1, 3)
            boxes = propose(points[points.isfinite().all(dim=1)].numpy(), memory.floor)
            seen = torch.from_numpy(boxes - (*memory.origin, 0.0, 0.0, 0.0)).float()
            origin = torch.from_numpy(memory.origin).float()
            self._objects = Objects(boxes, self._model.object_tokens(tokens.features, parts - origin, seen))
        return self._objects

    @torch.inference_mode()
    def read_prefix(self, spliced: Spliced, should_stop: Callable[[], bool] | None = None) -> ScenePrefix:
        """The prefix of a prompt with all of the scene's tokens, read if it was not yet.

        Raises:
            Cancelled: should_stop() was true before a layer.
        """
        if self.prefix is None:
            if self._limit:
                self.stems.forget()
            rows, layout = spliced.embeds[:, : spliced.layout.spatial_end], spliced.layout
            self.prefix = ScenePrefix(
                self._model.decoder,
                rows,
                spliced.spatial_start,
                layout=layout,
                measure=True,
                should_stop=should_stop,
            )
        return self.prefix
