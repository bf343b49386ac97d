# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding that really remove spatial tokens: transformers' own Llama layers, driven one by one.

`prefill` runs the layers; at a gate the policy chooses the tokens that stay and `_drop` gathers their rows. From there
on hidden states, rotary positions and the key/value cache are shorter. Kept tokens keep their original positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from adatoken3d_ros.decoder.cache import LayerFacts, RaggedCache
from adatoken3d_ros.pruning.policies import GateView, Policy, Rope, SceneTokens, Selection
from adatoken3d_ros.pruning.schedule import Schedule

ShouldStop = Callable[[], bool]
HurryUp = Callable[[int, int], int | None]
CosSin = tuple[Tensor, Tensor]
BeforeLayer = Callable[[int, Tensor, CosSin], None]

_TINY = torch.finfo(torch.float32).tiny


class GateError(ValueError):
    """A prompt or model that the gate cannot run, or a policy that went wrong; the message names the value."""


class Cancelled(Exception):
    """`should_stop` asked for an end between two layers of a prefill."""


@dataclass(frozen=True)
class Layout:
    """Where the spatial tokens of each of B left-padded samples are; rows are counted without padding.

    Attributes:
        spatial_start: row of the first spatial token.
        n_spatial: spatial tokens, 0 or more.
        n_tokens: rows in all; those after the spatial tokens are the question.
        n_rows: padded length S.
    """

    spatial_start: tuple[int, ...]
    n_spatial: tuple[int, ...]
    n_tokens: tuple[int, ...]
    n_rows: int

    def __post_init__(self) -> None:
        if not len(self.spatial_start) == len(self.n_spatial) == len(self.n_tokens) > 0:
            raise GateError(f"the layout's samples disagree: {self}")
        for start, spatial, tokens in zip(self.spatial_start, self.n_spatial, self.n_tokens, strict=True):
            if start < 0 or spatial < 0 or not 0 < tokens <= self.n_rows:
                raise GateError(f"{spatial} spatial tokens from row {start} of {tokens}, padded to {self.n_rows}")
            question = tokens - start - spatial
            if question < (1 if spatial else 0):
                raise GateError(
                    f"the question has {question} rows: {tokens}, of which {spatial} spatial from row {start}"
                )

    @classmethod
    def single(cls, spatial_start: int, n_spatial: int, n_tokens: int) -> Layout:
        """One sample without padding."""
        return cls((spatial_start,), (n_spatial,), (n_tokens,), n_tokens)

    @property
    def n_question(self) -> tuple[int, ...]:
        """Rows after the last spatial token."""
        return tuple(t - s - n for t, s, n in zip(self.n_tokens, self.spatial_start, self.n_spatial, strict=True))


@dataclass
class GateTrace:
    """What happened to the spatial tokens; N is the largest number of them in a sample, shorter samples are padded.

    Attributes:
        spatial_per_layer: spatial tokens seen by each layer (of the sample that has N).
        last_layer: (B, N) int64 last decoder layer that the token reached; -1 for none.
        contribution: (B, N) float32 share of the question's attention to the scene, mean over the gates; sums to 1
            where a gate measured it, else zeros.
        retained: (B, N) bool alive after the last gate (a withdrawal of all tokens is not one).
        gate_seconds: time spent choosing and gathering, on the device.
    """

    spatial_per_layer: tuple[int, ...]
    last_layer: Tensor
    contribution: Tensor
    retained: Tensor
    gate_seconds: float = 0.0


@dataclass
class Prefill:
    """A prompt that has been read; decoding continues it in place.

    Attributes:
        logits: (B, V) float32 of the last row.
        cache: keys and values by layer.
        next_position: (B,) int64 rotary position of the next token, before a renumbered layer's shift.
        trace: what happened to the spatial tokens.
    """

    logits: Tensor
    cache: RaggedCache
    next_position: Tensor
    trace: GateTrace


