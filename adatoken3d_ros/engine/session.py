# SPDX-License-Identifier: Apache-2.0
"""The scene session: posed frames go in, questions are answered. One thread owns it; it knows nothing of ROS."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Answer, Box, Question, StageTimes, Status, TokenReport
from adatoken3d_ros.model.llava3d import Llava3D, Spliced
from adatoken3d_ros.model.prompt import build_prompt, parse_boxes, parse_clicks
from adatoken3d_ros.pruning import flops
from adatoken3d_ros.pruning.gate import Cancelled, GateTrace, Layout, SceneTokens, generate, prefill
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.strategy import Strategy, default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, KeyFrameSelector, Verdict
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.token_map import SpatialTokens, TokenMap


class InvalidRequest(ValueError):
    """A question that cannot be asked; the message names the offending value."""


@dataclass(frozen=True)
class SessionConfig:
    """What a session may be told.

    Attributes:
        key_frames: which frames are encoded, and how many views are kept.
        max_depth: metres; depth beyond it is not used.
        origin: scene-frame point that the model sees as its origin (the floor in the middle of the room), metres.
        max_new_tokens: longest answer, unless the question says otherwise.
        template: prompt template, `llava_v1` or `vicuna_v1`.
        upstream_numerics: reproduce the bf16 geometry and unmasked depth of the original implementation.
        seed: of everything that draws random numbers (the random policy).
    """

    key_frames: KeyFrameConfig = field(default_factory=KeyFrameConfig)
    max_depth: float = 10.0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    max_new_tokens: int = 64
    template: str = "llava_v1"
    upstream_numerics: bool = False
    seed: int = 0


class SceneSession:
    """A scene memory and the model that answers questions about it.

    `observe` decides whether a frame is kept, `encode_pending` turns kept frames into spatial tokens (once each), and
    `ask` answers. None of them is thread safe: `engine.worker.Worker` gives the session a thread of its own.

    Raises:
        StrategyError: if the strategy was made for another model.
        ScheduleError: if the strategy has a gate outside the model.
    """

    def __init__(
        self,
        model: Llava3D,
        tokenizer: Any,
        config: SessionConfig | None = None,
        *,
        strategy: Strategy | None = None,
        model_id: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or SessionConfig()
        self.model_id = model_id
        self._clock = clock
        self._patches = PatchConfig(
            image_size=model.config.image_size,
            grid=model.config.grid,
            max_depth=self.config.max_depth,
            upstream_numerics=self.config.upstream_numerics,
        )
        self._origin = np.asarray(self.config.origin, dtype=np.float64)
        self._selector = KeyFrameSelector(self.config.key_frames, self._patches)
        self._map = TokenMap(
            model.config.voxel_size, self.config.origin, upstream_numerics=self.config.upstream_numerics
        )
        self._pending: list[PosedFrame] = []
        self.poses: dict[int, NDArray[np.float64]] = {}
        self.set_strategy(strategy or default_strategy("ours", self.n_layers))

    @property
    def n_layers(self) -> int:
        return int(self.model.config.language.num_hidden_layers)

    def set_strategy(self, strategy: Strategy) -> None:
        """Uses another pruning strategy from the next question on; raises as the constructor does."""
        strategy.check(self.model.config.hash())
        strategy.schedule.check(self.n_layers)
        self._policy = make_policy(strategy.policy, **{**strategy.options, **_seed(strategy, self.config.seed)})
        self.strategy = strategy

    # --- the scene ---

    def observe(self, frame: PosedFrame) -> Verdict:
        """Decides whether `frame` becomes a view of the scene; if so it waits for `encode_pending`."""
        verdict = self._selector.decide(frame)
        if verdict == Verdict.KEY_FRAME:
            self._selector.accepted(frame)
            self._pending.append(frame)
        return verdict

    def encode_pending(self) -> int:
        """Encodes the frames that wait, one vision pass each in its life; returns how many."""
        frames, self._pending = self._pending, []
        if not frames:
            return 0
        points = [patch_points(frame, self._patches) for frame in frames]
        with torch.inference_mode():
            xyz = torch.stack([torch.from_numpy(p.xyz) for p in points])
            features = self.model.patch_features([frame.rgb for frame in frames], xyz - torch.from_numpy(self._origin))
            for frame, point, view_features in zip(frames, points, features, strict=True):
                self._map.add_view(frame.stamp_ns, view_features, point.xyz, point.rgb, point.valid)
                self.poses[frame.stamp_ns] = frame.T_world_camera
        while (stamp := self._selector.evict()) is not None:
            self._map.remove_view(stamp)
            self.poses.pop(stamp, None)
        return len(frames)

    def scene(self) -> SpatialTokens | None:
        """The whole token map, or None while nothing has been seen."""
        return self._map.tokens() if len(self._map) else None

    @property
    def stamp_ns(self) -> int:
        """Newest acquisition time in the scene, 0 while it is empty."""
        return max(self.poses, default=0)

    def clear(self) -> None:
        self._selector.clear()
        self._map.clear()
        self._pending.clear()
        self.poses.clear()

    # --- questions ---

    def spliced(self, question: Question) -> tuple[Spliced, SpatialTokens]:
        """The model's input for a question about the scene as it is, [system | spatial tokens | question].

        Raises:
            InvalidRequest: for a question that cannot be asked (see `check_question`), or too long for the context.
            LookupError: if the scene is empty.
        """
        check_question(question)
        if not len(self._map):
            raise LookupError("the scene is empty: no key frame with valid depth has been seen yet")
        cap = torch.Generator().manual_seed(self.config.seed) if self.config.upstream_numerics else None
        tokens = self._map.tokens(self.model.config.max_spatial_tokens, generator=cap)
        try:
            text, clicks = _clicks_of(question)
            prompt = build_prompt(self.tokenizer, text, n_clicks=len(clicks), template=self.config.template)
            with torch.inference_mode():
                spatial = self.model.project(tokens.features)
                click_xyz = torch.from_numpy(clicks - self._origin).float().to(self.model.device)
                return self.model.splice(prompt, spatial, self.model.embed_clicks(click_xyz)), tokens
        except ValueError as error:
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
            on_text: called with (text so far, tokens so far) after every decode step.
            on_stage: called with the name of each stage as it begins.
            should_stop: polled between decoder layers and decode steps; True ends the answer as CANCELLED.

        Returns:
            An answer with a status; what still raises is a defect of the model, the program or the machine.
        """
        now = self._clock()
        watch = _Stopwatch(self._clock, now if arrived is None else arrived, on_stage or (lambda _: None))
        answer = Answer(question, Status.OK, strategy=self.strategy.name, model_id=self.model_id, seed=self.config.seed)
        try:
            answer = self._answer(answer, watch, on_text, should_stop or (lambda: False))
        except LookupError as error:
            answer = replace(answer, status=Status.NO_SCENE, status_message=str(error))
        except InvalidRequest as error:
            answer = replace(answer, status=Status.INVALID_REQUEST, status_message=str(error))
        except Cancelled:
            answer = replace(answer, status=Status.CANCELLED, status_message="ended during prefill")
        times = watch.finish()
        budget = question.latency_budget_ms or math.inf
        return replace(answer, times=times, budget_met=times.total <= budget)

    def _answer(
        self,
        answer: Answer,
        watch: _Stopwatch,
        on_text: Callable[[str, int], None] | None,
        should_stop: Callable[[], bool],
    ) -> Answer:
        question = answer.question
        watch.begin("encode")
        self.encode_pending()
        watch.begin("tokens")
        spliced, tokens = self.spliced(question)
        answer = replace(answer, stamp_ns=self.stamp_ns, spatial_tokens=spliced.n_spatial)
        limit = self._answer_limit(question, spliced)

        watch.begin("prefill")
        layout = Layout.single(spliced.spatial_start, spliced.n_spatial, spliced.n_tokens)
        with torch.inference_mode():
            filled = prefill(
                self.model.language,
                spliced.embeds,
                layout,
                self.strategy.schedule,
                self._policy,
                scene=SceneTokens(tokens.xyz, tokens.features),
                should_stop=should_stop,
            )
            report = self._report(tokens, filled.trace, spliced)
            answer = replace(
                answer,
                retained_tokens=int(report.retained.sum()),
                prefill_flops=self._prefill_flops(filled.trace.spatial_per_layer, spliced),
                prefill_flops_unpruned=self._prefill_flops((spliced.n_spatial,) * self.n_layers, spliced),
                report=report,
            )
            watch.begin("decode")
            deadline = watch.arrived + (question.latency_budget_ms or math.inf) / 1e3
            eos = set(_eos_ids(self.tokenizer))
            ids: list[int] = []
            text = ""
            status, message = Status.OK, ""
            for token in generate(self.model.language, filled, max_new_tokens=limit, eos_ids=eos):
                ids.append(token)
                text = self._decode(ids)
                if on_text is not None:
                    on_text(text, len(ids))
                if should_stop():
                    status, message = Status.CANCELLED, f"ended after {len(ids)} tokens"
                    break
                if self._clock() >= deadline:
                    status = Status.TRUNCATED
                    message = f"the latency budget of {question.latency_budget_ms} ms ended the answer"
                    break
            if status == Status.OK and len(ids) == limit:
                status, message = Status.TRUNCATED, f"the answer reached max_new_tokens = {limit}"
        boxes = tuple(
            Box(_triple(np.asarray(box[:3]) + self._origin), _triple(np.asarray(box[3:6]))) for box in parse_boxes(text)
        )
        return replace(answer, status=status, status_message=message, text=text, boxes=boxes)

    def _answer_limit(self, question: Question, spliced: Spliced) -> int:
        context = self.model.config.context_length
        room = context - spliced.n_tokens
        if room < 1:
            raise InvalidRequest(f"the prompt of {spliced.n_tokens} tokens fills the context of {context}")
        return min(question.max_new_tokens or self.config.max_new_tokens, room)

    def _decode(self, ids: list[int]) -> str:
        # A character may be spread over several byte tokens: hold an unfinished one back.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip().rstrip("\N{REPLACEMENT CHARACTER}")

    def _prefill_flops(self, spatial_per_layer: tuple[int, ...], spliced: Spliced) -> float:
        config, n_text = self.model.config.language, spliced.n_tokens - spliced.n_spatial
        sizes = (config, spliced.n_spatial, spatial_per_layer, n_text, spliced.n_question)
        return flops.prefill_flops(config, spatial_per_layer, n_text) + flops.scoring_flops(self._policy, *sizes)

    def _report(self, tokens: SpatialTokens, trace: GateTrace, spliced: Spliced) -> TokenReport:
        config, n_text = self.model.config.language, spliced.n_tokens - spliced.n_spatial
        contribution = trace.contribution[0].float().cpu().numpy()
        return TokenReport(
            xyz=tokens.xyz.float().cpu().numpy(),
            rgb=tokens.rgb.cpu().numpy(),
            contribution=contribution,
            last_layer=trace.last_layer[0].cpu().numpy(),
            retained=trace.retained[0].cpu().numpy(),
            spatial_per_layer=trace.spatial_per_layer,
            flops_per_layer=tuple(flops.layer_flops(config, n + n_text) for n in trace.spatial_per_layer),
            lorenz_share_60=lorenz_share(contribution, 0.6),
        )


