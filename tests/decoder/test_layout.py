# SPDX-License-Identifier: Apache-2.0
"""Spatial tokens with rows between them, positions of three axes and vectors added on the way, as Qwen3-VL has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import GateError, Layout, prefill
from adatoken3d_ros.decoder.prefix import PrefixError, ScenePrefix
from adatoken3d_ros.lab.mining import mine
from adatoken3d_ros.lab.probe import Probe, Sample
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import SceneTokens, Selection
from tests.decoder.oracle import randomised

TOKENS = (7, 31, 150)  # decoded after the prompt
SCHEDULES = {
    "none": Schedule(),
    "early": Schedule.of([0, 1, 2, 4], [0.8, 0.6, 0.4, 0.2]),
    "late": Schedule.of([3], [0.3]),
}
MERGING = ("coarse_voxel",)


class Language(torch.nn.Module):
    """A text model of Qwen3-VL with a head, as its parent has them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model, self.config = Qwen3VLTextModel(config), config
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = Qwen3VLTextConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        attn_implementation="sdpa",
    )
    return Decoder(randomised(Language, config))


def make_case(gaps: bool = True) -> SimpleNamespace:
    """Two images of 4 x 5 tokens, of which some are not there, between text; three layers add to them."""
    generator = torch.Generator().manual_seed(0)
    there = [torch.tensor([k for k in range(20) if k % 7 != 3]), torch.arange(20)]
    rows, positions, at, row = [], [], 0, 0
    pieces = [(5, None), (1, None), (4, 0), (2, None), (4, 1), (6, None)]
    for n, image in pieces:
        if image is None:
            positions.append(torch.arange(at, at + n).expand(3, n))
            at, row = at + n, row + n
            continue
        cells = there[image]
        positions.append(at + torch.stack([torch.zeros_like(cells), cells // 5, cells % 5]))
        rows.append(torch.arange(row, row + len(cells)))
        at, row = at + 5, row + len(cells)
    spatial = torch.cat(rows)
    n = len(spatial)
    layout = Layout(
        6,
        n,
        row,
        rows=spatial,
        positions=torch.cat(positions, dim=1),
        next_position=at,
        added=tuple(torch.randn(n, 64, generator=generator) for _ in range(3)),
    )
    embeds = torch.randn(1, row, 64, generator=generator)
    return SimpleNamespace(
        layout=layout, embeds=embeds, scene=SceneTokens(torch.rand(n, 3, generator=generator) * 5, embeds[0, spatial])
    )


CASE = make_case()


def oracle(decoder: Decoder, last_layer: Tensor, closing: Tensor | None = None) -> Tensor:
    """Logits (1 + T, V) of transformers' own model at full length, where a layer's rows do not see dropped tokens, nor
    what closes a line of which no token is left.
    """
    layout, model, cache = CASE.layout, decoder.language.model, DynamicCache()
    spatial = torch.zeros(1, layout.n_tokens, dtype=torch.bool)
    spatial[0, layout.rows] = True
    found = []

    def hide(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            q = args[0].shape[1]
            n = cache.layers[layer].get_seq_length() + q if len(cache.layers) > layer else q
            visible = torch.ones(n, dtype=torch.bool)
            visible[layout.rows] = last_layer >= layer
            for row in () if closing is None else set(closing.tolist()) - {-1}:
                visible[row] = bool((last_layer[closing == row] >= layer).any())
            mask = torch.ones(n, n, dtype=torch.bool).tril() & (visible | torch.eye(n, dtype=torch.bool))
            return args, {**kwargs, "attention_mask": mask[None, None, n - q :]}

        return hook

    hooks = [m.register_forward_pre_hook(hide(i), with_kwargs=True) for i, m in enumerate(model.layers)]
    try:
        with torch.no_grad():
            out = model(
                inputs_embeds=CASE.embeds,
                position_ids=layout.positions[:, None],
                past_key_values=cache,
                visual_pos_masks=spatial,
                deepstack_visual_embeds=list(layout.added),
            )
            found.append(decoder.language.lm_head(out.last_hidden_state[0, -1]))
            for step, token in enumerate(TOKENS):
                at = torch.full((3, 1, 1), layout.next_position + step)
                out = model(input_ids=torch.tensor([[token]]), position_ids=at, past_key_values=cache)
                found.append(decoder.language.lm_head(out.last_hidden_state[0, -1]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def answered(decoder: Decoder, filled: Any) -> Tensor:
    logits = [filled.logits]
    logits += [decode(decoder, filled, token) for token in TOKENS]
    return torch.stack(logits)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name not in MERGING])
def test_equals_the_masked_original(decoder, name: str, schedule: Schedule) -> None:
    if name == "none" and schedule.stages:
        return
    if name in ("fastv", "adatoken") and 0 in [stage.layer for stage in schedule.stages]:
        schedule = Schedule.of([1, 2, 4], [0.6, 0.4, 0.2])
    filled = prefill(decoder, CASE.embeds, CASE.layout, schedule, make_policy(name), scene=CASE.scene, rope="original")
    trace = filled.trace
    assert filled.next_position == CASE.layout.next_position
    torch.testing.assert_close(answered(decoder, filled), oracle(decoder, trace.last_layer), rtol=0, atol=1e-5)


def test_rows_between_the_tokens_stay_when_all_tokens_go(decoder) -> None:
    filled = prefill(decoder, CASE.embeds, CASE.layout, Schedule(withdraw_layer=1), make_policy("none"))
    n_text = CASE.layout.n_tokens - CASE.layout.n_spatial
    assert filled.cache.lengths == (CASE.layout.n_tokens, *[n_text] * 5)
    torch.testing.assert_close(answered(decoder, filled), oracle(decoder, filled.trace.last_layer), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "schedule", [*SCHEDULES.values(), Schedule.of([1, 3], [0.2, 0.05]), Schedule(withdraw_layer=2)]
)
def test_a_row_that_closes_a_line_goes_with_the_last_token_of_it(decoder, schedule: Schedule) -> None:
    """One of three tokens and one of a single token, so some gates empty them."""
    between = [row for row in range(6, CASE.layout.spatial_end) if row not in CASE.layout.rows.tolist()]
    closing = torch.full((CASE.layout.n_spatial,), -1)
    closing[1:4], closing[12] = between[0], between[1]
    layout = replace(CASE.layout, closing=closing)
    filled = prefill(
        decoder, CASE.embeds, layout, schedule, make_policy("pyramiddrop"), scene=CASE.scene, rope="original"
    )
    last, n_text = filled.trace.last_layer, layout.n_tokens - layout.n_spatial
    expected = [
        n + n_text - sum(int(not (last[closing == row] >= layer).any()) for row in between[:2])
        for layer, n in enumerate(filled.trace.spatial_per_layer)
    ]
    assert filled.trace.rows_per_layer == filled.cache.lengths == tuple(expected)
    assert filled.trace.counted(n_text) == tuple(n - n_text for n in expected)
    if schedule.withdraw_layer:
        assert expected[-1] == n_text - 2
    torch.testing.assert_close(answered(decoder, filled), oracle(decoder, last, closing), rtol=0, atol=1e-5)


def test_renumbered_positions_are_those_of_a_text(decoder) -> None:
    """As if what is left had been all there was, from the renumbering layer on."""
    filled = prefill(
        decoder, CASE.embeds, CASE.layout, Schedule.of([2], [0.5]), make_policy("pyramiddrop"), scene=CASE.scene
    )
    n_left = CASE.layout.n_tokens - CASE.layout.n_spatial + filled.trace.spatial_per_layer[-1]
    assert filled.cache.shifts == [0, 0, *[CASE.layout.next_position - n_left] * 4]
    assert filled.next_position - filled.cache.shifts[-1] == n_left


@pytest.mark.parametrize("keep", [None, [30, 0, 4, 17, 9]])
@pytest.mark.parametrize("top_k", [None, 1000])
def test_a_prefix_equals_the_masked_original(decoder, keep: list[int] | None, top_k: int | None) -> None:
    layout = CASE.layout
    end = layout.spatial_end
    prefix = ScenePrefix(
        decoder,
        CASE.embeds[:, :end],
        layout.spatial_start,
        layout=layout,
        keep=None if keep is None else torch.tensor(keep),
        top_k=top_k,
        measure=True,
    )
    last = torch.full((layout.n_spatial,), 5)
    if keep is not None:
        last = torch.full_like(last, -1).index_fill(0, torch.tensor(keep), 5)
    for _ in range(2):
        with prefix.asking(CASE.embeds[:, end:]) as filled:
            torch.testing.assert_close(answered(decoder, filled), oracle(decoder, last), rtol=0, atol=1e-5)


def test_a_prefix_sees_what_the_question_looks_at(decoder) -> None:
    """With top_k the fixed rows stay, and the contribution is that of the tokens, not of the rows between them."""
    layout, end = CASE.layout, CASE.layout.spatial_end
    full = ScenePrefix(decoder, CASE.embeds[:, :end], 6, layout=layout, measure=True)
    few = ScenePrefix(decoder, CASE.embeds[:, :end], 6, layout=layout, top_k=8)
    with full.asking(CASE.embeds[:, end:]) as a:
        contribution = a.trace.contribution
        assert contribution.shape == (layout.n_spatial,) and float(contribution.sum()) == pytest.approx(1.0)
    with few.asking(CASE.embeds[:, end:]) as b:
        n_question = layout.n_question
        assert b.cache.lengths == (end - layout.n_spatial + 8 + n_question,) * 6


def test_a_prefix_of_another_length_is_refused(decoder) -> None:
    with pytest.raises(PrefixError, match=r"47 rows, the spatial tokens end at row"):
        ScenePrefix(decoder, torch.zeros(1, 47, 64), 6, layout=CASE.layout)


def test_merged_tokens_merge_what_is_added_to_them(decoder) -> None:
    """By the groups in which the policy has averaged the tokens themselves."""
    policy, seen = make_policy("coarse_voxel"), []

    class Spy:
        name, rope, kept = policy.name, policy.rope, staticmethod(policy.kept)

        def select(self, view: Any) -> Selection:
            seen.append((view.hidden[view.spatial], policy.select(view)))
            return seen[-1][1]

    layout, schedule = CASE.layout, Schedule.of([0], [0.5])
    merged = prefill(decoder, CASE.embeds, layout, schedule, Spy(), scene=CASE.scene)
    [(states, selection)] = seen
    torch.testing.assert_close(selection.of(states), selection.merged)
    added = tuple(selection.of(vectors) for vectors in layout.added)
    fixed = [row for row in range(layout.n_tokens) if row not in layout.rows.tolist()]
    rows = torch.tensor(sorted(fixed + layout.rows[selection.keep].tolist()))
    left = torch.searchsorted(rows, layout.rows[selection.keep])
    embeds = CASE.embeds[:, rows].index_copy(1, left, selection.merged[None])
    small = Layout(6, len(left), len(rows), left, layout.positions[:, rows], layout.next_position, added)
    alone = prefill(decoder, embeds, small, Schedule(), make_policy("none"))
    torch.testing.assert_close(merged.logits, alone.logits, rtol=0, atol=1e-5)


def test_mining_knows_the_layout(decoder) -> None:
    """Its attention by layer is what a prefix measures, layer by layer, of the question."""
    layout, end = CASE.layout, CASE.layout.spatial_end
    mined = mine(decoder, CASE.embeds, spatial_start=6, n_spatial=layout.n_spatial, layout=layout)
    assert mined.attention.shape == (6, layout.n_spatial)
    prefix = ScenePrefix(decoder, CASE.embeds[:, :end], 6, layout=layout, measure=True)
    with prefix.asking(CASE.embeds[:, end:]) as filled:
        expected = (mined.attention / mined.attention.sum(axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(filled.trace.contribution.numpy(), expected, atol=1e-6)
    sample = Sample(CASE.embeds, layout, CASE.scene)
    probe = Probe(decoder, [sample], make_policy("ours"), n_tokens=2)
    assert probe.divergence(Schedule()) < 1e-6 < probe.divergence(Schedule.of([2], [0.2]))


def test_no_question_after_the_last_token_is_refused() -> None:
    with pytest.raises(GateError, match="question has 0 rows"):
        Layout(2, 2, 6, rows=torch.tensor([2, 5]))
