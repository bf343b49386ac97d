# SPDX-License-Identifier: Apache-2.0
"""An engine that is elsewhere, as a robot asks it: the same answers, budgets and events as of one in this process.

The time that a question has left goes with it, what the way takes counted, so clocks need not agree. Where the link
breaks, or the replica dies, the question is asked once more while there is time, with all that is missing; then the
fallback answers it, if there is one, or it is an error that says so.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from adatoken3d_ros.engine import loading
from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.answering import UNANSWERED
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.knowing import Recalled, guessed, what_is_known
from adatoken3d_ros.engine.recalling import recall
from adatoken3d_ros.engine.requests import InvalidRequest, check_question, clicks_of
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.stages import STAGES, StageTimes
from adatoken3d_ros.fleet.answers import read_done
from adatoken3d_ros.fleet.bodies import Whose
from adatoken3d_ros.fleet.far_model import FarModel, identity_of
from adatoken3d_ros.fleet.link import (
    PATIENCE,
    Link,
    LinkError,
    Missing,
    Stopped,
    Unreachable,
)
from adatoken3d_ros.fleet.remote_scene import Bodies, RemoteScene
from adatoken3d_ros.fleet.sender import Sender
from adatoken3d_ros.fleet.wire import RULES, Asked, Manifest, WireError, heartbeat
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.text_places import PromptError
from adatoken3d_ros.pruning.strategy import Strategy, parse
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import shown

logger = logging.getLogger(__name__)

HOLD_ON = 20.0  # seconds that a question without a budget is asked again, where there is no fallback
WITH_FALLBACK = 4.0  # where there is one
_PAUSE = 0.25  # seconds between two attempts
_LOOK = 0.01  # between two looks meanwhile whether somebody waits still
_BEATS = 2.5  # an engine that lives is heard twice before its connection counts as broken
_ROUNDS = 6  # in which bodies that are missing are sent
_OF_A_REQUEST = 0.75  # of what the engine takes in one request


def of_fallback(settings: Settings) -> Settings:
    """The settings of the model that answers while the engine is out of reach: but for what is the engine's."""
    path = "" if settings["engine.fallback"] == "embedded" else settings["engine.fallback"]
    return settings | {
        "engine.url": "",
        "model.path": path,
        "model.vision_path": "",
        "model.template": "",
        "model.tell_poses": False,
        "strategy": "ours",
    }


def patience_of(budget_ms: float | None, left: float, fallback: bool) -> float:
    """Seconds without a word from the engine after which its connection counts as broken.

    Args:
        budget_ms: the question's. left: of it, seconds. fallback: whether another model needs time to answer then.
    """
    return min(PATIENCE, max(_BEATS * heartbeat(budget_ms), left * (0.3 if fallback else 0.6)))


