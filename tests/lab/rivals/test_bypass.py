# SPDX-License-Identifier: Apache-2.0
"""Rivals that need more of the prefill than others: tokens that come back, and layers that are watched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import GateError, Prefill, prefill
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import GateView, Policy, Rope, Selection
from tests.decoder import test_layout
from tests.decoder.oracle import N_LAYERS, attention_map, make_prompt, tiny_decoder

PROMPT, CASE = make_prompt(5, 40, 7), test_layout.CASE
with_axes = test_layout.decoder


@pytest.fixture(scope="module", params=[4, 2])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(request.param)


@dataclass
class Told:
    """Keeps the tokens that it was told to keep, by gate; remembers which it could choose from."""

    keep: dict[int, list[int]]
    bypass: bool = True
    name: str = "told"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)
    candidates: dict[int, list[int]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    def select(self, view: GateView) -> Selection:
        self.candidates[view.layer] = view.alive.tolist()
        self.states[view.layer] = view.hidden.clone()
        assert torch.equal(view.hidden[view.spatial], view.hidden[torch.arange(len(view.hidden))[view.spatial]])
        return Selection(torch.searchsorted(view.alive, torch.tensor(self.keep[view.layer])))

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule()

    def flops(self, decoder: object, gate: object) -> float:
        return 0.0


def going_around(decoder: Decoder, embeds: Tensor, rows: Tensor, keep: dict[int, list[int]], tokens: list[int]) -> Any:
    """Logits (1 + T, V): every row is always there; a token that is not kept goes around a layer, seen by nobody."""
    model, cache, out = decoder.language.model, DynamicCache(), []
    seen_in: list[Tensor] = []
    for chunk in (embeds, *(decoder.embed(torch.tensor([token])) for token in tokens)):
        hidden, past = chunk[None], cache.get_seq_length()
        n = past + len(chunk)
        left = torch.arange(len(rows))
        for i, layer in enumerate(model.layers):
            if i in keep:
                left = torch.tensor(keep[i])
            if past == 0:
                visible = torch.ones(n, dtype=torch.bool).index_fill(0, rows, False)
                visible[rows[left]] = True
                seen_in.append(visible)
            visible = torch.cat([seen_in[i], torch.ones(n - len(seen_in[i]), dtype=torch.bool)])
            mask = torch.ones(n, n, dtype=torch.bool).tril() & (visible | torch.eye(n, dtype=torch.bool))
            ran = layer(
                hidden,
                attention_mask=mask[None, None, past:],
                position_embeddings=model.rotary_emb(hidden, torch.arange(past, n)[None]),
                past_key_values=cache,
            )
            hidden = torch.where(visible[past:][None, :, None], ran, hidden)
        out.append(decoder.language.lm_head(model.norm(hidden[0, -1])))
    return torch.stack(out)


def answered(decoder: Decoder, filled: Prefill, tokens: list[int]) -> Tensor:
    return torch.stack([filled.logits] + [decode(decoder, filled, token) for token in tokens])


def test_a_dropped_token_comes_back_as_it_was(decoder: Decoder) -> None:
    """At the second gate tokens are kept that the first had dropped; at the third, one that both had."""
    every = torch.arange(40)
    keep = {1: every[::2].tolist(), 3: every[5:15].tolist(), 5: [7, 12, 31]}
    policy = Told(keep)
    schedule = Schedule.of([1, 3, 5], [20 / 40, 10 / 40, 3 / 40])
    with torch.no_grad():
        filled = prefill(decoder, PROMPT.embeds, PROMPT.layout, schedule, policy)
        expected = going_around(decoder, PROMPT.embeds[0], 5 + every, keep, [3, 9])
    assert policy.candidates == dict.fromkeys((1, 3, 5), every.tolist())
    assert torch.equal(policy.states[3][5 + 7], policy.states[1][5 + 7]), "7 went around layers 1 and 2"
    assert not torch.equal(policy.states[3][5 + 8], policy.states[1][5 + 8])
    torch.testing.assert_close(answered(decoder, filled, [3, 9]), expected, rtol=0, atol=1e-5)
    trace = filled.trace
    assert trace.spatial_per_layer == (40, 20, 20, 10, 10, 3)
    assert trace.retained.nonzero()[:, 0].tolist() == [7, 12, 31]
    assert [int(trace.last_layer[k]) for k in (7, 31, 8, 5, 2, 1)] == [5, 5, 4, 4, 2, 0]


def test_without_a_way_back_it_is_a_gate_as_any_other(decoder: Decoder) -> None:
    schedule = Schedule.of([1, 3], [0.5, 0.2])
    options = {"bypass": False}
    found = prefill(decoder, PROMPT.embeds, PROMPT.layout, schedule, make_rival("bypass", **options))
    pyramid = prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([1], [0.5]), make_rival("pyramiddrop"))
    back = prefill(decoder, PROMPT.embeds, PROMPT.layout, schedule, make_rival("bypass"))
    assert found.trace.spatial_per_layer == back.trace.spatial_per_layer == (40, 20, 20, 8, 8, 8)
    assert pyramid.trace.spatial_per_layer[-1] == 20
    no, yes = (set((one.trace.last_layer > 0).nonzero()[:, 0].tolist()) for one in (found, back))
    assert no < yes, "some that had been dropped before layer 1 came back"


def test_its_score_is_the_next_layers_attention(decoder: Decoder) -> None:
    found = prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([3], [0.3]), make_rival("bypass"))
    attention = attention_map(decoder, PROMPT.embeds, 3)
    best = attention[:, -7:, 5:45].mean((0, 1)).topk(12).indices.sort().values
    assert found.trace.retained.nonzero()[:, 0].tolist() == best.tolist()


def test_rows_between_tokens_positions_of_axes_and_what_layers_add_stay_right(with_axes: Decoder) -> None:
    """Images with rows between, of which two layers behind the first gate add to the tokens: all come back in place."""
    n = CASE.layout.n_spatial
    every = list(range(n))
    told = Told({1: every[::2], 2: every[: n // 4], 4: [1, n - 1]})
    schedule = Schedule.of([1, 2, 4], [len(k) / n + 1e-6 for k in told.keep.values()])
    filled = prefill(with_axes, CASE.embeds, CASE.layout, schedule, told, scene=CASE.scene)
    assert told.candidates == dict.fromkeys((1, 2, 4), every)
    n_text = CASE.layout.n_tokens - n
    assert filled.cache.lengths == tuple(n_text + k for k in (n, *[len(told.keep[g]) for g in (1, 2, 2, 4, 4)]))
    rows = CASE.layout.rows
    gone = every[1::2]
    around = told.states[2][rows[gone]] - told.states[1][rows[gone]]
    torch.testing.assert_close(around, CASE.layout.added[1][gone], msg="a layer that they went around added to them")


def test_positions_cannot_be_renumbered() -> None:
    decoder, schedule = tiny_decoder(), Schedule.of([1], [0.5])
    with pytest.raises(GateError, match="policy bypass takes tokens back, and rope 'renumber'"):
        prefill(decoder, PROMPT.embeds, PROMPT.layout, schedule, make_rival("bypass"), rope="renumber")


def test_a_withdrawal_is_for_good(decoder: Decoder) -> None:
    schedule = Schedule.of([1, 2], [0.5, 0.2], withdraw_layer=4)
    filled = prefill(decoder, PROMPT.embeds, PROMPT.layout, schedule, make_rival("bypass"))
    assert filled.trace.spatial_per_layer == (40, 20, 8, 8, 0, 0) and filled.cache.lengths[4:] == (12, 12)


# TransPrune


def by_hand(decoder: Decoder, layers: range, alive: Tensor | None = None) -> Tensor:
    """What those layers of the unpruned model change, by copies of what goes in and out of their parts."""
    total = torch.zeros(PROMPT.embeds.shape[1])
    parts = [(i, kind) for i in layers for kind in ("self_attn", "mlp")]
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    hooks = []
    for i, kind in parts:

        def note(module, args, named, out, at=(i, kind)) -> None:  # type: ignore[no-untyped-def]
            given = named.get("hidden_states", args[0] if args else None)
            seen[at] = given[0], (out[0] if isinstance(out, tuple) else out)[0]

        hooks.append(getattr(decoder.layers[i].module, kind).register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        decoder.language(inputs_embeds=PROMPT.embeds)
    for hook in hooks:
        hook.remove()
    for given, gave in seen.values():
        angles = [torch.exp(1 - a @ b / (a.norm() * b.norm())) for a, b in zip(given, gave, strict=True)]
        total += torch.stack([gave[k].norm() / given[k].norm() * angles[k] / sum(angles) for k in range(len(given))])
    return total


def test_what_layers_change_is_added_up(decoder: Decoder) -> None:
    policy: Policy = make_rival("transprune", watched=(11, 22), attention=False)  # of six the second to fourth
    found = prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([4], [0.3]), policy)
    best = by_hand(decoder, range(1, 4))[5:45].topk(12).indices.sort().values
    assert found.trace.retained.nonzero()[:, 0].tolist() == best.tolist()
    short = make_rival("transprune", watched=(11, 11), attention=False)
    one = prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([4], [0.3]), short)
    best = by_hand(decoder, range(1, 2))[5:45].topk(12).indices.sort().values
    assert one.trace.retained.nonzero()[:, 0].tolist() == best.tolist()


def test_both_halves_of_the_score_count_the_same(decoder: Decoder) -> None:
    policy = make_rival("transprune", watched=(1, 16))
    found = prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([3], [0.3]), policy)
    change = by_hand(decoder, range(3))[5:45]
    attention = attention_map(decoder, PROMPT.embeds, 3)
    paid = attention[:, -7:, 5:45].mean((0, 1))
    best = (change / change.sum() + paid / paid.sum()).topk(12).indices.sort().values
    assert found.trace.retained.nonzero()[:, 0].tolist() == best.tolist()


def test_layers_are_left_as_they_were(decoder: Decoder) -> None:
    parts = [part for one in decoder.layers for part in (one.module.self_attn, one.module.mlp)]
    before = [list(part._forward_hooks) for part in parts]
    prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([2, 4], [0.5, 0.2]), make_rival("transprune"))
    assert [list(part._forward_hooks) for part in parts] == before
    watches = make_rival("transprune").watches  # type: ignore[attr-defined]
    assert [layer for layer in range(32) if watches(layer, 32)] == [6, 7, 8, 9, 10, 11]
    assert [layer for layer in range(12) if watches(layer, 12)] == [1, 2, 3]
    assert [layer for layer in range(N_LAYERS) if watches(layer, N_LAYERS)] == [0, 1]
