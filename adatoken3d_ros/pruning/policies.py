# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: our gate and its rivals behind one interface, so that a comparison is a loop over names.

A policy sees one sample at one gate and returns the rows to keep; `gate.prefill` removes the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from adatoken3d_ros.pruning.decay import Decay, gates_on_curve
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one, rounded, rounded_from_removed, truncated
from adatoken3d_ros.pruning.scores import (
    attention_of_last_rows,
    diverse_features,
    diverse_places,
    farthest_points,
    keep_top,
    position_bias,
    project_keys,
    project_queries,
    sink_tokens,
)

Rope = Literal["original", "renumber"]


class PolicyError(ValueError):
    """A policy that does not exist, or that was asked for what it cannot do; the message names the value."""


@dataclass(frozen=True, eq=False)
class SceneTokens:
    """What is known of the N spatial tokens beforehand: centroids (N, 3) in metres, and features (N, D), the tokens as
    the language model reads them.

    Keep one object as long as the scene stays the same: it remembers its `order`.

    Raises:
        PolicyError: a centroid is not finite.
    """

    xyz: Tensor
    features: Tensor | None = None

    def __post_init__(self) -> None:
        if not (finite := self.xyz.isfinite().all(-1)).all():
            token = int(finite.long().argmin())
            raise PolicyError(f"spatial token {token} is at {self.xyz[token].tolist()}")

    @cached_property
    def order(self) -> Tensor:
        """(N,) int64 tokens in an order in which each differs most from all before it, in what it shows and where, or
        without features only where. Asked for ahead of a question, it spares the gate the work.
        """
        if self.features is None:
            return farthest_points(self.xyz)
        return diverse_places(self.xyz, self.features)


@dataclass(frozen=True, eq=False)
class GateView:
    """One sample at the gate before decoder layer `layer`: S rows without padding, n of them spatial.

    Attributes:
        layer: the gate's layer g; layers < g have run.
        n_keep: spatial tokens to keep, 0 < n_keep < n.
        n_total: spatial tokens of the sample at the start, N.
        alive: (n,) int64 original indices of the spatial tokens still there, rising.
        start: row of the first spatial token.
        n_question: rows after the last spatial token, at least 1.
        hidden: (S, D) states that would enter layer g.
        question: (n_question, D) states of the question rows that entered layer g-1; None at g = 0.
        keys: (H_kv, S, head_dim) cached keys of layer g-1, rotated; None at g = 0.
        cos, sin: (S, head_dim) of the rows' positions.
        below, above: decoder layers g-1 (None at g = 0) and g.
        scene: centroids and features of the N tokens, if the caller gave them.
    """

    layer: int
    n_keep: int
    n_total: int
    alive: Tensor
    start: int
    n_question: int
    hidden: Tensor
    question: Tensor | None
    keys: Tensor | None
    cos: Tensor
    sin: Tensor
    below: LlamaDecoderLayer | None
    above: LlamaDecoderLayer
    scene: SceneTokens | None

    @property
    def spatial(self) -> slice:
        """Rows of the spatial tokens."""
        return slice(self.start, self.start + len(self.alive))

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


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens that stay.

    Attributes:
        keep: (n_keep,) int64 rising indices into `GateView.alive`.
        scores: (n,) attention that the question paid to each token, not negative; None if it was not measured.
        merged: (n_keep, D) states that replace the kept rows; None to keep them as they are.
    """

    keep: Tensor
    scores: Tensor | None = None
    merged: Tensor | None = None


@dataclass(frozen=True)
class GateSize:
    """What decides the cost of a gate: its layer, rows, how many are spatial or of the question, how many to keep."""

    layer: int
    n_rows: int
    n_spatial: int
    n_keep: int
    n_question: int


class Policy(Protocol):
    """What `gate.prefill` and the benchmarks need of a way to prune."""

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

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        """Operations of `select`, 2 per multiply-add, sorting and gathering not counted."""
        ...


def scaled_schedule(layers_of_32: list[int], ratios: list[float], n_layers: int) -> Schedule:
    """A schedule for 32 layers on `n_layers`; gates that fall together take the later ratio, none moves to layer 0."""
    stages: dict[int, float] = {}
    for layer, ratio in zip(layers_of_32, ratios, strict=True):
        stages[max(min(layer, 1), layer * n_layers // 32)] = ratio
    return Schedule.of(list(stages), list(stages.values()))


def projection_widths(config: LlamaConfig) -> tuple[int, int]:
    """Columns of the query and of the key projection."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, (config.num_key_value_heads or config.num_attention_heads) * head_dim


