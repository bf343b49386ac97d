# SPDX-License-Identifier: Apache-2.0
"""A question through its stages: encode, tokens, prefill, decode, each planned anew by what time is left."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.decoder.decode import chance, generate, surest
from adatoken3d_ros.decoder.prefill import Cancelled, Prefill, prefill
from adatoken3d_ros.engine.answer import Answer, Box, Question, Status
from adatoken3d_ros.engine.budget.deadline import BudgetInfeasible, DeadlineGuard
from adatoken3d_ros.engine.budget.latency import decode_terms, encode_terms, follow_up_terms, read_terms, token_terms
from adatoken3d_ros.engine.budget.plans import SHORTEST_ANSWER, Plan
from adatoken3d_ros.engine.knowing import Recalled, guessed, what_is_known
from adatoken3d_ros.engine.out_of_memory import describe, free_cached, is_out_of_memory
from adatoken3d_ros.engine.pointing import meant, told
from adatoken3d_ros.engine.prepared import Block, Objects
from adatoken3d_ros.engine.recalling import recall
from adatoken3d_ros.engine.report import prefill_flops, token_report
from adatoken3d_ros.engine.requests import InvalidRequest, clicks_of
from adatoken3d_ros.engine.scene import ContradictoryScene, NoScene, Scene
from adatoken3d_ros.engine.stages import Stopwatch
from adatoken3d_ros.engine.words import whole_words
from adatoken3d_ros.lmm.interface import PromptIds, Spliced
from adatoken3d_ros.pruning.view import Policy

logger = logging.getLogger(__name__)

# What a question that ends without an answer is told, by what was raised; wherever it is asked.
UNANSWERED: dict[type[Exception], Status] = {
    NoScene: Status.NO_SCENE,
    ContradictoryScene: Status.ERROR,
    InvalidRequest: Status.INVALID_REQUEST,
    BudgetInfeasible: Status.BUDGET_INFEASIBLE,
}


def answer(
    scene: Scene,
    question: Question,
    *,
    arrived: float,
    on_text: Callable[[str, int], None] | None,
    on_stage: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Answer:
    """The answer to a question; see `Engine.ask`."""
    watch = Stopwatch(scene.runtime.clock, arrived, on_stage)
    guard = DeadlineGuard(scene.controller, question.latency_budget_ms or None, watch)
    model_id, seed = scene.runtime.model_id, scene.config.seed
    asked = scene.resolved(question)
    found = Answer(asked, Status.OK, strategy=scene.strategy.name, model_id=model_id, seed=seed)
    try:
        with scene.seen_by(question):

            def by_model(known: Answer, aloud: bool) -> Answer:
                return _Answering(scene, known, watch, guard, on_text if aloud else None, should_stop).within_memory()

            found = recall(scene, found, question.text, by_model)
    except tuple(UNANSWERED) as error:
        found = replace(found, status=UNANSWERED[type(error)], status_message=str(error))
    except Cancelled:
        found = replace(found, status=Status.CANCELLED, status_message=f"cancelled during {watch.stage}")
    times = watch.finish()
    guard.finish(times)
    met = times.total <= (question.latency_budget_ms or math.inf)
    if found.report is not None and found.status.answered:
        short = guard.shortfall(times.total, sum(found.report.spatial_per_layer), scene.usual_reading)
        found = replace(found, status_message="; ".join(filter(None, (found.status_message, short))))
    return replace(
        found,
        question=question,
        times=times,
        budget_met=met,
        plan=guard.why,
        predicted=guard.predicted,
        decision=guard.decision,
    )


class _Answering:
    """One question on its way; `answer` is what is known of its answer so far."""

    def __init__(
        self,
        scene: Scene,
        answer: Answer,
        watch: Stopwatch,
        guard: DeadlineGuard,
        on_text: Callable[[str, int], None] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self.scene, self.runtime, self.answer = scene, scene.runtime, answer
        self.watch, self.guard = watch, guard
        self.on_text, self.should_stop = on_text, should_stop

    def set(self, **known: Any) -> None:
        """Notes what is known of the answer."""
        self.answer = replace(self.answer, **known)

    def within_memory(self) -> Answer:
        """As `run`, and once more with a smaller plan if memory runs out on the way."""
        begun, problems = self.answer, []
        for attempt in ("", " again, with half the tokens and the strongest pruning"):
            try:
                self.run()
                return self.answer
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problems.append(f"out of memory{attempt} in the stage {self.watch.stage}: {describe(error)}")
            logger.warning("the question %r: %s", begun.question.text, problems[-1])
            self.answer = begun
            self.scene.prepared.forget()
            free_cached()
            self.guard.small = True
        return replace(begun, status=Status.ERROR, status_message="; ".join(problems), **self._seen())

    def _seen(self) -> dict[str, Any]:
        """When what the answer is about was seen."""
        newest = self.scene.stamp_ns  # is always among the views that are used
        return {"stamp_ns": newest, "as_of_ns": newest, "confirmed_ns": self.scene.confirmed_ns}

    def run(self) -> None:
        """The stages."""
        scene, guard, question = self.scene, self.guard, self.answer.question
        prompt, clicks = scene.prompt(question, pending=True)
        pending = len(scene.memory.pending)
        if not pending:
            scene.check(clicks[:0])
        plan = guard.plan(scene.situation(question, prompt, pending=pending))

        self.watch.begin("encode")
        encoded = scene.encode_usable(plan.new_views, self.should_stop)
        if self.should_stop():
            raise Cancelled("stopped while views were encoded")
        guard.record("encode", encode_terms(encoded))
        scene.check(clicks)
        if pending and (scene.config.tell_poses or (self.runtime.model.writes_clicks and len(clicks))):
            prompt, clicks = scene.prompt(question)  # in words of the views that there are now
        plan = guard.plan(scene.situation(question, prompt))

        self.watch.begin("tokens")
        built = scene.prepared.size(plan.max_tokens) in scene.prepared.built
        block = scene.prepared.block(plan.max_tokens)
        spliced = scene.splice(prompt, clicks, block)
        self.set(spatial_tokens=spliced.n_spatial, **self._seen())
        guard.record("tokens", token_terms(0 if built else spliced.n_spatial))
        objects = scene.objects() if prompt.points else None
        plan = guard.plan(scene.situation(question, prompt, block))
        room = self._room(spliced)

        self.watch.begin("prefill")
        policy, size = scene.make_policy(plan.strategy), self.runtime.model.decoder.size
        with torch.inference_mode(), self._prefilled(plan, policy, spliced, block) as filled:
            report = token_report(size, block.tokens, filled.trace)
            self.set(
                strategy="scene-prefix" if plan.reuse else plan.strategy.name,
                retained_tokens=int(report.retained.sum()),
                prefill_flops=prefill_flops(size, policy, filled.trace, spliced),
                prefill_flops_unpruned=prefill_flops(size, policy, None, spliced),
                report=report,
            )
            seconds = self.watch.stage_seconds
            self.watch.begin("decode")
            if objects is not None:
                self._point(filled, objects)
            else:
                longest = question.max_new_tokens or scene.config.max_new_tokens
                self._write(filled, limit=min(plan.answer_tokens, room), asked=min(longest, room))
        del filled  # its keys and values
        if self.answer.status.answered:
            with guard.beside():
                recalled = self._recall(plan, prompt, clicks, block, seconds)
            find_out = scene.find_out or what_is_known
            self.set(**find_out(scene.memory, scene.config, self.answer, clicks, recalled))
            self.answer = guessed(self.answer, clicks)

    @torch.inference_mode()
    def _recall(
        self, plan: Plan, prompt: PromptIds, clicks: NDArray[np.float64], block: Block, seconds: float
    ) -> Recalled | None:
        """What the question draws on as if nothing had gone.

        None where nothing has, or it would not be looked at: a place is asked about, nothing was measured, or the
        question was not understood; or where there is no memory or time for it. It is not begun with less time left
        than twice `seconds`, which the prefill took, and ends within a layer of the deadline.
        """
        scene, guard = self.scene, self.guard
        report = self.answer.report
        measured = report is not None and bool(report.contribution.sum() > 0) and bool(plan.strategy.schedule.stages)
        if len(clicks) or not measured or self.answer.confidence == 0.0:
            return None

        def should_stop() -> bool:
            return guard.time_left <= 0 or self.should_stop()

        if guard.time_left < 2 * seconds or self.should_stop():
            return None
        model = self.runtime.model
        most = model.sizes.max_spatial_tokens
        found = scene.memory.past.with_the_gone(block.tokens, scene.memory.asked, most, model.lift_places)
        if found is None:
            return None
        tokens, owner = found
        try:
            with_gone = scene.prepared.block_of(tokens)
            spliced = scene.splice(prompt, clicks, with_gone)
            filled = prefill(
                model.decoder,
                spliced.embeds,
                spliced.layout,
                plan.strategy.schedule,
                scene.make_policy(plan.strategy),
                scene=with_gone.scene,
                should_stop=should_stop,
                bucket=plan.bucket,
            )
        except (InvalidRequest, Cancelled):  # too long with it, or nobody waits: the answer is there
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "the question %r was not asked as if nothing had gone: %s", self.answer.question.text, describe(error)
            )
            return None
        share = filled.trace.contribution.float().cpu().numpy()
        return Recalled(tokens.xyz.float().cpu().numpy(), share, owner)

    def _room(self, spliced: Spliced) -> int:
        """Tokens that the context has left for the answer."""
        context = self.runtime.model.sizes.context_length
        room = context - spliced.n_tokens
        if room < 1:
            raise InvalidRequest(f"the prompt of {spliced.n_tokens} tokens fills the context of {context}")
        return room

    @contextmanager
    def _prefilled(self, plan: Plan, policy: Policy, spliced: Spliced, block: Block) -> Iterator[Prefill]:
        """Reads the prompt as planned: over the scene's prefix, or in one go with the plan's gates."""
        decoder, prepared, guard = self.runtime.model.decoder, self.scene.prepared, self.guard
        if plan.reuse:
            ready = prepared.prefix is not None
            prefix = prepared.read_prefix(spliced, self.should_stop)
            rows = spliced.embeds[:, prefix.n_tokens :]
            with prefix.asking(rows, should_stop=self.should_stop) as filled:
                if ready:
                    guard.record("follow_up", follow_up_terms(rows.shape[1], prefix.n_tokens, len(decoder)))
                yield filled
            return
        n_text = spliced.n_tokens - spliced.n_spatial
        hurry = guard.hurry(plan, spliced.n_spatial, n_text, policy.kept)
        # The budget's table knows prefills of whole prompts; where there is no budget, the scene's share is kept.
        stems = prepared.stems if not self.answer.question.latency_budget_ms and prepared.may_keep_stem else None
        used = prepared.stems.used
        filled = prefill(
            decoder,
            spliced.embeds,
            spliced.layout,
            plan.strategy.schedule,
            policy,
            scene=block.scene,
            should_stop=self.should_stop,
            at_most=hurry,
            stems=stems,
            bucket=plan.bucket,
        )
        guard.record_drops(hurry)
        if prepared.stems.used == used:
            guard.record("prefill", read_terms(filled.trace.counted(n_text), spliced.n_spatial, n_text))
        yield filled

    def _point(self, filled: Prefill, objects: Objects) -> None:
        """Which of the boxes are meant, by what the last layer made of the prompt's last row."""
        chances = self.runtime.model.point_at(filled.last, objects.tokens).double().cpu().numpy()
        if not np.isfinite(chances).all():
            why = "the model's grounding head gave numbers that are not finite (NaN or infinite)"
            self.set(status=Status.ERROR, status_message=why)
            return
        chosen = meant(chances)
        text = told(objects.boxes, chances, chosen)
        if self.on_text is not None:
            self.on_text(text, 1)
        boxes = tuple(Box(_triple(box[:3]), _triple(box[3:])) for box in objects.boxes[chosen])
        self.set(status_message=self.guard.warning, text=text, boxes=boxes)

    def _write(self, filled: Prefill, limit: int, asked: int) -> None:
        """Decodes until the model ends, the limit (`asked` unless the plan is shorter), the deadline or a cancel.

        The model writes boxes as it sees the scene, from its origin; what leaves here is in the scene frame.
        """
        model, guard, question = self.runtime.model, self.guard, self.answer.question
        decoder = model.decoder
        origin = _triple(self.scene.memory.origin)
        ids: list[int] = []
        text, cached, read, begun = "", sum(filled.cache.lengths), filled.cache.lengths, filled.next_position
        status, message = Status.OK, guard.warning
        sure = surest(filled.logits)
        for token in generate(decoder, filled, max_new_tokens=limit, eos_ids=self.runtime.eos_ids):
            ids.append(token)
            text = self.runtime.decode(ids)
            if self.on_text is not None:
                self.on_text(model.move_boxes(whole_words(text), origin), len(ids))
            if self.should_stop():
                status, message = Status.CANCELLED, f"cancelled after {len(ids)} tokens"
                break
            least = min(limit, SHORTEST_ANSWER) if guard.hopeless else 1
            step = decode_terms(1, cached + (len(ids) - 1) * len(decoder), len(decoder))
            if least <= len(ids) < limit and guard.time_is_up(step):
                ended = f"the latency budget of {question.latency_budget_ms} ms ended the answer"
                status, message = Status.TRUNCATED, guard.warning or ended
                break
        steps = len(ids) - (status is not Status.OK or len(ids) == limit)
        guard.record("decode", decode_terms(max(0, steps), cached, len(decoder)))
        if status is Status.OK and len(ids) == limit:
            reached = f"the answer reached max_new_tokens = {limit}"
            short = f"the latency budget of {question.latency_budget_ms} ms leaves an answer of {limit} tokens"
            status, message = Status.TRUNCATED, guard.warning or (reached if limit == asked else short)
        if status is not Status.OK and len(ids) < asked:
            text = whole_words(text)
        lengths = self.scene.controller.lengths
        if status is Status.OK or len(ids) == asked:
            lengths.add(question.text, len(ids))
        elif status is Status.TRUNCATED:
            lengths.add_cut(question.text, len(ids), asked)
        boxes = tuple(
            Box(_triple(np.asarray(box[:3]) + origin), _triple(np.asarray(box[3:6]))) for box in model.boxes(text)
        )
        if model.lifts_boxes and (seen := self.scene.memory.seen()) is not None:
            boxes += tuple(Box(_triple(box[:3]), _triple(box[3:6])) for box in model.lift_boxes(text, seen))
        if question.candidates:
            filled.cache.roll_back(read)
            filled.next_position = begun
            self._weigh(filled, ids if status in (Status.OK, Status.UNSURE) else None)
        self.set(text=model.move_boxes(text, origin), boxes=boxes, **self._judged(status, message, sure, text))

    def _weigh(self, filled: Prefill, own: list[int] | None) -> None:
        """How probable the candidates are as answers to a prompt that was read, and the whole answer `own`, if any."""
        runtime, decoder = self.runtime, self.runtime.model.decoder
        with self.watch.aside():
            texts = self.answer.question.candidates
            tokens = [runtime.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            chances = tuple(chance(decoder, filled, ids, runtime.eos_ids) for ids in tokens)
            mine = math.nan if own is None else chance(decoder, filled, own, runtime.eos_ids)
        self.set(candidate_probabilities=chances, probability=mine)

    def _judged(self, status: Status, message: str, probability: float, said: str) -> dict[str, Any]:
        """Status, message and confidence of the answer `said`, whose first token had this probability."""
        if not status.answered:
            return {"status": status, "status_message": message}
        known, limit = self.runtime.understanding, self.scene.config.unsure_below
        text, clicks = clicks_of(self.answer.question, True)
        family, strange = known.judge(text, len(clicks))
        confidence = 0.0 if strange else known.confidence(probability, family)
        if not strange and known.says_unknown(said):
            strange = "the model says that it does not know"
        if not strange and confidence < limit:  # NaN is not
            strange = f"the confidence of {confidence:.2f} is below {limit:g}"
        if strange:
            message = "; ".join(filter(None, [strange, message]))
            status = Status.UNSURE if status is Status.OK else status
        return {"status": status, "status_message": message, "confidence": confidence}


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z
