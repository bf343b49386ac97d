# SPDX-License-Identifier: Apache-2.0
"""Prompts and schedules, and what it means that a prefill equals its oracle."""

from __future__ import annotations

import torch

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import (
    Prefill,
    prefill,
)
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import (
    Rope,
)
from tests.decoder.oracle import N_LAYERS, Prompt, make_prompt, oracle_logits

SINGLE = make_prompt(5, 40, 7)
# Others, and some without a spatial token, with one, and with no text before the scene.
PROMPTS = [SINGLE, *(make_prompt(*sizes) for sizes in ((3, 31, 1), (9, 12, 11), (5, 0, 7), (0, 31, 1), (2, 1, 3)))]
SCHEDULES = {
    "no gate": Schedule(),
    "one": Schedule.of([2], [0.5]),
    "before the model": Schedule.of([0], [0.4]),
    "two": Schedule.of([1, 4], [0.6, 0.2]),
    "three": Schedule.of([1, 2, 5], [0.9, 0.5, 0.1]),
    "four": Schedule.of([1, 2, 3, 5], [0.8, 0.6, 0.3, 0.05]),
    "two, then none": Schedule.of([1, 3], [0.6, 0.2], withdraw_layer=5),
    "only withdrawal": Schedule((), withdraw_layer=3),
    "nothing from the start": Schedule.of([0, 2], [0.5, 0.1], withdraw_layer=0),
    "withdrawn before the second gate": Schedule.of([1, 4], [0.5, 0.1], withdraw_layer=2),
    "before the first and after the last layer": Schedule.of([0, N_LAYERS], [0.5, 0.1]),
}


def run(decoder: Decoder, prompt: Prompt, schedule: Schedule, policy: str, rope: Rope = "original") -> Prefill:
    scene = prompt.scene
    return prefill(decoder, prompt.embeds, prompt.layout, schedule, make_policy(policy), scene=scene, rope=rope)


def assert_equals_oracle(
    decoder: Decoder, prompt: Prompt, result: Prefill, n_steps: int, rope: Rope = "original"
) -> None:
    tokens = torch.randint(0, 199, (n_steps,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = oracle_logits(decoder, prompt, result.trace, tokens, renumber=rope == "renumber")
    actual = torch.stack([result.logits] + [decode(decoder, result, token) for token in tokens])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