@dataclass(frozen=True)
class Unpruned:
    """`none`: every token stays; its schedule has no gate (it may withdraw)."""

    name: str = "none"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        raise PolicyError(
            f"policy none was given a gate at layer {view.layer} that keeps {view.n_keep} of {view.n_total}"
        )

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule()

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        return 0.0


@dataclass(frozen=True)
class Random:
    """`random`: a seeded uniform choice, the control of every comparison; by default on the schedule of `ours`."""

    seed: int = 0
    name: str = "random"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        generator = torch.Generator().manual_seed(self.seed * 1009 + view.layer)
        keep = torch.randperm(len(view.alive), generator=generator)[: view.n_keep].sort().values
        return Selection(keep.to(view.alive.device))

    def default_schedule(self, n_layers: int) -> Schedule:
        return Ours().default_schedule(n_layers)

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        return 0.0


@dataclass(frozen=True)
class CoarseVoxel:
    """`coarse_voxel`: the finest cubic grid with at most k occupied cells, each cell one token, the mean of its tokens.

    A grid seldom has exactly k occupied cells: slots left over go to further tokens of the fullest cells, which then
    are not part of a mean. Means are of the states at the gate (before the language model: of projected features) and
    stand at the row and position of the cell's first token.
    """

    name: str = "coarse_voxel"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        cell = coarsest_cells(view.scene_for(self.name).xyz[view.alive], view.n_keep)
        n_cells, order = int(cell.max()) + 1, torch.arange(len(cell), device=cell.device)
        first = torch.full((n_cells,), len(cell), device=cell.device).scatter_reduce(0, cell, order, "amin")
        size = cell.bincount(minlength=n_cells)
        spare = torch.ones_like(cell, dtype=torch.bool).index_fill(0, first, False)
        extra = order[spare][size[cell[spare]].argsort(descending=True, stable=True)][: view.n_keep - n_cells]
        cell = cell.index_put((extra,), n_cells + torch.arange(len(extra), device=cell.device))
        keep, by_row = torch.cat([first, extra]).sort()
        states = view.hidden[view.spatial].float()
        sums = torch.zeros(view.n_keep, states.shape[-1], device=states.device).index_add_(0, cell, states)
        means = sums / cell.bincount(minlength=view.n_keep)[:, None]
        return Selection(keep, merged=means[by_row].to(view.hidden.dtype))

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.36])

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        return float(size.n_spatial * config.hidden_size)


def coarsest_cells(xyz: Tensor, k: int) -> Tensor:
    """Cell (n,) of points `xyz` (n, 3) in the finest cubic grid with at most `k` cells occupied, by bisection."""
    points = xyz.double() - xyz.double().amin(0)
    coarse, fine = 2 * float(points.max()) + 1e-6, 0.0
    best = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _ in range(40):
        size = (coarse + fine) / 2
        cell = (points / size).floor().unique(dim=0, return_inverse=True)[1]
        if int(cell.max()) + 1 <= k:
            coarse, best = size, cell
        else:
            fine = size
    return best


@dataclass(frozen=True)
class FastV:
    """`fastv`: attention of the prompt's last row at layer g-1, mean over heads, positions kept (arXiv 2403.06764).

    The original reads full attention maps from an eager layer; this one row from the cached keys is the same number, at
    less than the original's cost.
    """

    name: str = "fastv"
    rope: Rope = "original"
    kept = staticmethod(rounded_from_removed)

    def select(self, view: GateView) -> Selection:
        return _by_attention(self.name, view, rows=1)

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_schedule([2], [0.5], n_layers)

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        return _cached_key_flops(config, size, rows=1)


def question_scores(policy: str, view: GateView, rows: int) -> Tensor:
    """Attention (n,) that the last `rows` question rows paid the tokens in layer g-1; only their queries are new.

    Raises:
        PolicyError: at g = 0 no layer has run.
    """
    if view.question is None or view.keys is None or view.below is None:
        raise PolicyError(f"{policy} scores by the attention of the layer below; layer {view.layer} has none")
    queries = project_queries(view.below, view.question[-rows:], view.cos[-rows:], view.sin[-rows:])
    return attention_of_last_rows(queries, view.keys, view.below.self_attn.scaling)[view.spatial]


def _by_attention(policy: str, view: GateView, rows: int) -> Selection:
    scores = question_scores(policy, view, rows)
    return Selection(keep_top(scores, view.n_keep), scores)


def _cached_key_flops(config: LlamaConfig, size: GateSize, rows: int) -> float:
    width, _ = projection_widths(config)
    return 2.0 * rows * config.hidden_size * width + 2.0 * rows * size.n_rows * width