@torch.no_grad()
def prefill(
    language: LlamaForCausalLM,
    embeds: Tensor,
    layout: Layout,
    schedule: Schedule,
    policy: Policy,
    *,
    scene: SceneTokens | Sequence[SceneTokens] | None = None,
    rope: Rope | None = None,
    should_stop: ShouldStop | None = None,
    pace: HurryUp | None = None,
    max_new_tokens: int = 0,
) -> Prefill:
    """Reads a prompt, dropping spatial tokens at the schedule's gates.

    Args:
        language: a Llama with SDPA attention, in eval mode.
        embeds: (B, S, D) input embeddings, left padded; what the padding holds does not matter.
        layout: where the spatial tokens are.
        schedule: how many of them each layer sees; counts are per sample, relative to its own number, as the
            policy counts.
        policy: which of them.
        scene: centroids of the spatial tokens, one for all samples or one for each; some policies need it.
        rope: "original" positions for kept tokens, or "renumber" from 0 after each drop; None for the policy's own way.
        should_stop: asked before each layer.
        pace: for one sample: asked before each layer g with (g, the spatial tokens that it is about to see); how many
            of these it and the layers behind may see at most, 0 for none, or None for all of them.
        max_new_tokens: tokens the caller means to decode, so that a full context is found before any work.

    Raises:
        GateError: the prompt does not fit the layout or the context, the model lacks SDPA, a score is not finite, or
            `pace` asks for more tokens than there are or for several samples.
        ScheduleError: the schedule does not fit the model.
        PolicyError: the policy cannot score at one of the gates.
        Cancelled: should_stop() was true.
    """
    model, layers = language.model, language.model.layers
    _check(language, embeds, layout, max_new_tokens)
    if pace is not None and len(embeds) != 1:
        raise GateError(f"a pace is kept for one sample, the prompt has {len(embeds)}")
    by_sample = (schedule.counts(n, len(layers), policy.kept) for n in layout.n_spatial)
    counts = list(zip(*by_sample, strict=True))  # [layer][sample]
    cache, journal = RaggedCache(len(layers)), _Journal(layout, len(layers), embeds.device)
    chooser = _Chooser(layers, layout, policy, scene, cache)
    hidden, rows, question = _clear_padding(embeds, layout), _Rows.at_start(layout, embeds.device), None
    cos_sin, mask = model.rotary_emb(hidden, rows.positions), rows.mask()
    for g, layer in enumerate(layers):
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before layer {g} of {len(layers)}")
        if pace is not None and (most := _most(pace, g, counts[g][0])) is not None:
            counts[g:] = [(min(n, most),) for (n,) in counts[g:]]
        if counts[g] != rows.counts:
            with journal.clock:
                chosen = [chooser.choose(g, b, k, hidden, question, cos_sin, rows) for b, k in enumerate(counts[g])]
                journal.note(g, rows, chosen)
                hidden, rows = _drop(chosen, hidden, rows, layout, renumber=(rope or policy.rope) == "renumber")
                cos_sin, mask = model.rotary_emb(hidden, rows.positions), rows.mask()
        # Whether `pace` will ask for a gate before the next layer is not known yet.
        if g + 1 < len(layers) and (pace is not None or counts[g + 1] != counts[g]):
            question = hidden[:, -max(layout.n_question) :].clone()  # a view would keep all of `hidden` alive
        cache.facts.append(LayerFacts(rows.pads, rows.shifts))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=cos_sin, past_key_values=cache)
    logits = last_logits(language, hidden)
    trace = journal.trace(tuple(max(at_layer) for at_layer in counts))
    return Prefill(logits, cache, torch.tensor(layout.n_tokens, device=embeds.device), trace)


def _clear_padding(embeds: Tensor, layout: Layout) -> Tensor:
    """Zeros where the padding is: a value that is not finite would reach every row, even through a weight of 0."""
    if min(layout.n_tokens) == layout.n_rows:
        return embeds
    pads = torch.tensor([layout.n_rows - n for n in layout.n_tokens], device=embeds.device)
    padding = torch.arange(layout.n_rows, device=embeds.device) < pads[:, None]
    return embeds.masked_fill(padding[..., None], 0)


def _most(pace: HurryUp, g: int, n: int) -> int | None:
    most = pace(g, n)
    if most is not None and not 0 <= most <= n:
        raise GateError(f"the pace asks for {most} of {n} spatial tokens before layer {g}")
    return most


