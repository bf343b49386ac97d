# SPDX-License-Identifier: Apache-2.0
"""What outlives a question of a scene's budgets: the strategies to plan with, the table of plans, answers' lengths."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from adatoken3d_ros.engine.budget.latency import FloatArray, LatencyModel
from adatoken3d_ros.engine.budget.lengths import AnswerLengths
from adatoken3d_ros.engine.budget.plans import Situation, Table, options
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.settings import DEFAULTS


class Infeasible(str, Enum):
    """What happens to a question whose budget no plan can keep."""

    BEST_EFFORT = "best_effort"  # it is answered by the fastest plan, and told so
    REFUSE = "refuse"  # it is answered BUDGET_INFEASIBLE at once


class Reuse(str, Enum):
    """Whether the keys and values of the scene are kept for the next question."""

    OFF = "off"
    PREFIX = "prefix"  # those of [system | all spatial tokens]; such an answer prunes nothing


@dataclass(frozen=True)
class BudgetConfig:
    """How budgets are kept.

    Attributes:
        infeasible: what happens to a question whose budget cannot be kept.
        reuse: of the scene's prefix.
        reserve_ms: of each budget, for what is in no stage: handing the answer over.
    """

    infeasible: Infeasible = Infeasible(DEFAULTS["budget.infeasible"])
    reuse: Reuse = Reuse(DEFAULTS["budget.reuse"])
    reserve_ms: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_ms < math.inf:
            raise ValueError(f"reserve_ms must be at least 0, got {self.reserve_ms}")


class Controller:
    """Of one scene: what its questions' plans are made of.

    Without a latency model every question gets the configured plan, and its deadline only ends the answer.

    Args:
        n_layers: of the language model.
        config: how budgets are kept.
        latency: the engine's; None where nothing is known about times.

    Attributes:
        latency: with the gates of the strategy's policy.
        options: the strategies that the planner chooses from; of them `strategy` is the configured one.
        lengths: of this scene's answers.
        refused: questions that were refused since something was measured.
    """

    _TABLES = 8
    _REFUSALS = 4  # in a row, before one is answered

    strategy: Strategy

    def __init__(
        self,
        n_layers: int,
        config: BudgetConfig | None = None,
        latency: LatencyModel | None = None,
        *,
        first_gate: int = 0,
    ) -> None:
        self.n_layers, self.first_gate = n_layers, first_gate
        self.config = config or BudgetConfig()
        self.latency = latency
        self._tables: OrderedDict[tuple[Situation, int], Table] = OrderedDict()
        self.lengths = AnswerLengths()
        self.refused = 0

    def set_strategy(self, strategy: Strategy, calibrated: Sequence[Strategy] = ()) -> None:
        """Plans around a configured strategy, with other `calibrated` ones of its policy."""
        self.strategy = strategy
        self.options = options(strategy, self.n_layers, tuple(calibrated), self.first_gate)
        if self.latency is not None:
            self.latency = self.latency.for_policy(strategy.policy)
        self._tables.clear()

    def table(self, situation: Situation) -> Table:
        """The plans of a situation; kept until the latency model learns something new.

        Raises:
            ValueError: without a latency model.
        """
        if self.latency is None:
            raise ValueError("there is no latency model to plan with")
        key = situation, self.latency.version
        if key not in self._tables:
            self._tables[key] = Table(situation, self.options, self.latency, self.n_layers)
            while len(self._tables) > self._TABLES:
                self._tables.popitem(last=False)
        return self._tables[key]

    def learn(self, stage: str, terms: FloatArray, seconds: float) -> None:
        """Takes into account what was done between questions."""
        if self.latency is not None:
            self.latency.observe(stage, terms, seconds)

    def wants_to_know(self) -> bool:
        """Whether a question that would be refused is answered all the same, to see if the machine is still slow.

        Refusing measures nothing: without this, what slowed the machine once would be believed for ever.
        """
        self.refused += 1
        slowed = self.latency is not None and self.latency.slower > 1.0
        return slowed and self.refused % self._REFUSALS == 0

    def forget_tables(self) -> None:
        """Makes the next question build its table anew."""
        self._tables.clear()