class RemoteEngine(Engine):
    """See the module.

    Args:
        model: what stands for its model. hello: what the engine has told of itself; None: it was out of reach.
        link: the way there. settings: the robot's.
        fallback: another engine, in this process.

    Raises:
        StrategyError: for strategies that cannot be read.
    """

    def __init__(
        self,
        model: FarModel,
        hello: Mapping[str, Any] | None,
        link: Link,
        settings: Settings,
        fallback: Engine | None = None,
    ) -> None:
        nobody = SimpleNamespace(eos_token_id=None)
        super().__init__(cast(SpatialLMM, model), nobody, model_id="" if fallback is None else fallback.model_id)
        self.link, self.fallback, self._settings = link, fallback, settings
        self._far = model
        self._rules = {name: settings[name] for name in RULES}
        self._most = 0
        if hello is not None:
            self._note(hello)

    def _note(self, hello: Mapping[str, Any]) -> None:
        fitted = {str(name): parse(str(text)) for name, text in dict(hello.get("fitted", {})).items()}
        most = int(_OF_A_REQUEST * float(hello.get("max_body", 2**24)))
        self.fitted, self.model_id, self._most = fitted, shown(hello.get("model_id", ""), 200), most

    @property
    def met(self) -> bool:
        """Whether it is known which model the engine has."""
        return bool(self._far.identity)

    def meet(self, patience: float = PATIENCE, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Asks the engine which model it has, unless that is known. Any thread.

        Raises:
            LinkError: where it cannot be reached, and where its model is not the robot's. Stopped: see `Link.hello`.
        """
        if self.met:
            return
        hello = self.link.hello(patience, should_stop)
        try:
            identity = identity_of(self._far, self._settings, hello)
            self._note(hello)
        except (ValueError, TypeError) as error:
            raise LinkError(str(error)) from error
        self._far.identity = identity  # the last: from now on it is met
        logger.warning("%s is reached: from now on it answers, with %s", self.link.address.url, self.model_id)

    def open(self, config: SessionConfig | None = None, strategy: Strategy | None = None) -> Scene:
        config = config or SessionConfig()
        other = None if self.fallback is None else loading.open_scene(self.fallback, of_fallback(self._settings))
        if self._far.pictures:
            config = replace(config, moved_within=-1.0)  # nothing here tells whether two things look alike
        scene = RemoteScene(self, config, strategy, other)
        name, again = scene.name, weakref.ref(scene)

        def send(offer: tuple[Manifest, Bodies, Whose]) -> None:
            self.meet()
            if offer[-1].model == self._far.identity:
                self._bring(name, *offer)
            elif (described := again()) is not None:  # before there were names for bodies
                described.forget_told()

        sender = Sender(send)
        scene.offer = lambda manifest, bodies, whose: sender.offer((manifest, bodies, whose))
        weakref.finalize(scene, sender.close)
        return scene

    def _bring(
        self,
        name: str,
        manifest: Manifest,
        bodies: Bodies,
        whose: Any,
        wanted: Any = None,
        patience: float = PATIENCE,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Sends what the engine lacks of a scene, in as many requests as that takes. Raises LinkError, Stopped."""
        content = {"model": self.model.identity, "scene": manifest.plain(), "rules": self._rules}
        missing = self.link.put(name, content, ()) if wanted is None else list(wanted)
        for _ in range(_ROUNDS):
            if not missing:
                return
            while missing:
                if should_stop():
                    raise Stopped
                batch: list[bytes] = []
                size = 0
                while missing and (not batch or size < self._most):
                    batch.append(_made(bodies, missing.pop(0), whose))
                    size += len(batch[-1])
                if size > self._most and len(batch) > 1:
                    batch.pop()  # it comes with the next
                left = self.link.put(name, content, batch, patience, should_stop)
            missing = left
        raise LinkError(f"{len(missing)} bodies were sent and are missing still")

    # --- questions ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        scene: Scene,
        question: Question,
        *,
        arrived: float | None = None,
        on_text: Callable[[str, int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Answer:
        if scene.runtime is not self or not isinstance(scene, RemoteScene):
            raise ValueError("the scene belongs to another engine")
        asking = _Asking(
            self, scene, question, self.clock() if arrived is None else arrived, on_text, on_stage, should_stop
        )
        return asking.answer()

    def attempt(
        self, scene: RemoteScene, question: Question, elapsed_ms: float, events: _Asking, patience: float, first: bool
    ) -> tuple[Answer, Recalled | None]:
        """Asks once, and sends what is missing until nothing is. Raises LinkError, Stopped."""
        self.meet(patience, events.should_stop)
        scene.follow_model()
        manifest, bodies = scene.described()
        asked = Asked(manifest, question, scene.strategy.text(), elapsed_ms, self._rules, self.model.identity)
        wanted: tuple[str, ...] = ()
        for number in range(1, _ROUNDS + 1):
            began, asked = self.clock(), replace(asked, elapsed_ms=events.elapsed_ms())
            content, places = asked.content()
            content["attempt"] = number if first else number + 1
            sent: list[bytes] = []
            if wanted:
                sent = [_made(bodies, name, scene.whose) for name in wanted]
                if sum(map(len, sent)) > self._most:
                    self._bring(scene.name, manifest, bodies, scene.whose, wanted, patience, events.should_stop)
                    sent = []
            try:
                for event, tail in self.link.ask(
                    scene.name, content, [places, *sent], patience=patience, should_stop=events.should_stop
                ):
                    if event.get("event") == "done":
                        try:
                            answer, recalled = read_done(event, tail, question)
                        except WireError as error:
                            raise LinkError(str(error)) from error
                        if answer.status.answered and not wanted:
                            there = (answer.times.total - asked.elapsed_ms) / 1e3
                            self.link.way.answered(self.clock() - began - there)
                        elif answer.status is Status.BUDGET_INFEASIBLE:
                            self.link.way.refused()
                        return answer, recalled
                    events.told(event)
            except Missing as missing:
                wanted = missing.bodies
        raise LinkError(f"{len(wanted)} bodies were sent and are missing still")


def _made(bodies: Bodies, name: str, whose: Any) -> bytes:
    if name not in bodies:
        raise LinkError(f"it misses {shown(name, 40)}, of which this scene is not made")
    return bodies[name].packed(whose)


class _Asking:
    """One question on its way."""

    def __init__(
        self,
        engine: RemoteEngine,
        scene: RemoteScene,
        question: Question,
        arrived: float,
        on_text: Callable[[str, int], None] | None,
        on_stage: Callable[[str], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self.engine, self.scene, self.question, self.arrived = engine, scene, question, arrived
        self._on_text, self._on_stage = on_text, on_stage or (lambda _: None)
        self._stop = should_stop or (lambda: False)
        self._aloud = True
        self._encoding = 0.0
        self._least = _BEATS * heartbeat(question.latency_budget_ms)
        budget = question.latency_budget_ms or 0.0
        self.deadline = arrived + budget / 1e3 if 0 < budget < math.inf else math.inf
        # One that is alive and late is waited for: its engine ends an answer at its deadline.
        self._end = math.inf if math.isinf(self.deadline) else self.deadline + max(2.0, budget / 1e3)

    def should_stop(self) -> bool:
        """Whether nobody waits any more."""
        return self._stop() or self.engine.clock() > self._end

    def elapsed_ms(self) -> float:
        """Since the question arrived, and on the ways to the engine and back."""
        return (self.engine.clock() - self.arrived + self.engine.link.way.seconds) * 1e3

    def told(self, event: Mapping[str, Any]) -> None:
        """An event of the engine's."""
        if event.get("event") == "stage" and event.get("stage") in STAGES:
            self._on_stage(str(event["stage"]))
        elif event.get("event") == "text" and self._on_text is not None and self._aloud:
            self._on_text(str(event.get("text", "")), int(event.get("tokens", 0)))

    def answer(self) -> Answer:
        """The answer, whatever becomes of the link."""
        scene, engine = self.scene, self.engine
        asked = scene.resolved(self.question)
        found = Answer(asked, Status.OK, strategy=scene.strategy.name, model_id=engine.model_id, seed=scene.config.seed)
        try:
            with scene.seen_by(self.question):
                found = recall(scene, found, self.question.text, self._by_model)
        except tuple(UNANSWERED) as error:
            found = replace(found, status=UNANSWERED[type(error)], status_message=str(error))
        except Stopped:
            late = not self._stop()
            status = Status.ERROR if late else Status.CANCELLED
            why = f"{engine.link.address.url} did not answer within its time" if late else "cancelled by the robot"
            found = replace(found, status=status, status_message=why)
        times = self._times(found.times)
        return replace(found, question=self.question, times=times, budget_met=engine.clock() <= self.deadline)

    def _times(self, there: StageTimes) -> StageTimes:
        """By the robot's clock; what is in no stage, the way included, is waiting."""
        total = (self.engine.clock() - self.arrived) * 1e3
        stages = {name: getattr(there, name) for name in STAGES if name != "queue"}
        stages["encode"] += self._encoding * 1e3
        return StageTimes(queue=max(0.0, total - sum(stages.values())), total=total, **stages)

    def _by_model(self, known: Answer, aloud: bool) -> Answer:
        scene, question = self.scene, known.question
        self._aloud = aloud
        check_question(question)
        try:
            _, clicks = clicks_of(question, scene.runtime.model.takes_clicks)
        except PromptError as error:
            raise InvalidRequest(str(error)) from error
        if scene.memory.pending:
            self._on_stage("encode")
            began = self.engine.clock()
            # The newest first, as far as half of the budget goes; the rest waits.
            half = self.arrived + (self.deadline - self.arrived) / 2
            while scene.memory.pending and (not len(scene.memory) or self.engine.clock() < half):
                if not scene.encode_usable(1, self.should_stop):
                    break
            self._encoding += self.engine.clock() - began
        if self.should_stop():
            raise Stopped
        scene.check(clicks)
        newest = scene.stamp_ns
        seen: dict[str, Any] = {"stamp_ns": newest, "as_of_ns": newest, "confirmed_ns": scene.confirmed_ns}
        try:
            answer, recalled = self._reached(question)
        except LinkError as error:
            return self._without(known, question, str(error))
        answer = replace(answer, question=question, **(seen if answer.status is not Status.NO_SCENE else {}))
        if answer.status.answered and answer.report is not None:
            answer = replace(answer, **what_is_known(scene.memory, scene.config, answer, clicks, recalled))
            answer = guessed(answer, clicks)
        return answer

    def _reached(self, question: Question) -> tuple[Answer, Recalled | None]:
        """The engine's answer; where it cannot be reached it is asked again, if that leaves time for the fallback."""
        engine, began = self.engine, self.engine.clock()
        if math.isinf(self.deadline):
            until = began + (HOLD_ON if engine.fallback is None else WITH_FALLBACK)
            patience = min(PATIENCE, until - began)
        else:
            left = max(0.0, self.deadline - began)
            until = began + left * (0.9 if engine.fallback is None else 0.4)
            patience = patience_of(self.question.latency_budget_ms, left, engine.fallback is not None)
        first = True
        while True:
            try:
                return engine.attempt(self.scene, question, self.elapsed_ms(), self, patience, first)
            except Unreachable as error:
                first = False
                if engine.clock() + _PAUSE + self._least >= until:
                    raise
                logger.info("asking again: %s", error)
                rested = engine.clock() + _PAUSE
                while engine.clock() < rested:
                    if self.should_stop():
                        raise Stopped from error
                    time.sleep(_LOOK)
                patience = min(patience, until - engine.clock())
                if patience <= 0:
                    raise

    def _without(self, known: Answer, question: Question, why: str) -> Answer:
        """The answer where the engine gives none."""
        engine, fallback = self.engine, self.scene.fallback
        logger.warning("%s", why)
        if engine.fallback is None or fallback is None:
            message = f"the shared engine did not answer: {why}"
            return replace(known, status=Status.ERROR, status_message=message)
        found = engine.fallback.ask(
            fallback,
            replace(question, latency_budget_ms=self.question.latency_budget_ms),
            arrived=self.arrived,
            on_text=self._on_text if self._aloud else None,
            on_stage=self._on_stage,
            should_stop=self._stop,
        )
        told = "; ".join(filter(None, (found.status_message, f"answered by the fallback: {why}")))
        return replace(found, status_message=told)
