# SPDX-License-Identifier: Apache-2.0
"""The scene session: posed frames go in, questions are answered. One thread owns it; it knows nothing of ROS."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefill import Cancelled, Layout, Prefill, prefill
from adatoken3d_ros.engine.answer import Answer, Box, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetInfeasible, Controller, Pace, Reuse, Stopwatch
from adatoken3d_ros.engine.budget.latency import decode_terms, encode_terms, follow_up_terms, read_terms, token_terms
from adatoken3d_ros.engine.budget.plans import SHORTEST_ANSWER, Plan, Situation, Table
from adatoken3d_ros.engine.budget.warmup import latency_model, synchronised
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.out_of_memory import describe, free_cached, is_out_of_memory
from adatoken3d_ros.engine.prepared import Block, Prepared
from adatoken3d_ros.engine.report import token_report
from adatoken3d_ros.engine.requests import FAR_CLICK, InvalidRequest, check_points, check_question, clicks_of
from adatoken3d_ros.engine.scene_memory import SceneMemory, ViewError
from adatoken3d_ros.engine.words import whole_words
from adatoken3d_ros.lmm.interface import PromptIds, SpatialLMM, Spliced, SpliceError
from adatoken3d_ros.lmm.text_places import PromptError
from adatoken3d_ros.pruning import flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.strategy import Strategy, default_strategy
from adatoken3d_ros.pruning.view import Policy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import Verdict
from adatoken3d_ros.scene.token_map import SpatialTokens

logger = logging.getLogger(__name__)


class NoScene(Exception):
    """There is nothing yet that a question could be about; the message says why."""


class SceneSession:
    """A scene memory and the model that answers questions about it.

    `observe` decides whether a frame is kept, `encode_pending` turns kept frames into spatial tokens (once each),
    `prepare` does what can be done before a question, and `ask` answers. None of them is thread safe:
    `engine.worker.Worker` gives the session a thread of its own. Budgets are kept by `controller`, which needs a
    latency model (`engine.budget.warmup`) to do more than end an answer at its deadline; `fitted` are strategies with
    measured losses that it may plan with where they are of the strategy's policy.

    Raises:
        StrategyError: if the strategy was made for another model.
        ScheduleError: if the strategy has a gate outside the model.
    """

    def __init__(
        self,
        model: SpatialLMM,
        tokenizer: Any,
        config: SessionConfig | None = None,
        *,
        strategy: Strategy | None = None,
        fitted: Mapping[str, Strategy] | None = None,
        model_id: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or SessionConfig()
        self.model_id = model_id
        self.fitted = dict(fitted or {})
        self._clock = synchronised(clock, model.device)
        self.memory = SceneMemory(model, self.config)
        self.prepared = Prepared(model, self.memory, self.config.seed if self.config.upstream_numerics else None)
        self._eos = set(_eos_ids(tokenizer))
        strategy = strategy or default_strategy("ours", self.n_layers)
        self.controller = Controller(strategy, self.n_layers, self.config.budget)
        self.set_strategy(strategy)

    @property
    def n_layers(self) -> int:
        return len(self.model.decoder)

    def set_strategy(self, strategy: Strategy) -> None:
        """Uses another pruning strategy from the next question on; raises as the constructor does."""
        strategy.check(self.model.identity)
        strategy.schedule.check(self.n_layers)
        self._make_policy(strategy)  # refuses options that there are not
        self.strategy = strategy
        self.controller.set_strategy(strategy, [one for one in self.fitted.values() if one.policy == strategy.policy])

    def warm_up(self, cache: Path | None = None, progress: Callable[[int, int], None] | None = None) -> bool:
        """Learns how fast this machine is (`engine.budget.warmup.latency_model`). Returns whether it was known."""
        self.controller.latency, known = latency_model(self.model, self.tokenizer, self.strategy, cache, progress)
        self.controller.forget_tables()
        return known

    def _make_policy(self, strategy: Strategy) -> Policy:
        return make_policy(strategy.policy, **{**strategy.options, **_seed(strategy, self.config.seed)})

    # --- the scene ---

    @property
    def poses(self) -> dict[int, NDArray[np.float64]]:
        """{stamp in nanoseconds: T_world_camera (4, 4)} of the encoded views."""
        return self.memory.poses

    @property
    def stamp_ns(self) -> int:
        """Acquisition time of the newest view, the last to arrive, 0 while there is none."""
        return self.memory.stamp_ns

    def foresee(self, stamp_ns: int, T_world_camera: NDArray[np.float64]) -> Verdict | None:
        """What `observe` would say of a frame as far as its stamp and pose (4, 4) tell; None: it has to be seen."""
        return self.memory.foresee(stamp_ns, T_world_camera)

    def observe(self, frame: PosedFrame) -> Verdict:
        """Decides whether `frame` becomes a view of the scene; if so it waits for `encode_pending`."""
        return self.memory.observe(frame)

    def encode_pending(self, limit: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Encodes the newest `limit` of the frames that wait and returns how many; raises as `SceneMemory.encode`."""
        began = self._clock()
        views = self._encode(limit, should_stop)
        self.controller.learn("encode", encode_terms(views), self._clock() - began)
        return views

    def _encode(self, limit: int | None, should_stop: Callable[[], bool] | None = None) -> int:
        should_stop = should_stop and synchronised(should_stop, self.model.device)
        before = len(self.memory.pending), len(self.memory)
        try:
            return self.memory.encode(limit, should_stop)
        finally:
            if (len(self.memory.pending), len(self.memory)) != before:
                self.prepared.forget()

    def _encode_usable(self, limit: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """As `_encode`; what is given up costs nobody else more than a line of the log."""
        before = len(self.memory.pending)
        try:
            return self._encode(limit, should_stop)
        except ViewError as error:
            logger.warning("%s", error)
            return before - len(self.memory.pending)

    def scene(self) -> SpatialTokens | None:
        """The whole token map, or None while nothing has been seen."""
        return self.memory.tokens()

    def clear(self) -> None:
        """Forgets everything that was seen."""
        self.memory.clear()
        self.prepared.forget()

    def save(self, path: str | Path, frame_id: str = "map") -> None:
        """Writes the scene, frames that wait included, to a file; raises as `scene.storage.save_scene`."""
        self._encode_usable()
        self.memory.save(path, frame_id)

    def load(self, path: str | Path, frame_id: str = "map") -> int:
        """Replaces the scene by a saved one and returns its number of views; see `SceneMemory.load`."""
        views = self.memory.load(path, frame_id)
        self.prepared.forget()
        return views

    # --- questions ---

    def spliced(self, question: Question) -> tuple[Spliced, Block]:
        """The model's input for a question about the scene as it is, [system | spatial tokens | question], and the
        scene's part of it, one object as long as the scene stays the same.

        Raises:
            InvalidRequest: for a question that cannot be asked (see `check_question`), or too long for the context.
            NoScene: if the scene is empty.
        """
        prompt, clicks = self._prompt(question)
        self._check_scene()
        self._check_places(clicks)
        block = self.prepared.block(None)
        return self._splice(prompt, clicks, block), block

    def plans(self, question: Question) -> Table:
        """The plans that a question would have at this moment; needs a latency model.

        Raises:
            InvalidRequest: for a question that cannot be asked.
            ValueError: without a latency model.
        """
        return self.controller.table(
            self._situation(question, self._prompt(question)[0], pending=len(self.memory.pending))
        )

    @property
    def work_ahead(self) -> bool:
        """Whether there is something left that `prepare` could do."""
        if self.memory.pending:
            return True
        size = self.prepared.size(None) if len(self.memory) else 0
        wants_prefix = self.config.budget.reuse is Reuse.PREFIX and self.prepared.prefix is None
        return size > 0 and (size not in self.prepared.built or wants_prefix)

    def prepare(self, should_stop: Callable[[], bool] | None = None) -> None:
        """Does ahead of the next question what does not depend on it: new views, tokens, the scene's prefix.

        Ends within a layer of a model where should_stop() is true; what was finished by then is kept.
        """
        while self.memory.pending:
            try:
                if not self.encode_pending(1, should_stop):
                    return
            except ViewError as error:
                logger.warning("%s", error)
        if not self.work_ahead:
            return
        block = self.prepared.block(None)
        if self.config.budget.reuse is Reuse.PREFIX:
            prompt, clicks = self._prompt(Question("What is this?"))
            with suppress(Cancelled):
                should_stop = should_stop and synchronised(should_stop, self.model.device)
                self.prepared.read_prefix(self._splice(prompt, clicks, block), should_stop)

    def _prompt(self, question: Question) -> tuple[PromptIds, NDArray[np.float64]]:
        check_question(question)
        try:
            text, clicks = clicks_of(question, self.model.takes_clicks)
            check_points(clicks)
            return self.model.prompt(self.tokenizer, text, n_clicks=len(clicks), template=self.config.template), clicks
        except PromptError as error:
            raise InvalidRequest(str(error)) from error

    def _check_scene(self) -> None:
        if not len(self.memory):
            why = self.memory.problem or "no key frame with valid depth has been seen yet"
            raise NoScene(f"the scene is empty: {why}")

    def _check_places(self, clicks: NDArray[np.float64]) -> None:
        """Raises InvalidRequest for a point (n, 3) that is farther than FAR_CLICK from all that has been seen."""
        far = self.memory.distance(clicks)
        worst = int(far.argmax()) if len(far) else -1
        if worst >= 0 and far[worst] > FAR_CLICK:
            raise InvalidRequest(
                f"the point {clicks[worst].tolist()} is {far[worst]:.6g} m from what has been seen, more than "
                f"{FAR_CLICK:g} m"
            )

    def _splice(self, prompt: PromptIds, clicks: NDArray[np.float64], block: Block) -> Spliced:
        with torch.inference_mode():
            click_xyz = torch.from_numpy(clicks - self.memory.origin).float().to(self.model.device)
            published = self.config.upstream_numerics
            vectors = self.model.embed_clicks(click_xyz, published=published) if self.model.takes_clicks else None
            try:
                return self.model.splice(prompt, block.spatial, vectors)
            except SpliceError as error:
                raise InvalidRequest(str(error)) from error

    def ask(
        self,
        question: Question,
        *,
        arrived: float | None = None,
        on_text: Callable[[str, int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answers a question about everything that has been observed.

        Args:
            question: what is asked.
            arrived: when it arrived, on the session's clock; now if None. Time before this call counts as `queue`.
            on_text: called with (whole words so far, tokens so far) after every decode step; the answer's text begins
                with them.
            on_stage: called with the name of each stage as it begins.
            should_stop: polled between layers, of the vision tower too, and decode steps; True ends the answer as
                CANCELLED, and views that were being encoded wait on.

        Returns:
            An answer with a status. Where memory runs out the question is begun anew, smaller, once; then it is an
            ERROR that says where. What still raises is a defect of the model, the program or the machine.
        """
        now = self._clock()
        watch = Stopwatch(self._clock, now if arrived is None else arrived, on_stage or (lambda _: None))
        pace = self.controller.start(question, watch)
        answer = Answer(question, Status.OK, strategy=self.strategy.name, model_id=self.model_id, seed=self.config.seed)
        try:
            answer = self._within_memory(answer, watch, pace, on_text, should_stop or (lambda: False))
        except NoScene as error:
            answer = replace(answer, status=Status.NO_SCENE, status_message=str(error))
        except InvalidRequest as error:
            answer = replace(answer, status=Status.INVALID_REQUEST, status_message=str(error))
        except BudgetInfeasible as error:
            answer = replace(answer, status=Status.BUDGET_INFEASIBLE, status_message=str(error))
        except Cancelled:
            answer = replace(answer, status=Status.CANCELLED, status_message=f"cancelled during {watch.stage}")
        times = watch.finish()
        pace.answered(times)
        met = times.total <= (question.latency_budget_ms or math.inf)
        return replace(
            answer, times=times, budget_met=met, plan=pace.why, predicted=pace.predicted, decision=pace.decision
        )

    def _within_memory(
        self,
        answer: Answer,
        watch: Stopwatch,
        pace: Pace,
        on_text: Callable[[str, int], None] | None,
        should_stop: Callable[[], bool],
    ) -> Answer:
        """As `_answer`, and once more with a smaller plan if memory runs out on the way."""
        problems = []
        for attempt in ("", " again, with half the tokens and the strongest pruning"):
            try:
                return self._answer(answer, watch, pace, on_text, should_stop)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problems.append(f"out of memory{attempt} in the stage {watch.stage}: {describe(error)}")
            logger.warning("the question %r: %s", answer.question.text, problems[-1])
            self.prepared.forget()
            free_cached()
            pace.out_of_memory()
        return replace(answer, status=Status.ERROR, status_message="; ".join(problems), stamp_ns=self.stamp_ns)

    def _answer(
        self,
        answer: Answer,
        watch: Stopwatch,
        pace: Pace,
        on_text: Callable[[str, int], None] | None,
        should_stop: Callable[[], bool],
    ) -> Answer:
        question = answer.question
        prompt, clicks = self._prompt(question)
        if not self.memory.pending:
            self._check_scene()
        plan = pace.plan(self._situation(question, prompt, pending=len(self.memory.pending)))

        watch.begin("encode")
        encoded = self._encode_usable(plan.new_views, should_stop)
        if should_stop():
            raise Cancelled("stopped while views were encoded")
        pace.took("encode", encode_terms(encoded))
        self._check_scene()
        self._check_places(clicks)
        plan = pace.plan(self._situation(question, prompt))

        watch.begin("tokens")
        built = self.prepared.size(plan.max_tokens) in self.prepared.built
        block = self.prepared.block(plan.max_tokens)
        spliced = self._splice(prompt, clicks, block)
        answer = replace(answer, stamp_ns=self.stamp_ns, spatial_tokens=spliced.n_spatial)
        pace.took("tokens", token_terms(0 if built else spliced.n_spatial))
        plan = pace.plan(self._situation(question, prompt, block))
        limit = min(plan.answer_tokens, self._room(spliced))
        asked = min(question.max_new_tokens or self.config.max_new_tokens, self._room(spliced))

        watch.begin("prefill")
        policy = self._make_policy(plan.strategy)
        with torch.inference_mode(), self._read(plan, policy, spliced, block, should_stop, pace) as filled:
            report = token_report(self.model.decoder.size, block.tokens, filled.trace, spliced)
            answer = replace(
                answer,
                strategy="scene-prefix" if plan.reuse else plan.strategy.name,
                retained_tokens=int(report.retained.sum()),
                prefill_flops=self._prefill_flops(policy, filled.trace.spatial_per_layer, spliced),
                prefill_flops_unpruned=self._prefill_flops(policy, (spliced.n_spatial,) * self.n_layers, spliced),
                report=report,
            )
            watch.begin("decode")
            return self._write(answer, filled, limit, asked, pace, on_text, should_stop)

    @contextmanager
    def _read(
        self,
        plan: Plan,
        policy: Policy,
        spliced: Spliced,
        block: Block,
        should_stop: Callable[[], bool],
        pace: Pace,
    ) -> Iterator[Prefill]:
        """Reads the prompt as planned: over the scene's prefix, or in one go with the plan's gates."""
        if plan.reuse:
            ready = self.prepared.prefix is not None
            prefix = self.prepared.read_prefix(spliced, should_stop)
            rows = spliced.embeds[:, prefix.n_tokens :]
            with prefix.asking(rows, should_stop=should_stop) as filled:
                if ready:
                    pace.took("follow_up", follow_up_terms(rows.shape[1], prefix.n_tokens, self.n_layers))
                yield filled
            return
        layout = Layout(spliced.spatial_start, spliced.n_spatial, spliced.n_tokens)
        schedule, n_text = plan.strategy.schedule, spliced.n_tokens - spliced.n_spatial
        hurry = pace.reading(plan, spliced.n_spatial, n_text, policy.kept)
        filled = prefill(
            self.model.decoder,
            spliced.embeds,
            layout,
            schedule,
            policy,
            scene=block.scene,
            should_stop=should_stop,
            at_most=hurry,
        )
        pace.read(hurry)
        pace.took("prefill", read_terms(filled.trace.spatial_per_layer, spliced.n_spatial, n_text))
        yield filled

    def _write(
        self,
        answer: Answer,
        filled: Prefill,
        limit: int,
        asked: int,
        pace: Pace,
        on_text: Callable[[str, int], None] | None,
        should_stop: Callable[[], bool],
    ) -> Answer:
        """Decodes until the model ends, the limit (`asked` unless the plan is shorter), the deadline or a cancel.

        The model writes boxes as it sees the scene, from its origin; what leaves here is in the scene frame.
        """
        origin = _triple(self.memory.origin)
        ids: list[int] = []
        text, cached = "", sum(filled.cache.lengths)
        status, message = Status.OK, pace.warning
        for token in generate(self.model.decoder, filled, max_new_tokens=limit, eos_ids=self._eos):
            ids.append(token)
            text = self._decode(ids)
            if on_text is not None:
                on_text(self.model.move_boxes(whole_words(text), origin), len(ids))
            if should_stop():
                status, message = Status.CANCELLED, f"cancelled after {len(ids)} tokens"
                break
            least = min(limit, SHORTEST_ANSWER) if pace.hopeless else 1
            step = decode_terms(1, sum(filled.cache.lengths), self.n_layers)
            if least <= len(ids) < limit and pace.time_is_up(step):
                status = Status.TRUNCATED
                ended = f"the latency budget of {answer.question.latency_budget_ms} ms ended the answer"
                message = pace.warning or ended
                break
        steps = len(ids) - (status is not Status.OK or len(ids) == limit)
        pace.took("decode", decode_terms(max(0, steps), cached, self.n_layers))
        if status is Status.OK and len(ids) == limit:
            reached = f"the answer reached max_new_tokens = {limit}"
            short = f"the latency budget of {answer.question.latency_budget_ms} ms leaves an answer of {limit} tokens"
            status, message = Status.TRUNCATED, pace.warning or (reached if limit == asked else short)
        if status is not Status.OK and len(ids) < asked:
            text = whole_words(text)
        lengths = self.controller.lengths
        if status is Status.OK or len(ids) == asked:
            lengths.add(answer.question.text, len(ids))
        elif status is Status.TRUNCATED:
            lengths.add_cut(answer.question.text, len(ids), asked)
        boxes = tuple(
            Box(_triple(np.asarray(box[:3]) + origin), _triple(np.asarray(box[3:6]))) for box in self.model.boxes(text)
        )
        text = self.model.move_boxes(text, origin)
        return replace(answer, status=status, status_message=message, text=text, boxes=boxes)

    def _situation(
        self, question: Question, prompt: PromptIds, block: Block | None = None, *, pending: int = 0
    ) -> Situation:
        """What is to be planned for: `pending` views may still be encoded, and `block` is built already."""
        views, voxels = len(self.memory.asked), self.memory.asked.n_voxels
        limit = question.max_new_tokens or self.config.max_new_tokens
        n_system = prompt.n_system
        return Situation(
            n_spatial=voxels if block is None else len(block.tokens),
            max_spatial=self.model.sizes.max_spatial_tokens,
            views=views,
            pending=pending,
            tokens_per_view=voxels / views if views else float(self.memory.patches_per_view),
            n_system=n_system,
            n_question=prompt.n_tokens - n_system,
            answer_limit=limit,
            answer_expected=self.controller.lengths.of(question.text, limit, 95),
            answer_typical=self.controller.lengths.of(question.text, limit, 50),
            built=self.prepared.built,
            # The prefix is that of all tokens: it does not go with fewer.
            reuse=self.config.budget.reuse is Reuse.PREFIX
            and (block is None or len(block.tokens) == self.prepared.size(None)),
            prefix_ready=self.prepared.prefix is not None,
            prunable=block is None,
        )

    def _room(self, spliced: Spliced) -> int:
        context = self.model.sizes.context_length
        room = context - spliced.n_tokens
        if room < 1:
            raise InvalidRequest(f"the prompt of {spliced.n_tokens} tokens fills the context of {context}")
        return room

    def _decode(self, ids: list[int]) -> str:
        # A character may be spread over several byte tokens: hold an unfinished one back.
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()

    def _prefill_flops(self, policy: Policy, spatial_per_layer: tuple[int, ...], spliced: Spliced) -> float:
        decoder, n_text = self.model.decoder.size, spliced.n_tokens - spliced.n_spatial
        sizes = (decoder, spliced.n_spatial, spatial_per_layer, n_text, spliced.n_question)
        return flops.prefill_flops(decoder, spatial_per_layer, n_text) + flops.scoring_flops(policy, *sizes)


def _seed(strategy: Strategy, seed: int) -> dict[str, int]:
    return {"seed": seed} if strategy.policy == "random" and "seed" not in strategy.options else {}


def _eos_ids(tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
