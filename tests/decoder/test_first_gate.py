# SPDX-License-Identifier: Apache-2.0
"""Layers before which no token may go, and any rows among the spatial tokens that stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import GateError, Layout, prefill
from adatoken3d_ros.decoder.prefix import PrefixError, ScenePrefix
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError
from adatoken3d_ros.pruning.view import Rope, SceneTokens
from tests.decoder.oracle import N_LAYERS, MaskedOracle, make_prompt, tiny_decoder

DOUBLE = Decoder(tiny_decoder(n_kv_heads=2).language.double())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows_that_stay_and_any_policy_equal_the_masked_run_in_float64(data: st.DataObject) -> None:
    before, block, after = data.draw(st.tuples(st.integers(0, 4), st.integers(2, 30), st.integers(1, 5)))
    made = make_prompt(before, block, after, seed=data.draw(st.integers(0, 99)))
    spatial = torch.tensor(sorted(data.draw(st.sets(st.integers(0, block - 1), min_size=1))))
    n, n_rows = len(spatial), before + block + after
    layout = Layout(before + int(spatial[0]), n, n_rows, rows=before + spatial)
    policy = make_policy(data.draw(st.sampled_from([n for n in POLICY_NAMES if n not in ("none", "coarse_voxel")])))
    layers = data.draw(st.lists(st.integers(1, N_LAYERS - 1), max_size=3, unique=True).map(sorted))
    ratios = sorted(data.draw(st.lists(st.floats(0.05, 1), min_size=len(layers), max_size=len(layers))), reverse=True)
    schedule = Schedule.of(layers, ratios, data.draw(st.none() | st.integers(0, N_LAYERS)))
    rope: Rope = data.draw(st.sampled_from(["original", "renumber"]))
    embeds, scene = made.embeds.double(), SceneTokens(made.scene.xyz[spatial])
    filled = prefill(DOUBLE, embeds, layout, schedule, policy, scene=scene, rope=rope)
    counts = schedule.counts(n, N_LAYERS, policy.kept)
    assert filled.trace.spatial_per_layer == counts
    assert tuple(filled.cache.lengths) == tuple(n_rows - n + count for count in counts)
    last_layer = torch.full((block,), N_LAYERS).index_copy(0, spatial, filled.trace.last_layer)
    oracle = MaskedOracle(DOUBLE.language, before, last_layer, rope == "renumber")
    torch.testing.assert_close(filled.logits.double(), oracle(embeds[0]), rtol=0, atol=1e-5)
    for token in (7, 8):
        expected = oracle(DOUBLE.embed(torch.tensor([token])))
        torch.testing.assert_close(decode(DOUBLE, filled, token).double(), expected, rtol=0, atol=1e-5)


EARLY = [Schedule.of([1], [0.5]), Schedule((), 1), Schedule.of([0, 3], [0.9, 0.5])]


@pytest.mark.parametrize("schedule", EARLY, ids=str)
def test_a_gate_before_the_first_legal_one_is_refused(schedule: Schedule) -> None:
    decoder, prompt = Decoder(tiny_decoder().language, first_gate=2), make_prompt(3, 20, 4)
    with pytest.raises(ScheduleError, match=r"gate layer [01] is before layer 2"):
        prefill(decoder, prompt.embeds, prompt.layout, schedule, make_policy("random"))
    moved = schedule.not_before(2)
    filled = prefill(decoder, prompt.embeds, prompt.layout, moved, make_policy("random"))
    assert filled.trace.spatial_per_layer[:2] == (20, 20) and filled.trace.spatial_per_layer[2] < 20


def test_a_hurry_before_it_is_refused_and_a_stage_that_drops_nothing_is_not() -> None:
    decoder, prompt = Decoder(tiny_decoder().language, first_gate=2), make_prompt(3, 20, 4)
    with pytest.raises(GateError, match="3 of 20 spatial tokens are asked for before layer 1"):
        asks = [None, 3]
        prefill(decoder, prompt.embeds, prompt.layout, Schedule(), make_policy("ours"), at_most=lambda g, _: asks[g])
    Schedule.of([0], [1.0]).check(N_LAYERS, 2)
    with pytest.raises(PrefixError, match="before layer 2"):
        ScenePrefix(decoder, prompt.embeds[:, :23], 3, keep=torch.arange(4))


def test_moved_gates_that_fall_together_keep_the_later_share() -> None:
    schedule = Schedule.of([0, 1, 4], [0.9, 0.5, 0.2], withdraw_layer=1)
    assert schedule.not_before(2) == Schedule.of([2, 4], [0.5, 0.2], withdraw_layer=2)
    assert schedule.not_before(0) == schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_policy_may_score_in_any_number_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each token contributed is float32 whatever its policy counted in."""
    policy, made = make_policy("fastv"), make_prompt(2, 9, 3, seed=0)
    schedule, layout = Schedule.of([2], [0.5]), Layout(2, 9, 14)
    plain = prefill(DOUBLE, made.embeds.double(), layout, schedule, policy, scene=made.scene).trace
    select = type(policy).select
    monkeypatch.setattr(
        type(policy), "select", lambda self, view: replace(found := select(self, view), scores=found.scores.to(dtype))
    )
    other = prefill(DOUBLE, made.embeds.double(), layout, schedule, policy, scene=made.scene).trace
    assert other.contribution.dtype == torch.float32 and torch.equal(other.retained, plain.retained)
    assert torch.allclose(other.contribution, plain.contribution, atol=1e-2)
