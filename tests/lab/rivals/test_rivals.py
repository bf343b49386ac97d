# SPDX-License-Identifier: Apache-2.0
"""Rivals by hand, beside slow and obvious implementations, and what holds for all of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.lab.rivals import RIVAL_NAMES, make_rival
from adatoken3d_ros.lab.rivals.cdpruner import greedy_map, relevance
from adatoken3d_ros.lab.rivals.evs import change
from adatoken3d_ros.lab.rivals.holov import part_score, shares
from adatoken3d_ros.lab.rivals.sparsevlm import clusters, recycled, text_raters
from adatoken3d_ros.pruning.flops import scoring_flops
from adatoken3d_ros.pruning.policies import POLICY_NAMES
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, PolicyError, SceneTokens
from tests.decoder.oracle import N_LAYERS, Prompt, attention_map, make_prompt, tiny_decoder
from tests.decoder.prompts import assert_equals_oracle

MERGING = ("visionzip", "sparsevlm", "framefusion")
PROMPT = make_prompt(5, 40, 7)
TINY = tiny_decoder()
SIZE = DecoderSize(n_layers=6, hidden=64, intermediate=112, vocabulary=199, queries=64, keys=32)


def known(prompt: Prompt, n_views: int = 4) -> SceneTokens:
    """All that a rival may ask for: views of equal grids, and some attention."""
    n = prompt.layout.n_spatial
    place = torch.arange(n)
    each = max(1, n // n_views)
    attended = torch.rand(n, generator=torch.Generator().manual_seed(n))
    return SceneTokens(prompt.scene.xyz, attended=attended, views=torch.stack([place // each, place % each], 1))


@pytest.fixture(scope="module", params=[4, 2])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return tiny_decoder(request.param)


def run(decoder: Decoder, name: str, schedule: Schedule, prompt: Prompt = PROMPT, **options: Any) -> Prefill:
    policy = make_rival(name, **options)
    return prefill(decoder, prompt.embeds, prompt.layout, schedule, policy, scene=known(prompt))


def first_gate(name: str, ratio: float) -> Schedule:
    return Schedule.of([2 if name in ("sparsevlm", "transprune", "framefusion") else 0, 4], [ratio, ratio / 2])


# What holds for all


@pytest.mark.parametrize("name", RIVAL_NAMES)
def test_each_keeps_what_its_schedule_says(decoder: Decoder, name: str) -> None:
    policy = make_rival(name)
    assert policy.name == name and name not in POLICY_NAMES
    for schedule in (policy.default_schedule(N_LAYERS), first_gate(name, 0.55)):
        first, second = (run(decoder, name, schedule) for _ in range(2))
        assert first.trace.spatial_per_layer == schedule.counts(40, N_LAYERS, policy.kept)
        assert int(first.trace.retained.sum()) == first.trace.spatial_per_layer[-1]
        assert first.logits.isfinite().all() and torch.equal(first.logits, second.logits)
        assert first.cache.lengths == tuple(12 + n for n in first.trace.spatial_per_layer), "text stays"


@pytest.mark.parametrize("name", [name for name in RIVAL_NAMES if name not in (*MERGING, "bypass")])
def test_each_equals_its_masked_run(decoder: Decoder, name: str) -> None:
    rope = make_rival(name).rope
    for prompt in (PROMPT, make_prompt(3, 31, 1), make_prompt(0, 9, 2)):
        result = run(decoder, name, first_gate(name, 0.5), prompt)
        assert_equals_oracle(decoder, prompt, result, n_steps=2, rope=rope)


@pytest.mark.parametrize("name", MERGING)
def test_those_that_merge_drop_as_their_masked_run_when_they_do_not(decoder: Decoder, name: str) -> None:
    options = {"visionzip": {"contextual": 0.0}, "sparsevlm": {"recycle": False}, "framefusion": {"alike": 1.0}}[name]
    assert_equals_oracle(decoder, PROMPT, run(decoder, name, first_gate(name, 0.5), **options), n_steps=2)


@pytest.mark.parametrize("name", RIVAL_NAMES)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 40), share=st.floats(0.02, 0.98), seed=st.integers(0, 9))
def test_any_number_can_be_kept(name: str, n: int, share: float, seed: int) -> None:
    prompt = make_prompt(2, n, 3, seed=seed)
    schedule, policy = Schedule.of([1], [share]), make_rival(name)
    found = prefill(TINY, prompt.embeds, prompt.layout, schedule, policy, scene=known(prompt))
    assert found.trace.spatial_per_layer[1:] == (policy.kept(share, n),) * 5 and found.logits.isfinite().all()


@pytest.mark.parametrize("name", RIVAL_NAMES)
@pytest.mark.parametrize("n_layers", [2, 6, 16, 32, 40])
def test_schedules_fit_any_depth(name: str, n_layers: int) -> None:
    make_rival(name).default_schedule(n_layers).check(n_layers)


def test_operations_by_hand() -> None:
    """100 of 150 tokens in 130 rows, 20 stay, 10 words; hidden 64, 64 columns of queries, 32 of keys."""
    gate = GateSize(layer=3, n_rows=130, n_spatial=100, n_keep=20, n_question=10, n_total=150)
    expected = {
        "cdpruner": 2 * 64 * 100 * 110 + 100 * 20**2,
        "visionzip": 2 * 64 * 3 * 80 + 64 * 100,
        "holov": 2 * 64 * 100**2 / 16,
        "evs": 6 * 64 * 100,
        "framefusion": 7 * 64 * 100 + 2 * 64 * 64 + 2 * 130 * 64,
        "transprune": 4 * 6 * 130 * 64 + 2 * 130 * 64 * 32 + 2 * 10 * 64 * (64 + 130),
        "bypass": 2 * 180 * 64 * 32 + 2 * 10 * 64 * (64 + 180),
        "sparsevlm": 2 * 64 * 100 * 10 + 2 * 10 * 64 * 64 + 2 * 10 * 130 * 64 + 2 * 64 * (0.3 * 80 + 1) ** 2,
    }
    for name, operations in expected.items():
        assert make_rival(name).flops(SIZE, gate) == pytest.approx(operations), name
    # At the second gate of a bypass all 100 are candidates, though 50 of 80 rows are left.
    policy = make_rival("bypass")
    gates = [GateSize(1, 130, 100, 50, 10, 100), GateSize(3, 80, 50, 20, 10, 100)]
    assert policy.flops(SIZE, gates[0]) == policy.flops(SIZE, gates[1])
    total = scoring_flops(policy, SIZE, 100, [100, 50, 50, 20, 20, 20], 30, 10)
    assert total == sum(policy.flops(SIZE, gate) for gate in gates)


def test_what_a_model_does_not_offer_is_said(mha: Decoder) -> None:
    plain, schedule = PROMPT.scene, Schedule.of([0], [0.5])
    for name, says in (
        ("visionzip", "visionzip ranks by the attention of the vision tower's class token, and none is given"),
        ("holov", "holov ranks by the attention of the vision tower's class token, and none is given"),
        ("evs", "evs compares views, and this model's tokens are those of no view"),
        ("framefusion", "framefusion compares views, and this model's tokens are those of no view"),
        ("transprune", "transprune ranks by what layers change; none is watched before layer 0"),
        ("sparsevlm", "sparsevlm rates by the attention of the layer below; layer 0 has none"),
    ):
        with pytest.raises(PolicyError, match=says):
            prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, make_rival(name), scene=plain)
    with pytest.raises(PolicyError, match="holov at layer 0 needs the tokens' positions"):
        prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, make_rival("holov"))
    with pytest.raises(PolicyError, match=r"attention to tokens is \(3,\) for 4 of them"):
        SceneTokens(torch.zeros(4, 3), attended=torch.zeros(3))
    with pytest.raises(PolicyError, match=r"views are \(4, 3\) for 4 of them"):
        SceneTokens(torch.zeros(4, 3), views=torch.zeros(4, 3))


def test_names_and_options() -> None:
    assert make_rival("fastv").name == "fastv"
    with pytest.raises(PolicyError, match="no policy 'best'; there are none, random.*evs"):
        make_rival("best")
    with pytest.raises(PolicyError, match="'cdpruner'.*seed"):
        make_rival("cdpruner", seed=1)
    with pytest.raises(PolicyError, match="contextual 1.0"):
        make_rival("visionzip", contextual=1.0)
    with pytest.raises(PolicyError, match="alike 2"):
        make_rival("framefusion", alike=2.0)
    with pytest.raises(PolicyError, match="parts 0"):
        make_rival("holov", parts=0)


# CDPruner


def test_relevance_by_hand() -> None:
    cosines = torch.tensor([[0.2, 0.4], [0.0, 0.0], [0.5, 0.7]])  # means 0.3, 0, 0.6
    torch.testing.assert_close(relevance(cosines, negate=False), torch.tensor([0.5, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(relevance(cosines, negate=True), torch.tensor([0.5, 1.0, 0.0]), atol=1e-5, rtol=0)
    assert relevance(torch.full((3, 2), 0.4), negate=True).tolist() == [1.0, 1.0, 1.0]


def test_a_greedy_set_by_hand() -> None:
    """The largest diagonal, then not its double (nothing is left of that) but the one at a right angle."""
    rows = torch.tensor([[0.9, 0.0], [1.0, 0.0], [0.0, 0.5]])
    kernel = rows @ rows.T
    assert greedy_map(kernel, 2).tolist() == [1, 2]
    assert greedy_map(kernel, 3).tolist() == [1, 2, 0], "of rank two: the largest of the others follows"


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 9), seed=st.integers(0, 99))
def test_the_greedy_set_is_that_of_determinants(n: int, seed: int) -> None:
    """Always the one with which the determinant of the chosen is largest, by computing all of them."""
    rows = torch.randn(n, n + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel, chosen = rows @ rows.T, list[int]()
    for _ in range(n):
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(max(rest, key=lambda j: float(kernel[[*chosen, j]][:, [*chosen, j]].det())))
    assert greedy_map(kernel, n).tolist() == chosen


def test_relevance_decides_where_tokens_are_alike(mha: Decoder) -> None:
    """Two pairs of equal tokens, the second pair as the question's words: negated, a token of the other pair stays."""
    embeds = torch.zeros(1, 7, 64)
    embeds[0, 1:5, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    embeds[0, 1:5, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    embeds[0, 5:, 1] = 1.0
    prompt = Prompt(embeds, make_prompt(1, 4, 2).layout, make_prompt(1, 4, 2).scene)
    one = Schedule.of([0], [0.25])
    kept = [run(mha, "cdpruner", one, prompt, negate=n).trace.retained.tolist() for n in (True, False)]
    assert kept == [[True, False, False, False], [False, False, True, False]]


# VisionZip


def test_the_rest_is_merged_into_every_second_by_hand(mha: Decoder) -> None:
    """Six tokens, four stay: the three most attended (5, 0, 3), and of 1, 2, 4 the first, as the mean of those like it.

    A third of the kept is contextual: one target of three others, and both others are most like the only target.
    """
    prompt = make_prompt(1, 6, 2)
    scene = SceneTokens(prompt.scene.xyz, attended=torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]))
    seen: list[Tensor] = []
    hook = mha.layers[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    policy = make_rival("visionzip", contextual=0.3)
    found = prefill(mha, prompt.embeds, prompt.layout, Schedule.of([0], [4 / 6]), policy, scene=scene)
    hook.remove()
    assert found.trace.retained.tolist() == [True, True, False, True, False, True]
    old = prompt.embeds[0, 1:7]
    expected = torch.stack([old[0], (old[1] + old[2] + old[4]) / 3, old[3], old[5]])
    torch.testing.assert_close(seen[0][0, 1:5], expected)


# HoloV


def test_shares_by_hand() -> None:
    """Of ten, 1 : 2 : 5 are 1.25, 2.5 and 6.25; the one left over goes to the best."""
    assert shares(torch.tensor([1.0, 2.0, 5.0]), 10).tolist() == [1, 2, 7]
    assert shares(torch.tensor([0.0, 0.0, 0.0]), 5).tolist() == [2, 2, 1]


def test_a_parts_score_is_its_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    states, attended = torch.randn(5, 8, generator=generator), torch.rand(5, generator=generator)
    unit = (states / states.norm(dim=1, keepdim=True)).numpy()
    variance = []
    for i in range(5):
        cosines = [0.0 if i == j else float(unit[i] @ unit[j]) for j in range(5)]
        mean = sum(cosines) / 4
        variance.append(sum((c - mean) ** 2 for c in cosines) / 4)
    scale = float(attended.mean()) * 1e3 / (float(np.mean(variance)) + 1e-6)
    expected = np.mean([1e3 * float(a) + 0.09 * scale * v for a, v in zip(attended, variance, strict=True)])
    assert float(part_score(states, attended, 0.09)) == pytest.approx(float(expected), rel=1e-5)


def test_each_part_keeps_its_most_attended(mha: Decoder) -> None:
    """Two parts of three equal tokens: 8 : 4 of the attention are two of three slots and one."""
    embeds = torch.ones(1, 9, 64)
    prompt = Prompt(embeds, make_prompt(1, 6, 2).layout, make_prompt(1, 6, 2).scene)
    scene = SceneTokens(prompt.scene.xyz, attended=torch.tensor([1.0, 3.0, 4.0, 2.0, 1.0, 1.0]))
    policy = make_rival("holov", parts=2)
    found = prefill(mha, embeds, prompt.layout, Schedule.of([0], [0.5]), policy, scene=scene)
    assert found.trace.retained.tolist() == [False, True, True, True, False, False]
    # Five of six: a part of three has 3.33 and the rest, four in all; the one too many goes to the other part.
    found = prefill(mha, embeds, prompt.layout, Schedule.of([0], [5 / 6]), policy, scene=scene)
    assert found.trace.retained.tolist() == [True, True, True, True, True, False]


# SparseVLM


def test_raters_by_hand() -> None:
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    words = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]])
    assert text_raters(tokens, words).tolist() == [True, False, False]
    assert text_raters(tokens, torch.ones(3, 2)).tolist() == [True, True, True], "none is above the mean of equal ones"


