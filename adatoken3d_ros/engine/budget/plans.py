# SPDX-License-Identifier: Apache-2.0
"""Ways to answer a question, what each costs in time and accuracy, and the best one that fits a budget.

A plan sets five knobs: the pruning schedule, the new views that are encoded, the scene tokens that are kept, whether
the scene's kept prefix is read or the whole prompt, and the length of the answer. The schedules from unpruned to the
configured strategy are the normal range (rung 0). Where none of them fits, a plan may also, in this order,

    1. encode fewer new views,
    2. use fewer scene tokens,
    3. prune more than configured and withdraw the scene earlier,
    4. give a shorter answer.

The first rung on which a plan fits is used, and there the plan with the least loss. Loss is the strategy's calibrated
divergence (KL, in nats) where it has one. Whatever was not calibrated counts by a stated monotone proxy: the share of
token-layers removed, of new views left out, of scene tokens left out, of the answer cut. A share of token-layers counts
the divergence that the configured strategy pays per share (1 where it was not calibrated), a share of the others the
most that any schedule pays.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.budget.latency import (
    LatencyModel,
    decode_terms,
    encode_terms,
    follow_up_terms,
    read_terms,
    token_terms,
)
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.pruning.schedule import Schedule, in_buckets, scaled
from adatoken3d_ros.pruning.strategy import Strategy

FloatArray = NDArray[np.float64]

RUNGS = ("as configured", "fewer new views", "fewer scene tokens", "stronger pruning", "shorter answer")
WEAKER = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)  # factors on the configured keep ratios
STRONGER = (0.7, 0.5, 0.25)
WITHDRAWALS = (0.75, 0.5, 0.25)  # of the layers, together with the strongest pruning
TOKEN_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.125)
SHORTEST_ANSWER = 4  # tokens, unless the question asks for less


@dataclass(frozen=True)
class Option:
    """A pruning schedule that a plan may use; rung 0 or 3."""

    strategy: Strategy
    rung: int
    removed: float  # share of token-layers
    loss: float


def options(
    strategy: Strategy, n_layers: int, calibrated: Sequence[Strategy] = (), first_gate: int = 0
) -> tuple[Option, ...]:
    """From no pruning over the configured strategy to hardly any scene, by what they remove; no gate before first_gate.

    `calibrated` are further strategies of the same model; those that remove no more than the configured one are in the
    normal range, and they stand for what would be the same schedule with a loss by the proxy. As far as they reach,
    only they are used: what their schedules cost is known, what scaled ones would cost is guessed.
    """
    removed = removed_share(strategy.schedule, n_layers)
    measured = {
        one.schedule: kl
        for one in (*calibrated, strategy)
        if one.policy == strategy.policy and (kl := calibrated_loss(one)) is not None
    }
    shares = [kl / share for schedule, kl in measured.items() if (share := removed_share(schedule, n_layers)) > 0]
    unit = max(shares, default=1.0)
    reach = max((removed_share(one.schedule, n_layers) for one in calibrated if one.schedule in measured), default=0.0)
    full = replace(strategy, name="unpruned", schedule=Schedule())
    found: dict[Any, Strategy] = {full.schedule: full, strategy.schedule: strategy}
    guessed: dict[Schedule, str] = {}
    for factor in (*WEAKER, *STRONGER):
        guessed.setdefault(scaled(strategy.schedule, factor), f"{strategy.name} x{factor:g}")
    strongest = scaled(strategy.schedule, STRONGER[-1])
    for share in WITHDRAWALS:
        layer = max(1, first_gate, math.floor(share * n_layers + 0.5))
        if strategy.schedule.withdraw_layer is not None:
            layer = min(layer, strategy.schedule.withdraw_layer)
        stages = tuple(stage for stage in strongest.stages if stage.layer < layer)
        schedule = Schedule(stages, layer)
        guessed.setdefault(schedule, f"{strategy.name} until {layer}")
    for schedule, name in guessed.items():
        if removed_share(schedule, n_layers) > reach:
            found.setdefault(schedule, replace(strategy, name=name, schedule=schedule))
    for one in calibrated:
        if one.policy != strategy.policy or one.schedule not in found:
            found[(one.policy, one.schedule)] = one
    rows = []
    for one in found.values():
        share = removed_share(one.schedule, n_layers)
        known = measured.get(one.schedule) if one.policy == strategy.policy else calibrated_loss(one)
        rung = 0 if share <= removed + 1e-9 else 3
        rows.append(Option(one, rung, share, unit * share if known is None else known))
    return tuple(sorted(rows, key=lambda option: (option.removed, option.loss)))


def removed_share(schedule: Schedule, n_layers: int) -> float:
    """Share of token-layers that a schedule takes away from 10 000 tokens."""
    n_spatial = 10_000
    return 1.0 - sum(schedule.counts(n_spatial, n_layers)) / (n_spatial * n_layers)


def calibrated_loss(strategy: Strategy) -> float | None:
    """KL in nats that the strategy was measured to cost, if it was."""
    figures = strategy.info.get("figures")
    kl = figures.get("kl") if isinstance(figures, dict) else None
    return float(kl) if isinstance(kl, int | float) and kl >= 0 else None


@dataclass(frozen=True)
class Situation:
    """What plans are made for.

    Attributes:
        n_spatial: tokens of the scene as it is encoded, before the model's limit.
        max_spatial: that limit.
        views: encoded views.
        pending: key frames that wait to be encoded.
        tokens_per_view: what a new view is expected to add, tokens.
        n_system, n_question: rows of the prompt before and after the spatial tokens.
        answer_limit: longest answer, tokens.
        answer_expected: tokens that 19 of 20 answers stay under.
        answer_typical: tokens that half of them stay under; None for answer_expected.
        built: numbers of scene tokens for which the tokens are there already.
        reuse: prefixes may be used; prefix_ready: the scene's is there.
        prunable: plans may choose the number of scene tokens (not any more once they are built).
    """

    n_spatial: int
    max_spatial: int
    views: int
    pending: int
    tokens_per_view: float
    n_system: int
    n_question: int
    answer_limit: int
    answer_expected: int
    built: frozenset[int] = frozenset()
    reuse: bool = False
    prefix_ready: bool = False
    prunable: bool = True
    answer_typical: int | None = None

    @property
    def n_text(self) -> int:
        return self.n_system + self.n_question

    def tokens_after(self, new_views: int) -> int:
        """Scene tokens once so many new views are encoded."""
        return min(self.max_spatial, max(1, round(self.n_spatial + new_views * self.tokens_per_view)))


@dataclass(frozen=True)
class Plan:
    """One way to answer.

    Attributes:
        strategy: the pruning schedule and policy.
        new_views: pending key frames to encode.
        max_tokens: scene tokens to use; None for all that the model takes.
        reuse: read the question over the scene's prefix; nothing is pruned then.
        answer_tokens: longest answer.
        rung: index into RUNGS.
        loss: see the module's text; views_loss and tokens_loss: what of it is for views and scene tokens left out.
        predicted: p50 in milliseconds, without waiting.
        p95_ms: what 19 of 20 such answers stay under, from now on.
        bucket: rows of which gates make a multiple (`decoder.prefill.prefill`).
    """

    strategy: Strategy
    new_views: int
    max_tokens: int | None
    reuse: bool
    answer_tokens: int
    rung: int = 0
    loss: float = 0.0
    views_loss: float = 0.0
    tokens_loss: float = 0.0
    predicted: StageTimes | None = None
    p95_ms: float = 0.0
    bucket: int = 1

    @property
    def knobs(self) -> str:
        """For people."""
        tokens = "all tokens" if self.max_tokens is None else f"{self.max_tokens} tokens"
        way = "scene prefix" if self.reuse else self.strategy.name
        return f"{way}, {self.new_views} new views, {tokens}, answer up to {self.answer_tokens}"


class Table:
    """The plans of a situation that no other beats in both time and loss, for each rung that one may go down to.

    Built in one go with arrays; `choose` then only searches sorted times.
    """

    def __init__(self, situation: Situation, options: Sequence[Option], latency: LatencyModel, n_layers: int) -> None:
        self.situation = situation
        self._options = tuple(options)
        self._bucket = latency.bucket
        grid = _grid(situation, self._options, latency, n_layers)
        self._grid = grid
        self._fronts: list[tuple[list[float], NDArray[np.int64]]] = []
        for rung in range(len(RUNGS)):
            rows = np.flatnonzero(grid.rung <= rung)
            rows = rows[np.lexsort((grid.loss[rows], grid.p95[rows]))]
            before = np.concatenate([[np.inf], np.minimum.accumulate(grid.loss[rows])[:-1]])
            front = rows[grid.loss[rows] < before]
            self._fronts.append((grid.p95[front].tolist(), front))

    def __len__(self) -> int:
        """Pareto-optimal plans, all rungs together."""
        return len(np.unique(np.concatenate([front for _, front in self._fronts])))

    @property
    def cheapest_seconds(self) -> float:
        """p95 of the fastest plan of all."""
        return min(times[0] for times, _ in self._fronts if times)

    @cached_property
    def cheapest(self) -> Plan:
        """The fastest plan of all."""
        return self._plan(int(self._fronts[-1][1][0]))

    def choose(self, seconds: float, bisect: Callable[[list[float], float], int] = bisect_right) -> Plan | None:
        """The plan with the least loss on the first rung that has one with a p95 of at most `seconds`; None: no rung.

        At most one binary search a rung.
        """
        for times, front in self._fronts:
            at = bisect(times, seconds)
            if at > 0:
                return self._plan(int(front[at - 1]))
        return None

    def configured(self, strategy: Strategy, reuse: bool) -> Plan:
        """The plan with every view and token and the longest answer, by the prefix or with that strategy."""
        index = -1 if reuse else [option.strategy for option in self._options].index(strategy)
        grid = self._grid
        wanted = (grid.option == index) & (grid.views == self.situation.pending) & ~grid.capped
        return self._plan(int(np.flatnonzero(wanted & (grid.answer == self.situation.answer_limit))[0]))

    @property
    def unpruned(self) -> Plan:
        """The plan with every view and token in every layer and the longest answer."""
        return self.configured(self._options[0].strategy, reuse=False)

    def plans(self) -> list[Plan]:
        """Every plan on a front, by time."""
        rows = np.unique(np.concatenate([front for _, front in self._fronts]))
        return [self._plan(int(row)) for row in rows[np.argsort(self._grid.p95[rows], kind="stable")]]

    def _plan(self, row: int) -> Plan:
        grid = self._grid
        option = self._options[max(0, grid.option[row])]
        ms = [1e3 * float(seconds) for seconds in grid.stages[row]]
        tokens = int(grid.tokens[row])
        return Plan(
            strategy=option.strategy,
            new_views=int(grid.views[row]),
            max_tokens=tokens if grid.capped[row] else None,
            reuse=bool(grid.option[row] < 0),
            answer_tokens=int(grid.answer[row]),
            rung=int(grid.rung[row]),
            loss=float(grid.loss[row]),
            views_loss=float(grid.views_loss[row]),
            tokens_loss=float(grid.tokens_loss[row]),
            predicted=StageTimes(0.0, ms[0], ms[1], ms[2] + ms[3], ms[4], sum(ms)),
            p95_ms=1e3 * float(grid.p95[row]),
            bucket=self._bucket,
        )


@dataclass(frozen=True, eq=False)
class _Grid:
    """All plans: knobs, rung, loss and p95 (P,), and p50 seconds of each stage (P, 5); option -1 is the prefix."""

    option: NDArray[np.int64]
    views: NDArray[np.int64]
    tokens: NDArray[np.int64]
    capped: NDArray[np.bool_]
    answer: NDArray[np.int64]
    rung: NDArray[np.int64]
    loss: FloatArray
    views_loss: FloatArray
    tokens_loss: FloatArray
    stages: FloatArray
    p95: FloatArray


_COLUMNS = ("option", "views", "tokens", "capped", "rung", "loss", "views_loss", "tokens_loss")


def _grid(s: Situation, options: Sequence[Option], latency: LatencyModel, n_layers: int) -> _Grid:
    unit = loss_per_share(options)
    rows: list[tuple[Any, ...]] = []  # of _COLUMNS
    terms: list[list[FloatArray]] = []
    scene_knobs = [(views, share) for views in _views(s) for share in (TOKEN_SHARES if s.prunable else (1.0,))]
    ratios = np.array([option.strategy.schedule.ratios(n_layers) for option in options])
    for views, share in scene_knobs:
        whole = s.tokens_after(views)
        tokens = max(1, math.floor(share * whole + 1e-9))
        counts = np.where(ratios > 0, np.maximum(1.0, np.floor(ratios * tokens + 1e-9)), 0.0)
        counts = in_buckets(counts, tokens, s.n_text, latency.bucket)
        reading = read_terms(counts, np.full(len(options), tokens), s.n_text)
        built = views == 0 and tokens in s.built
        encode, build = encode_terms(views), token_terms(0 if built else tokens)
        views_loss = unit * (1 - views / s.pending) if s.pending else 0.0
        lost = (views_loss, unit * (1 - share))
        rung = 2 if share < 1 else 1 if views < s.pending else 0
        for index, option in enumerate(options):
            terms.append([encode, build, reading[index], np.zeros(5), reading[index][1:2]])
            rows.append((index, views, tokens, share < 1, max(rung, option.rung), option.loss + sum(lost), *lost))
        if s.reuse and share == 1:
            prefix = s.n_system + tokens
            # A prefix that is not there has to be read first, which is an unpruned prefill.
            ready = s.prefix_ready and views == 0
            read = np.zeros(5) if ready else read_terms(np.full(n_layers, tokens), tokens, s.n_system)
            cached = np.array([n_layers * (prefix + s.n_question)], dtype=np.float64)
            terms.append([encode, build, read, follow_up_terms(s.n_question, prefix, n_layers), cached])
            rows.append((-1, views, tokens, False, rung, sum(lost), *lost))
    return _with_answers(rows, terms, s, latency, n_layers, unit)


def _with_answers(
    rows: list[tuple[Any, ...]],
    terms: list[list[FloatArray]],
    s: Situation,
    latency: LatencyModel,
    n_layers: int,
    unit: float,
) -> _Grid:
    """Every plan so far with every answer length."""
    names = ("encode", "tokens", "prefill", "follow_up")
    stacked = [np.stack([row[i] for row in terms]) for i in range(5)]
    once50 = np.stack([latency.p50(name, stacked[i]) for i, name in enumerate(names)], axis=1)
    once95 = np.stack([latency.p95(name, stacked[i]) for i, name in enumerate(names)], axis=1)
    limits = np.asarray(_answers(s.answer_limit))
    n, m = len(terms), len(limits)
    # The first token comes out of the prefill; an answer that ends by itself takes one more step to say so.
    typical = s.answer_expected if s.answer_typical is None else s.answer_typical
    usual, long = (
        decode_terms(np.minimum(limits - 1, tokens)[None, :], stacked[4], n_layers)
        for tokens in (typical, s.answer_expected)
    )
    decode50 = latency.p50("decode", usual)
    # What varies on its own adds up in squares: the speed of each stage, and how long the answer is.
    p50 = once50.sum(axis=1)[:, None] + decode50
    squares = np.square(once95 - once50).sum(axis=1)[:, None] + np.square(latency.p95("decode", usual) - decode50)
    slower = latency.p95_answer(p50, p50 + np.sqrt(squares)) - p50
    p95 = p50 + np.hypot(slower, latency.p50("decode", long) - decode50)
    columns = zip(_COLUMNS, zip(*rows, strict=True), strict=True)
    wide = {name: np.repeat(np.asarray(values), m) for name, values in columns}
    shorter = np.tile(1 - limits / limits[0], n)
    return _Grid(
        **{name: wide[name] for name in ("option", "views", "tokens", "capped", "views_loss", "tokens_loss")},
        answer=np.tile(limits, n),
        rung=np.where(shorter > 0, 4, wide["rung"]),
        loss=wide["loss"] + unit * shorter,
        stages=np.concatenate([np.repeat(once50, m, axis=0), decode50.reshape(-1, 1)], axis=1),
        p95=p95.reshape(-1),
    )


def loss_per_share(options: Sequence[Option]) -> float:
    """Loss of a share of views, tokens or answer by the proxy: no less than any option pays for what it removes."""
    return max((option.loss / option.removed for option in options if option.removed > 0), default=1.0)


def _views(s: Situation) -> list[int]:
    """Numbers of new views, falling; none only if there is a scene without them."""
    fewest = 0 if s.views else 1
    return sorted({s.pending, s.pending * 2 // 3, s.pending // 3, fewest} - set(range(fewest)), reverse=True)


def _answers(limit: int) -> list[int]:
    shortest = min(limit, SHORTEST_ANSWER)
    return sorted({limit, *(max(shortest, limit * k // 8) for k in (1, 2, 3, 4, 6))}, reverse=True)
