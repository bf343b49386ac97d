# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.pruning.decay import DecayError
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.policies.coarse_voxel import best_of_each, coarsest_cells
from adatoken3d_ros.pruning.policies.ours import Ours
from adatoken3d_ros.pruning.policies.pyramiddrop import RELEASED_LISTS
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.scores import diverse_places, farthest_points
from adatoken3d_ros.pruning.view import Policy, PolicyError, SceneTokens
from tests.decoder.oracle import N_LAYERS, attention_map, make_prompt

PROMPT = make_prompt(5, 40, 7)


def kept(decoder: Decoder, policy: Policy, schedule: Schedule) -> list[int]:
    result = prefill(decoder, PROMPT.embeds, PROMPT.layout, schedule, policy, scene=PROMPT.scene)
    return result.trace.retained.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_one_loop_over_names(mha: Decoder, name: str) -> None:
    policy = make_policy(name)
    assert policy.name == name
    schedule = policy.default_schedule(N_LAYERS)
    first, second = (prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, policy, scene=PROMPT.scene) for _ in range(2))
    assert first.logits.isfinite().all()
    assert torch.equal(first.logits, second.logits)
    assert first.trace.spatial_per_layer == schedule.counts(40, N_LAYERS, policy.kept)
    assert first.trace.retained.sum() == schedule.counts(40, N_LAYERS, policy.kept)[-1]


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("n_layers", [1, 2, 6, 16, 32, 40])
def test_default_schedules_fit_any_depth(name: str, n_layers: int) -> None:
    make_policy(name).default_schedule(n_layers).check(n_layers)


@pytest.mark.parametrize(
    ("name", "left"),
    # Of 19 tokens at 0.5 (9.5), and of 5 at 0.1 (0.5).
    [
        *((name, (9, 1)) for name in ("random", "coarse_voxel", "one_per_voxel", "adatoken", "ours")),
        *((name, (9, 0)) for name in ("pyramiddrop", "adatoken_release")),
        *((name, (10, 0)) for name in ("fastv", "divprune")),
    ],
)
def test_rivals_count_as_their_published_code_does(mha: Decoder, name: str, left: tuple[int, int]) -> None:
    for (n, ratio), expected in zip(((19, 0.5), (5, 0.1)), left, strict=True):
        prompt = make_prompt(5, n, 7)
        schedule, policy = Schedule.of([2], [ratio]), make_policy(name)
        result = prefill(mha, prompt.embeds, prompt.layout, schedule, policy, scene=prompt.scene)
        assert result.logits.isfinite().all()
        assert result.trace.spatial_per_layer == (n,) * 2 + (expected,) * (N_LAYERS - 2)
        assert result.cache.lengths[-1] == 12 + expected


def test_default_schedules_at_32_layers() -> None:
    def stages(name: str, **options: object) -> list[tuple[int, float]]:
        return [(stage.layer, stage.ratio) for stage in make_policy(name, **options).default_schedule(32).stages]

    assert stages("fastv") == [(2, 0.5)]
    assert stages("pyramiddrop") == [(8, 0.5), (16, 0.25), (24, 0.125)]
    assert stages("adatoken_release", lists="run") == [(8, 0.8), (16, 0.5), (24, 0.25)]
    assert len(stages("adatoken_release")) == 10
    assert stages("random") == stages("ours")
    assert [stage.layer for stage in make_policy("pyramiddrop").default_schedule(16).stages] == [4, 8, 12]


def test_release_runs_with_and_without_renumbered_positions() -> None:
    assert make_policy("adatoken_release").rope == "renumber"
    assert make_policy("adatoken_release_original").rope == "original"
    assert make_policy("adatoken_release", renumber=False) == make_policy("adatoken_release_original")
    assert {make_policy(name).rope for name in ("fastv", "ours", "random", "divprune")} == {"original"}
    assert all(len(layers) == len(ratios) for layers, ratios in RELEASED_LISTS.values())