@dataclass(frozen=True)
class PyramidDrop:
    """`pyramiddrop`: attention of the last question row in the *next* layer (arXiv 2410.17247).

    Scored the method's own way: queries and keys of all rows are computed for one row's attention and thrown away, then
    computed again by the layer. Positions are renumbered after each drop, as in its code.
    """

    name: str = "pyramiddrop"
    rope: Rope = "renumber"
    layers: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    kept = staticmethod(truncated)

    def select(self, view: GateView) -> Selection:
        keys = project_keys(view.above, view.hidden, view.cos, view.sin)
        queries = project_queries(view.above, view.hidden, view.cos, view.sin)
        scores = attention_of_last_rows(queries[:, -1:], keys, view.above.self_attn.scaling)[view.spatial]
        return Selection(keep_top(scores, view.n_keep), scores)

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_schedule(list(self.layers), list(self.ratios), n_layers)

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        width, kv_width = projection_widths(config)
        return 2.0 * size.n_rows * (config.hidden_size * (width + kv_width) + width)


RELEASED_LISTS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "model": ((8, 16, 24), (0.5, 0.25, 0.125)),
    "run": ((8, 16, 24), (0.8, 0.5, 0.25)),
    "scanqa": ((8, 16, 24), (0.8, 0.6, 0.4)),
    "ate": ((4, 8, 12, 16, 18, 20, 22, 24, 26, 28), (0.9, 0.8, 0.75, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.25)),
    "plot": ((4, 8, 12, 16, 18, 20), (0.75, 0.5, 0.4, 0.3, 0.25, 0.15)),
}


def adatoken_release(lists: str = "ate", renumber: bool = True) -> PyramidDrop:
    """`adatoken_release`: what the published code of AdaToken-3D runs, PyramidDrop's gate on its own lists.

    `adatoken_release_original` is the same with original positions.

    Args:
        lists: which of the lists found in its scripts, a key of RELEASED_LISTS.
        renumber: renumber positions after each drop, as published.
    """
    if lists not in RELEASED_LISTS:
        raise PolicyError(f"no released lists {lists!r}; there are {', '.join(RELEASED_LISTS)}")
    layers, ratios = RELEASED_LISTS[lists]
    if renumber:
        return PyramidDrop("adatoken_release", "renumber", layers, ratios)
    return PyramidDrop("adatoken_release_original", "original", layers, ratios)


# B (L - 1) of the decay that saves 63 % of the exact prefill of LLaVA-3D-7B with end share 0.10 and ten gates.
CLAIMED_FALL = 3.6


@dataclass(frozen=True)
class AdaToken(FastV):
    """`adatoken`: AdaToken-3D as its paper means it and its code does not run (arXiv 2505.12782).

    Ranked by the attention of the last question row, read off cached keys; many gates that follow an exponential decay
    of the kept share down to `end_share` at the last layer; positions kept. A model's own decay is fitted to what its
    layers contribute (`decay.adatoken_schedule`); without a fit it falls as fast as the paper's claim of 63 % fewer
    operations asks at 7B.

    Attributes:
        end_share: share of the spatial tokens left at the last layer, the method's single knob.
        max_gates: most gates of the default schedule; ten, as in the release's longest list.
    """

    name: str = "adatoken"
    end_share: float = 0.10
    max_gates: int = 10
    kept = staticmethod(at_least_one)

    def default_schedule(self, n_layers: int) -> Schedule:
        if n_layers < 2:
            return Schedule()
        return gates_on_curve(Decay(CLAIMED_FALL / (n_layers - 1), self.end_share, n_layers).curve(), self.max_gates)


@dataclass(frozen=True)
class DivPrune:
    """`divprune`: greedy max-min cosine distance of the tokens, before the language model (arXiv 2503.02175)."""

    name: str = "divprune"
    rope: Rope = "original"
    kept = staticmethod(rounded)

    def select(self, view: GateView) -> Selection:
        return Selection(diverse_features(view.hidden[view.spatial], view.n_keep).sort().values)

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.098])

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        return 2.0 * config.hidden_size * size.n_spatial**2 + 2.0 * size.n_keep * size.n_spatial


