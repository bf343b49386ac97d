# SPDX-License-Identifier: Apache-2.0
"""Questions that keep their budgets, on a clock that only moves when the model works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine import answering, runtime
from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Infeasible, Reuse
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.budget.plans import TOKEN_SHARES
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.pruning.strategy import default_strategy
from tests.engine.budget.world import COEFFICIENTS, Frames, World, layers
from tests.engine.scenes import ask


def test_without_a_budget_everything_is_as_configured(make_world: Any, frames: Frames) -> None:
    world = make_world()
    for frame in frames:
        world.session.observe(frame)
    answer = world.ask()
    assert answer.strategy == "ours-default" and answer.budget_met and "no latency budget" in answer.plan
    assert answer.times.encode == pytest.approx(300.0) and answer.times.decode == pytest.approx(150.0)
    predicted = answer.predicted
    assert predicted is not None
    assert (predicted.encode, predicted.decode) == (pytest.approx(300.0), pytest.approx(150.0))
    assert predicted.prefill == pytest.approx(answer.times.prefill)
    assert predicted.total == pytest.approx(answer.times.total)


def test_much_time_is_spent_on_accuracy(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    answer = world.ask(60_000)
    assert answer.strategy == "unpruned" and len(set(layers(answer))) == 1
    assert answer.budget_met and answer.status is Status.TRUNCATED and "max_new_tokens = 16" in answer.status_message


def test_every_budget_above_the_least_is_kept_and_spent(make_world: Any, frames: Frames) -> None:
    world = make_world()
    for frame in frames:
        world.session.observe(frame)
    world.session.encode_pending()
    least = float(re.findall(r"feasible one is (\d+) ms", world.ask(1.0).status_message)[0])
    full = world.ask(60_000).times.total
    seen = []
    for budget in np.linspace(least + 1.0, full, 30):
        answer = world.ask(float(budget))
        assert answer.budget_met and answer.times.total <= budget, answer.plan
        assert answer.times.total >= 0.7 * budget, answer.plan
        seen.append(answer.plan)
    assert len(set(seen)) > 10


def test_new_views_are_given_up_first_and_stay_for_later(make_world: Any, wall_frame: Any) -> None:
    world = make_world()
    world.session.observe(wall_frame(0))
    world.session.encode_pending()
    configured = world.ask().times.total
    for i in (1, 2, 3):
        world.session.observe(wall_frame(i))
    answer = world.ask(configured + 290.0)
    assert answer.budget_met and "fewer new views" in answer.plan
    # The one that was there and the newest of the three: the time for a second new one buys more by pruning less.
    assert sorted(world.session.poses) == [wall_frame(0).stamp_ns, wall_frame(3).stamp_ns]
    assert answer.stamp_ns == wall_frame(3).stamp_ns
    assert world.session.work_ahead
    world.session.prepare()
    assert len(world.session.poses) == 4 and not world.session.work_ahead


def test_what_encoding_takes_too_long_the_language_model_gives_back(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    world.session.observe(frames[1])
    free = world.ask(60_000)
    world.session.clear()
    world.session.observe(frames[0])
    world.session.encode_pending()
    world.session.observe(frames[1])
    original = world.session.runtime.model.encode_images

    def late(*args: Any, **options: Any) -> Any:
        world.spend(0.05)
        return original(*args, **options)

    world.session.runtime.model.encode_images = late
    answer = world.ask(free.times.total + 1.0 + 100.0)
    assert answer.times.encode == pytest.approx(150.0)
    assert answer.budget_met and answer.predicted is not None and answer.predicted.encode == pytest.approx(100.0)


def encoding(world: World, seconds: float) -> None:
    """From now on a view takes so much more or less than it was measured to take."""
    original = world.session.runtime.model.encode_images

    def timed(*args: Any, **options: Any) -> Any:
        world.now += seconds
        return original(*args, **options)

    world.session.runtime.model.encode_images = timed


@pytest.mark.parametrize(("more", "late", "pruned"), [(20.0, 0.05, True), (-30.0, -0.08, False)])
def test_after_encoding_the_language_model_gets_what_is_left(
    make_world: Any, frames: Frames, more: float, late: float, pruned: bool
) -> None:
    """A view that took long is paid for by pruning or words, the time that one did not need buys them back."""

    def answer(late: float, budget: float) -> Answer:
        world: World = make_world()
        world.session.observe(frames[0])
        encoding(world, late)
        return world.ask(budget)  # there is no scene without the view

    budget = answer(0.0, 60_000).times.total + more
    as_planned, other = answer(0.0, budget), answer(late, budget)
    assert as_planned.budget_met and other.budget_met
    assert other.times.encode == pytest.approx(100.0 + 1e3 * late)
    work = [sum(layers(one)) + one.times.decode for one in (as_planned, other)]
    assert work[1] < work[0] if pruned else work[1] > work[0], (as_planned.plan, other.plan)


def test_rungs_that_take_tokens_and_words_do_so(make_world: Any, frames: Frames) -> None:
    world = make_world()
    for frame in frames:
        world.session.observe(frame)
    world.session.encode_pending()
    full = world.ask(60_000)
    least = float(re.findall(r"feasible one is (\d+) ms", world.ask(1.0).status_message)[0])
    # Just too little for anything that is configured: fewer scene tokens come before stronger pruning.
    plans = world.session.plans(Question("What is this?")).plans()
    answer = world.ask(min(plan.p95_ms for plan in plans if plan.rung == 0) - 0.1)
    assert "fewer scene tokens" in answer.plan and answer.budget_met
    assert answer.spatial_tokens in [int(share * full.spatial_tokens) for share in TOKEN_SHARES[1:]]
    shorter = 0
    for budget in np.linspace(least + 1.0, full.times.total, 40):
        answer = world.ask(float(budget))
        plan = answer.decision
        assert plan is not None and answer.budget_met
        if plan.answer_tokens < 16:
            shorter += 1
            assert answer.times.decode == pytest.approx(10.0 * (plan.answer_tokens - 1))
            assert answer.status is Status.TRUNCATED
            assert f"leaves an answer of {plan.answer_tokens} tokens" in answer.status_message
    assert shorter > 2


def test_another_policy_is_planned_for_with_other_gates(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    world.session.controller.latency = LatencyModel(COEFFICIENTS, {"policy": "ours"})
    before = world.ask().predicted
    world.session.set_strategy(default_strategy("random", 8))  # with the same schedule
    after = world.ask().predicted
    assert before is not None and after is not None and after.prefill > before.prefill


def test_what_was_measured_is_planned_with(make_world: Any, frames: Frames, monkeypatch: Any) -> None:
    engine = make_world().session.runtime
    question = Question("What is this?")
    seconds = []
    for step in (0.01, 0.02):
        model = LatencyModel({**COEFFICIENTS, "decode": [step, 0.0]})
        monkeypatch.setattr(runtime, "latency_model", lambda *_, model=model: (model, False))
        assert not engine.warm_up(default_strategy("ours", engine.n_layers))
        scene = engine.open()
        scene.observe(frames[0])
        scene.encode_pending()
        seconds.append(scene.plans(question).cheapest.predicted.decode)
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_a_slower_machine_is_noticed_and_planned_for(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    budget = 1.2 * world.ask(60_000).times.total
    world.pace = 3.0
    for _ in range(3):
        world.ask(budget)
    after = [world.ask(budget) for _ in range(10)]
    assert all(answer.budget_met for answer in after)
    assert world.session.controller.latency.drift["prefill"] == pytest.approx(3.0, rel=0.1)
    assert after[-1].strategy != "unpruned" or after[-1].report is not None
    world.pace = 1.0
    for _ in range(3):
        world.ask(budget)
    assert world.session.controller.latency.drift["prefill"] == pytest.approx(1.0, rel=0.1)


def test_another_pace_is_counted_once(make_world: Any, frames: Frames) -> None:
    """The stages have it: the ratio of whole answers must not have it again."""
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    for _ in range(6):
        full = world.ask(60_000).times.total
    world.pace = 3.0
    for _ in range(2):
        world.ask(60_000)
    latency = world.session.controller.latency
    assert latency.drift["prefill"] == pytest.approx(3.0) and latency.drift["decode"] == pytest.approx(3.0)
    assert latency.answers.value == pytest.approx(1.0, rel=0.05)
    answer = world.ask(4.5 * full)
    assert answer.strategy == "unpruned" and answer.budget_met and answer.times.decode == pytest.approx(450.0)


def test_what_is_in_no_stage_is_planned_for(make_world: Any, frames: Frames, monkeypatch: Any) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    original = answering.token_report

    def slow(*args: Any) -> Any:
        world.spend(0.05)
        return original(*args)

    full = world.ask(60_000).times.total
    monkeypatch.setattr(answering, "token_report", slow)
    for _ in range(4):
        world.ask(60_000)
    answer = world.ask(full + 10.0)
    # It was planned for, the answer did not have to be cut.
    assert answer.budget_met and "ended the answer" not in answer.status_message, answer.plan


def test_who_refuses_finds_out_that_the_machine_is_fast_again(make_world: Any, frames: Frames) -> None:
    world = make_world(infeasible=Infeasible.REFUSE)
    world.session.observe(frames[0])
    world.session.encode_pending()
    budget = 0.6 * world.ask(60_000).times.total
    assert world.ask(budget).budget_met
    world.pace = 4.0
    for _ in range(3):
        world.ask(60_000)
    assert world.ask(budget).status is Status.BUDGET_INFEASIBLE
    world.pace = 1.0
    statuses = [world.ask(budget).status for _ in range(20)]
    assert Status.BUDGET_INFEASIBLE in statuses and set(statuses[-8:]) == {Status.TRUNCATED}
    # Where nothing is slower than it was measured to be, all are refused.
    fresh = make_world(infeasible=Infeasible.REFUSE)
    fresh.session.observe(frames[0])
    fresh.session.encode_pending()
    assert {fresh.ask(5.0).status for _ in range(20)} == {Status.BUDGET_INFEASIBLE}


def test_views_that_are_encoded_between_questions_teach_too(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.pace = 3.0
    for frame in frames:
        world.session.observe(frame)
        world.session.prepare()
    assert world.session.controller.latency.drift == {"encode": pytest.approx(3.0)}


def test_answers_that_are_always_cut_are_not_thought_to_be_short(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    for _ in range(5):
        world.session.controller.lengths.add("What is this?", 2)
    budget = 0.75 * world.ask(60_000).times.total
    for _ in range(5):
        world.session.controller.lengths.add("What is this?", 2)
    answers = [world.ask(budget) for _ in range(16)]
    assert "ended the answer" in answers[0].status_message and "ended the answer" not in answers[-1].status_message
    assert all(answer.budget_met for answer in answers)
    assert world.session.controller.lengths.of("What is this?", 16, 95) == 16


# Kept prefixes --------------------------------------------------------------------------------------------------


def test_a_prefix_is_read_once_and_follow_ups_equal_a_fresh_run(make_world: Any, frames: Frames) -> None:
    world = make_world(reuse=Reuse.PREFIX)
    world.session.observe(frames[0])
    world.session.prepare()
    assert world.reads == ["prefix"] and not world.session.work_ahead
    first, second = world.ask(), world.ask()
    assert world.reads == ["prefix"]
    fresh = make_world(reuse=Reuse.PREFIX)
    fresh.session.observe(frames[0])
    third = fresh.ask()
    assert fresh.reads == ["prefix"]
    for answer in (first, second):
        assert (answer.text, answer.strategy) == (third.text, "scene-prefix")
        assert answer.report is not None and third.report is not None
        assert np.array_equal(answer.report.contribution, third.report.contribution)
    assert first.times.prefill < third.times.prefill


def test_a_kept_prefix_answers_as_the_unpruned_model_does(make_session: Any, frames: Frames) -> None:
    texts = []
    for reuse in Reuse:
        session = make_session(SessionConfig(max_new_tokens=12, budget=BudgetConfig(reuse=reuse)))
        session.controller.latency = LatencyModel(COEFFICIENTS)
        session.observe(frames[0])
        session.prepare()
        answer = ask(session, Question("What is this?", latency_budget_ms=1e6))
        assert answer.strategy == ("unpruned" if reuse is Reuse.OFF else "scene-prefix")
        texts.append(answer.text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_a_prefix_goes_with_all_of_its_tokens(make_session: Any, frames: Frames, slower: float) -> None:
    """Also where long answers over many tokens cost so much that fewer tokens without the prefix are faster."""
    budget = BudgetConfig(reuse=Reuse.PREFIX, reserve_ms=0.0)
    session = make_session(SessionConfig(max_new_tokens=16, budget=budget), clock=lambda: 0.0)
    session.observe(frames[0])
    session.prepare()
    session.controller.latency = LatencyModel({**COEFFICIENTS, "decode": [0.01, 1e-5]})
    session.controller.latency.ratios["follow_up"].value = slower
    question = Question("What is this?")
    table = session.plans(question)
    chosen = [table.choose(budget_ms / 1000) for budget_ms in range(20, 600, 6)]
    ways = {(plan.reuse, plan.max_tokens is None) for plan in chosen if plan is not None}
    assert (True, True) in ways and (False, False) in ways and (True, False) not in ways
    answer = ask(session, replace(question, latency_budget_ms=580.0))
    assert answer.strategy == "scene-prefix" and answer.spatial_tokens == len(session.tokens())


def test_a_new_view_makes_the_prefix_stale(make_world: Any, frames: Frames) -> None:
    world = make_world(reuse=Reuse.PREFIX)
    world.session.observe(frames[0])
    world.session.prepare()
    world.session.observe(frames[1])
    assert world.session.work_ahead
    answer = world.ask()
    assert world.reads == ["prefix", "prefix"] and answer.strategy == "scene-prefix"
    world.session.clear()
    assert world.session.prepared.prefix is None


# Work ahead -----------------------------------------------------------------------------------------------------


def test_work_ahead_stops_within_a_layer_and_keeps_what_is_finished(make_session: Any, frames: Frames) -> None:
    session = make_session(SessionConfig(budget=BudgetConfig(reuse=Reuse.PREFIX)))
    session.observe(frames[0])
    looks: list[int] = []

    def stop_at(n: int) -> Callable[[], bool]:
        looks.clear()
        return lambda: looks.append(1) is None and len(looks) > n

    session.prepare(stop_at(2))
    assert len(looks) == 3 and not session.poses and session.work_ahead
    # Nothing of the model is left changed: the view is encoded as if it had never been interrupted.
    session.prepare(None)
    assert session.prepared.prefix is not None
    fresh = make_session()
    fresh.observe(frames[0])
    fresh.encode_pending()
    a, b = session.tokens(), fresh.tokens()
    assert a is not None and b is not None and torch.equal(a.features, b.features)

    session.observe(frames[1])
    session.encode_pending()
    session.prepare(stop_at(2))
    assert len(looks) == 3 and session.prepared.prefix is None and session.work_ahead
    assert len(session.prepared.built) == 1


def test_a_budget_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="-1"):
        BudgetConfig(reserve_ms=-1)