def test_the_repaired_method_beside_the_release(mha: Decoder) -> None:
    repaired = make_policy("adatoken")
    stages = repaired.default_schedule(32).stages
    assert repaired.rope == "original"
    assert len(stages) == 10 and stages[0].layer == 1 and stages[-1].ratio < 0.13
    assert [stage.layer for stage in make_policy("adatoken", max_gates=2).default_schedule(16).stages] == [3, 8]
    assert make_policy("adatoken", end_share=0.4).default_schedule(32).counts(1000, 32)[-1] >= 400
    # Its score: the last row's, from the keys that the layer below has cached.
    schedule = Schedule.of([2, 4], [0.5, 0.2])
    assert kept(mha, repaired, schedule) == kept(mha, Ours(rows="last", coverage=0.0), schedule)
    with pytest.raises(DecayError, match="end share 1.5"):
        make_policy("adatoken", end_share=1.5).default_schedule(32)
    with pytest.raises(DecayError, match="0 gates"):
        make_policy("adatoken", max_gates=0).default_schedule(32)


def test_random_is_seeded_and_nested(mha: Decoder) -> None:
    one, two = Schedule.of([1], [0.5]), Schedule.of([1, 3], [0.5, 0.2])
    assert kept(mha, make_policy("random"), one) == kept(mha, make_policy("random"), one)
    assert kept(mha, make_policy("random"), one) != kept(mha, make_policy("random", seed=1), one)
    assert set(kept(mha, make_policy("random"), two)) < set(kept(mha, make_policy("random"), one))


def test_fastv_is_ours_with_one_row_and_nothing_else(mha: Decoder) -> None:
    schedule = Schedule.of([2], [0.3])
    assert kept(mha, make_policy("fastv"), schedule) == kept(mha, Ours(rows="last", coverage=0.0), schedule)
    assert kept(mha, make_policy("fastv"), schedule) != kept(mha, Ours(coverage=0.0), schedule)


def test_pyramiddrop_scores_in_the_next_layer(decoder: Decoder) -> None:
    # Without a drop so far, layer 3 of the unpruned model is the next layer of a gate at 3.
    attention = attention_map(decoder, PROMPT.embeds, 3)
    best = attention[:, -1, 5:45].mean(0).topk(12).indices.sort().values
    assert kept(decoder, make_policy("pyramiddrop"), Schedule.of([3], [0.3])) == best.tolist()


def test_centroids_that_are_not_finite_are_refused() -> None:
    xyz = torch.zeros(4, 3)
    xyz[2, 1] = torch.nan
    with pytest.raises(PolicyError, match=r"spatial token 2 is at \[0.0, nan, 0.0\]"):
        SceneTokens(xyz)


# ours


def test_coverage_gives_slots_to_the_farthest_point_order(mha: Decoder) -> None:
    schedule = Schedule.of([2], [0.5])
    best = kept(mha, Ours(coverage=0.0), schedule)
    spread = kept(mha, Ours(coverage=1.0), schedule)
    assert spread == farthest_points(PROMPT.scene.xyz)[:20].sort().values.tolist()
    mixed = set(kept(mha, Ours(coverage=0.5), schedule))
    first = set(farthest_points(PROMPT.scene.xyz)[:10].tolist())
    # The other ten are the best of the others: the best twenty without those, as far as the slots go.
    assert first <= mixed and len(mixed) == 20
    assert mixed - first <= set(best) or set(best) <= mixed
    assert kept(mha, Ours(coverage=0.5), Schedule.of([2, 4], [0.5, 0.2])) != best


def test_coverage_survives_every_gate(mha: Decoder) -> None:
    left = kept(mha, Ours(coverage=0.5), Schedule.of([0, 2, 4], [0.8, 0.5, 0.2]))
    assert set(farthest_points(PROMPT.scene.xyz)[:4].tolist()) <= set(left) and len(left) == 8


def test_what_tokens_show_counts_where_it_is_known(mha: Decoder) -> None:
    xyz, features = PROMPT.scene.xyz, PROMPT.embeds[0, 5:45]
    assert torch.equal(PROMPT.scene.order, farthest_points(xyz))
    scene = SceneTokens(xyz, features)
    asked = [scene.first(n) for n in (3, 5, 2, 10_000)]  # before `order` is known
    assert torch.equal(scene.order, diverse_places(xyz, features)) and scene.order is scene.order
    assert all(torch.equal(some, scene.order[: len(some)]) for some in (*asked, scene.first(7)))
    assert [len(some) for some in asked] == [3, 5, 2, len(xyz)]
    schedule = Schedule.of([0, 2], [0.25, 0.1])
    result = prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, Ours(coverage=1.0), scene=scene)
    assert result.trace.retained.nonzero()[:, 0].tolist() == scene.order[:4].sort().values.tolist()


