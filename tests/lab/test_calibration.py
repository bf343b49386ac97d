# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab import calibration
from adatoken3d_ros.lab.calibration import (
    CalibrationError,
    FlopsCost,
    LatencyCost,
    Probe,
    Sample,
    bisect,
    calibrate,
    cost_share,
    horizon,
    massive_dims,
    plan,
    sensitivity,
    withdrawal_scan,
)
from adatoken3d_ros.pruning.flops import prefill_flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, Stage, scaled
from adatoken3d_ros.pruning.view import DecoderSize

N_LAYERS = 5


class LinearCost:
    """Text costs a tenth of a layer, spatial tokens the rest."""

    def of_layer(self, ratio: float) -> float:
        return 0.1 + 0.9 * ratio


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 6.0)
    return Decoder(model)


def samples(n: int = 2) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [Sample(torch.randn(1, 30 + i, 32, generator=generator), 3, 20 + i) for i in range(n)]


@pytest.fixture(scope="module")
def probe(decoder: Decoder) -> Probe:
    return Probe(decoder, samples(), make_policy("ours"), n_tokens=3)


def test_an_unpruned_schedule_moves_nothing(probe: Probe) -> None:
    """But for rounding: products of other shapes are added in another order on some processors."""
    assert probe.divergence(Schedule()) == pytest.approx(0.0, abs=1e-6)
    assert probe.divergence(Schedule((Stage(2, 1.0),))) == pytest.approx(0.0, abs=1e-6)
    assert probe.divergence(Schedule(withdraw_layer=N_LAYERS)) == pytest.approx(0.0, abs=1e-6)