def _drop(
    chosen: list[Selection], hidden: Tensor, rows: _Rows, layout: Layout, *, renumber: bool
) -> tuple[Tensor, _Rows]:
    """Removes what was not chosen: hidden states (B, S', D), S' the longest sample that is left, and their rows."""
    device, n_old = hidden.device, hidden.shape[1]
    kept = [len(selection.keep) for selection in chosen]
    n_real = [n_old - pad - n + k for pad, n, k in zip(rows.pads, rows.counts, kept, strict=True)]
    n_new = max(n_real)
    pads = tuple(n_new - n for n in n_real)
    index = torch.zeros(len(chosen), n_new, dtype=torch.long, device=device)  # padding repeats row 0
    for b, (selection, old_pad, pad, n) in enumerate(zip(chosen, rows.pads, pads, rows.counts, strict=True)):
        start, old_start = pad + layout.spatial_start[b], old_pad + layout.spatial_start[b]
        index[b, pad:start] = torch.arange(old_pad, old_start, device=device)
        index[b, start : start + kept[b]] = old_start + selection.keep
        index[b, start + kept[b] :] = torch.arange(old_start + n, n_old, device=device)
    hidden = _gather(hidden, index)
    for b, selection in enumerate(chosen):
        if selection.merged is not None:
            start = pads[b] + layout.spatial_start[b]
            hidden[b, start : start + kept[b]] = selection.merged
    alive = tuple(old[selection.keep] for old, selection in zip(rows.alive, chosen, strict=True))
    if not renumber:
        return hidden, _Rows(_gather(rows.positions[..., None], index)[..., 0], pads, alive, rows.shifts)
    shifts = tuple(n - k for n, k in zip(layout.n_spatial, kept, strict=True))
    return hidden, _Rows(_counted_from(pads, n_new, device), pads, alive, shifts)


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, S') of `states` (B, S, C)."""
    first_row = torch.arange(len(states), device=states.device)[:, None] * states.shape[1]
    return states.flatten(0, 1).index_select(0, (index + first_row).flatten()).unflatten(0, index.shape)


def _check(language: LlamaForCausalLM, embeds: Tensor, layout: Layout, max_new_tokens: int) -> None:
    if embeds.ndim != 3 or embeds.shape[:2] != (len(layout.n_tokens), layout.n_rows):
        raise GateError(f"embeddings {tuple(embeds.shape)} for {len(layout.n_tokens)} samples of {layout.n_rows} rows")
    check_context(language, max(layout.n_tokens), max_new_tokens)


def check_context(language: LlamaForCausalLM, n_tokens: int, max_new_tokens: int) -> None:
    """Raises GateError where the model does not use SDPA or the tokens do not fit its context."""
    attention, context = language.config._attn_implementation, language.config.max_position_embeddings
    if attention != "sdpa":
        raise GateError(f"the gate needs attention 'sdpa', the model uses {attention!r}")
    if max_new_tokens < 0:
        raise GateError(f"max_new_tokens is {max_new_tokens}")
    if n_tokens + max_new_tokens > context:
        raise GateError(f"{n_tokens} tokens and {max_new_tokens} new ones exceed the context of {context}")


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows that are left: (B, S) positions, and by sample padding, spatial tokens and how far positions shifted."""

    positions: Tensor
    pads: tuple[int, ...]
    alive: tuple[Tensor, ...]
    shifts: tuple[int, ...]

    @classmethod
    def at_start(cls, layout: Layout, device: torch.device) -> _Rows:
        pads = tuple(layout.n_rows - n for n in layout.n_tokens)
        alive = tuple(torch.arange(n, device=device) for n in layout.n_spatial)
        return cls(_counted_from(pads, layout.n_rows, device), pads, alive, (0,) * len(pads))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(alive) for alive in self.alive)

    def mask(self) -> Tensor | None:
        """Causal mask (B, 1, S, S); None without padding."""
        n = self.positions.shape[1]
        return _chunk_mask(self.pads, n, n, self.positions.device)


def _counted_from(pads: Sequence[int], n_rows: int, device: torch.device) -> Tensor:
    """Positions (B, n_rows) that count from 0 after each sample's padding, and are 0 in it."""
    return (torch.arange(n_rows, device=device) - torch.tensor(pads, device=device)[:, None]).clamp(min=0)


