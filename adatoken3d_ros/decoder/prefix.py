# SPDX-License-Identifier: Apache-2.0
"""One scene, many questions: the keys and values of [system | spatial tokens] are computed once and kept.

The prompt puts the scene before the question, so nothing in this prefix depends on what is asked. Tokens may only be
left out of it without a question in hand (`farthest_points` or `diverse_features` of scores.py choose such a list); a
question may then look at the part of the prefix that its own attention prefers, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import CosSin, Decoder
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.decode import read_chunk
from adatoken3d_ros.decoder.prefill import (
    GateError,
    GateTrace,
    Layout,
    Prefill,
    ShouldStop,
    check_context,
)
from adatoken3d_ros.decoder.rows import fixed_rows
from adatoken3d_ros.pruning.scores import attention_of_last_rows, keep_top


class PrefixError(GateError):
    """A prefix that cannot be made, or a question that cannot be asked of it; the message names the value."""


class ScenePrefix:
    """The cached prefix of one scene; questions are asked one at a time, each forgotten when its `asking` ends.

    Attributes:
        n_tokens: rows of the prefix before any was left out.
        next_position: rotary position of the question's first row.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        embeds: Tensor,
        spatial_start: int,
        *,
        layout: Layout | None = None,
        keep: Tensor | None = None,
        top_k: int | None = None,
        measure: bool = False,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Reads the prefix.

        Args:
            decoder: a language model with SDPA attention, in eval mode.
            embeds: (1, P, D) embeddings of the prompt up to and with the last spatial token.
            spatial_start: row of the first spatial token; N = P - spatial_start.
            layout: of the whole prompt, where it says more than that: its first P rows are read.
            keep: (k,) which of the N tokens to keep, in any order; None for all. They keep their positions.
            top_k: how many of them a question sees in each layer, those it pays most attention there; None for all.
            measure: record the question's attention to the scene where `top_k` does not measure it anyway, at the cost
                of a second query and key projection of its rows in every layer.
            should_stop: asked before each layer.

        Raises:
            PrefixError: a shape, start, keep list or top_k that does not fit.
            GateError: the prefix does not fit the context, or the model does not use SDPA.
            Cancelled: should_stop() was true.
        """
        n_rows = embeds.shape[1] if embeds.ndim == 3 else 0
        n_spatial = n_rows - spatial_start if layout is None else layout.n_spatial
        if embeds.ndim != 3 or len(embeds) != 1 or spatial_start < 0 or n_spatial < 1:
            raise PrefixError(f"a prefix of shape {tuple(embeds.shape)} with spatial tokens from row {spatial_start}")
        if layout is not None and layout.spatial_end != n_rows:
            raise PrefixError(f"a prefix of {n_rows} rows, the spatial tokens end at row {layout.spatial_end}")
        if top_k is not None and top_k < 1:
            raise PrefixError(f"top_k is {top_k}")
        if decoder.first_gate and (keep is not None or top_k is not None):
            raise PrefixError(f"tokens cannot be left out before layer {decoder.first_gate} of this model")
        check_context(decoder, embeds.shape[1], 0)
        self.decoder, self.n_tokens, self.n_spatial = decoder, n_rows, n_spatial
        self.next_position = n_rows if layout is None else layout.next_position - layout.n_question
        self.keep = self._checked(keep, embeds.device)
        self.top_k = None if top_k is None else min(top_k, len(self.keep))
        self.measure = measure or self.top_k is not None
        every, added = torch.arange(n_rows, device=embeds.device), () if layout is None else layout.added
        if layout is None or layout.rows is None:
            spatial, self._fixed = spatial_start + self.keep, every[:spatial_start]
            rows = torch.cat([self._fixed, spatial])
            self._columns: slice | Tensor = slice(spatial_start, spatial_start + len(self.keep))
        else:
            spatial, fixed = layout.rows.to(embeds.device), fixed_rows(every, layout.rows.to(embeds.device))
            spatial = spatial[self.keep]
            rows = torch.cat([fixed, spatial]).sort().values
            self._columns, self._fixed = torch.searchsorted(rows, spatial), torch.searchsorted(rows, fixed)
        positions = rows if layout is None or layout.positions is None else layout.positions.to(rows.device)[..., rows]

        def add(i: int, hidden: Tensor) -> None:
            if i < len(added):
                hidden[0, self._columns] += added[i][self.keep].to(hidden.dtype)

        self.cache = RaggedCache(len(decoder))
        read_chunk(decoder, self.cache, embeds[:, rows], positions, after_layer=add, should_stop=should_stop)
        self._mark = self.cache.lengths
        self._asking = False

    @contextmanager
    def asking(
        self, question: Tensor, *, max_new_tokens: int = 0, should_stop: ShouldStop | None = None
    ) -> Iterator[Prefill]:
        """Reads a question (1, Q, D) and yields what `generate` continues from; the prefix is itself again afterwards.

        The trace counts a token as retained where the last layer's rows saw it; its contribution is the mean over the
        layers of its share of the question's attention to the scene, zeros where it is not measured.

        Raises:
            PrefixError: no question rows, another question still open, or attention that is not finite.
            GateError: prefix, question and new tokens do not fit the context.
            Cancelled: should_stop() was true before a layer.
        """
        if self._asking:
            raise PrefixError("a question is still open on this prefix")
        if question.ndim != 3 or len(question) != 1 or question.shape[1] < 1:
            raise PrefixError(f"a question of shape {tuple(question.shape)}")
        check_context(self.decoder, self.n_tokens + question.shape[1], max_new_tokens)
        self._asking = True
        try:
            yield self._read(question, should_stop)
        finally:
            self.cache.roll_back(self._mark)
            self._asking = False

    @torch.inference_mode()
    def _read(self, question: Tensor, should_stop: ShouldStop | None) -> Prefill:
        positions = self.next_position + torch.arange(question.shape[1], device=question.device)
        cache = self.cache if self.top_k is None else RaggedCache(len(self.decoder))
        n_layers, device = len(cache.layers), question.device
        contribution = torch.zeros(self.n_spatial, device=device)
        last_layer = torch.full((self.n_spatial,), -1, device=device)

        def look(i: int, hidden: Tensor, cos_sin: CosSin) -> None:
            seen = self.keep
            if self.measure:
                share = self._attention(i, hidden[0], cos_sin)
                contribution[self.keep] += share / (share.sum() * n_layers)
                if self.top_k is not None:
                    best = keep_top(share, self.top_k)
                    seen = self.keep[best]
                    self._copy_seen(i, best, cache)
            last_layer[seen] = i

        hidden = read_chunk(self.decoder, cache, question, positions, before_layer=look, should_stop=should_stop)
        if not contribution.isfinite().all():
            raise PrefixError("the question's attention to the scene is not finite (NaN or infinite)")
        n_seen = len(self.keep) if self.top_k is None else self.top_k
        trace = GateTrace((n_seen,) * n_layers, last_layer, contribution, last_layer == n_layers - 1, cache.lengths)
        last = hidden[0, -1]
        return Prefill(self.decoder.logits(last), last, cache, self.next_position + question.shape[1], trace)

    def _attention(self, i: int, question: Tensor, cos_sin: CosSin) -> Tensor:
        """Attention (k,) that the question's rows (Q, D), as they enter layer i, pay each kept spatial token there."""
        layer, (cos, sin) = self.decoder.layers[i], cos_sin
        keys = torch.cat([self._prefix(i)[0], layer.keys(question, cos[0], sin[0])], dim=1)
        queries = layer.queries(question, cos[0], sin[0])
        attention = attention_of_last_rows(queries, keys, layer.scaling)
        return attention[self._columns]

    def _copy_seen(self, i: int, best: Tensor, cache: RaggedCache) -> None:
        """Fills layer i of a question's own cache with the fixed rows and the spatial tokens `best` (top_k,)."""
        every = torch.arange(self._mark[i], device=best.device)
        columns = torch.cat([self._fixed, every[self._columns][best]])
        keys, values = self._prefix(i)
        cache.layers[i].update(keys[None, :, columns], values[None, :, columns])

    def _prefix(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values (H_kv, n, head_dim) of the prefix in layer i."""
        layer, n = self.cache.layers[i], self._mark[i]
        return layer.keys[0, :, :n], layer.values[0, :, :n]

    def _checked(self, keep: Tensor | None, device: torch.device) -> Tensor:
        every = torch.arange(self.n_spatial, device=device)
        if keep is None:
            return every
        if keep.ndim != 1 or len(keep) == 0 or not torch.isin(keep, every).all() or len(keep.unique()) < len(keep):
            raise PrefixError(
                f"a list of {tuple(keep.shape)} tokens to keep that are not distinct indices below {self.n_spatial}"
            )
        return keep.sort().values
