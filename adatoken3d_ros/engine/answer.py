# SPDX-License-Identifier: Apache-2.0
"""What is asked and what comes back: plain values, the same for ROS, the command line and tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.scene.evidence import Evidence, Observed

if TYPE_CHECKING:
    from adatoken3d_ros.engine.budget.plans import Plan


class Status(IntEnum):
    """Outcome of a question; the numbers are those of adatoken3d/msg/Answer."""

    OK = 0
    NO_SCENE = 1
    BUSY = 2
    BUDGET_INFEASIBLE = 3
    TRUNCATED = 4
    CANCELLED = 5
    INVALID_REQUEST = 6
    ERROR = 7
    UNSURE = 8

    @property
    def answered(self) -> bool:
        """Whether there is an answer's text."""
        return self in (Status.OK, Status.TRUNCATED, Status.UNSURE)


def status_name(status: str, message: str) -> str:
    """The name of a status as people are told it: an answer that is OK but for what its message says is DEGRADED."""
    return "DEGRADED" if status == Status.OK.name and message else status


@dataclass(frozen=True, eq=False)
class Question:
    """A question about the scene.

    Attributes:
        text: the question in plain words.
        clicks: (n, 3) float64, points the question is about, scene frame, metres.
        latency_budget_ms: time from arrival to answer, milliseconds; None or 0 for no limit.
        max_new_tokens: longest answer in tokens; None for the scene's default.
        without: (n, 3) float64, places that are not seen: what lies in a voxel with one of them, scene frame, metres.
        only: (n, 3) float64, likewise, places besides which nothing is seen; none for the whole scene.
        candidates: texts whose probability as the whole answer is told beside the answer.
    """

    text: str
    clicks: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    latency_budget_ms: float | None = None
    max_new_tokens: int | None = None
    without: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    only: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Box:
    """Axis-aligned box in the scene frame: centre and size in metres."""

    centre: tuple[float, float, float]
    size: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class TokenReport:
    """What happened to each spatial token of one question, N tokens and L decoder layers.

    Attributes:
        xyz: (N, 3) float32 centroids, scene frame, metres.
        rgb: (N, 3) uint8 mean colours.
        contribution: (N,) float32 share of what the question drew from the scene; sums to 1 where it was measured.
        last_layer: (N,) int64 last decoder layer (0-based) that the token reached.
        retained: (N,) bool alive after the last gate.
        spatial_per_layer: (L,) spatial tokens seen by each layer.
        flops_per_layer: (L,) exact prefill FLOPs of each layer.
        lorenz_share_60: share of the contribution held by the least contributing 60 % of the tokens; NaN if unmeasured.
    """

    xyz: NDArray[np.float32]
    rgb: NDArray[np.uint8]
    contribution: NDArray[np.float32]
    last_layer: NDArray[np.int64]
    retained: NDArray[np.bool_]
    spatial_per_layer: tuple[int, ...]
    flops_per_layer: tuple[float, ...]
    lorenz_share_60: float


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer and what it cost.

    `stamp_ns` is the newest acquisition time in the scene that was used, 0 for none; `confirmed_ns` that of the newest
    frame that is part of it or was found to agree with it, which may be later. `strategy` and `model_id` are
    empty where the question never came to an engine. `plan` says for people how the question was answered and why so;
    `predicted` are the times that were expected (median, without the queue), None where nothing was known about times.
    `decision` is the last plan, with the rung and loss of all that was given up. `confidence` is how likely the text is
    right, from 0 to 1 (`engine.understanding`): 0 where the question was not understood, NaN where nobody can tell.
    `as_of_ns` is the acquisition time of the newest view that was used, 0 for none. `verdict` and its reason say what
    is known of what was asked about, and `evidence` what that rests on, in the order of the message; `coverage` is
    the share of the place in question that was ever seen, NaN where there is none. `goal` is where to drive to look at
    the evidence, T_world_goal (4, 4), x forwards and z up; None with a `goal_reason`. Where the question names
    candidates, `probability` is how probable the model finds the text as the whole answer, NaN for one that was cut,
    and `candidate_probabilities` how probable the candidates; finding that out is not part of the times.
    """

    question: Question
    status: Status
    text: str = ""
    status_message: str = ""
    boxes: tuple[Box, ...] = ()
    stamp_ns: int = 0
    times: StageTimes = StageTimes()
    budget_met: bool = True
    spatial_tokens: int = 0
    retained_tokens: int = 0
    prefill_flops: float = 0.0
    prefill_flops_unpruned: float = 0.0
    strategy: str = ""
    model_id: str = ""
    seed: int = 0
    report: TokenReport | None = None
    plan: str = ""
    predicted: StageTimes | None = None
    decision: Plan | None = None
    confidence: float = math.nan
    confirmed_ns: int = 0
    as_of_ns: int = 0
    verdict: Observed = Observed.UNKNOWN
    verdict_reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    coverage: float = math.nan
    goal: NDArray[np.float64] | None = None
    goal_reason: str = ""
    probability: float = math.nan
    candidate_probabilities: tuple[float, ...] = ()