@dataclass(frozen=True, eq=False)
class _Chooser:
    """Shows the policy one sample at one gate, cut out of the batch and its padding."""

    layers: Any
    layout: Layout
    policy: Policy
    scene: SceneTokens | Sequence[SceneTokens] | None
    cache: RaggedCache

    def choose(
        self,
        g: int,
        b: int,
        n_keep: int,
        hidden: Tensor,
        question: Tensor | None,
        cos_sin: CosSin,
        rows: _Rows,
    ) -> Selection:
        alive, pad, n_question = rows.alive[b], rows.pads[b], self.layout.n_question[b]
        if n_keep in (0, len(alive)):
            return Selection(torch.arange(n_keep, device=hidden.device))
        view = GateView(
            layer=g,
            n_keep=n_keep,
            n_total=self.layout.n_spatial[b],
            alive=alive,
            start=self.layout.spatial_start[b],
            n_question=n_question,
            hidden=hidden[b, pad:],
            question=None if g == 0 or question is None else question[b, -n_question:],
            keys=None if g == 0 else self.cache.layers[g - 1].keys[b, :, pad:],
            cos=cos_sin[0][b, pad:],
            sin=cos_sin[1][b, pad:],
            below=None if g == 0 else self.layers[g - 1],
            above=self.layers[g],
            scene=self.scene if self.scene is None or isinstance(self.scene, SceneTokens) else self.scene[b],
        )
        selection = self.policy.select(view)
        if len(selection.keep) != n_keep:
            raise GateError(
                f"policy {self.policy.name} keeps {len(selection.keep)} of {len(alive)} tokens before layer {g}, "
                f"the schedule {n_keep}"
            )
        return selection


class _Journal:
    """Keeps the trace while the layers run; nothing here waits for the device before the end."""

    def __init__(self, layout: Layout, n_layers: int, device: torch.device) -> None:
        n = torch.tensor(layout.n_spatial, device=device)[:, None]
        self.retained = torch.arange(max(layout.n_spatial), device=device) < n
        self.last_layer = torch.where(self.retained, n_layers - 1, -1)
        self.contribution = torch.zeros(self.retained.shape, device=device)
        self.finite: list[tuple[int, Tensor]] = []
        self.clock = _Clock(device)

    def note(self, g: int, rows: _Rows, chosen: list[Selection]) -> None:
        """What the gate before layer g chose of the tokens in `rows`."""
        for b, (alive, selection) in enumerate(zip(rows.alive, chosen, strict=True)):
            kept, end = alive[selection.keep], self.last_layer[b, alive[selection.keep]]
            self.last_layer[b, alive] = g - 1
            self.last_layer[b, kept] = end
            if len(kept) > 0:
                self.retained[b, alive] = False
                self.retained[b, kept] = True
            if selection.scores is not None:
                self.finite.append((g, selection.scores.isfinite().all()))
                # Attention that all went to the text may leave nothing to share.
                self.contribution[b, alive] += selection.scores / selection.scores.sum().clamp(min=_TINY)

    def trace(self, spatial_per_layer: tuple[int, ...]) -> GateTrace:
        """Raises GateError if a score was not finite."""
        broken = sorted({g for g, finite in self.finite if not finite})
        if broken:
            raise GateError(f"scores that are not finite (NaN or infinite) at the gates before layers {broken}")
        share = self.contribution / self.contribution.sum(1, keepdim=True).clamp(min=_TINY)
        return GateTrace(spatial_per_layer, self.last_layer, share, self.retained, self.clock.seconds())


