# SPDX-License-Identifier: Apache-2.0
"""Prefill that really removes spatial tokens: transformers' own layers, driven one by one.

`prefill` runs the layers; at a gate the policy chooses the tokens that stay and `Rows.drop` gathers their rows. From
there on hidden states, rotary positions and the key/value cache are shorter. Kept tokens keep their original positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import CosSin, Decoder
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.clock import DeviceClock
from adatoken3d_ros.decoder.rows import Rows
from adatoken3d_ros.decoder.stem import Asking, Stem, Stems, first_asking_gate, read_question, rows_before
from adatoken3d_ros.pruning.schedule import Schedule, in_buckets
from adatoken3d_ros.pruning.view import Bypassing, GateView, Policy, Rope, SceneTokens, Selection, Watching

ShouldStop = Callable[[], bool]
AtMost = Callable[[int, int], int | None]

_TINY = torch.finfo(torch.float32).tiny


class GateError(ValueError):
    """A prompt or model that the gate cannot run, or a policy that went wrong; the message names the value."""


class Cancelled(Exception):
    """`should_stop` asked for an end between two layers of a prefill."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the spatial tokens of a prompt are: [system | spatial tokens | question].

    Attributes:
        spatial_start: row of the first spatial token.
        n_spatial: spatial tokens N, 0 or more.
        n_tokens: rows in all, S; those after the spatial tokens are the question.
        rows: (N,) int64 rows of the spatial tokens, rising; rows between them stay at every gate, unless `closing` says
            otherwise. None: one after the other from `spatial_start` on.
        positions: (S,) rotary positions, or (axes, S) of a model whose positions have several; None: the rows' numbers.
        next_position: rotary position of the first token after the prompt; -1: S.
        added: (N, D) vectors for each of the first layers, added to the spatial tokens that leave it.
        closing: (N,) int64 with `rows`: the row between the spatial tokens that closes the line of each and goes with
            the last token of its line (one that is learned has no place, but stands for a line); -1 for none.
    """

    spatial_start: int
    n_spatial: int
    n_tokens: int
    rows: Tensor | None = None
    positions: Tensor | None = None
    next_position: int = -1
    added: tuple[Tensor, ...] = ()
    closing: Tensor | None = None

    def __post_init__(self) -> None:
        if self.next_position < 0:
            object.__setattr__(self, "next_position", self.n_tokens)
        if self.spatial_start < 0 or self.n_spatial < 0 or self.n_tokens < 1:
            raise GateError(f"{self.n_spatial} spatial tokens from row {self.spatial_start} of {self.n_tokens}")
        if self.n_question < (1 if self.n_spatial else 0):
            raise GateError(
                f"the question has {self.n_question} rows: {self.n_tokens}, of which {self.n_spatial} spatial from row "
                f"{self.spatial_start}"
            )

    @property
    def n_question(self) -> int:
        """Rows after the last spatial token."""
        return self.n_tokens - self.spatial_end

    @property
    def spatial_end(self) -> int:
        """The row after the last spatial token."""
        if self.rows is None or not self.n_spatial:
            return self.spatial_start + self.n_spatial
        return int(self.rows[-1]) + 1

    def every_row(self, device: torch.device) -> Rows:
        """All of them, before the first gate."""
        spatial = slice(self.spatial_start, self.spatial_end) if self.rows is None else self.rows
        return Rows.at_start(self.n_tokens, spatial, self.positions, self.added, self.closing, device)


@dataclass
class GateTrace:
    """What happened to the N spatial tokens.

    Attributes:
        spatial_per_layer: spatial tokens seen by each layer.
        last_layer: (N,) int64 last decoder layer that the token reached; -1 for none.
        contribution: (N,) float32 share of the question's attention to the scene, mean over the gates; sums to 1 where
            a gate measured it, else zeros.
        retained: (N,) bool alive after the last gate (a withdrawal of all tokens is not one).
        rows_per_layer: rows of the whole prompt seen by each layer.
        gate_seconds: time spent choosing and gathering, on the device.
    """

    spatial_per_layer: tuple[int, ...]
    last_layer: Tensor
    contribution: Tensor
    retained: Tensor
    rows_per_layer: tuple[int, ...]
    gate_seconds: float = 0.0

    def counted(self, n_text: int) -> tuple[int, ...]:
        """Rows that each layer has seen beside `n_text` of the prompt that are not spatial: fewer than its spatial
        tokens where others have gone with them."""
        return tuple(n - n_text for n in self.rows_per_layer)


@dataclass
class Prefill:
    """A prompt that has been read; decoding continues it in place.

    Attributes:
        logits: (V,) float32 of the last row.
        last: (D,) the last row as it leaves the last layer.
        cache: keys and values by layer.
        next_position: rotary position of the next token, before a renumbered layer's shift.
        trace: what happened to the spatial tokens.
    """

    logits: Tensor
    last: Tensor
    cache: RaggedCache
    next_position: int
    trace: GateTrace


@torch.inference_mode()
def prefill(
    decoder: Decoder,
    embeds: Tensor,
    layout: Layout,
    schedule: Schedule,
    policy: Policy,
    *,
    scene: SceneTokens | None = None,
    rope: Rope | None = None,
    should_stop: ShouldStop | None = None,
    at_most: AtMost | None = None,
    max_new_tokens: int = 0,
    stems: Stems | None = None,
    bucket: int = 1,
) -> Prefill:
    """Reads a prompt, dropping spatial tokens at the schedule's gates.

    Args:
        decoder: a language model with SDPA attention, in eval mode.
        embeds: (1, S, D) input embeddings.
        layout: where the spatial tokens are.
        schedule: how many of them each layer sees, counted as the policy counts.
        policy: which of them.
        scene: centroids and features of the spatial tokens; some policies need them.
        rope: "original" positions for kept tokens, or "renumber" from 0 after each drop; None for the policy's own way.
        should_stop: asked before each layer.
        at_most: asked before each layer g with (g, the spatial tokens that it is about to see); how many of these it
            and the layers behind may see at most, 0 for none, or None for all of them.
        max_new_tokens: tokens the caller means to decode, so that a full context is found before any work.
        stems: of this scene. The rows before the question are then read through the layers before the first gate that
            looks at it once for all questions; the result is the same. Not with `at_most`, nor where a policy takes
            tokens back, watches layers or counts positions anew.

    Raises:
        GateError: the prompt does not fit the layout or the context, the model lacks SDPA, a score is not finite, or
            `at_most` asks for more tokens than there are.
        ScheduleError: the schedule does not fit the model or has a gate before the model's first; a bucket below 1.
        PolicyError: the policy cannot score at one of the gates.
        Cancelled: should_stop() was true.
    """
    if embeds.ndim != 3 or embeds.shape[:2] != (1, layout.n_tokens):
        raise GateError(f"embeddings {tuple(embeds.shape)} for a prompt of {layout.n_tokens} rows")
    check_context(decoder, layout.n_tokens, max_new_tokens)
    schedule.check(len(decoder), decoder.first_gate)
    planned = schedule.counts(layout.n_spatial, len(decoder), policy.kept)
    counts = in_buckets(planned, layout.n_spatial, layout.n_tokens - layout.n_spatial, bucket).tolist()
    cache, journal = RaggedCache(len(decoder)), _Journal(layout, len(decoder), embeds.device)
    hidden, rows = embeds, layout.every_row(embeds.device)
    question: Asking | None = None
    gates = _Gates(decoder, layout, policy, scene, cache, embeds[0], rows.spatial)
    renumber = (rope or policy.rope) == "renumber"
    if renumber and gates.bypass:
        raise GateError(f"policy {policy.name} takes tokens back, and rope 'renumber' leaves them no position")
    if gates.bypass:
        rows = replace(rows, closing=None)  # a line whose tokens may come back is not over

    def check(g: int) -> None:
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before layer {g} of {len(decoder)}")

    begin = 0
    if stems is not None and at_most is None and not (renumber or gates.bypass or isinstance(policy, Watching)):
        begin = first_asking_gate(counts, layout.n_spatial, policy)
    if stems is not None and begin:
        end, key = layout.spatial_end, (policy.name, counts[0], begin, scene)
        stem = stems.get(embeds[:, :end], key, lambda: _read_stem(gates, embeds, rows, key, check))
        for choice in stem.choices:
            journal.note(*choice)
        journal.rows = [stem.hidden.shape[1] + layout.n_question] * begin
        hidden, rows, question = read_question(decoder, stem, cache, embeds[:, end:], rows.positions[..., end:], check)
    cos_sin = decoder.rotary(hidden, rows.positions)
    for g, layer in list(enumerate(decoder.layers))[begin:]:
        check(g)
        if at_most is not None and (most := _most(at_most, g, counts[g], decoder)) is not None:
            counts[g:] = [min(n, most) for n in counts[g:]]
        if counts[g] != len(rows.alive):
            with journal.clock:
                reached = rows.alive
                if gates.bypass and counts[g] and rows.parked is not None:
                    hidden, rows = rows.rejoined(hidden)
                    cos_sin, question = decoder.rotary(hidden, rows.positions), None
                chosen = gates.choose(g, counts[g], hidden, question, cos_sin, rows)
                journal.note(g, reached, rows.alive, chosen)
                rows = rows.park(chosen, hidden) if gates.bypass else rows
                hidden, rows, left = rows.drop(chosen, hidden, layout.next_position if renumber else None)
                cos_sin = decoder.rotary(hidden, rows.positions) if renumber else _rows_of(cos_sin, left)
        # Whether `at_most` will ask for a gate before the next layer is not known yet.
        asks = g + 1 < len(decoder) and (at_most is not None or counts[g + 1] != counts[g])
        if asks:
            question = Asking(hidden[0, -layout.n_question :].clone(), None)  # a view would keep all of `hidden` alive
        cache.shifts[g] = rows.shift
        journal.rows.append(hidden.shape[1])
        if isinstance(policy, Watching) and policy.watches(g, len(decoder)):
            with layer.watched() as parts:
                hidden = layer.run(hidden, cos_sin, cache=cache)
            rows = rows.watched(policy.change(parts))
        else:
            with layer.asked(layout.n_question if asks else 0) as noted:
                hidden = layer.run(hidden, cos_sin, cache=cache)
            if question is not None and noted:
                question = question._replace(queries=noted[0])
        if rows.added:
            rows = rows.add(hidden)
    last = hidden[0, -1]
    return Prefill(decoder.logits(last), last, cache, layout.next_position, journal.trace(tuple(counts)))


def _rows_of(cos_sin: CosSin, index: Tensor) -> CosSin:
    cos, sin = cos_sin
    return cos.index_select(1, index), sin.index_select(1, index)


def _read_stem(gates: _Gates, embeds: Tensor, rows: Rows, key: tuple[Any, ...], check: Callable[[int], None]) -> Stem:
    """The rows of a prompt (1, S, D) before its question, read as `key` says: (policy, tokens, layers, scene)."""
    (_, n_keep, n_layers, _), end, decoder = key, gates.layout.spatial_end, gates.decoder
    hidden, rows = embeds[:, :end], rows_before(rows, end)
    choices: tuple[Any, ...] = ()
    if n_keep != len(rows.alive):
        chosen = gates.choose(0, n_keep, hidden, None, decoder.rotary(hidden, rows.positions), rows)
        choices = ((0, rows.alive, rows.alive, chosen),)
        hidden, rows, _ = rows.drop(chosen, hidden, None)
    cache, cos_sin = RaggedCache(n_layers), decoder.rotary(hidden, rows.positions)
    for g, layer in enumerate(decoder.layers[:n_layers]):
        check(g)
        hidden = layer.run(hidden, cos_sin, cache=cache)
        if rows.added:
            rows = rows.add(hidden)
    kept = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Stem(embeds[:, :end], key, hidden, rows, kept, choices)


def _most(at_most: AtMost, g: int, n: int, decoder: Decoder) -> int | None:
    most = at_most(g, n)
    if most is not None and g < decoder.first_gate:
        raise GateError(f"{most} of {n} spatial tokens are asked for before layer {g}, where this model needs them all")
    if most is not None and not 0 <= most <= n:
        raise GateError(f"{most} of {n} spatial tokens are asked for before layer {g}")
    return most


def check_context(decoder: Decoder, n_tokens: int, max_new_tokens: int) -> None:
    """Raises GateError where the model does not use SDPA or the tokens do not fit its context."""
    if decoder.attention != "sdpa":
        raise GateError(f"the gate needs attention 'sdpa', the model uses {decoder.attention!r}")
    if max_new_tokens < 0:
        raise GateError(f"max_new_tokens is {max_new_tokens}")
    if n_tokens + max_new_tokens > decoder.context:
        raise GateError(f"{n_tokens} tokens and {max_new_tokens} new ones exceed the context of {decoder.context}")


@dataclass(frozen=True, eq=False)
class _Gates:
    """Shows the policy what there is to choose from."""

    decoder: Decoder
    layout: Layout
    policy: Policy
    scene: SceneTokens | None
    cache: RaggedCache
    embeds: Tensor
    entered: slice | Tensor

    @property
    def bypass(self) -> bool:
        """Whether what is dropped may come back."""
        return isinstance(self.policy, Bypassing) and self.policy.bypass

    def choose(
        self, g: int, n_keep: int, hidden: Tensor, question: Asking | None, cos_sin: CosSin, rows: Rows
    ) -> Selection:
        """What stays of the spatial tokens in `rows` before layer g."""
        if n_keep in (0, len(rows.alive)):
            return Selection(torch.arange(n_keep, device=hidden.device))
        below = self.decoder.layers[g - 1] if g else None
        view = GateView(
            layer=g,
            n_keep=n_keep,
            n_total=self.layout.n_spatial,
            alive=rows.alive,
            spatial=rows.spatial,
            n_question=self.layout.n_question,
            embeds=self.embeds,
            entered=self.entered,
            hidden=hidden[0],
            question=question.states if g and question is not None else None,
            queried=question.queries if g and question is not None else None,
            keys=self.cache.layers[g - 1].keys[0] if g and question is not None else None,
            cos=cos_sin[0][0],
            sin=cos_sin[1][0],
            below=below,
            above=self.decoder.layers[g],
            scene=self.scene,
            changed=rows.changed,
        )
        selection = self.policy.select(view)
        if len(selection.keep) != n_keep:
            raise GateError(
                f"policy {self.policy.name} keeps {len(selection.keep)} of {len(rows.alive)} tokens before layer {g}, "
                f"the schedule {n_keep}"
            )
        return selection


class _Journal:
    """Keeps the trace while the layers run; nothing here waits for the device before the end."""

    def __init__(self, layout: Layout, n_layers: int, device: torch.device) -> None:
        self.n_layers = n_layers
        self.retained = torch.ones(layout.n_spatial, dtype=torch.bool, device=device)
        self.last_layer = torch.full((layout.n_spatial,), n_layers - 1, device=device)
        self.contribution = torch.zeros(layout.n_spatial, device=device)
        self.finite: list[tuple[int, Tensor]] = []
        self.rows: list[int] = []
        self.clock = DeviceClock(device)

    def note(self, g: int, reached: Tensor, alive: Tensor, chosen: Selection) -> None:
        """What the gate before layer g chose of the tokens `alive`, of which layer g-1 has seen those `reached`."""
        # By calls that do one thing each: `tensor[index] = value` and the like take twice as long for few tokens.
        kept = alive.index_select(0, chosen.keep)
        self.last_layer.index_fill_(0, reached, g - 1).index_fill_(0, kept, self.n_layers - 1)
        if len(kept) > 0:
            self.retained.index_fill_(0, alive, False).index_fill_(0, kept, True)
        if chosen.scores is not None:
            scores = chosen.scores.float()  # a policy may count in others
            self.finite.append((g, scores.isfinite().all()))
            # Attention that all went to the text may leave nothing to share.
            self.contribution.index_add_(0, alive, scores / scores.sum().clamp(min=_TINY))

    def trace(self, spatial_per_layer: tuple[int, ...]) -> GateTrace:
        """Raises GateError if a score was not finite."""
        broken = sorted({g for g, finite in self.finite if not finite})
        if broken:
            raise GateError(f"scores that are not finite (NaN or infinite) at the gates before layers {broken}")
        share = self.contribution / self.contribution.sum().clamp(min=_TINY)
        seconds = self.clock.seconds()
        return GateTrace(spatial_per_layer, self.last_layer, share, self.retained, tuple(self.rows), seconds)