def test_how_many_means_by_hand() -> None:
    """Of 100 stay 40, m of them means: 60 + m go, 30 % of these and one are 19, a tenth of them and one are 2."""
    assert recycled(100, 40) == 2
    assert recycled(576, 300) == 9  # of 285 dropped 86 are recycled
    assert recycled(3, 1) == 0


def test_clusters_are_those_of_loops() -> None:
    states, k = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), 3
    apart = [[float((a - b).norm()) / 5**0.5 for b in states] for a in states]
    density = [np.exp(-np.mean([d**2 for d in sorted(row)[:k]])) for row in apart]
    most = max(itertools.chain(*apart))
    score = []
    for i in range(12):
        denser = [apart[i][j] for j in range(12) if density[j] > density[i]]
        score.append(min(denser, default=most) * density[i])
    peaks = sorted(range(12), key=lambda i: -score[i])[:k]
    expected = [peaks.index(i) if i in peaks else min(range(k), key=lambda c: apart[i][peaks[c]]) for i in range(12)]
    assert clusters(states, k).tolist() == expected


def test_of_equally_dense_tokens_the_first_counts_as_denser() -> None:
    assert clusters(torch.tensor([[0.0], [1], [4], [5]]), 2).tolist() == [0, 0, 1, 1]


def test_the_raters_attention_decides(decoder: Decoder) -> None:
    """Its score is that of the whole map, of the raters' rows alone."""
    found = run(decoder, "sparsevlm", Schedule.of([3], [0.3]), recycle=False)
    raters = text_raters(PROMPT.embeds[0, 5:45], PROMPT.embeds[0, 45:])
    assert 0 < int(raters.sum()) < 7
    attention = attention_map(decoder, PROMPT.embeds, 2)
    best = attention[:, 45:][:, raters][..., 5:45].mean((0, 1)).topk(12).indices.sort().values
    assert found.trace.retained.nonzero()[:, 0].tolist() == best.tolist()