def check_question(question: Question) -> None:
    """Raises InvalidRequest, naming the value, for a question that no session can answer."""
    if not question.text.strip():
        raise InvalidRequest("the question is empty")
    clicks = question.clicks
    if clicks.ndim != 2 or clicks.shape[1] != 3:
        raise InvalidRequest(f"clicks must be (n, 3), got {clicks.shape}")
    if not np.isfinite(clicks).all():
        raise InvalidRequest(f"clicks must be finite, got {clicks.tolist()}")
    budget = question.latency_budget_ms
    if budget is not None and not 0 <= budget < math.inf:
        raise InvalidRequest(f"latency_budget_ms must be 0 (no limit) or positive, got {budget}")
    if question.max_new_tokens is not None and not 0 <= question.max_new_tokens <= 4096:
        raise InvalidRequest(f"max_new_tokens must be between 0 (the default) and 4096, got {question.max_new_tokens}")


def lorenz_share(contribution: NDArray[np.float32], q: float) -> float:
    """Share of the total held by the least contributing `q` of the tokens; NaN if nothing was measured."""
    total = float(contribution.sum())
    if not total > 0:
        return math.nan
    smallest = np.sort(contribution.astype(np.float64))[: math.floor(q * len(contribution))]
    return float(smallest.sum() / total)


class _Stopwatch:
    """Disjoint stages from the question's arrival on."""

    def __init__(self, clock: Callable[[], float], arrived: float, on_stage: Callable[[str], None]) -> None:
        self.arrived = arrived
        self._clock = clock
        self._on_stage = on_stage
        self._stage = "queue"
        self._since = arrived
        self._ms: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        self._close()
        self._stage = stage
        self._on_stage(stage)

    def finish(self) -> StageTimes:
        self._close()
        return StageTimes(**self._ms, total=(self._since - self.arrived) * 1e3)

    def _close(self) -> None:
        now = self._clock()
        self._ms[self._stage] = (now - self._since) * 1e3
        self._since = now


def _clicks_of(question: Question) -> tuple[str, NDArray[np.float64]]:
    """The question with its written points taken out, and all clicks in the order of their placeholders."""
    text, written = parse_clicks(question.text)
    return text, np.concatenate([np.asarray(written, dtype=np.float64).reshape(-1, 3), question.clicks])


def _seed(strategy: Strategy, seed: int) -> dict[str, int]:
    return {"seed": seed} if strategy.policy == "random" and "seed" not in strategy.options else {}


def _eos_ids(tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
