# SPDX-License-Identifier: Apache-2.0
"""Questions that run late, that were late before they began, and those that cannot be in time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine import answering
from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget import warmup
from adatoken3d_ros.engine.budget.controller import Infeasible
from adatoken3d_ros.engine.budget.deadline import DeadlineGuard
from adatoken3d_ros.engine.budget.plans import Plan
from adatoken3d_ros.engine.stages import Stopwatch
from adatoken3d_ros.pruning.schedule import at_least_one, in_buckets
from tests.engine.budget.world import Frames, layers
from tests.engine.scenes import ask


def test_an_answer_that_runs_out_of_time_ends_with_a_whole_word(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    budget = world.ask(60_000).times.total + 1.0
    world.session.runtime.decode = lambda ids: " ".join(f"word{i}" for i in ids)[:-1]  # the last one is unfinished

    texts: list[str] = []

    def slow(text: str, n: int) -> None:
        texts.append(text)
        world.spend(0.015)

    answer = world.ask(budget, on_text=slow)
    assert answer.status is Status.TRUNCATED and f"{budget}" in answer.status_message
    assert answer.text.startswith(texts[-1]) and texts == sorted(texts, key=len)
    assert answer.budget_met and answer.times.total <= budget
    assert re.fullmatch(r"(word3\d\d )*word3\d\d", answer.text), answer.text


def test_an_answer_that_the_plan_makes_shorter_ends_with_a_whole_word(make_world: Any, frames: Frames) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    least = float(re.findall(r"feasible one is (\d+) ms", world.ask(1.0).status_message)[0])
    world.session.runtime.decode = lambda ids: " ".join(f"word{i}" for i in ids)[:-1]
    texts: list[str] = []
    answer = world.ask(least + 12.0, on_text=lambda text, n: texts.append(text))
    assert answer.status is Status.TRUNCATED and "leaves an answer of 4 tokens" in answer.status_message
    assert answer.text == texts[-1] == "word300 word301 word302"
    # Who asks for so many tokens gets them as they are.
    asked = ask(world.session, Question("What is this?", max_new_tokens=4))
    assert asked.text == "word300 word301 word302 word30"


def test_a_prefill_that_falls_behind_drops_tokens_instead_of_being_late(
    make_world: Any, frames: Frames, monkeypatch: Any
) -> None:
    world = make_world()
    monkeypatch.setattr(answering, "prefill", prefill)
    world.session.observe(frames[0])
    world.session.encode_pending()
    stalls: dict[int, float] = {}  # layer and seconds
    rows: list[int] = []

    def read(index: int, hidden: torch.Tensor) -> None:
        rows.append(hidden.shape[1])
        world.spend(1e-4 * rows[-1] + stalls.get(index, 0.0))

    language = world.session.runtime.model.language.model
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=i: read(index, args[0]))
        for i, layer in enumerate(language.layers)
    ]
    try:
        free = world.ask(60_000)
        n_layers, n_text = len(language.layers), rows[0] - free.spatial_tokens
        budget = 1.3 * free.times.total
        assert free.retained_tokens == free.spatial_tokens and layers(free)[-1] == free.spatial_tokens
        on_time = world.ask(budget)
        assert on_time.budget_met and "hurried" not in on_time.plan and layers(on_time) == layers(free)
        # Another program takes the core before layer 1. Enough is left for the text and four words only.
        least = 1.84e-4 * n_text * (n_layers - 2) + 0.037
        stalls[1] = budget / 1e3 - 2e-4 * rows[0] - least
        late = world.ask(budget)
    finally:
        for hook in hooks:
            hook.remove()
    full = late.spatial_tokens
    assert late.budget_met and late.times.total <= budget, late.plan
    assert "unpruned" in late.plan and f"hurried before layer 2 (0 of {full} tokens)" in late.plan
    assert layers(late) == (full, full) + (0,) * (n_layers - 2)
    assert late.decision is not None and late.decision.rung == 3 and late.decision.loss > 0
    assert late.prefill_flops < 0.6 * free.prefill_flops and late.text


def test_a_stage_on_a_gpu_takes_until_its_work_is_done(make_world: Any, frames: Frames, monkeypatch: Any) -> None:
    """Launching costs nothing here, and what was launched is only done once somebody waits for it."""
    world = make_world()
    launched: list[float] = []
    waits: list[float] = []

    def synchronize(device: torch.device) -> None:
        waits.append(sum(launched))
        world.now += waits[-1]
        launched.clear()

    world.session.observe(frames[0])
    world.session.encode_pending()
    expected = world.ask(60_000)
    monkeypatch.setattr(world, "spend", launched.append)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    world.session.runtime.clock = warmup.synchronised(world.session.runtime.clock, torch.device("cuda"))
    answer = world.ask(60_000)
    assert answer.times.prefill == pytest.approx(expected.times.prefill) and answer.times.prefill > 1.0
    assert answer.times.decode == pytest.approx(150.0) and answer.times.total == pytest.approx(expected.times.total)
    # A prefill that may have to hurry waits before each layer.
    assert len(waits) > len(layers(answer)) + 16
    world.session.observe(frames[1])
    world.session.prepare()
    assert world.session.controller.latency.drift["encode"] == pytest.approx(1.0)


@pytest.mark.parametrize(("expected", "steps", "hurried"), [(0, 0, 0), (5, 5, 4), (16, 15, 15)])
def test_a_prefill_hurries_for_the_answer_that_was_planned(
    make_world: Any, frames: Frames, monkeypatch: Any, expected: int, steps: int, hurried: int
) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    for _ in range(4):
        world.session.controller.lengths.add("What is this?", expected)
    hurries: list[Any] = []
    monkeypatch.setattr("adatoken3d_ros.engine.budget.deadline.Hurry", lambda *_, **options: hurries.append(options))
    predicted = world.ask(60_000).predicted
    assert predicted is not None and predicted.decode == pytest.approx(10.0 * steps)
    assert [options["steps"] for options in hurries] == [hurried]


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_can(make_world: Any, frames: Frames) -> None:
    world = make_world(infeasible=Infeasible.REFUSE)
    world.session.observe(frames[0])
    world.session.encode_pending()
    before = world.now
    answer = world.ask(5.0)
    assert answer.status is Status.BUDGET_INFEASIBLE and answer.text == "" and answer.budget_met
    assert world.now == before
    least = float(re.findall(r"smallest feasible one is (\d+) ms", answer.status_message)[0])
    assert world.ask(least - 2.0).status is Status.BUDGET_INFEASIBLE
    assert world.ask(least + 2.0).budget_met


def test_best_effort_answers_fast_and_says_so(make_world: Any, frames: Frames) -> None:
    world = make_world(infeasible=Infeasible.BEST_EFFORT)
    world.session.observe(frames[0])
    world.session.encode_pending()
    answer = world.ask(5.0)
    assert answer.status is Status.TRUNCATED and "smallest feasible" in answer.status_message and answer.text
    assert not answer.budget_met and "the fastest plan" in answer.plan


@pytest.mark.parametrize("infeasible", list(Infeasible))
def test_a_question_that_waited_too_long_is_never_silently_late(
    make_world: Any, frames: Frames, infeasible: Infeasible
) -> None:
    world = make_world(infeasible=infeasible)
    world.session.observe(frames[0])
    world.session.encode_pending()
    assert world.ask(1000.0).budget_met
    late = world.ask(1000.0, waited=1.5)
    assert late.times.queue == pytest.approx(1500.0) and not late.budget_met
    assert "1000 ms cannot be kept" in late.status_message
    assert (late.status is Status.BUDGET_INFEASIBLE) == (infeasible is Infeasible.REFUSE)
    # One that still can be answered gets what is left.
    waited = world.ask(1000.0, waited=0.8)
    assert waited.budget_met and waited.times.total <= 1000.0 and waited.status_message


def test_an_answer_with_next_to_nothing_of_the_scene_says_so(make_world: Any, frames: Frames) -> None:
    """In between, where plans take less than configured, the plan says it and the status has nothing to add."""
    world = make_world()
    for frame in frames[:2]:
        world.session.observe(frame)
    world.session.encode_pending()
    answers = [world.ask(budget) for budget in (None, 60_000.0)]
    least = float(re.findall(r"feasible one is (\d+) ms", world.ask(1.0).status_message)[0])
    usual = sum(answers[0].report.spatial_per_layer)
    assert usual == world.session.usual_reading
    for budget in range(round(least) + 2, round(answers[0].times.total) + 20, 2):
        answers.append(world.ask(float(budget)))
    shares = [sum(answer.report.spatial_per_layer) / usual for answer in answers]
    assert min(shares) <= 0.125 < max(share for share in shares if share < 1)
    for answer, share in zip(answers, shares, strict=True):
        assert answer.budget_met
        told = f"there was time for {share:.1%} of what the strategy {world.session.strategy.name} reads of the scene"
        short = [text for text in answer.status_message.split("; ") if "there was time" in text]
        assert short == ([told] if share <= 0.125 else [])


def test_a_missed_budget_is_said_beside_the_answer(make_world: Any, frames: Frames, monkeypatch: Any) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    finish = answering.Stopwatch.finish
    monkeypatch.setattr(answering.Stopwatch, "finish", lambda watch: world.spend(0.5) or finish(watch))
    budget = world.ask(60_000).times.total - 200.0  # the end alone takes 500
    answer = world.ask(budget)
    assert not answer.budget_met
    took = f"the latency budget of {budget:g} ms was missed: the answer took {answer.times.total:.0f} ms"
    assert took in answer.status_message
    assert "missed" not in world.ask(60_000).status_message


@pytest.mark.parametrize("budget_ms", [None, 60_000.0])
def test_gates_keep_whole_buckets_and_the_prediction_knows_it(
    make_world: Any, frames: Frames, budget_ms: float | None
) -> None:
    world = make_world()
    world.session.observe(frames[0])
    world.session.encode_pending()
    plain = layers(world.ask())
    world.session.controller.latency.bucket = 16
    world.session.controller.forget_tables()
    answer = world.ask(budget_ms)
    assert answer.predicted is not None and answer.predicted.prefill == pytest.approx(answer.times.prefill)
    if budget_ms is None:
        found = layers(answer)
        assert found != plain
        assert any(in_buckets(plain, plain[0], others, 16).tolist() == list(found) for others in range(16))
        return
    guard = DeadlineGuard(world.session.controller, budget_ms, Stopwatch(lambda: world.now, world.now, lambda _: None))
    plan = Plan(world.session.strategy, 0, None, False, 4, bucket=16)
    hurry = guard.hurry(plan, 100, 61, at_least_one)
    assert hurry is not None and any(n < 100 for n in hurry._planned)
    assert all(n == 100 or (n + 61) % 16 == 0 for n in hurry._planned)
