# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from adatoken3d_ros.pruning.gate import (
    Cancelled,
    GateError,
    Layout,
    Prefill,
    decode,
    generate,
    generate_batch,
    prefill,
)
from adatoken3d_ros.pruning.policies import GateView, PolicyError, Rope, SceneTokens, Selection, make_policy
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.pruning.oracle import N_LAYERS, Prompt, make_prompt, oracle_logits, tiny_llama

SINGLE = make_prompt((5,), (40,), (7,))
BATCH = make_prompt((5, 3, 9), (40, 31, 12), (7, 1, 11))
SCHEDULES = {
    "no gate": Schedule(),
    "one": Schedule.of([2], [0.5]),
    "before the model": Schedule.of([0], [0.4]),
    "two": Schedule.of([1, 4], [0.6, 0.2]),
    "three": Schedule.of([1, 2, 5], [0.9, 0.5, 0.1]),
    "four": Schedule.of([1, 2, 3, 5], [0.8, 0.6, 0.3, 0.05]),
    "two, then none": Schedule.of([1, 3], [0.6, 0.2], withdraw_layer=5),
    "only withdrawal": Schedule((), withdraw_layer=3),
}


def run(
    language: LlamaForCausalLM, prompt: Prompt, schedule: Schedule, policy: str, rope: Rope = "original"
) -> Prefill:
    scene = prompt.scene
    return prefill(language, prompt.embeds, prompt.layout, schedule, make_policy(policy), scene=scene, rope=rope)


def assert_equals_oracle(
    language: LlamaForCausalLM, prompt: Prompt, result: Prefill, n_steps: int, rope: Rope = "original"
) -> None:
    tokens = torch.randint(0, 199, (n_steps, len(result.logits)), generator=torch.Generator().manual_seed(3))
    expected = oracle_logits(language, prompt, result.trace, tokens, renumber=rope == "renumber")
    actual = torch.stack([result.logits] + [decode(language, result, step) for step in tokens])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", [SINGLE, BATCH], ids=["batch 1", "batch 3"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_equals_the_masked_full_length_run(language: LlamaForCausalLM, prompt: Prompt, schedule: Schedule) -> None:
    policy = "ours" if schedule.stages else "none"
    assert_equals_oracle(language, prompt, run(language, prompt, schedule, policy), n_steps=20)


@pytest.mark.parametrize("policy", ["random", "fastv", "pyramiddrop", "adatoken_release", "ours"])
@pytest.mark.parametrize("rope", ["original", "renumber"])
def test_every_dropping_policy_equals_its_oracle(language: LlamaForCausalLM, policy: str, rope: Rope) -> None:
    result = run(language, BATCH, SCHEDULES["two"], policy, rope)
    assert_equals_oracle(language, BATCH, result, n_steps=4, rope=rope)