class _Clock:
    """Sums the device time spent inside `with`; CUDA is asked only at the end."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def _mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *error: object) -> None:
        self._mark()

    def seconds(self) -> float:
        if self._cuda and self._marks:
            self._marks[-1].synchronize()
        spans = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans)


def generate(
    language: LlamaForCausalLM,
    prefilled: Prefill,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    should_stop: ShouldStop | None = None,
) -> Iterator[int]:
    """Greedy token ids of one sample as they are found, without the one of `eos_ids` that ends them.

    Ends within one step once should_stop() is true. Uses up `prefilled`: its cache grows.

    Raises:
        GateError: at once, not at the first token: a batch of several samples, or more tokens than the context holds.
    """
    if len(prefilled.logits) != 1:
        raise GateError(f"generate streams one sample, the prefill has {len(prefilled.logits)}: use generate_batch")
    _check_room(language, prefilled, max_new_tokens)
    return _stream(language, prefilled, max_new_tokens, eos_ids, should_stop)


def _stream(
    language: LlamaForCausalLM, prefilled: Prefill, n: int, eos_ids: Collection[int], should_stop: ShouldStop | None
) -> Iterator[int]:
    logits = prefilled.logits
    for i in range(n):
        if should_stop is not None and should_stop():
            return
        token = logits.argmax(-1)
        if int(token) in eos_ids:
            return
        yield int(token)
        if i + 1 < n:
            logits = decode(language, prefilled, token)


def generate_batch(
    language: LlamaForCausalLM,
    prefilled: Prefill,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    should_stop: ShouldStop | None = None,
) -> list[list[int]]:
    """As `generate`, for all B samples at once; each answer is what its sample alone would give."""
    _check_room(language, prefilled, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prefilled.logits]
    going, logits = set(range(len(answers))), prefilled.logits
    for _ in range(max_new_tokens):
        if should_stop is not None and should_stop():
            break
        tokens = logits.argmax(-1)
        for b, token in enumerate(tokens.tolist()):
            if token in eos_ids:
                going.discard(b)
            elif b in going:
                answers[b].append(token)
        if not going:
            break
        logits = decode(language, prefilled, tokens)
    return answers


def _check_room(language: LlamaForCausalLM, prefilled: Prefill, max_new_tokens: int) -> None:
    check_context(language, int(prefilled.next_position.max()), max_new_tokens)


@torch.no_grad()
def decode(language: LlamaForCausalLM, prefilled: Prefill, tokens: Tensor) -> Tensor:
    """One step: appends `tokens` (B,) to every layer of the cache; float32 logits (B, V) of what follows."""
    embeds = language.model.embed_tokens(tokens[:, None])
    hidden = read_chunk(language, prefilled.cache, embeds, prefilled.next_position[:, None])
    prefilled.next_position = prefilled.next_position + 1
    return last_logits(language, hidden)


def last_logits(language: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    """Float32 logits (B, V) of the last row of the last layer's output (B, q, D)."""
    return language.lm_head(language.model.norm(hidden[:, -1])).float()


@torch.no_grad()
def read_chunk(
    language: LlamaForCausalLM,
    cache: RaggedCache,
    hidden: Tensor,
    positions: Tensor,
    *,
    before_layer: BeforeLayer | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Appends a chunk (B, q, D) at original `positions` (B, q) to what each layer has cached; the last layer's output.

    `before_layer(i, hidden, cos_sin)` is called before layer i, which then sees what its cache holds after the call.

    Raises:
        Cancelled: should_stop() was true before a layer.
    """
    model, q = language.model, hidden.shape[1]
    rotary: dict[tuple[int, ...], CosSin] = {}  # by position shift, one where positions are original
    masks: dict[tuple[tuple[int, ...], int], Tensor | None] = {}  # by padding and length
    for i, (layer, cached, facts) in enumerate(zip(model.layers, cache.layers, cache.facts, strict=True)):
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before layer {i} of {len(model.layers)}")
        if facts.shifts not in rotary:
            shifts = torch.tensor(facts.shifts, device=hidden.device)[:, None] if any(facts.shifts) else 0
            rotary[facts.shifts] = model.rotary_emb(hidden, positions - shifts)
        if before_layer is not None:
            before_layer(i, hidden, rotary[facts.shifts])
        key = facts.pads, cached.get_seq_length() + q
        if key not in masks:
            masks[key] = _chunk_mask(*key, q, hidden.device)
        hidden = layer(
            hidden, attention_mask=masks[key], position_embeddings=rotary[facts.shifts], past_key_values=cache
        )
    return hidden


def _chunk_mask(pads: tuple[int, ...], n: int, q: int, device: torch.device) -> Tensor | None:
    """(B, 1, q, n) for the last q of n rows, true where a row may look.

    None where that is all of them (q = 1) or SDPA's own causal mask (q = n). Never for a chunk over a prefix: with
    None, SDPA would cut the keys to the first q.
    """
    if not any(pads) and q in (1, n):
        return None
    column, row = torch.arange(n, device=device), torch.arange(n - q, n, device=device)[:, None]
    unpadded = column >= torch.tensor(pads, device=device)[:, None, None]
    # Padding looks at itself: a row that sees nothing would be NaN in some kernels.
    return ((column <= row) & (unpadded | (column == row)))[:, None]
