# SPDX-License-Identifier: Apache-2.0
"""One engine that answers many robots over HTTP: a replica of a Ray Serve deployment. `fleet.deployment` is Ray's part.

A request about a scene says what the scene is (`wire.Manifest`). Where bodies of it are not here, the answer is which,
and the robot sends these: after a start, an eviction or a broken link there is nothing else to be done. One question is
answered at a time; those that wait are in the order of `order.Line`. While somebody waits a line comes every
`wire.heartbeat` seconds; a connection that is closed ends its question within a decode step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.engine.answer import Answer, Status
from adatoken3d_ros.engine.events import StageBegan, TextSoFar
from adatoken3d_ros.engine.loading import load_engine
from adatoken3d_ros.engine.tickets import Ticket
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.fleet import answers, wire
from adatoken3d_ros.fleet.bodies import Whose
from adatoken3d_ros.fleet.catching_up import CatchingUp
from adatoken3d_ros.fleet.door import ROBOT as ROBOT_HEADER
from adatoken3d_ros.fleet.door import SCENE, DoorConfig, Refused
from adatoken3d_ros.fleet.hello import hello_of
from adatoken3d_ros.fleet.order import Full, Line, Waiting
from adatoken3d_ros.fleet.scenes import Held, HeldScene, NoRoom, Scenes
from adatoken3d_ros.fleet.wire import Asked, Manifest, WireError
from adatoken3d_ros.pruning.strategy import Strategy, parse
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import described, shown

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

STOP_SECONDS = 2.0
_LINES = "application/x-ndjson"
_GONE = "the robot has gone"
_ASKED_ABOUT = "adatoken3d.asked_about"  # in a request's scope: the scene


@dataclass(frozen=True)
class ReplicaConfig:
    """What replicas are told.

    Attributes:
        settings: values other than the defaults.
        replicas: how many there are. gpus, cpus: that each takes of its machine, for Ray.
        max_scenes, max_mb: scenes that a replica holds, and what they may take together.
        waiting: questions of one robot that may wait. patience: see `order`, seconds.
        door: who may come in.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    gpus: float = 0.0
    cpus: float = 0.0
    max_scenes: int = 16
    max_mb: float = 4096.0
    waiting: int = 8
    patience: float = 10.0
    door: DoorConfig = field(default_factory=DoorConfig)


@dataclass(eq=False)
class Question:
    """A question that is here.

    Attributes:
        hit: whether its scene was here as it is when it came first. events: what its robot is told next; None: the end.
        ticket: once it is its turn. told: whether its answer was given out, and counted.
    """

    asked: Asked
    held: Held
    arrived: float
    hit: bool
    events: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    ticket: Ticket | None = None
    told: bool = False


