# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from adatoken3d_ros.decoder.adapter import size_of
from adatoken3d_ros.lmm.vision.clip import clip_flops
from adatoken3d_ros.pruning.flops import (
    Convention,
    FlopsError,
    decode_flops,
    layer_flops,
    prefill_flops,
    reduction,
    scoring_flops,
    three_conventions,
)
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import DecoderSize

VICUNA_7B = size_of(LlamaConfig())  # hidden 4096, MLP 11008, 32 layers, 32 heads
CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
SMALL = DecoderSize(n_layers=2, hidden=8, intermediate=10, vocabulary=100, queries=8, keys=4)
SCENE, TEXT = 1659, 61


def saved(schedule: Schedule, convention: Convention = "exact") -> float:
    pruned = prefill_flops(VICUNA_7B, schedule.counts(SCENE, 32), TEXT, convention)
    return 100 * reduction(pruned, prefill_flops(VICUNA_7B, (SCENE,) * 32, TEXT, convention))


def test_by_hand_on_a_small_model() -> None:
    # d = q = 8, kv = 4, m = 10, 3 tokens
    assert layer_flops(SMALL, 3, "paper") == 4 * 3 * 64 + 2 * 9 * 8 + 2 * 3 * 8 * 10
    exact = (2 * 3 * 8 * 8) + (2 * 2 * 3 * 8 * 4) + (2 * 3 * 8 * 8) + (2 * 9 * 8) + (3 * 2 * 3 * 8 * 10)
    assert layer_flops(SMALL, 3) == exact
    assert prefill_flops(SMALL, (2, 1), 1) == exact + layer_flops(SMALL, 2) + 2 * 8 * 100
    one_token = 4 * 64 + 4 * 32 + 6 * 80
    # two steps: layer 0 sees 4 and 5 tokens, layer 1 sees 3 and 4
    assert decode_flops(SMALL, (2, 1), 1, 2) == 2 * (2 * one_token + 2 * 800) + 4 * 8 * (4 + 5 + 3 + 4)


def test_llava_3d_7b_at_full_length() -> None:
    full = (SCENE,) * 32
    assert prefill_flops(VICUNA_7B, full, TEXT, "paper") / 1e12 == pytest.approx(9.43, abs=0.005)
    assert prefill_flops(VICUNA_7B, full, TEXT) / 1e12 == pytest.approx(23.05, abs=0.005)
    assert clip_flops(CLIP_L) / 1e12 == pytest.approx(0.381, abs=0.001)


@pytest.mark.parametrize(
    ("schedule", "percent"),
    [
        (Schedule.of([2], [0.25]), 68.5),
        (Schedule.of([0], [0.36]), 62.6),
        (Schedule.of([0], [0.2]), 77.8),
        (Schedule.of([0], [0.1]), 87.2),
        (Schedule.of([0, 8], [0.5, 0.2], withdraw_layer=24), 75.3),
        (Schedule.of([0, 8], [0.4, 0.15], withdraw_layer=24), 80.1),
    ],
)
def test_known_schedules(schedule: Schedule, percent: float) -> None:
    assert saved(schedule) == pytest.approx(percent, abs=0.3)


def test_the_repaired_method_saves_what_its_paper_claims() -> None:
    assert saved(make_policy("adatoken").default_schedule(32)) == pytest.approx(63, abs=0.1)


def test_conventions_agree_within_a_point_and_a_half() -> None:
    released = Schedule.of([8, 16, 24], [0.8, 0.5, 0.2])
    assert saved(released, "paper") == pytest.approx(37.4, abs=0.05)
    assert saved(released) == pytest.approx(36.7, abs=0.05)


def test_three_conventions_of_an_answer_by_hand() -> None:
    # two layers with 2 and 1 spatial tokens, one text token, two new tokens
    found = three_conventions(SMALL, (2, 1), 1, n_new=2, encoder=1e6, scoring=500)
    assert found["papers"] == (4 * 3 * 64 + 2 * 9 * 8 + 2 * 3 * 80) + (4 * 2 * 64 + 2 * 4 * 8 + 2 * 2 * 80)
    assert found["exact"] == prefill_flops(SMALL, (2, 1), 1) + 500
    assert found["with_encoder_and_answer"] == 1e6 + found["exact"] + decode_flops(SMALL, (2, 1), 1, 2)
    assert three_conventions(SMALL, (2, 1), 1, n_new=0, encoder=0.0)["with_encoder_and_answer"] == found["exact"] - 500


def test_every_policy_reports_what_choosing_costs() -> None:
    counts = Schedule.of([8], [0.5]).counts(SCENE, 32)
    layer = layer_flops(VICUNA_7B, SCENE + TEXT)

    def share(name: str) -> float:
        return scoring_flops(make_policy(name), VICUNA_7B, SCENE, counts, TEXT, 24) / layer

    assert share("none") == share("random") == 0
    # 24 query rows and their products with 1720 keys; 82 of the 829 that stay are compared with all 1659 tokens
    scored = 2 * 24 * 4096 * 4096 + 2 * 24 * (SCENE + TEXT) * 4096
    assert share("ours") * layer == pytest.approx(scored + 2 * 82 * SCENE * 4096)
    assert scored / layer == pytest.approx(0.0016, abs=0.0001)
    assert share("ours") == pytest.approx(0.0031, abs=0.0001)
    assert share("fastv") * layer == pytest.approx(scored / 24)
    # queries and keys of all rows; its code also computes values, which makes 24 %
    assert share("pyramiddrop") == pytest.approx(0.16, abs=0.005)


def test_no_gate_costs_nothing() -> None:
    ours = make_policy("ours")
    for schedule in (Schedule(), Schedule.of([2], [1.0]), Schedule.of([32], [0.1]), Schedule((), withdraw_layer=4)):
        assert scoring_flops(ours, VICUNA_7B, SCENE, schedule.counts(SCENE, 32), TEXT, 24) == 0


def test_bad_input() -> None:
    with pytest.raises(FlopsError, match="counts for 3 layers, the model has 2"):
        prefill_flops(SMALL, (1, 1, 1), 1)
    with pytest.raises(FlopsError, match="'macs'"):
        layer_flops(SMALL, 1, "macs")  # type: ignore[arg-type]
    with pytest.raises(FlopsError, match="0"):
        reduction(1, 0)