def test_what_goes_is_recycled(mha: Decoder) -> None:
    """Twelve stay, two of them as means; the best ten are as they were."""
    seen: list[Tensor] = []
    hook = mha.layers[3].module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 5:-7]))
    plain, found = (run(mha, "sparsevlm", Schedule.of([3], [0.3]), recycle=r) for r in (False, True))
    hook.remove()
    kept, before = (f.trace.retained.nonzero()[:, 0].tolist() for f in (found, plain))
    assert len(kept) == len(before) == 12 and recycled(40, 12) == 1
    same = [k for k, token in enumerate(kept) if token in before and (seen[1][k] == seen[0][before.index(token)]).all()]
    assert len(same) == 11 and not torch.equal(found.logits, plain.logits)


# EVS


def test_change_by_hand() -> None:
    """Two views; the second's first place is as before, its second the opposite, its third was not there before."""
    states = torch.tensor([[1.0, 0], [0, 1.0], [2.0, 0], [0, -3.0], [5.0, 5.0]])
    views = torch.tensor([[4, 0], [4, 1], [7, 0], [7, 1], [7, 2]])
    assert change(states, views).tolist() == [torch.inf, torch.inf, 0.0, 2.0, torch.inf]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n_views=st.integers(1, 4), cells=st.integers(1, 6))
def test_change_is_that_of_loops(seed: int, n_views: int, cells: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(n_views * cells, generator=generator) < 0.7
    there[0] = True
    place = torch.arange(n_views * cells)[there]
    views, states = torch.stack([place // cells, place % cells], 1), torch.randn(len(place), 4, generator=generator)
    names = [tuple(v) for v in views.tolist()]
    numbers = sorted({v for v, _ in names})
    for k, (number, cell) in enumerate(names):
        turn = numbers.index(number)
        before = (numbers[turn - 1], cell) if turn else None
        if before not in names:
            assert change(states, views)[k] == torch.inf
        else:
            other = states[names.index(before)]
            expected = 1 - float(states[k] @ other / (states[k].norm() * other.norm()))
            assert float(change(states, views)[k]) == pytest.approx(expected, abs=1e-5)