class Replica:
    """An engine with its scenes, behind HTTP.

    Args:
        config: see there.
        load: makes the engine.
        record: told of each question: robot, status, whether its scene was here, whether it was late, tokens that were
            kept, and {stage: milliseconds}.

    Raises:
        ValueError, OSError: as `load_engine`; for a limit that leaves no room.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        load: Callable[..., Any] = load_engine,
        record: Callable[..., object] = lambda *of_a_question: None,
    ) -> None:
        settings = Settings(config.settings)
        self._record = record
        self._loop: asyncio.AbstractEventLoop | None = None
        engine: list[Any] = []

        def make() -> Any:
            engine.append(load(settings))
            return engine[0]

        self.worker = Worker(make, ahead=settings["budget.background"])
        self.worker.start()
        self.worker.ready.result()
        (self.engine,) = engine
        self.line: Line[Question] = Line(config.patience, config.waiting)
        self._catching_up = CatchingUp(lambda: self.line.running is not None or len(self.line) > 0, self._soon)
        whose = Whose(self.engine.model.identity, self.engine.model.sizes)
        most = config.max_mb * 1e6
        self.scenes = Scenes(self.worker, whose, settings, most=config.max_scenes, most_bytes=most, gone=self._gone)
        self._hello = hello_of(self.engine, settings, config.door.max_body)
        self._strategies: dict[str, Strategy] = {}

    def check(self) -> None:
        """Raises RuntimeError where the worker has ended: nothing would be answered any more."""
        if not self.worker.alive:
            raise RuntimeError("the worker has ended")

    def stop(self) -> None:
        """Ends the worker; what runs is answered CANCELLED."""
        self.worker.stop(STOP_SECONDS)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        from starlette.requests import Request

        if scope["type"] != "http":
            return
        response = await self._reply(Request(scope, receive))
        try:
            await response(scope, receive, send)
        finally:
            if (held := scope.get(_ASKED_ABOUT)) is not None:
                held.questions -= 1
                self.scenes.tidy()

    async def _reply(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        self._loop = asyncio.get_running_loop()
        routes = {("GET", wire.HELLO): self._say_hello, ("POST", wire.ASK): self._ask, ("POST", wire.VIEWS): self._take}
        route = routes.get((request.method, request.url.path))
        if route is None:
            return JSONResponse({"error": "path", "message": f"there is no {request.method} here"}, 404)
        try:
            return await route(request)
        except ValueError as error:  # WireError, BodyError, and rules that do not go with the model
            return JSONResponse({"error": "request", "message": shown(error)}, 422)
        except NoRoom as error:
            return JSONResponse({"error": "room", "message": shown(error)}, 503)
        except (Refused, ClientDisconnect):  # by the door, which counts what comes
            raise
        except Exception as error:  # no rule ends here: a defect, which is told, too
            logger.exception("a request could not be handled")
            return JSONResponse({"error": "defect", "message": described(error)}, 500)

    async def _say_hello(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse(self._hello)

    async def _read(self, request: Request) -> tuple[dict[str, Any], list[bytes], str, str]:
        """The request's text and bodies, its robot and its scene."""
        parts, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > wire.MOST_REQUEST:
                raise WireError(f"a request of more than {wire.MOST_REQUEST} bytes")
            parts.append(chunk)
        content, bodies = wire.unframed(b"".join(parts))
        if content.get("model") != self._hello["model"]:
            raise WireError(
                f"a request for the model {shown(content.get('model'), 80)}, here is {self._hello['model']}"
            )
        robot, scene = request.headers.get(ROBOT_HEADER, ""), request.headers.get(SCENE, "")
        if not robot or not scene:
            raise WireError(f"a request without {ROBOT_HEADER} or {SCENE}")
        return content, bodies, robot, scene

    async def _take(self, request: Request) -> Response:
        """Bodies of a scene that its robot may soon ask about."""
        from starlette.responses import JSONResponse

        content, bodies, robot, scene = await self._read(request)
        manifest, rules = Manifest.read(content.get("scene")), wire.read_rules(content.get("rules"))
        held = self.scenes.of(scene, robot, rules)
        missing = await self._put(held, manifest, bodies)
        if not missing:
            self._catching_up.told(held, manifest)
        self.scenes.tidy()
        return JSONResponse({"missing": missing})

    async def _put(self, held: Held, manifest: Manifest, bodies: list[bytes]) -> list[str]:
        """Has bodies on the scene's shelf, checked beside the loop's thread; those that are still missing."""
        held.questions += 1  # it is not given up meanwhile
        try:
            held.shelf.want(manifest)
            for body in bodies:
                await asyncio.to_thread(held.shelf.put, body)
            return held.shelf.want(manifest)
        finally:
            held.questions -= 1

    async def _ask(self, request: Request) -> Response:
        from starlette.responses import JSONResponse, Response, StreamingResponse

        now = time.monotonic()
        content, bodies, robot, scene = await self._read(request)
        if not bodies:
            raise WireError("a question without its places")
        asked = Asked.read(content, bodies[0])
        arrived = now - asked.elapsed_ms / 1e3
        try:
            held = self.scenes.of(scene, robot, asked.rules)
        except NoRoom as error:
            left = f"what it answers now is likely to take {self.line.left(now) * 1e3:.0f} ms more"
            answer = self._unanswered(asked, arrived, Status.BUSY, f"the shared engine: {error}; {left}")
            self._count(robot, False, answer)
            return Response(answers.done(answer, None), media_type=_LINES)
        missing = await self._put(held, asked.scene, bodies[1:])
        if missing:
            return JSONResponse({"error": "missing", "bodies": missing}, 428)
        held.questions += 1  # until its answer has gone: before the first word of it others would take its room
        request.scope[_ASKED_ABOUT] = held
        question = Question(asked, held, arrived, content.get("attempt") == 1)
        return StreamingResponse(self._answered(question, robot), media_type=_LINES)

    async def _answered(self, question: Question, robot: str) -> AsyncIterator[bytes]:
        """The events of a question, to its end; whoever gives up reading them cancels it."""
        entry: Waiting[Question] | None = None
        try:
            yield answers.line("wait")
            budget = question.asked.question.latency_budget_ms or 0.0
            beat = wire.heartbeat(budget)
            deadline = question.arrived + budget / 1e3 if 0 < budget < math.inf else math.inf
            try:
                views = question.held.unmade(question.asked.scene)
                entry = self.line.join(question, robot, time.monotonic(), deadline, views)
            except Full as error:
                infeasible = math.isfinite(deadline) and "before it" in str(error)
                self._refuse(
                    question, Status.BUDGET_INFEASIBLE if infeasible else Status.BUSY, f"the shared engine: {error}"
                )
            self._advance()
            while True:
                try:
                    event = await asyncio.wait_for(question.events.get(), beat)
                except (TimeoutError, asyncio.TimeoutError):
                    event = answers.line("wait")
                    self._refuse_late()
                if event is None:
                    return
                yield event
        finally:
            if entry is not None:
                self.line.leave([entry])
            if question.ticket is not None:
                question.ticket.cancel(_GONE)
            elif not question.told:  # nobody reads it: it is counted
                self._refuse(question, Status.CANCELLED, _GONE)
            if question.held.unmade(question.asked.scene):  # the next question would find no time for them either
                self._catching_up.told(question.held, question.asked.scene)

    # --- questions, in the loop's thread ------------------------------------------------------------------------------

    def _refuse(self, question: Question, status: Status, why: str) -> None:
        self._tell(question, self._unanswered(question.asked, question.arrived, status, why), None)

    def _unanswered(self, asked: Asked, arrived: float, status: Status, why: str) -> Answer:
        answer = Ticket(asked.question, arrived).unanswered(status, why, time.monotonic())
        return replace(answer, model_id=self.engine.model_id)

    def _refuse_late(self) -> None:
        for entry in self.line.late(time.monotonic()):
            budget = entry.what.asked.question.latency_budget_ms
            why = f"the latency budget of {budget:g} ms ran out before its turn came"
            self._refuse(entry.what, Status.BUDGET_INFEASIBLE, why)

    def _advance(self) -> None:
        """Gives the worker the next question, or the next view of a scene, if it has none."""
        self._refuse_late()
        entry = self.line.next(time.monotonic())
        if entry is None:
            self._catching_up.go_on()
            return
        question = entry.what
        asked, held = question.asked, question.held
        if self.line.viewing:
            one = held.queue.call(partial(held.make_one, asked.scene))
            one.add_done_callback(lambda future: self._soon(self._viewed, entry, future))
            return
        question.ticket = ticket = held.queue.submit(
            asked.question,
            before=partial(self._before, asked),
            listener=partial(self._told, question),
            arrived=question.arrived,
        )
        ticket.result.add_done_callback(partial(self._finished, entry))

    def _viewed(self, entry: Waiting[Question], one: Future[int]) -> None:
        problem = one.exception()
        self.line.ended(time.monotonic(), measured=problem is None, views=0 if problem else one.result())
        try:
            if problem is not None and not entry.what.told:
                self.line.leave([entry])
                self._refuse(entry.what, Status.ERROR, described(problem))
        finally:
            self._advance()

    def _ended(self, entry: Waiting[Question], answer: Answer, tail: Any) -> None:
        self.line.ended(time.monotonic(), measured=answer.status.answered)
        try:
            self._tell(entry.what, answer, tail)
        finally:
            self._advance()

    def _tell(self, question: Question, answer: Answer, recalled: Any) -> None:
        try:
            question.events.put_nowait(answers.done(answer, recalled))
        finally:
            question.events.put_nowait(None)
        question.told = True
        self._count(question.held.robot, question.hit, answer)

    def _count(self, robot: str, hit: bool, answer: Answer) -> None:
        self._record(
            robot,
            answer.status.name,
            hit,
            not answer.budget_met,
            answer.retained_tokens,
            {name: float(ms) for name, ms in vars(answer.times).items()},
        )

    def _gone(self, held: Held) -> None:
        self._catching_up.gone(held)
        if all(other.robot != held.robot for other in self.scenes.all()):
            self.line.forget(held.robot)

    # --- in the worker's thread ---------------------------------------------------------------------------------------

    def _before(self, asked: Asked, scene: Any) -> None:
        assert isinstance(scene, HeldScene)
        scene.recalled = None
        scene.become(asked.scene)
        strategy = self._strategies.get(asked.strategy) or parse(asked.strategy)
        if len(self._strategies) > 64:
            self._strategies.clear()
        self._strategies[asked.strategy] = strategy
        if scene.strategy is not strategy:
            scene.set_strategy(strategy)

    def _told(self, question: Question, event: StageBegan | TextSoFar) -> None:
        if isinstance(event, StageBegan):
            self._soon(question.events.put_nowait, answers.line("stage", stage=event.stage))
        else:
            self._soon(question.events.put_nowait, answers.line("text", text=event.text, tokens=event.tokens))

    def _finished(self, entry: Waiting[Question], future: Any) -> None:
        """Of a ticket: in the worker's thread, or in the loop's where it was refused or withdrawn at once."""
        held, recalled = entry.what.held, None
        try:
            if held.queue.ready.done() and held.queue.ready.exception() is None:
                scene = held.queue.ready.result()
                recalled = scene.recalled if isinstance(scene, HeldScene) else None
                held.look(scene)
        finally:  # or nobody would be answered any more
            self._soon(self._ended, entry, future.result(), recalled)

    def _soon(self, function: Callable[..., object], *given: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *given)
