# SPDX-License-Identifier: Apache-2.0
"""A scene on a clock that only moves when its model works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from adatoken3d_ros.engine import answering
from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.budget.controller import BudgetConfig
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.scene.frames import PosedFrame
from tests.engine.scenes import ask

Frames = list[PosedFrame]
# Seconds: 0.1 a view, 0.0001 a row and layer, 0.01 a decode step.
COEFFICIENTS = {"encode": [0.1], "tokens": [0.0] * 3, "prefill": [0.0, 1e-4, 0.0, 0.0, 0.0], "decode": [0.01, 0.0]}


class World:
    """A session and the seconds that its model takes; `pace` makes it slower than it was measured."""

    def __init__(self, make_session: Callable[..., Scene], monkeypatch: Any, **budget: Any) -> None:
        self.now = 100.0
        self.pace = 1.0
        self.words: list[str] | None = None
        config = SessionConfig(max_new_tokens=16, budget=BudgetConfig(**{"reserve_ms": 0.0, **budget}))
        self.session = make_session(config, clock=lambda: self.now)
        self.session.controller.latency = LatencyModel(COEFFICIENTS)
        latency = self.session.controller.latency
        for ratio in (*latency.ratios.values(), latency.answers):
            ratio.guard = 1.0
        self.reads: list[str] = []
        monkeypatch.setattr(
            self.session.runtime.model, "encode_images", self._timed_features(self.session.runtime.model)
        )
        monkeypatch.setattr(answering, "prefill", self._timed_prefill(answering.prefill))
        monkeypatch.setattr(answering, "generate", self._generate)
        read_prefix = self.session.prepared.read_prefix
        monkeypatch.setattr(self.session.prepared, "read_prefix", self._timed_prefix(read_prefix))

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.pace

    def _timed_features(self, model: Any) -> Any:
        original = model.encode_images

        def timed(rgb: Any, **options: Any) -> Any:
            self.spend(0.1 * len(rgb))
            return original(rgb, **options)

        return timed

    def _timed_prefill(self, original: Any) -> Any:
        def timed(language: Any, embeds: Any, *args: Any, **options: Any) -> Any:
            filled = original(language, embeds, *args, **options)
            self.reads.append("prompt")
            n_text = embeds.shape[1] - len(options["scene"].xyz)
            self.spend(1e-4 * sum(n + n_text for n in filled.trace.spatial_per_layer))
            return filled

        return timed

    def _timed_prefix(self, original: Any) -> Any:
        def timed(spliced: Any, *args: Any) -> Any:
            if self.session.prepared.prefix is None:
                self.reads.append("prefix")
                self.spend(1e-4 * 8 * (spliced.spatial_start + spliced.n_spatial))
            self.spend(1e-4 * 8 * spliced.n_question)
            return original(spliced, *args)

        return timed

    def _generate(self, language: Any, filled: Any, *, max_new_tokens: int, eos_ids: Any) -> Iterator[int]:
        """A model that would never end by itself; each step takes its time."""
        for i in range(max_new_tokens):
            yield 300 + i
            if i + 1 < max_new_tokens:
                self.spend(0.01)

    def ask(self, budget_ms: float | None = None, waited: float = 0.0, **options: Any) -> Answer:
        question = Question("What is this?", latency_budget_ms=budget_ms)
        return ask(self.session, question, arrived=self.now - waited, **options)


def layers(answer: Answer) -> tuple[int, ...]:
    assert answer.report is not None
    return answer.report.spatial_per_layer
