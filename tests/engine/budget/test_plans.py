# SPDX-License-Identifier: Apache-2.0
"""The table of plans, with a latency model in whole numbers: one second a thousand rows in a layer, and so on."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace

import numpy as np
import pytest

from adatoken3d_ros.engine.budget.latency import LatencyModel, decode_terms, follow_up_terms, read_terms
from adatoken3d_ros.engine.budget.plans import RUNGS, Plan, Situation, Table, calibrated_loss, options, removed_share
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy

L = 8
STRATEGY = Strategy("half", "ours", Schedule.of([2, 4], [0.5, 0.25]))
# Seconds: 1 a view, 0.001 a row and layer, 0.1 a decode step.
LATENCY = {"encode": [1.0], "tokens": [0.0, 1e-4, 0.0], "prefill": [0.0, 1e-3, 0.0, 0.0, 0.0], "decode": [0.1, 0.0]}
HERE = Situation(
    n_spatial=1000,
    max_spatial=2000,
    views=4,
    pending=3,
    tokens_per_view=100.0,
    n_system=20,
    n_question=20,
    answer_limit=16,
    answer_expected=16,
)


def exact() -> LatencyModel:
    """Without scatter, so that p95 is p50."""
    model = LatencyModel(LATENCY)
    for ratio in (*model.ratios.values(), model.answers):
        ratio.guard = 1.0
    return model


def table(situation: Situation = HERE, strategy: Strategy = STRATEGY, *calibrated: Strategy) -> Table:
    return Table(situation, options(strategy, L, calibrated), exact(), L)


def seconds(plan: Plan, s: Situation = HERE) -> float:
    """The slow, obvious way to predict a plan."""
    model = exact()
    tokens = plan.max_tokens or s.tokens_after(plan.new_views)
    counts = plan.strategy.schedule.counts(tokens, L)
    reading = read_terms(counts, tokens, s.n_text)
    decoding = decode_terms(min(plan.answer_tokens - 1, s.answer_expected), reading[1], L)
    built = 0.0 if plan.new_views == 0 and tokens in s.built else 1e-4 * tokens
    return float(plan.new_views * 1.0 + built + model.p50("prefill", reading) + model.p50("decode", decoding))


def test_removed_share_by_hand() -> None:
    # 2 layers with all, 2 with a half, 4 with a quarter: 2 + 1 + 1 of 8.
    assert removed_share(STRATEGY.schedule, L) == pytest.approx(0.5)
    assert removed_share(Schedule(withdraw_layer=2), L) == pytest.approx(0.75)


def test_options_run_from_unpruned_over_the_configured_one_to_hardly_any_scene() -> None:
    found = options(STRATEGY, L)
    assert found[0].strategy.schedule == Schedule() and found[0].loss == 0.0
    assert [one.loss for one in found] == sorted(one.loss for one in found)
    configured = next(one for one in found if one.strategy == STRATEGY)
    assert configured.rung == 0 and all(one.rung == (0 if one.removed <= 0.5 else 3) for one in found)
    assert found[-1].strategy.schedule.withdraw_layer == 2 and found[-1].rung == 3


def test_the_calibrated_divergence_is_the_unit_of_loss() -> None:
    calibrated = replace(STRATEGY, info={"figures": {"kl": 0.02}})
    assert calibrated_loss(calibrated) == 0.02 and calibrated_loss(STRATEGY) is None
    found = {one.strategy.name: one for one in options(calibrated, L)}
    assert found["half"].loss == pytest.approx(0.02)
    assert found["unpruned"].loss == 0.0
    assert found["half until 2"].loss == pytest.approx(0.04 * found["half until 2"].removed)
    other = Strategy("other", "ours", Schedule.of([1], [0.5]), info={"figures": {"kl": 0.0005}})
    assert next(one for one in options(calibrated, L, [other]) if one.strategy == other).loss == 0.0005


def test_within_the_reach_of_calibrated_strategies_nothing_is_guessed() -> None:
    """Scaled schedules are left only where they remove more than all that were measured, and cost the most they may."""
    configured = replace(STRATEGY, info={"figures": {"kl": 0.02}})
    strong = Strategy("strong", "ours", Schedule.of([1], [0.2]), info={"figures": {"kl": 0.35}})  # removes 0.7
    found = {one.strategy.name: one for one in options(configured, L, [strong])}
    guessed = {name: one for name, one in found.items() if name not in ("unpruned", "half", "strong")}
    assert guessed and all(one.removed > 0.7 and one.rung == 3 for one in guessed.values())
    assert guessed["half until 2"].loss == pytest.approx(0.5 * guessed["half until 2"].removed)


def test_predictions_equal_the_slow_way() -> None:
    situation = replace(HERE, built=frozenset({1000}))
    for plan in table(situation).plans():
        assert plan.p95_ms == pytest.approx(1e3 * seconds(plan, situation))
        assert plan.predicted is not None and plan.predicted.total == pytest.approx(plan.p95_ms)


def test_no_plan_on_the_front_is_beaten_within_its_rung() -> None:
    plans = table().plans()
    for a in plans:
        rivals = [b for b in plans if b.rung <= a.rung and b.p95_ms < a.p95_ms]
        assert all(b.loss > a.loss for b in rivals)


def test_much_time_gives_everything_and_no_time_nothing() -> None:
    best = table().choose(1e9)
    assert best is not None
    assert (best.rung, best.loss, best.new_views, best.max_tokens, best.answer_tokens) == (0, 0.0, 3, None, 16)
    assert best.strategy.schedule == Schedule()
    assert table().choose(0.0) is None
    assert table().choose(table().cheapest_seconds) == table().cheapest


def test_the_ladder_is_gone_down_in_the_stated_order() -> None:
    """Every rung is reached by some budget, rungs never fall as budgets shrink, and each gives up what it says."""
    plans = table()
    budgets = np.linspace(20.0, 0.0, 4000)
    chosen = [plan for budget in budgets if (plan := plans.choose(float(budget))) is not None]
    rungs = [plan.rung for plan in chosen]
    assert rungs == sorted(rungs) and set(rungs) == set(range(len(RUNGS)))
    for plan in chosen:
        full_views, full_tokens = plan.new_views == 3, plan.max_tokens is None
        configured = removed_share(plan.strategy.schedule, L) <= 0.5 + 1e-9
        whole = plan.answer_tokens == 16
        allowed = [full_views, full_tokens, configured, whole]
        assert all(allowed[plan.rung :]), plan.knobs
        assert plan.rung == 0 or not allowed[plan.rung - 1], plan.knobs
    for rung in range(len(RUNGS)):
        losses = [plan.loss for plan in chosen if plan.rung == rung]
        assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("rung", "budget", "views"),
    [
        # Unpruned: 3 views 3.0, 1300 tokens 0.13, 8 layers of 1340 rows 10.72, 15 steps 1.5.
        (0, 15.36, 3),
        # Configured: 3.13 + 8 * 0.040 + 4 * 1.300 + 1.5 = 10.15 s.
        (0, 10.16, 3),
        # A view less, 1200 tokens: 2.12 + 0.32 + 4.8 + 1.5 = 8.74 s.
        (1, 10.14, 2),
        (1, 8.75, 2),
        # No new view, 1000 tokens: 0.1 + 0.32 + 4.0 + 1.5 = 5.92 s.
        (1, 5.93, 0),
        # Fewer scene tokens leave time for new views: of all that this rung allows the least loss is taken.
        (2, 5.91, 3),
        # 125 tokens: 0.0125 + 0.32 + (2 * 125 + 2 * 62 + 4 * 31) / 1000 + 1.5 = 2.3305 s.
        (2, 2.34, 0),
        (3, 2.32, 0),
        # No scene in 6 of 8 layers, an eighth of an eighth in the others: 0.0125 + 0.32 + 0.25 + 1.5 = 2.0825 s.
        (3, 2.09, 0),
        (4, 2.07, 0),
    ],
)
def test_each_rung_by_hand(rung: int, budget: float, views: int) -> None:
    plan = table().choose(budget)
    assert plan is not None and plan.p95_ms <= 1e3 * budget
    assert (plan.rung, plan.new_views) == (rung, views)


def test_choosing_takes_a_binary_search_a_rung() -> None:
    plans = table()
    calls: list[int] = []

    def counting(times: list[float], value: float) -> int:
        calls.append(len(times))
        return bisect_right(times, value)

    for budget in np.linspace(0, 20, 50):
        calls.clear()
        plans.choose(float(budget), counting)
        assert len(calls) <= len(RUNGS)
    assert len(plans) > 20


def test_without_a_scene_at_least_one_view_is_encoded() -> None:
    nothing = replace(HERE, n_spatial=0, views=0)
    assert {plan.new_views for plan in table(nothing).plans()} <= {1, 2, 3}
    assert table(nothing).cheapest.new_views == 1


def test_scene_tokens_that_are_built_are_not_chosen_again() -> None:
    built = replace(HERE, pending=0, built=frozenset({1000}), prunable=False)
    assert {plan.max_tokens for plan in table(built).plans()} == {None}


def test_a_kept_prefix_costs_the_question_alone_and_loses_nothing() -> None:
    here = replace(HERE, pending=0, reuse=True, prefix_ready=True, built=frozenset({1000}))
    plan = table(here).choose(3.0)
    assert plan is not None and plan.reuse and plan.rung == 0 and plan.loss == 0.0
    expected = float(exact().p50("follow_up", follow_up_terms(20, 1020, L))) + 1.5
    assert plan.p95_ms == pytest.approx(1e3 * expected)
    off = table(replace(here, reuse=False)).choose(3.0)
    assert off is not None and not off.reuse and off.rung > 0
    # One that is not there is read first.
    cold = table(replace(here, prefix_ready=False)).configured(STRATEGY, reuse=True)
    assert cold.p95_ms == pytest.approx(1e3 * (8 * 1.020 + expected))
    # A new view makes it another scene.
    moved = [plan for plan in table(replace(here, pending=1)).plans() if plan.reuse and plan.p95_ms < 4e3]
    assert moved and all(plan.new_views == 0 and plan.rung >= 1 for plan in moved)


def test_short_answers_are_known_to_be_short() -> None:
    plan = table(replace(HERE, answer_expected=2)).choose(1e9)
    assert plan is not None and plan.predicted is not None
    assert plan.answer_tokens == 16 and plan.predicted.decode == pytest.approx(200.0)


def test_a_strategy_without_gates_still_has_a_ladder() -> None:
    unpruned = Strategy("none", "none", Schedule())
    rungs = {plan.rung for plan in table(HERE, unpruned).plans()}
    assert rungs == set(range(len(RUNGS)))


def test_what_varies_on_its_own_adds_up_in_squares() -> None:
    """Unpruned: 3 views 3.0, 1300 tokens 0.13, 8 layers of 1340 rows 10.72, two steps 0.2, six more at most 0.6."""
    model = exact()
    model.ratios["prefill"].guard, model.ratios["decode"].guard = 1.3, 1.4
    situation = replace(HERE, answer_expected=8, answer_typical=2)
    plan = Table(situation, options(STRATEGY, L), model, L).unpruned
    likely = 3.0 + 0.13 + 10.72 + 0.2
    assert plan.predicted is not None and plan.predicted.total == pytest.approx(1e3 * likely)
    assert plan.p95_ms == pytest.approx(1e3 * (likely + math.hypot(0.3 * 10.72, 0.4 * 0.2, 0.6)))
    # Unless whole answers have been seen to vary by more.
    model.answers.guard = 1.5
    plan = Table(situation, options(STRATEGY, L), model, L).unpruned
    assert plan.p95_ms == pytest.approx(1e3 * (likely + math.hypot(0.5 * likely, 0.6)))


def test_whole_buckets_of_rows_are_known_to_the_table() -> None:
    """Half and a quarter of 1300 tokens beside 40 rows: 690 and 365, in buckets of 64 704 and 384."""
    latency = exact()
    latency.bucket = 64
    plan = Table(HERE, options(STRATEGY, L), latency, L).configured(STRATEGY, reuse=False)
    assert plan.bucket == 64 and table().configured(STRATEGY, reuse=False).bucket == 1
    assert plan.predicted is not None
    assert plan.predicted.prefill == pytest.approx(2 * 1340 + 2 * 704 + 4 * 384)
