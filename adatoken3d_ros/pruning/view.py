# SPDX-License-Identifier: Apache-2.0
"""What a policy author reads: what a policy sees at a gate, what it gives back, and what else is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.scores import attention_of_last_rows, diverse_places, farthest_points

Rope = Literal["original", "renumber"]


class PolicyError(ValueError):
    """A policy that does not exist, or that was asked for what it cannot do; the message names the value."""


@dataclass(frozen=True, eq=False)
class SceneTokens:
    """What is known of the N spatial tokens beforehand: centroids (N, 3) in metres, features (N, D), the tokens as the
    language model reads them, and how well each was `seen` (N,), more is better.

    What only some models have, and only some rivals ask for: the attention `attended` (N,) that the vision tower's
    class token pays to each, and of tokens of views the number of the view, rising, and the place in its grid, `views`
    (N, 2).

    Keep one object as long as the scene stays the same: it remembers its `order`.

    Raises:
        PolicyError: a centroid is not finite, or `seen`, `attended` or `views` is of another number of tokens.
    """

    xyz: Tensor
    features: Tensor | None = None
    seen: Tensor | None = None
    attended: Tensor | None = None
    views: Tensor | None = None

    def __post_init__(self) -> None:
        if not (finite := self.xyz.isfinite().all(-1)).all():
            token = int(finite.long().argmin())
            raise PolicyError(f"spatial token {token} is at {self.xyz[token].tolist()}")
        if self.seen is not None and self.seen.shape != self.xyz.shape[:1]:
            raise PolicyError(f"how well tokens were seen is {tuple(self.seen.shape)} for {len(self.xyz)} of them")
        if self.attended is not None and self.attended.shape != self.xyz.shape[:1]:
            raise PolicyError(f"attention to tokens is {tuple(self.attended.shape)} for {len(self.xyz)} of them")
        if self.views is not None and self.views.shape != (len(self.xyz), 2):
            raise PolicyError(f"the tokens' views are {tuple(self.views.shape)} for {len(self.xyz)} of them")

    @cached_property
    def order(self) -> Tensor:
        """(N,) int64 tokens in an order in which each differs most from all before it, in what it shows and where, or
        without features only where. Asked for ahead of a question, it spares the gate the work.
        """
        return self._ordered(len(self.xyz))

    def first(self, n: int) -> Tensor:
        """(n,) the first of `order`; where that is not known yet, no more of it is made than is asked for."""
        known: Tensor | None = self.__dict__.get("order", self.__dict__.get("_first"))
        if known is None or len(known) < min(n, len(self.xyz)):
            known = self.__dict__["_first"] = self._ordered(n)
        return known[:n]

    def _ordered(self, n: int) -> Tensor:
        if self.features is None:
            return farthest_points(self.xyz, n)
        return diverse_places(self.xyz, self.features, most=n)


class LayerView(Protocol):
    """Of a decoder layer, what a score is made of; `decoder.adapter.Layer` is one."""

    @property
    def scaling(self) -> float:
        """Factor of the products of queries and keys."""
        ...

    def queries(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H, n, head_dim) of rows (n, D) that enter the layer, turned to their positions."""
        ...

    def queries_of(self, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The same of what the layer's query projection has made of them, (n, H * head_dim)."""
        ...

    def keys(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H_kv, n, head_dim), the same."""
        ...


@dataclass(frozen=True, eq=False)
class GateView:
    """The gate before decoder layer `layer`: S rows, n of them spatial.

    Attributes:
        layer: the gate's layer g; layers < g have run.
        n_keep: spatial tokens to keep, 0 < n_keep < n.
        n_total: spatial tokens at the start, N.
        alive: (n,) int64 original indices of the spatial tokens still there, rising.
        spatial: rows of these tokens.
        n_question: rows after the last spatial token, at least 1.
        embeds: (S0, D) the prompt as it entered the model. entered: rows of all N tokens in it.
        hidden: (S, D) states that would enter layer g.
        question: (n_question, D) states of the question rows that entered layer g-1; None at g = 0.
        keys: (H_kv, S, head_dim) cached keys of layer g-1, rotated; None at g = 0.
        cos, sin: (S, head_dim) of the rows' positions.
        below, above: decoder layers g-1 (None at g = 0) and g.
        scene: centroids and features of the N tokens, if the caller gave them.
        changed: (n,) what a policy that is `Watching` made of the layers so far, else None.
        queried: (n_question, H * head_dim) what the query projection of layer g-1 made of `question`, where it was
            noted.
    """

    layer: int
    n_keep: int
    n_total: int
    alive: Tensor
    spatial: slice | Tensor
    n_question: int
    embeds: Tensor
    entered: slice | Tensor
    hidden: Tensor
    question: Tensor | None
    keys: Tensor | None
    cos: Tensor
    sin: Tensor
    below: LayerView | None
    above: LayerView
    scene: SceneTokens | None
    changed: Tensor | None = None
    queried: Tensor | None = None

    def scene_for(self, policy: str) -> SceneTokens:
        """The scene.

        Raises:
            PolicyError: the caller gave none, or one of another number of tokens.
        """
        if self.scene is None:
            raise PolicyError(f"{policy} at layer {self.layer} needs the tokens' positions: pass scene=...")
        if self.scene.xyz.shape != (self.n_total, 3):
            raise PolicyError(f"the scene's positions are {tuple(self.scene.xyz.shape)} for {self.n_total} tokens")
        return self.scene

    def attention_below(self, policy: str, rows: int) -> Tensor:
        """Attention (n,) that the last `rows` question rows paid the tokens in layer g-1.

        Raises:
            PolicyError: at g = 0 no layer has run.
        """
        if self.question is None or self.keys is None or self.below is None:
            raise PolicyError(f"{policy} scores by the attention of the layer below; layer {self.layer} has none")
        cos, sin = self.cos[-rows:], self.sin[-rows:]
        if self.queried is None:
            queries = self.below.queries(self.question[-rows:], cos, sin)
        else:
            queries = self.below.queries_of(self.queried[-rows:], cos, sin)
        return attention_of_last_rows(queries, self.keys, self.below.scaling)[self.spatial]


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens that stay.

    Attributes:
        keep: (n_keep,) int64 rising indices into `GateView.alive`.
        scores: (n,) attention that the question paid to each token, not negative; None if it was not measured.
        merged: (n_keep, D) states that replace the kept rows; None to keep them as they are.
        groups: (n,) int64, of which kept token each is part then; it says how to merge what later layers add to them.
    """

    keep: Tensor
    scores: Tensor | None = None
    merged: Tensor | None = None
    groups: Tensor | None = None

    def of(self, vectors: Tensor) -> Tensor:
        """What is left of (n, D) vectors of the tokens: rows of the kept ones, or their groups' means."""
        if self.groups is None:
            return vectors[self.keep]
        sums = torch.zeros(len(self.keep), vectors.shape[1], device=vectors.device)
        sums = sums.index_add_(0, self.groups, vectors.float())
        return (sums / self.groups.bincount(minlength=len(self.keep))[:, None]).to(vectors.dtype)


@dataclass(frozen=True)
class GateSize:
    """What decides the cost of a gate: its layer, rows, how many are spatial or of the question, how many to keep, and
    how many spatial tokens there were at the start."""

    layer: int
    n_rows: int
    n_spatial: int
    n_keep: int
    n_question: int
    n_total: int = 0


@dataclass(frozen=True)
class DecoderSize:
    """What the operations of a language model depend on.

    Attributes:
        n_layers: decoder layers.
        hidden: width of the hidden states, D.
        intermediate: width inside a layer's gated MLP.
        vocabulary: V.
        queries, keys: columns of the query and of the key projection.
    """

    n_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    queries: int
    keys: int


class Policy(Protocol):
    """What `decoder.prefill` and the benchmarks need of a way to prune."""

    @property
    def name(self) -> str:
        """One of POLICY_NAMES."""
        ...

    @property
    def rope(self) -> Rope:
        """Whether kept tokens keep their positions."""
        ...

    def kept(self, ratio: float, n_spatial: int, /) -> int:
        """How many of `n_spatial` tokens a stage of `ratio` leaves: rivals count as their published code does."""
        ...

    def select(self, view: GateView) -> Selection:
        """The rows to keep at this gate."""
        ...

    def default_schedule(self, n_layers: int) -> Schedule:
        """The method's own schedule, its layers scaled from the 32 of LLaMA-7B to `n_layers`."""
        ...

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        """Operations of `select`, 2 per multiply-add, sorting and gathering not counted."""
        ...


@runtime_checkable
class Watching(Protocol):
    """A policy that also asks what layers do to the rows: `GateView.changed` is the sum of what it says of them."""

    def watches(self, layer: int, n_layers: int) -> bool:
        """Whether of this layer."""
        ...

    def change(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(q,) of what attention and MLP were given and gave back, (q, D) each."""
        ...


@runtime_checkable
class Bypassing(Protocol):
    """A policy to whose later gates dropped tokens come back, as they were when they were dropped.

    Its view then has all N tokens but no keys of layer g-1, which has not seen all of them.
    """

    @property
    def bypass(self) -> bool:
        """Whether it is."""
        ...


@runtime_checkable
class BlindAtStart(Protocol):
    """A policy whose gate before the first layer may choose without the question, for all questions about a scene."""

    @property
    def blind_at_start(self) -> bool:
        """Whether it does."""
        ...


def attention_flops(decoder: DecoderSize, gate: GateSize, rows: int) -> float:
    """Operations of `GateView.attention_below` for `rows` question rows."""
    return 2.0 * rows * decoder.hidden * decoder.queries + 2.0 * rows * gate.n_rows * decoder.queries
