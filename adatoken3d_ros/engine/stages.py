# SPDX-License-Identifier: Apache-2.0
"""The stages that a question goes through, and how long each took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageTimes:
    """Disjoint stages in milliseconds; `total` runs from the question's arrival to its answer.

    `queue` is waiting and choosing a plan.
    """

    queue: float = 0.0
    encode: float = 0.0
    tokens: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    total: float = 0.0


STAGES = ("queue", "encode", "tokens", "prefill", "decode")  # of StageTimes, in their order
