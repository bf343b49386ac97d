# SPDX-License-Identifier: Apache-2.0
"""Keeps one question within its latency budget: a plan, and another look at it after each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median_high

from adatoken3d_ros.engine.budget.controller import Controller, Infeasible, Reuse
from adatoken3d_ros.engine.budget.hurry import Hurry
from adatoken3d_ros.engine.budget.latency import FloatArray
from adatoken3d_ros.engine.budget.plans import RUNGS, TOKEN_SHARES, Plan, Situation, loss_per_share
from adatoken3d_ros.engine.stages import STAGES, StageTimes, Stopwatch
from adatoken3d_ros.pruning.schedule import KeepCount, in_buckets


class BudgetInfeasible(Exception):
    """No plan keeps the budget and the policy is to refuse; the message has the smallest feasible budget."""


class DeadlineGuard:
    """One question on its way: `plan` before each stage, `record` after it, `finish` at the end.

    Args:
        controller: of the question's scene.
        budget_ms: its latency budget; None where it has none.
        watch: runs since the question's arrival.

    Attributes:
        deadline: on the watch's clock; infinite without a budget.
        why: how the plan was chosen, in words.
        warning: that the budget cannot be kept; empty if it can.
        hopeless: from the start: then a short answer is worth more than one that is cut.
        decision: the plan, with what was given up since.
        predicted: by stage, p50 in milliseconds when it was last planned; None without a latency model.
        small: set where memory ran out: from then on `plan` gives the smallest plan there is, whatever the budget.
    """

    def __init__(self, controller: Controller, budget_ms: float | None, watch: Stopwatch) -> None:
        self._controller = controller
        self._watch = watch
        self._budget_ms = budget_ms
        self.deadline = math.inf if budget_ms is None else watch.arrived + budget_ms / 1e3
        self.why = ""
        self.warning = ""
        self.hopeless = False
        self.predicted: StageTimes | None = None
        self.decision: Plan | None = None
        self._given_up = 0  # rung
        self._lost = [0.0, 0.0]  # by views and by tokens
        self._tokens: int | None = None  # the smallest cap so far
        self.small = False
        self._trial = False  # answered although it should be refused
        self._expected = 1  # tokens of the answer
        self._explained = 0.0  # seconds, p50 of what was done
        self._beside = 0.0  # seconds of what no plan counts
        self._done: set[str] = set()
        self._asked: float | None = None  # when the last token was there
        self._steps: list[float] = []

    def plan(self, situation: Situation) -> Plan:
        """The best plan from here on.

        Raises:
            BudgetInfeasible: the fastest plan is too slow and the policy is to refuse.
        """
        if self.small:
            return self._smallest(situation)
        plan = self._best(situation)
        self._expected = situation.answer_expected
        self._tokens = plan.max_tokens or self._tokens
        return plan

    def _smallest(self, situation: Situation) -> Plan:
        """Half the tokens, read under the strongest pruning; no new view where there is a scene without it."""
        options = self._controller.options
        tokens = None
        if situation.prunable:
            tokens = max(1, min(situation.n_spatial, situation.max_spatial, self._tokens or situation.n_spatial) // 2)
        views = 0 if situation.views else min(1, situation.pending)
        plan = Plan(options[-1].strategy, views, tokens, False, situation.answer_limit, options[-1].rung)
        self.predicted, self.decision = None, plan
        size = situation.n_spatial if tokens is None else tokens
        self.why = f"{plan.strategy.name}, {size} tokens: memory ran out, so half the tokens and the strongest pruning"
        return plan

    def _best(self, situation: Situation) -> Plan:
        controller = self._controller
        reuse = controller.config.reuse is Reuse.PREFIX
        if controller.latency is None:
            plan = Plan(controller.strategy, situation.pending, None, reuse, situation.answer_limit)
            self.decision, self.why = plan, f"{plan.knobs}: as configured, nothing is known about times"
            return plan
        table = controller.table(situation)
        if self._budget_ms is None:
            return self._decided(table.configured(controller.strategy, reuse), situation, "no latency budget")
        now, reserve = self._watch.clock(), controller.config.reserve_ms / 1e3
        left = self.deadline - now - reserve
        chosen = table.choose(left)
        if chosen is not None:
            return self._decided(chosen, situation, f"{left * 1e3:.0f} ms are left")
        smallest = (now - self._watch.arrived + reserve + table.cheapest_seconds) * 1e3
        feasible = f"the smallest feasible one is {smallest:.0f} ms"
        self.warning = f"the latency budget of {self._budget_ms:g} ms cannot be kept: {feasible}"
        self.hopeless = self.hopeless or self._watch.stage == "queue"
        if controller.config.infeasible is Infeasible.REFUSE:
            self._trial = self._trial or controller.wants_to_know()
            if not self._trial:
                raise BudgetInfeasible(self.warning)
        return self._decided(table.cheapest, situation, f"the fastest plan, {max(0.0, left) * 1e3:.0f} ms are left")

    def _decided(self, plan: Plan, situation: Situation, why: str) -> Plan:
        """Notes the plan, with what no later one can bring back: views before encoding, tokens once they are built."""
        stage = self._watch.stage
        if stage == "queue":
            self._lost[0] = plan.views_loss
            self._given_up = int(plan.new_views < situation.pending)
        elif stage == "encode":
            self._lost[1] = plan.tokens_loss
            self._given_up = 2 if plan.max_tokens is not None else self._given_up
        before = {"queue": 0.0, "encode": self._lost[0]}.get(stage, sum(self._lost))
        rung = max(plan.rung, self._given_up)
        new, old = plan.predicted, self.predicted
        assert new is not None
        if old is not None:
            # A stage that is done has no work left in the new plan.
            new = replace(new, encode=old.encode, tokens=old.tokens if stage == "tokens" else new.tokens)
        new = replace(new, total=new.encode + new.tokens + new.prefill + new.decode)
        self.predicted = new
        self.decision = replace(plan, rung=rung, loss=plan.loss + before, predicted=new)
        rest = f"predicted {new.total:.0f} ms, p95 of the rest {plan.p95_ms:.0f} ms"
        self.why = f"{plan.knobs}: {RUNGS[rung]}, {why}; {rest}"
        return plan

    def record(self, stage: str, terms: FloatArray) -> None:
        """The present stage has done what `terms` describe."""
        latency = self._controller.latency
        if latency is not None:
            explained = float(latency.p50(stage, terms))
            self._done.add(stage)
            if latency.observe(stage, terms, self._watch.stage_seconds):
                # That this stage has become slower is not to be counted for the whole answer, too.
                explained = float(latency.p50(stage, terms))
            self._explained += explained
            self._controller.refused = 0

    @property
    def time_left(self) -> float:
        """Seconds until the deadline, without the reserve; infinite without a budget."""
        return self.deadline - self._watch.clock() - self._controller.config.reserve_ms / 1e3

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is done within is part of the answer's time and of no plan: it has what time is left."""
        began = self._watch.clock()
        try:
            yield
        finally:
            self._beside += self._watch.clock() - began

    def finish(self, times: StageTimes) -> None:
        """The question is answered; teaches how whole answers differ from the sum of their stages."""
        if self.predicted is not None:
            stages = ((name, getattr(self.predicted, name), getattr(times, name)) for name in STAGES[1:])
            told = ", ".join(f"{name} {before:.0f}/{after:.0f}" for name, before, after in stages)
            self.why += f"; predicted/measured ms: {told}"
        latency = self._controller.latency
        # A prefix that had to be read first, and an answer that ended early, are not explained by their stages.
        whole = "decode" in self._done and not self._done.isdisjoint({"prefill", "follow_up"})
        if latency is not None and whole and not self.small:
            latency.observe_answer(self._explained, (times.total - times.queue) / 1e3 - self._beside)

    def shortfall(self, total_ms: float, read: int, usual: int) -> str:
        """What an answer that is there cost, in words, where time or memory did not do; empty where they did.

        Args:
            total_ms: from the question's arrival to its answer.
            read: tokens of the scene, summed over the layers that read them. usual: what the configured strategy reads.
        """
        found = []
        if total_ms > 1e3 * (self.deadline - self._watch.arrived) and not self.warning:
            found.append(f"the latency budget of {self._budget_ms:g} ms was missed: the answer took {total_ms:.0f} ms")
        if self.small:
            found.append("memory ran out: the answer is by half the tokens and the strongest pruning")
        elif usual and read <= TOKEN_SHARES[-1] * usual:
            share, name = read / usual, self._controller.strategy.name
            found.append(f"there was time for {share:.1%} of what the strategy {name} reads of the scene")
        return "; ".join(found)

    def hurry(self, plan: Plan, n_spatial: int, n_text: int, kept: KeepCount) -> Hurry | None:
        """What keeps the prefill of `plan` in time, whose policy counts as `kept` does; None where it has all the time
        there is, or is late anyway.
        """
        latency = self._controller.latency
        if latency is None or self._budget_ms is None or self.hopeless or self.small:
            return None
        counts = plan.strategy.schedule.counts(n_spatial, self._controller.n_layers, kept)
        return Hurry(
            latency,
            self._watch.clock,
            self.deadline - self._controller.config.reserve_ms / 1e3,
            in_buckets(counts, n_spatial, n_text, plan.bucket).tolist(),
            n_spatial,
            n_text,
            # The first token comes out of the prefill. The step that says that an answer is at its end is not counted:
            # what makes half of the prefills hurry costs more answers than it saves (docs/benchmarks.md).
            steps=max(0, min(plan.answer_tokens, self._expected) - 1),
            may_choose=plan.strategy.policy != "none",
            first_gate=self._controller.first_gate,
        )

    def record_drops(self, hurry: Hurry | None) -> None:
        """Notes what a prefill gave up on the way."""
        if hurry is None or not hurry.drops or self.decision is None:
            return
        lost = loss_per_share(self._controller.options) * hurry.removed_share
        self.decision = replace(self.decision, rung=max(3, self.decision.rung), loss=self.decision.loss + lost)
        steps = ", ".join(f"layer {g} ({kept} of {n} tokens)" for g, n, kept in hurry.drops)
        self.why += f"; hurried before {steps}"

    def time_is_up(self, next_step: FloatArray) -> bool:
        """Asked after each token: whether another decode step might end after the deadline."""
        latency, now = self._controller.latency, self._watch.clock()
        if latency is None:
            return now >= self.deadline
        # From token to token in this answer: what is done with the text belongs to a step, too.
        if self._asked is not None:
            self._steps.append(now - self._asked)
        self._asked = now
        step = max(float(latency.p95("decode", next_step)), median_high(self._steps) if self._steps else 0.0)
        return now + step + self._controller.config.reserve_ms / 1e3 >= self.deadline