@dataclass(frozen=True, eq=False)
class Ours:
    """`ours`: attention that the whole question pays, read off the keys that layer g-1 has cached anyway.

    At g = 0 nothing has been asked yet: the tokens that differ most in what they show and where (`SceneTokens.order`),
    in their states alone where no positions are given.

    Attributes:
        rows: "question" for all rows after the spatial tokens, "last" for the last one.
        coverage: share of the slots given to the first tokens in that order of the scene, whatever their score, so that
            counting and grounding survive; the best of the others get the rest. None for 0.1 where positions are given,
            0 where they are not.
        debias: m numbers, the mean score to expect along the relative position of a token, which the scores are
            divided by; empty for no correction (`information.position_curve` measures them).
        sink_dims: activations that mark attention sinks, which then rank last; they belong to the language model
            (`calibration.massive_dims` finds them).
        sink_threshold: how huge such an activation is, as a multiple of the row's root mean square.
    """

    rows: Literal["question", "last"] = "question"
    coverage: float | None = None
    debias: Sequence[float] = ()
    sink_dims: Sequence[int] = ()
    sink_threshold: float = 20.0
    name: str = "ours"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def __post_init__(self) -> None:
        if self.rows not in ("question", "last"):
            raise PolicyError(f"rows {self.rows!r} is neither 'question' nor 'last'")
        if self.coverage is not None and not 0.0 <= self.coverage <= 1.0:
            raise PolicyError(f"coverage {self.coverage} is outside [0, 1]")
        for value in self.debias:
            if isinstance(value, str) or not 0.0 < value < math.inf:
                raise PolicyError(f"debias holds {value!r}, expected positive, finite numbers")
        for dim in self.sink_dims:
            if not isinstance(dim, int) or dim < 0:
                raise PolicyError(f"sink_dims holds {dim!r}, expected indices of the hidden state")

    def select(self, view: GateView) -> Selection:
        if any(dim >= view.hidden.shape[-1] for dim in self.sink_dims):
            raise PolicyError(f"sink_dims {list(self.sink_dims)} for a model of hidden size {view.hidden.shape[-1]}")
        if view.layer == 0:
            return Selection(self._spread(view))
        scores = question_scores(self.name, view, 1 if self.rows == "last" else view.n_question)
        ranked = scores
        if self.debias:
            curve = torch.tensor(self.debias, dtype=torch.float32, device=scores.device)
            ranked = ranked / position_bias(curve, view.alive, view.n_total)
        if self.sink_dims:
            sinks = sink_tokens(view.hidden[view.spatial], tuple(self.sink_dims), self.sink_threshold)
            ranked = ranked.masked_fill(sinks, -1.0)
        n_spread = self._spread_slots(view)
        if n_spread > 0:
            # Alive: every gate before kept as many of this order or more, unless its scores were NaN. The trace says so
            # in the end; an index beyond the last would before be an error without a name, and end a GPU's context.
            spread = view.scene_for(self.name).order[:n_spread]
            places = torch.searchsorted(view.alive, spread).clamp_(max=len(view.alive) - 1)
            ranked = ranked.index_fill(0, places, torch.inf)
        keep = keep_top(ranked, view.n_keep)
        return Selection(keep, scores)

    def _spread_slots(self, view: GateView) -> int:
        share = (0.0 if view.scene is None else 0.1) if self.coverage is None else self.coverage
        return math.floor(share * view.n_keep)

    def _spread(self, view: GateView) -> Tensor:
        if view.scene is None:
            return diverse_features(view.hidden[view.spatial], view.n_keep).sort().values
        return view.scene_for(self.name).order[: view.n_keep].sort().values

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_schedule([2, 8, 16], [0.5, 0.25, 0.125], n_layers)

    def flops(self, config: LlamaConfig, size: GateSize) -> float:
        # Its part of the scene's order, as if that were not made once for all questions, and ahead of them.
        if size.layer == 0:
            return 2.0 * config.hidden_size * size.n_keep * size.n_spatial
        n_spread = math.floor((0.1 if self.coverage is None else self.coverage) * size.n_keep)
        spread = 2.0 * config.hidden_size * n_spread * size.n_spatial
        return spread + _cached_key_flops(config, size, 1 if self.rows == "last" else size.n_question)


_POLICIES: dict[str, Callable[..., Policy]] = {
    "none": Unpruned,
    "random": Random,
    "coarse_voxel": CoarseVoxel,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "adatoken_release": adatoken_release,
    "adatoken_release_original": partial(adatoken_release, renumber=False),
    "adatoken": AdaToken,
    "divprune": DivPrune,
    "ours": Ours,
}
POLICY_NAMES = tuple(_POLICIES)


def make_policy(name: str, **options: Any) -> Policy:
    """The policy called `name`, one of POLICY_NAMES.

    Raises:
        PolicyError: no such policy, or an option it does not have.
    """
    if name not in _POLICIES:
        raise PolicyError(f"no policy {name!r}; there are {', '.join(POLICY_NAMES)}")
    try:
        return _POLICIES[name](**options)
    except TypeError as error:
        raise PolicyError(f"policy {name!r}: {error}") from error
