# SPDX-License-Identifier: Apache-2.0
"""A training run's recipe: how long, how fast, what is asked, and which of a scene's tokens are left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Questions of each family asked of a scene: at first mostly what one token tells, then everything.
_EARLY = {
    **{"class": 5, "colour": 4, "existence": 4, "count": 2, "on": 2},
    **dict.fromkeys(("nearest", "taller", "larger"), 1),
    **dict.fromkeys(("distance", "closer", "direction", "box"), 3),
}
# More of those of which a room has few that are clear: about as many of each come of it.
_LATE = {
    **{"existence": 3, "count": 6, "colour": 2, "class": 3, "nearest": 8, "on": 4},
    **{"direction": 4, "closer": 3, "taller": 6, "larger": 6, "distance": 5, "box": 5},
}

# Where tokens are those of views: a scene has at most 392 and the ends of 56 rows, and each digit is a token.
OF_VIEWS: Mapping[str, Any] = {
    "sizes": ((160, 4), (288, 3), (480, 2)),
    "groups": ((6, 16), (12, 24), (5, 32), (3, 64)),
}


class TrainingError(ValueError):
    """A run that cannot be started or resumed; the message names the setting or file."""


@dataclass(frozen=True)
class TrainConfig:
    """A run's recipe.

    Attributes:
        steps: of the optimizer. batches: of scenes, whose gradients are added in each of them.
        processes: that share the batches, in one group of torch.distributed; the result is the same, to the bit.
        rate: learning rate. It rises in the first `warmup` steps, and again where the language model begins to learn,
            and falls to a twentieth in the last `decay` of all steps.
        align: first steps, in which only projector and position embedding learn, from what each token shows: without
            the language model these cost a tenth, and what it reads makes sense from its first step on.
        heads_first: first steps, in which only the heads of the losses on tokens learn: they begin at random, and what
            they would ask of a model that is trained already is noise.
        early: steps after the aligned ones with mostly simple questions.
        sizes: (rows of a prefix, scenes) of the kinds of batches, and `mix`, how often each is taken; in the early
            steps the first always is. A scene loses tokens at random until it fits: what words mean is learned from a
            few tokens in a third of the time, and a model does not mind which of them are there.
        thinnest: parts of the tokens that scenes of the first kind keep: of those that show something, of the others.
            Of the last kind they keep all that fits, of those between a random part.
        groups: (questions a scene, rows a question): room for most of these. What finds no place is left out.
        auxiliary: factor of the losses on tokens and attention.
        guided_heads: heads whose attention is shown what to look at. noise: deviation of noise on vision features.
        blind: train without spatial tokens, to see what can be guessed.
        simulated: part of the scenes whose detector's evidence is simulated, `strange`: of those whose other features
            say nothing besides (`variants.detected`), where the tower has a detector and tokens are voxels.
        unseen: questions a scene about places that no view shows, at most.
        turns: parts of the furniture models that are left out in turn, `turn` steps each: what comes back was not seen
            for so long that its class has to be told by what others of the class look like. 0: none is.
        told: distances say in more wordings from where to where they are.
        autocast: matrix products in bfloat16.
        compiled: layers by torch.compile, which needs a C++ compiler and some minutes at first.
    """

    steps: int = 4000
    seed: int = 0
    batches: int = 2
    processes: int = 1
    rate: float = 1.5e-3
    warmup: int = 150
    decay: float = 0.25
    weight_decay: float = 0.05
    clip: float = 1.0
    heads_first: int = 0
    align: int = 1000
    early: int = 800
    sizes: tuple[tuple[int, int], ...] = ((128, 4), (384, 3), (768, 2))
    mix: tuple[float, ...] = (0.25, 0.4, 0.35)
    thinnest: tuple[float, float] = (0.25, 0.05)
    groups: tuple[tuple[int, int], ...] = ((16, 16), (9, 24), (4, 32), (6, 40))
    auxiliary: float = 1.5
    guided_heads: int = 2
    noise: float = 0.3
    simulated: float = 0.25
    strange: float = 0.35
    unseen: int = 0
    turns: int = 0
    turn: int = 100
    told: bool = False
    blind: bool = False
    autocast: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batches", "rate", "clip", "turn"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("decay", "simulated", "strange"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.simulated + self.strange > 1:
            raise TrainingError(f"simulated {self.simulated} and strange {self.strange} are more than 1 together")
        for name in ("seed", "heads_first", "align", "early", "unseen"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.turns < 0 or self.turns == 1:
            raise TrainingError(f"turns must be 0 or 2 and more, got {self.turns}")
        if self.processes < 1 or self.batches % self.processes:
            raise TrainingError(f"{self.batches} batches a step cannot be shared by {self.processes} processes")

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        falling = min(1.0, max(0.05, (self.steps - step) / max(1.0, self.decay * self.steps)))
        begun = step - self.align if step >= self.align else step
        return self.rate * min(1.0, (begun + 1) / max(1, self.warmup)) * falling

    def left_out(self, step: int) -> int | None:
        """Which of the `turns` parts of the furniture models the step leaves out, if any."""
        return step // self.turn % self.turns if self.turns else None

    def kind(self, step: int) -> int:
        """Index of the step's size; without tokens there is nothing to thin."""
        if self.blind or step < self.align + self.early:
            return 0
        return int(np.random.default_rng([self.seed, 2, step]).choice(len(self.sizes), p=self.mix))

    def kept(self, kind: int, rng: np.random.Generator) -> tuple[float, float]:
        """Parts of the tokens that a scene of this size keeps: of those that show something, of the others."""
        items, rest = self.thinnest
        if kind == 0:
            return items, rest
        if kind == len(self.sizes) - 1:
            return 1.0, 1.0
        return max(items, float(rng.uniform()) ** 0.5), max(rest, float(rng.uniform()))

    def counts(self, step: int) -> Mapping[str, int]:
        """Questions of each family."""
        return _EARLY if step < self.align + self.early else _LATE
