# SPDX-License-Identifier: Apache-2.0
"""What a scene may be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from adatoken3d_ros.engine.budget.controller import BudgetConfig
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.window import OriginMode


@dataclass(frozen=True)
class SessionConfig:
    """What a scene may be told.

    Attributes:
        key_frames: which frames are encoded, and how many views are kept.
        max_depth: metres; depth beyond it is not used.
        origin: scene-frame point that the model sees as its origin (the floor in the middle of the room), metres; where
            the origin follows what is seen, where it is until then.
        origin_mode: whether it does.
        question_views: views that a question is about where there are more; 0: as many as the model was trained with.
        max_new_tokens: longest answer, unless the question says otherwise.
        template: name of one of the model's prompt templates; empty: its own choice.
        upstream_numerics: reproduce the bf16 geometry and unmasked depth of the original implementation.
        seed: of everything that draws random numbers (the random policy).
        budget: how latency budgets are kept, and whether a scene's prefix is kept for the next question.
    """

    key_frames: KeyFrameConfig = field(default_factory=KeyFrameConfig)
    max_depth: float = 10.0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    origin_mode: OriginMode = OriginMode.FIXED
    question_views: int = 0
    max_new_tokens: int = 64
    template: str = ""
    upstream_numerics: bool = False
    seed: int = 0
    budget: BudgetConfig = field(default_factory=BudgetConfig)