def test_coverage_is_a_tenth_where_positions_are_known(mha: Decoder) -> None:
    schedule = Schedule.of([2], [0.5])
    assert kept(mha, Ours(), schedule) == kept(mha, Ours(coverage=0.1), schedule)
    blind = prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, Ours())
    assert blind.trace.retained.nonzero()[:, 0].tolist() == kept(mha, Ours(coverage=0.0), schedule)
    with pytest.raises(PolicyError, match="needs the tokens' positions"):
        prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, Ours(coverage=0.1))
    with pytest.raises(PolicyError, match=r"\(3, 3\) for 40 tokens"):
        prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, Ours(), scene=SceneTokens(torch.zeros(3, 3)))


def test_before_the_model_ours_spreads(mha: Decoder) -> None:
    schedule = Schedule.of([0], [0.25])
    assert kept(mha, Ours(), schedule) == farthest_points(PROMPT.scene.xyz)[:10].sort().values.tolist()
    blind = prefill(mha, PROMPT.embeds, PROMPT.layout, schedule, Ours()).trace.retained.nonzero()[:, 0].tolist()
    assert blind == kept(mha, make_policy("divprune"), schedule)


def test_before_the_model_ours_takes_what_is_named(mha: Decoder) -> None:
    """Two tokens are words of the question: the first of the scene's order, and its last."""
    embeds = PROMPT.embeds.clone()
    order = farthest_points(PROMPT.scene.xyz)
    named = [int(order[0]), int(order[39])]
    embeds[0, [5 + k for k in named]] = PROMPT.embeds[0, 46:48]
    scene = SceneTokens(PROMPT.scene.xyz)
    schedule = Schedule.of([0], [0.1])
    expected = {0.0: order[:4], 0.5: torch.cat([order[:3], order[39:]])}
    for share, tokens in expected.items():
        result = prefill(mha, embeds, PROMPT.layout, schedule, Ours(named=share), scene=scene)
        assert result.trace.retained.nonzero()[:, 0].tolist() == tokens.sort().values.tolist()
    blind = prefill(mha, embeds, PROMPT.layout, schedule, Ours(named=0.5)).trace.retained
    assert blind.sum() == 4 and blind[named].all()


def test_debias_divides_by_the_curve(mha: Decoder) -> None:
    schedule = Schedule.of([2], [0.5])
    flat = Ours(coverage=0.0, debias=[1, 1, 1, 1, 1])
    assert kept(mha, flat, schedule) == kept(mha, Ours(coverage=0.0), schedule)
    steep = Ours(coverage=0.0, debias=[1e-6] * 20 + [1.0] * 20)
    assert kept(mha, steep, schedule) == list(range(20))


def test_sinks_go_first(mha: Decoder) -> None:
    # With a threshold below 1 some rows always have a "huge" activation; exactly those must rank last.
    schedule = Schedule.of([2], [0.5])
    plain = kept(mha, Ours(coverage=0.0), schedule)
    assert kept(mha, Ours(coverage=0.0, sink_dims=(3,), sink_threshold=1e9), schedule) == plain
    assert kept(mha, Ours(coverage=0.0, sink_dims=(3,), sink_threshold=0.0), schedule) == list(range(20))
    assert kept(mha, Ours(coverage=0.0, sink_dims=(3,), sink_threshold=1.0), schedule) != plain


# coarse voxels


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_cells_are_at_most_as_many_as_asked(n: int, k: int, seed: int) -> None:
    xyz = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 7 - 3
    cell = coarsest_cells(xyz, k)
    assert sorted(set(cell.tolist())) == list(range(int(cell.max()) + 1))
    assert int(cell.max()) < k