def test_the_reference_is_what_transformers_generates(decoder: Decoder, probe: Probe) -> None:
    for sample, reference in zip(probe.samples, probe._references, strict=True):
        with torch.inference_mode():
            expected = decoder.language.generate(
                inputs_embeds=sample.embeds, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert list(reference.tokens) == expected[0].tolist()


def test_the_answer_ends_at_the_end_token(decoder: Decoder, probe: Probe) -> None:
    second = probe._references[0].tokens[1]
    short = Probe(decoder, samples(1), make_policy("ours"), n_tokens=3, eos_ids=[second])
    assert short._references[0].tokens == probe._references[0].tokens[:1]
    assert short._references[0].log_probs.shape == (2, 50)


def test_withdrawal_from_the_start_equals_a_prompt_without_spatial_tokens(decoder: Decoder) -> None:
    """Slow oracle: whole sequences without a cache, rows of spatial tokens left out, positions kept."""
    (sample,) = samples(1)
    one = Probe(decoder, [sample], make_policy("none"), n_tokens=2)
    tokens = one._references[0].tokens
    with torch.inference_mode():
        whole = torch.cat([sample.embeds, decoder.embed(torch.tensor([tokens]))], dim=1)
        positions = torch.arange(whole.shape[1])
        text = torch.cat([positions[:3], positions[3 + sample.n_spatial :]])
        rows = []
        for keep in (positions, text):
            states = whole[:, keep]
            rope = decoder.rotary(states, keep)
            for layer in decoder.layers:
                states = layer.run(states, rope)
            rows.append(decoder.logits(states)[0, -3:].double().log_softmax(-1))
    expected = (rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean().item()
    assert one.divergence(Schedule(withdraw_layer=0)) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_sensitivity_has_a_row_for_each_layer(probe: Probe) -> None:
    seen: list[tuple[int, int]] = []
    found = sensitivity(probe, [1, 3], [0.5, 0.1], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found[1, 0] == probe.divergence(Schedule((Stage(3, 0.5),)))
    assert found[0, 1] == probe.divergence(Schedule((Stage(1, 0.1),)))
    assert (found > 0).all()


def test_horizon_is_the_first_layer_below_the_threshold(probe: Probe) -> None:
    assert horizon(np.array([0.9, 0.2, 0.3, 0.002, 0.004, 0.0])) == 3
    assert horizon(np.array([0.9, 0.2, 0.0]), eta=0.1) is None
    scan = withdrawal_scan(probe)
    assert scan.shape == (N_LAYERS + 1,) and scan[-1] == 0.0 and scan[0] > scan[-2]


def test_cost_share_by_hand() -> None:
    # Layers: 1, 0.55, 0.55, 0.1
    schedule = Schedule.of([1], [0.5], withdraw_layer=3)
    assert cost_share(LinearCost(), schedule, 4) == pytest.approx((1 + 0.55 + 0.55 + 0.1) / 4)
    assert cost_share(LinearCost(), Schedule(), 4) == 1.0


def test_flops_cost_counts_what_the_accounting_counts(decoder: Decoder) -> None:
    some = samples()
    cost = FlopsCost(decoder.size, some)
    schedule = Schedule.of([1, 3], [0.5, 0.2], withdraw_layer=4)
    pruned = full = 0.0
    for sample in some:
        kept = schedule.counts(sample.n_spatial, N_LAYERS)
        pruned += prefill_flops(decoder.size, kept, sample.n_text) - lm_head_flops(decoder.size)
        full += prefill_flops(decoder.size, (sample.n_spatial,) * N_LAYERS, sample.n_text)
        full -= lm_head_flops(decoder.size)
    assert cost_share(cost, schedule, N_LAYERS) == pytest.approx(pruned / full)


def lm_head_flops(decoder: DecoderSize) -> float:
    return 2.0 * decoder.hidden * decoder.vocabulary


def test_measured_latency_never_falls_with_more_tokens(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = LatencyCost(decoder, samples(), [0.5, 0.1], repeats=1)
    shares = [cost.of_layer(ratio) for ratio in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0
    # 10 text tokens and 0, 10 or 20 spatial ones; 20 tokens were measured too slow.
    monkeypatch.setattr(calibration, "_time_layer", lambda decoder, counts, *rest: {10: 1.0, 20: 5.0, 30: 4.0})
    cost = LatencyCost(decoder, samples(1), [0.5])
    assert [cost.of_layer(ratio) for ratio in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def brute_force(gaps: np.ndarray, layers: list[int], ratios: list[float], limit: float, n: int, most: int, end: int):
    """Every choice of at most `most` gates with falling ratios: (least divergence, whether any is cheap enough)."""
    best = np.inf
    for k in range(most + 1):
        for rows in itertools.combinations(range(len(layers)), k):
            if any(layers[row] >= end for row in rows):
                continue
            for columns in itertools.combinations(range(len(ratios)), k):
                schedule = Schedule.of(
                    [layers[r] for r in rows], [ratios[c] for c in columns], end if end < n else None
                )
                if cost_share(LinearCost(), schedule, n) <= limit + 1e-9:
                    best = min(best, sum(gaps[r, c] for r, c in zip(rows, columns, strict=True)))
    return best


@settings(max_examples=150, deadline=None)
@given(
    n_layers=st.integers(2, 6),
    n_ratios=st.integers(1, 3),
    most=st.integers(1, 4),
    limit=st.floats(0.1, 1.0),
    withdraw=st.none() | st.integers(0, 6),
    seed=st.integers(0, 2**16),
    coarse=st.booleans(),
)
def test_planning_equals_brute_force(
    n_layers: int, n_ratios: int, most: int, limit: float, withdraw: int | None, seed: int, coarse: bool
) -> None:
    random = np.random.default_rng(seed)
    layers = sorted(random.choice(n_layers, size=random.integers(1, n_layers + 1), replace=False).tolist())
    ratios = [0.6, 0.3, 0.1][:n_ratios]
    gaps = random.random((len(layers), n_ratios))
    if coarse:  # many ties
        gaps = np.round(gaps * 2) / 2
    end = n_layers if withdraw is None else min(withdraw, n_layers)
    expected = brute_force(gaps, layers, ratios, limit, n_layers, most, end)
    more = {"max_gates": most, "withdraw_layer": end if end < n_layers else None}
    if np.isinf(expected):
        with pytest.raises(CalibrationError, match="cannot be reached"):
            plan(gaps, layers, ratios, LinearCost(), limit, n_layers, **more)
        return
    found = plan(gaps, layers, ratios, LinearCost(), limit, n_layers, **more)
    assert found.divergence == pytest.approx(expected)
    assert (
        found.cost == pytest.approx(cost_share(LinearCost(), found.schedule, n_layers)) and found.cost <= limit + 1e-9
    )
    assert len(found.schedule.stages) <= most
    again = sum(gaps[layers.index(s.layer), ratios.index(s.ratio)] for s in found.schedule.stages)
    assert again == pytest.approx(found.divergence)


def test_a_plan_of_seven_billion_parameters_size() -> None:
    random = np.random.default_rng(0)
    depth, share = np.arange(1, 32)[:, None], np.array(calibration.RATIOS)[None, :]
    gaps = np.exp(-depth / 8) * (1 - share) ** 2 * random.uniform(0.8, 1.2, (31, 7))
    found = plan(gaps, range(1, 32), calibration.RATIOS, LinearCost(), 0.37, 32)
    assert found.cost <= 0.37 and 1 <= len(found.schedule.stages) <= 4
    assert (
        found.divergence <= plan(gaps, range(1, 32), calibration.RATIOS, LinearCost(), 0.37, 32, max_gates=2).divergence
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"divergences": np.ones((2, 3))}, r"\(2, 3\) divergences"),
        ({"divergences": np.full((2, 2), np.nan)}, "finite"),
        ({"layers": [3, 1]}, r"\[3, 1\]"),
        ({"layers": [3, 4]}, r"\[3, 4\].* 4 layers"),
        ({"ratios": [0.1, 0.5]}, r"\[0.1, 0.5\]"),
        ({"ratios": [1.0, 0.5]}, r"\[1.0, 0.5\]"),
        ({"max_gates": 5}, "5 gates"),
        ({"max_gates": 0}, "0 gates"),
        ({"limit": 0.05}, "0.050 .* cannot be reached"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change: dict[str, object], match: str) -> None:
    arguments = {
        "divergences": np.ones((2, 2)),
        "layers": [1, 3],
        "ratios": [0.5, 0.1],
        "cost": LinearCost(),
        "limit": 0.5,
        "n_layers": 4,
        **change,
    }
    with pytest.raises(CalibrationError, match=match):
        plan(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("good", "bad"), [(4.0, 1.0), (0.0, 4.0)])
def test_bisection_meets_the_target_from_the_accepted_side(good: float, bad: float) -> None:
    target = 2.718281828
    upwards = good > bad
    asked: list[float] = []

    def accept(value: float) -> bool:
        asked.append(value)
        return value >= target if upwards else value <= target

    found = bisect(accept, good, bad, 30)
    assert found == pytest.approx(target, abs=1e-7)
    assert found >= target if upwards else found <= target
    assert len(asked) == 31
    assert bisect(lambda value: True, good, bad, 5) == bad


def test_scaling_keeps_the_order_and_stops_at_everything() -> None:
    schedule = scaled(Schedule.of([1, 2, 3], [0.8, 0.5, 0.1], withdraw_layer=4), 1.5)
    assert [stage.ratio for stage in schedule.stages] == pytest.approx([1.0, 0.75, 0.15])
    assert schedule.withdraw_layer == 4


def test_calibration_uses_up_the_cost_limit(probe: Probe) -> None:
    found = calibrate(probe, LinearCost(), 0.6, max_gates=2, ratios=(0.5, 0.1))
    assert found.within_limit and found.cost == pytest.approx(0.6, abs=1e-6)
    assert found.factor >= 1.0 and found.planned.cost <= 0.6
    assert found.divergence == pytest.approx(probe.divergence(found.schedule))
    assert found.schedule == scaled(found.planned.schedule, found.factor)
    assert found.sensitivity.shape == (N_LAYERS - 1, 2) and found.withdrawal is None


def test_calibration_meets_a_divergence_limit_by_bisection(probe: Probe) -> None:
    free = calibrate(probe, LinearCost(), 0.4, max_gates=1, ratios=(0.5, 0.1))
    asked = free.divergence / 3
    found = calibrate(probe, LinearCost(), 0.4, max_gates=1, ratios=(0.5, 0.1), max_divergence=asked)
    assert found.divergence <= asked
    assert found.factor > free.factor and not found.within_limit
    # No more is given back than bisection can tell.
    step = (1 / 0.1 - free.factor) / 2**calibration._DIVERGENCE_STEPS
    assert probe.divergence(scaled(found.planned.schedule, found.factor - step)) > asked


def test_calibration_withdraws_past_the_horizon(probe: Probe) -> None:
    scan = withdrawal_scan(probe)
    eta = float(scan[N_LAYERS - 1]) * 1.01
    found = calibrate(probe, LinearCost(), 0.6, ratios=(0.5, 0.1), withdraw=True, eta=eta)
    assert found.schedule.withdraw_layer == horizon(scan, eta)
    assert found.withdrawal == pytest.approx(scan)
    # What withdrawal alone costs is too much here: it is given up.
    strict = calibrate(probe, LinearCost(), 0.6, ratios=(0.5, 0.1), withdraw=True, eta=eta, max_divergence=1e-7)
    assert strict.schedule.withdraw_layer is None
    assert strict.divergence <= 1e-7


def test_calibrations_that_make_no_sense_are_refused(decoder: Decoder, probe: Probe) -> None:
    with pytest.raises(CalibrationError, match="no calibration prompt"):
        Probe(decoder, [], make_policy("ours"))
    with pytest.raises(CalibrationError, match="1.2"):
        calibrate(probe, LinearCost(), 1.2)
    with pytest.raises(CalibrationError, match="max_divergence -1"):
        calibrate(probe, LinearCost(), 0.5, max_divergence=-1)
    with pytest.raises(CalibrationError, match="0.110 .* cannot be reached"):
        calibrate(probe, LinearCost(), 0.11, ratios=(0.5, 0.1))
    with pytest.raises(CalibrationError, match="9 gates"):
        calibrate(probe, LinearCost(), 0.5, max_gates=9)


def test_a_limit_out_of_reach_is_found_before_the_long_measurement(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "sensitivity", lambda *arguments: pytest.fail("measured in vain"))
    # One full layer and four that keep a tenth: (1 + 4 * 0.19) / 5
    with pytest.raises(CalibrationError, match="least is 0.352"):
        calibrate(probe, LinearCost(), 0.35, ratios=(0.5, 0.1))


def test_no_gate_is_measured_past_the_horizon(probe: Probe) -> None:
    found = calibrate(probe, LinearCost(), 0.6, ratios=(0.5, 0.1), withdraw=True, eta=1e6)
    assert found.schedule == Schedule(withdraw_layer=0) and found.sensitivity.shape == (0, 2)


def test_calibration_is_deterministic(decoder: Decoder) -> None:
    def once() -> Schedule:
        fresh = Probe(decoder, samples(), make_policy("ours"), n_tokens=2)
        return calibrate(fresh, FlopsCost(decoder.size, samples()), 0.5, ratios=(0.5, 0.25, 0.1)).schedule

    assert once() == once()


def test_only_partial_schedules_that_nothing_beats_go_on() -> None:
    gates = np.arange(4).reshape(4, 1, 1).repeat(2, axis=2)
    front = calibration._Front(np.array([3.0, 1.0, 2.0, 2.0]), np.array([3.0, 1.0, 5.0, 0.5]), gates)
    best = calibration._Front.best([front, front])
    assert best.cost.tolist() == [1.0, 2.0] and best.divergence.tolist() == [1.0, 0.5]
    assert best.gates[:, 0, 0].tolist() == [1, 3]


def test_massive_dimensions_are_those_that_stand_out_in_most_layers(mha: Decoder) -> None:
    # One of 64 dimensions stands out by at most sqrt(64) = 8 root mean squares.
    embeds = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    embeds[0, 6, 11] = 1e4
    assert massive_dims(mha, [Sample(embeds, 3, 12)], threshold=6.0) == (11,)
    assert massive_dims(mha, [Sample(embeds, 3, 12)]) == ()
    assert not any(layer._forward_pre_hooks for layer in mha.language.model.layers)
