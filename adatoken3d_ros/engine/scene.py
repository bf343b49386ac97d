# SPDX-License-Identifier: Apache-2.0
"""A scene: what one robot has seen, and how its questions are answered. It knows nothing of ROS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.decoder.prefill import Cancelled
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.budget.controller import Controller, Reuse
from adatoken3d_ros.engine.budget.latency import encode_terms
from adatoken3d_ros.engine.budget.plans import Situation, Table
from adatoken3d_ros.engine.budget.warmup import synchronised
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.prepared import Block, Objects, Prepared
from adatoken3d_ros.engine.requests import FAR_CLICK, InvalidRequest, check_points, check_question, clicks_of
from adatoken3d_ros.engine.runtime import Runtime
from adatoken3d_ros.engine.scene_memory import SceneMemory, ViewError
from adatoken3d_ros.engine.selection import is_narrowed, left, narrowed
from adatoken3d_ros.lmm.interface import PromptIds, Spliced, SpliceError
from adatoken3d_ros.lmm.text_places import PromptError
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.strategy import Strategy, default_strategy
from adatoken3d_ros.pruning.view import Policy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import Verdict
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens
from adatoken3d_ros.scene.storage import Packed
from adatoken3d_ros.settings import DEFAULTS

logger = logging.getLogger(__name__)


class NoScene(Exception):
    """There is nothing yet that a question could be about; the message says why."""


class ContradictoryScene(Exception):
    """What has been seen cannot be true; the message says why, and what is probably wrong."""


class Scene:
    """One robot's views and their tokens, its strategy and what is known of its answers.

    `observe` decides whether a frame is kept, `encode_pending` turns kept frames into spatial tokens (once each),
    `prepare` does what can be done before a question, and the engine answers. None of them is thread safe.
    Budgets are kept by `controller`, which needs a runtime that has warmed up to do more than end an answer at its
    deadline.

    Args:
        runtime: the engine that answers its questions.
        config: what the scene may be told.
        strategy: of pruning; the model's own default without one.

    Attributes:
        find_out: in the place of `knowing.what_is_known`, where that is known elsewhere.
        wake: has the worker that owns it, if any, look again whether there is work ahead. Any thread.

    Raises:
        StrategyError: if the strategy was made for another model.
        ScheduleError: if the strategy has a gate outside the model.
    """

    find_out: Callable[..., dict[str, Any]] | None = None
    wake: Callable[[], object] = staticmethod(lambda: None)

    def __init__(
        self, runtime: Runtime, config: SessionConfig | None = None, *, strategy: Strategy | None = None
    ) -> None:
        self.runtime = runtime
        self.config = config or SessionConfig()
        self.memory = SceneMemory(runtime.model, self.config)
        self.prepared = Prepared(runtime.model, self.memory, self.config.memory_limit_mb * 1e6)
        first_gate = runtime.model.decoder.first_gate
        self.controller = Controller(runtime.n_layers, self.config.budget, runtime.latency, first_gate=first_gate)
        self.set_strategy(strategy or default_strategy("ours", runtime.n_layers, first_gate))

    def set_strategy(self, strategy: Strategy) -> None:
        """Uses another pruning strategy from the next question on; raises as the constructor does."""
        strategy.check(self.runtime.model.identity)
        strategy.schedule.check(self.runtime.n_layers, self.runtime.model.decoder.first_gate)
        self.make_policy(strategy)  # refuses options that there are not
        self.strategy = strategy
        fitted = [one for one in self.runtime.fitted.values() if one.policy == strategy.policy]
        self.controller.set_strategy(strategy, fitted)

    def make_policy(self, strategy: Strategy) -> Policy:
        """The strategy's policy; what draws random numbers draws them from the configured seed."""
        draws = strategy.policy == "random" and "seed" not in strategy.options
        return make_policy(strategy.policy, **strategy.options, **({"seed": self.config.seed} if draws else {}))

    @property
    def usual_reading(self) -> int:
        """Tokens that the strategy reads of the scene, summed over the layers."""
        kept = self.make_policy(self.strategy).kept
        return sum(self.strategy.schedule.counts(self.prepared.size(None), self.runtime.n_layers, kept))

    # --- frames ---

    @property
    def poses(self) -> dict[int, NDArray[np.float64]]:
        """{stamp in nanoseconds: T_world_camera (4, 4)} of the encoded views."""
        return self.memory.poses

    @property
    def stamp_ns(self) -> int:
        """Acquisition time of the newest view, the last to arrive, 0 while there is none."""
        return self.memory.stamp_ns

    @property
    def confirmed_ns(self) -> int:
        """As `SceneMemory.confirmed_ns`."""
        return self.memory.confirmed_ns

    def announce(self, stamp_ns: int, T_world_camera: NDArray[np.float64]) -> Verdict | None:
        """What `observe` would say of a frame as far as its stamp and pose (4, 4) tell; None: it has to be seen."""
        return self.memory.announce(stamp_ns, T_world_camera)

    def observe(self, frame: PosedFrame) -> Verdict:
        """Decides whether `frame` becomes a view of the scene; if so it waits for `encode_pending`."""
        carved = self.memory.carved
        verdict = self.memory.observe(frame)
        if self.memory.carved != carved:
            self.prepared.forget()
        return verdict

    def encode_pending(self, limit: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Encodes the newest `limit` of the frames that wait and returns how many; raises as `SceneMemory.encode`."""
        began = self.runtime.clock()
        views = self._encode(limit, should_stop)
        self.controller.learn("encode", encode_terms(views), self.runtime.clock() - began)
        return views

    def encode_usable(self, limit: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """As `encode_pending`, but teaches no times, and a view that is given up costs no more than a line of the log.

        Returns how many views no longer wait.
        """
        before = len(self.memory.pending)
        try:
            return self._encode(limit, should_stop)
        except ViewError as error:
            logger.warning("%s", error)
            return before - len(self.memory.pending)

    def _encode(self, limit: int | None, should_stop: Callable[[], bool] | None = None) -> int:
        should_stop = should_stop and synchronised(should_stop, self.runtime.model.device)
        before = len(self.memory.pending), len(self.memory)
        try:
            return self.memory.encode(limit, should_stop)
        finally:
            if (len(self.memory.pending), len(self.memory)) != before:
                self.prepared.forget()

    @property
    def nbytes(self) -> int:
        """Of views, what is known of free space, what has gone, and what is prepared for questions."""
        return self.memory.nbytes + self.prepared.nbytes

    def tokens(self) -> SpatialTokens | None:
        """The whole token map, or None while nothing has been seen."""
        return self.memory.tokens()

    def clear(self) -> None:
        """Forgets everything that was seen."""
        self.memory.clear()
        self.prepared.forget()

    def packed(self, frame_id: str = DEFAULTS["scene.frame_id"]) -> Packed:
        """The scene as it is, frames that wait included, to be written; raises SceneFileError if there is nothing."""
        self.encode_usable()
        return self.memory.packed(frame_id)

    def save(self, path: str | Path, frame_id: str = DEFAULTS["scene.frame_id"]) -> None:
        """Writes the scene, frames that wait included, to a file; raises as `packed`, and OSError."""
        self.packed(frame_id).write(path)

    def load(self, path: str | Path, frame_id: str = DEFAULTS["scene.frame_id"], *, merge: bool = False) -> int:
        """Replaces the scene by a saved one, or adds that, and returns its number of views; see `KeptScene.load`."""
        views = self.memory.load(path, frame_id, merge=merge)
        self.prepared.forget()
        return views

    def move(self, poses: Mapping[int, NDArray[np.float64]]) -> int:
        """Views were taken from elsewhere than was believed; see `KeptScene.move`."""
        moved = self.memory.move(poses)
        if moved:
            self.prepared.forget()
        return moved

    # --- ahead of a question ---

    @property
    def work_ahead(self) -> bool:
        """Whether there is something left that `prepare` could do."""
        if self.memory.pending:
            return True
        size = self.prepared.size(None) if len(self.memory) else 0
        wants_prefix = self._may_reuse and self.prepared.prefix is None
        return size > 0 and (size not in self.prepared.built or wants_prefix)

    @property
    def _may_reuse(self) -> bool:
        """Whether a prefix is wanted, and there is room for it."""
        prepared = self.prepared
        wanted = self.config.budget.reuse is Reuse.PREFIX
        return wanted and (prepared.prefix is not None or not len(self.memory) or prepared.may_keep_prefix)

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
        if self._may_reuse:
            spliced = self.splice(*self.prompt(Question("What is this?")), block)
            with suppress(Cancelled):
                should_stop = should_stop and synchronised(should_stop, self.runtime.model.device)
                self.prepared.read_prefix(spliced, should_stop)

    # --- a question about the scene as it is ---

    @contextmanager
    def seen_by(self, question: Question) -> Iterator[None]:
        """Within it, the scene is what the question is to see of it."""
        if not is_narrowed(question):
            yield
            return
        whole, self.prepared = self.prepared, Prepared(self.runtime.model, self.memory)
        views = set(self.memory.poses)
        self.memory.narrow(lambda token_map: narrowed(token_map, question))
        self.memory.past.narrow(lambda token_map: left(token_map, question))
        try:
            yield
        finally:
            self.memory.narrow(None)
            self.memory.past.narrow(None)
            self.prepared = whole
            if self.memory.poses.keys() != views:
                whole.forget()

    def prompt(self, question: Question, *, pending: bool = False) -> tuple[PromptIds, NDArray[np.float64]]:
        """The question's token ids, and its clicks (n, 3) in the scene frame, metres.

        With `pending` it is as long as it becomes once the views that wait are encoded, in other words perhaps.

        Raises:
            InvalidRequest: for a question that cannot be asked (see `check_question`).
        """
        check_question(question)
        try:
            model, tokenizer, template = self.runtime.model, self.runtime.tokenizer, self.config.template
            text, clicks = clicks_of(question, model.takes_clicks)
            check_points(clicks)
            if (wanted := model.description(text)) is not None and not model.grounds:
                raise InvalidRequest(
                    "the question asks which thing in the scene is meant, and this model has no grounding head to tell"
                )
            text, vectors = self.runtime.understanding.as_trained(text), len(clicks)
            if model.writes_clicks and vectors:
                text = model.write_clicks(text, clicks, self.memory.seen(), coordinates=self.config.tell_poses)
                vectors = 0
            if wanted is not None:
                return model.ground_prompt(tokenizer, wanted, n_clicks=vectors), clicks
            prompt = model.prompt(tokenizer, text, n_clicks=vectors, template=template)
            if self.config.tell_poses:
                prompt = model.tell_poses(tokenizer, prompt, self.memory.asked_poses(pending=pending))
            return prompt, clicks
        except PromptError as error:
            raise InvalidRequest(str(error)) from error

    def resolved(self, question: Question) -> Question:
        """The question with the places of the marks that it names, for a model that takes places."""
        if not self.runtime.model.takes_clicks:
            return question
        return replace(question, text=self.memory.marks.resolved(question.text))

    def check(self, clicks: NDArray[np.float64]) -> None:
        """Raises ContradictoryScene if its views contradict each other, NoScene if it is empty, InvalidRequest for a
        click (n, 3) that is farther than FAR_CLICK from all that has been seen.
        """
        if self.memory.contradiction:
            raise ContradictoryScene(self.memory.contradiction)
        if not len(self.memory):
            why = self.memory.problem or "no key frame with valid depth has been seen yet"
            raise NoScene(f"the scene is empty: {why}")
        if not self.memory.asked.n_tokens:
            raise NoScene("nothing of the scene is left: all that was seen lies in the places that are left out")
        if not len(clicks):
            return
        far = self.memory.distance(clicks)
        worst = int(far.argmax())
        if far[worst] > FAR_CLICK:
            raise InvalidRequest(
                f"the point {clicks[worst].tolist()} is {far[worst]:.6g} m from what has been seen, more than "
                f"{FAR_CLICK:g} m"
            )

    def objects(self) -> Objects:
        """What a question that points may mean; raises NoScene if there is nothing."""
        found = self.prepared.objects()
        if not len(found.boxes):
            floor = self.memory.floor
            where = "and no floor was found" if floor is None else f"above the floor at {round(floor, 2) + 0.0:.2f} m"
            raise NoScene(f"nothing to point at stands out in the scene: no cluster of the size of a thing {where}")
        return found

    @torch.inference_mode()
    def splice(self, prompt: PromptIds, clicks: NDArray[np.float64], block: Block) -> Spliced:
        """The model's input, [system | tokens of `block` | question].

        Raises:
            InvalidRequest: if it is too long for the context.
        """
        model = self.runtime.model
        click_xyz = torch.from_numpy(clicks - self.memory.origin).float().to(model.device)
        vectors = model.embed_clicks(click_xyz) if model.takes_clicks and not model.writes_clicks else None
        try:
            return model.splice(prompt, block.spatial, vectors, where=block.where)
        except SpliceError as error:
            raise InvalidRequest(str(error)) from error

    def spliced(self, question: Question) -> tuple[Spliced, Block]:
        """The model's input for a question with all tokens that the model takes, and the scene's part of it, one object
        as long as the scene stays the same.

        Raises:
            InvalidRequest, NoScene: as `prompt`, `check` and `splice`.
        """
        prompt, clicks = self.prompt(question)
        self.check(clicks)
        block = self.prepared.block(None)
        return self.splice(prompt, clicks, block), block

    def plans(self, question: Question) -> Table:
        """The plans that a question would have at this moment.

        Raises:
            InvalidRequest: for a question that cannot be asked.
            ValueError: without a latency model.
        """
        situation = self.situation(question, self.prompt(question, pending=True)[0], pending=len(self.memory.pending))
        return self.controller.table(situation)

    def situation(
        self, question: Question, prompt: PromptIds, block: Block | None = None, *, pending: int = 0
    ) -> Situation:
        """What is to be planned for: `pending` views may still be encoded, and `block` is built already."""
        views, voxels = len(self.memory.asked), self.memory.asked.n_tokens
        limit = 1 if prompt.points else question.max_new_tokens or self.config.max_new_tokens
        n_system, lengths = prompt.n_system, self.controller.lengths
        return Situation(
            n_spatial=voxels if block is None else len(block.tokens),
            max_spatial=self.runtime.model.sizes.max_spatial_tokens,
            views=views,
            pending=pending,
            tokens_per_view=voxels / views if views else float(self.memory.patches_per_view),
            n_system=n_system,
            n_question=prompt.n_tokens - n_system,
            answer_limit=limit,
            answer_expected=lengths.of(question.text, limit, 95),
            answer_typical=lengths.of(question.text, limit, 50),
            built=self.prepared.built,
            # The prefix is that of all tokens: it does not go with fewer.
            reuse=self._may_reuse and (block is None or len(block.tokens) == self.prepared.size(None)),
            prefix_ready=self.prepared.prefix is not None,
            prunable=block is None,
        )