def test_coarse_voxels_merge_by_hand(mha: Decoder) -> None:
    # two coincident pairs and a lone point: three cells in any grid, so a fourth slot splits the first pair
    xyz = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 0, 0], [9, 0, 0], [0, 5, 0]])
    prompt = make_prompt(2, 5, 3)
    seen: list[torch.Tensor] = []
    hook = mha.layers[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        for ratio in (0.6, 0.8):
            schedule = Schedule.of([0], [ratio])
            policy = make_policy("coarse_voxel")
            prefill(mha, prompt.embeds, prompt.layout, schedule, policy, scene=SceneTokens(xyz))
    finally:
        hook.remove()
    old = prompt.embeds[0, 2:7]
    merged = torch.stack([(old[0] + old[2]) / 2, (old[1] + old[3]) / 2, old[4]])
    torch.testing.assert_close(seen[0][0, 2:5], merged)
    torch.testing.assert_close(seen[1][0, 2:6], torch.stack([old[0], merged[1], old[2], old[4]]))
    assert torch.equal(seen[0][0, 5:], prompt.embeds[0, 7:])


def test_of_each_voxel_the_token_that_was_seen_best_stays_by_hand(mha: Decoder) -> None:
    """Four and three in one place, and a lone point. Slots left over go to the second of each, of the four first."""
    xyz = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 0, 0], [9, 0, 0], [0, 5, 0], [0, 0, 0], [9, 0, 0], [0, 0, 0]])
    seen = -torch.tensor([2.0, 1.0, 1.5, 1.0, 4.0, 1.5, 0.5, 3.0])
    prompt, policy = make_prompt(2, 8, 3), make_policy("one_per_voxel")

    def left(n: int, scene: SceneTokens) -> list[int]:
        schedule = Schedule.of([0], [n / 8])
        result = prefill(mha, prompt.embeds, prompt.layout, schedule, policy, scene=scene)
        return result.trace.retained.nonzero()[:, 0].tolist()

    known = SceneTokens(xyz, seen=seen)
    assert left(3, known) == [2, 4, 6], "of the equal ones the first"
    assert left(4, known) == [2, 4, 5, 6] and left(5, known) == [1, 2, 4, 5, 6]
    assert left(6, known) == [0, 1, 2, 4, 5, 6]
    assert left(3, SceneTokens(xyz)) == [0, 1, 4], "nobody knows: the first"
    with pytest.raises(PolicyError, match=r"\(3,\) for 8 of them"):
        SceneTokens(xyz, seen=seen[:3])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_no_voxel_has_two_tokens_before_each_has_one(n: int, k: int, seed: int) -> None:
    generator, k = torch.Generator().manual_seed(seed), min(n, k)
    cell = torch.randint(0, 6, (n,), generator=generator).unique(return_inverse=True)[1]
    seen = torch.randint(0, 4, (n,), generator=generator)
    kept = best_of_each(cell, seen, k)
    assert len(kept.unique()) == k and torch.equal(kept, kept.sort().values)
    counts, sizes = cell[kept].bincount(minlength=int(cell.max()) + 1), cell.bincount()
    most = int(counts.max())
    assert bool((counts >= torch.minimum(sizes, torch.tensor(most - 1))).all())
    for one in range(len(sizes)):
        own = cell == one
        stayed = torch.zeros(n, dtype=torch.bool).index_fill(0, kept, True)
        if counts[one]:
            assert (
                int(seen[own & stayed].min()) >= int(seen[own & ~stayed].max()) if bool((own & ~stayed).any()) else True
            )


def test_sink_dimensions_of_another_model_are_refused(mha: Decoder) -> None:
    with pytest.raises(PolicyError, match=r"sink_dims \[1415, 2533\] for a model of hidden size 64"):
        kept(mha, make_policy("ours", sink_dims=[1415, 2533]), Schedule.of([2], [0.5]))


def test_bad_options() -> None:
    with pytest.raises(PolicyError, match="no policy 'best'; there are none, random"):
        make_policy("best")
    with pytest.raises(PolicyError, match="'fastv'.*seed"):
        make_policy("fastv", seed=1)
    with pytest.raises(PolicyError, match="'train'; there are model"):
        make_policy("adatoken_release", lists="train")
    with pytest.raises(PolicyError, match="named -0.1"):
        Ours(named=-0.1)
    with pytest.raises(PolicyError, match="coverage 1.5"):
        Ours(coverage=1.5)
    with pytest.raises(PolicyError, match="rows 'some'"):
        make_policy("ours", rows="some")
    for curve, named in (([1.0, float("nan")], "nan"), ([0.0], "0.0"), (["flat"], "'flat'")):
        with pytest.raises(PolicyError, match=f"debias holds {named}"):
            make_policy("ours", debias=curve)
    for dims, named in (([-1], "-1"), ([2.5], "2.5")):
        with pytest.raises(PolicyError, match=f"sink_dims holds {named}"):
            make_policy("ours", sink_dims=dims)
    for option in ("debias", "sink_dims"):
        with pytest.raises(PolicyError, match="not iterable"):
            make_policy("ours", **{option: 3})
