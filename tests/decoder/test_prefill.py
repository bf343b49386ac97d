# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode, generate
from adatoken3d_ros.decoder.prefill import (
    Cancelled,
    GateError,
    Layout,
    prefill,
)
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError, at_least_one
from adatoken3d_ros.pruning.view import (
    GateView,
    PolicyError,
    Rope,
    Selection,
)
from tests.decoder.oracle import N_LAYERS, Prompt, attention_map, make_prompt, oracle_logits, tiny_decoder
from tests.decoder.prompts import PROMPTS, SCHEDULES, SINGLE, assert_equals_oracle, run


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: str(prompt.layout.n_spatial))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_equals_the_masked_full_length_run(decoder: Decoder, prompt: Prompt, schedule: Schedule) -> None:
    policy = "ours" if schedule.stages else "none"
    assert_equals_oracle(decoder, prompt, run(decoder, prompt, schedule, policy), n_steps=20 if prompt is SINGLE else 4)


@pytest.mark.parametrize("policy", ["random", "fastv", "pyramiddrop", "adatoken_release", "ours"])
@pytest.mark.parametrize("rope", ["original", "renumber"])
def test_every_dropping_policy_equals_its_oracle(decoder: Decoder, policy: str, rope: Rope) -> None:
    for prompt in PROMPTS:
        result = run(decoder, prompt, SCHEDULES["two"], policy, rope)
        assert_equals_oracle(decoder, prompt, result, n_steps=4, rope=rope)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_schedule_equals_its_oracle(data: st.DataObject) -> None:
    decoder = tiny_decoder(n_kv_heads=data.draw(st.sampled_from([4, 2, 1])))
    layers = data.draw(st.lists(st.integers(0, N_LAYERS), max_size=4, unique=True).map(sorted))
    ratios = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=len(layers), max_size=len(layers))), reverse=True)
    schedule = Schedule.of(layers, ratios, data.draw(st.none() | st.integers(0, N_LAYERS)))
    sizes = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 5)))
    prompt = make_prompt(*sizes, seed=data.draw(st.integers(0, 99)))
    rope: Rope = data.draw(st.sampled_from(["original", "renumber"]))
    policy = data.draw(st.sampled_from(["ours", "random", "pyramiddrop"]))
    assert_equals_oracle(decoder, prompt, run(decoder, prompt, schedule, policy, rope), n_steps=2, rope=rope)


@pytest.mark.parametrize(
    "shape", [{"head_dim": 24}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_other_shapes_equal_their_oracle(shape: dict[str, Any]) -> None:
    decoder = tiny_decoder(n_kv_heads=2, **shape)
    assert_equals_oracle(decoder, SINGLE, run(decoder, SINGLE, SCHEDULES["four"], "ours"), n_steps=3)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name not in ("none", "coarse_voxel")])
def test_half_precision_equals_its_oracle_but_for_rounding(policy: str, dtype: torch.dtype, rounding: float) -> None:
    decoder = Decoder(tiny_decoder(n_kv_heads=2).language.to(dtype))
    prompt = Prompt(SINGLE.embeds.to(dtype), SINGLE.layout, SINGLE.scene)
    result = run(decoder, prompt, SCHEDULES["two"], policy, "original")
    assert result.logits.dtype == result.trace.contribution.dtype == torch.float32
    expected = oracle_logits(decoder, prompt, result.trace, [])[0]
    torch.testing.assert_close(result.logits, expected.float(), rtol=0, atol=rounding)


def test_without_gates_equals_the_stock_model(decoder: Decoder) -> None:
    result = run(decoder, SINGLE, Schedule(), "none")
    with torch.no_grad():
        expected = decoder.language(inputs_embeds=SINGLE.embeds).logits[0, -1]
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=1e-5)


# What shrinks, and what is reported of it


def test_later_layers_hold_fewer_tokens(mha: Decoder) -> None:
    result = run(mha, SINGLE, Schedule.of([1, 4], [0.5, 0.1], withdraw_layer=5), "ours")
    assert result.trace.spatial_per_layer == (40, 20, 20, 20, 4, 0)
    assert result.cache.lengths == (52, 32, 32, 32, 16, 12)
    assert result.cache.nbytes() == sum(result.cache.lengths) * 64 * 4 * 2
    reached = result.trace.last_layer
    assert [(reached == i).sum().item() for i in (0, 3, 4, 5)] == [20, 16, 4, 0]
    assert torch.equal(result.trace.retained, reached == 4)
    assert result.trace.contribution.sum().item() == pytest.approx(1)
    assert result.trace.contribution.min() > 0
    assert result.trace.gate_seconds > 0


def test_nothing_measured_is_zero(mha: Decoder) -> None:
    for policy, schedule in (("none", Schedule()), ("random", SCHEDULES["one"])):
        trace = run(mha, SINGLE, schedule, policy).trace
        assert not trace.contribution.any()
    assert run(mha, SINGLE, Schedule(), "none").trace.retained.all()


def test_the_score_is_the_attention_that_the_layer_below_paid(decoder: Decoder) -> None:
    result = run(decoder, SINGLE, Schedule.of([3], [0.5]), "ours")
    attention = attention_map(decoder, SINGLE.embeds, 2)
    share = attention[:, -7:, 5:45].mean((0, 1))
    torch.testing.assert_close(result.trace.contribution, share / share.sum(), rtol=1e-4, atol=1e-7)


class Recorder:
    """Keeps the earliest tokens and remembers what it was shown."""

    name, rope = "recorder", "original"
    kept = staticmethod(at_least_one)

    def __init__(self) -> None:
        self.views: list[GateView] = []

    def select(self, view: GateView) -> Selection:
        self.views.append(view)
        return Selection(torch.arange(view.n_keep))


@pytest.mark.parametrize(
    "schedule",
    [Schedule.of([0, 2], [1.0, 1.0]), Schedule.of([N_LAYERS], [0.1]), Schedule((), N_LAYERS), Schedule((), 2)],
    ids=["ratio 1", "after the last layer", "withdrawal after the last layer", "withdrawal"],
)
def test_what_needs_no_choice_asks_no_policy(mha: Decoder, schedule: Schedule) -> None:
    recorder = Recorder()
    prefill(mha, SINGLE.embeds, SINGLE.layout, schedule, recorder)
    assert not recorder.views


def test_equal_consecutive_ratios_are_one_gate(mha: Decoder) -> None:
    recorder = Recorder()
    result = prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule.of([1, 2, 4], [0.5, 0.5, 0.2]), recorder)
    assert [view.layer for view in recorder.views] == [1, 4]
    assert [len(view.alive) for view in recorder.views] == [40, 20]
    assert result.cache.lengths == (52, 32, 32, 32, 20, 20)


def test_no_spatial_tokens_is_the_stock_model(mha: Decoder) -> None:
    prompt = make_prompt(4, 0, 9)
    recorder = Recorder()
    result = prefill(mha, prompt.embeds, prompt.layout, SCHEDULES["four"], recorder)
    with torch.no_grad():
        expected = mha.language(inputs_embeds=prompt.embeds).logits[0, -1]
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=1e-5)
    assert not recorder.views
    assert result.trace.contribution.shape == (0,)


def test_renumbered_positions_give_another_answer(mha: Decoder) -> None:
    a = run(mha, SINGLE, SCHEDULES["two"], "fastv", "original")
    b = run(mha, SINGLE, SCHEDULES["two"], "fastv", "renumber")
    assert (a.logits - b.logits).abs().max() > 1e-2
    assert run(mha, SINGLE, SCHEDULES["two"], "pyramiddrop").cache.shifts[5] == 0
    default = prefill(mha, SINGLE.embeds, SINGLE.layout, SCHEDULES["two"], make_policy("pyramiddrop"))
    assert default.cache.shifts == [0, 16, 16, 16, 32, 32]


# Silent errors of transformers 5 with ragged caches, and why they do not happen here


def test_layers_get_no_position_ids_and_no_mask(mha: Decoder) -> None:
    # Gapped position ids without a mask are taken for packed sequences; one mask for all layers has the wrong length.
    calls: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"n": args[0].shape[1], **kwargs})

    hooks = [layer.module.register_forward_pre_hook(note, with_kwargs=True) for layer in mha.layers]
    try:
        result = run(mha, SINGLE, SCHEDULES["two"], "ours")
        before = list(result.cache.lengths)
        decode(mha, result, 0)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = before + [n + 1 for n in before]
    for call, length in zip(calls, lengths, strict=True):
        assert "position_ids" not in call
        # None means causal only where queries and keys are equally many: with more keys SDPA would cut them off.
        assert call["attention_mask"] is None and call["n"] in (length, 1)


def test_positions_do_not_shrink_when_tokens_go_before_the_model(mha: Decoder) -> None:
    # transformers would take the next position from layer 0's length.
    result = run(mha, SINGLE, Schedule.of([0], [0.25]), "random")
    assert result.cache.lengths == (22,) * N_LAYERS
    assert result.next_position == 52
    assert_equals_oracle(mha, SINGLE, result, n_steps=3)


# Cancelling


def test_prefill_is_cancelled_between_layers(mha: Decoder) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Cancelled, match="before layer 2"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule(), make_policy("none"), should_stop=lambda: next(answers))


# Bad input


class NotANumber(Recorder):
    def select(self, view: GateView) -> Selection:
        return Selection(torch.arange(view.n_keep), torch.full((len(view.alive),), torch.nan))


def test_scores_that_are_not_finite_name_their_gates(mha: Decoder) -> None:
    with pytest.raises(GateError, match=r"not finite.*\[2, 4\]"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule.of([2, 4], [0.5, 0.2]), NotANumber())


class Keeps(Recorder):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def select(self, view: GateView) -> Selection:
        return Selection(torch.arange(self.n), torch.zeros(len(view.alive)))


@pytest.mark.parametrize("n", [0, 19, 21])
def test_a_policy_that_keeps_another_number_is_refused(mha: Decoder, n: int) -> None:
    with pytest.raises(GateError, match=f"recorder keeps {n} of 40 tokens before layer 2, the schedule 20"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, SCHEDULES["one"], Keeps(n))


def test_a_question_that_looks_only_at_text_leaves_contributions_of_zero(mha: Decoder) -> None:
    trace = prefill(mha, SINGLE.embeds, SINGLE.layout, SCHEDULES["one"], Keeps(20)).trace
    assert torch.equal(trace.contribution, torch.zeros(40))


def test_nan_embeddings_do_not_pass_the_gate(mha: Decoder) -> None:
    embeds = SINGLE.embeds.clone()
    embeds[0, 20] = torch.nan
    with pytest.raises(GateError, match="not finite"):
        prefill(mha, embeds, SINGLE.layout, SCHEDULES["one"], make_policy("ours"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (lambda: Layout(5, 40, 45), "question has 0 rows"),
        (lambda: Layout(5, 41, 45), "question has -1 rows"),
        (lambda: Layout(-1, 4, 9), "row -1"),
        (lambda: Layout(0, 0, 0), "of 0"),
    ],
)
def test_bad_layouts(layout: object, message: str) -> None:
    with pytest.raises(GateError, match=message):
        layout()  # type: ignore[operator]


def test_bad_calls(mha: Decoder) -> None:
    with pytest.raises(ScheduleError, match="layer 7 is outside a model of 6"):
        run(mha, SINGLE, Schedule.of([7], [0.5]), "ours")
    with pytest.raises(ScheduleError, match="0.6 follows 0.5"):
        Schedule.of([1, 2], [0.5, 0.6])
    with pytest.raises(ScheduleError, match=r"1\.5"):
        Schedule.of([1], [1.5])
    with pytest.raises(GateError, match=r"\(1, 52, 64\) for a prompt of 51 rows"):
        prefill(mha, SINGLE.embeds, Layout(5, 40, 51), Schedule(), make_policy("none"))
    with pytest.raises(GateError, match="10052 tokens and 0 new ones exceed the context of 512"):
        long = torch.zeros(1, 10_052, 64)
        prefill(mha, long, Layout(5, 40, 10_052), Schedule(), make_policy("none"))
    with pytest.raises(GateError, match="52 tokens and 500 new ones exceed the context of 512"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule(), make_policy("none"), max_new_tokens=500)
    with pytest.raises(GateError, match="52 tokens and 461 new ones"):
        generate(mha, run(mha, SINGLE, Schedule(), "none"), max_new_tokens=461, eos_ids=())
    with pytest.raises(GateError, match="max_new_tokens is -1"):
        generate(mha, run(mha, SINGLE, Schedule(), "none"), max_new_tokens=-1, eos_ids=())
    with pytest.raises(GateError, match=r"\(2, 52, 64\) for a prompt of 52 rows"):
        prefill(mha, SINGLE.embeds.repeat(2, 1, 1), SINGLE.layout, Schedule(), make_policy("none"))


def test_attention_other_than_sdpa_is_refused() -> None:
    decoder = tiny_decoder()
    decoder.language.set_attn_implementation("eager")
    with pytest.raises(GateError, match="'eager'"):
        run(decoder, SINGLE, Schedule(), "none")


def test_a_policy_says_what_it_lacks(mha: Decoder) -> None:
    with pytest.raises(PolicyError, match="fastv scores by the attention of the layer below; layer 0 has none"):
        run(mha, SINGLE, Schedule.of([0], [0.5]), "fastv")
    with pytest.raises(PolicyError, match="coarse_voxel at layer 0 needs the tokens' positions"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule.of([0], [0.5]), make_policy("coarse_voxel"))
    with pytest.raises(PolicyError, match="none was given a gate at layer 2 that keeps 20 of 40"):
        run(mha, SINGLE, SCHEDULES["one"], "none")


# A prefill that is hurried


@pytest.mark.parametrize("policy", ["ours", "fastv", "pyramiddrop"])
@pytest.mark.parametrize(
    ("schedule", "asked", "seen"),
    [
        # Without a gate of its own; the mildest and the strongest drop.
        (Schedule(), {3: 11}, (40, 40, 40, 11, 11, 11)),
        (Schedule(), {2: 20, 3: 0}, (40, 40, 20, 0, 0, 0)),
        # Between gates: the next one finds less than it would keep, the one after it drops again.
        (Schedule.of([1, 3, 5], [0.5, 0.4, 0.1]), {2: 7}, (40, 20, 7, 7, 7, 4)),
        # At a gate: what the schedule leaves is dropped further in one go.
        (Schedule.of([2], [0.5], withdraw_layer=5), {2: 10, 4: 3}, (40, 40, 10, 10, 3, 0)),
        # Right after a gate and before the last layer.
        (Schedule.of([4], [0.5]), {5: 1}, (40, 40, 40, 40, 20, 1)),
    ],
)
def test_a_hurried_prefill_equals_its_oracle(
    decoder: Decoder, policy: str, schedule: Schedule, asked: dict[int, int], seen: tuple[int, ...]
) -> None:
    shown: list[tuple[int, int]] = []

    def at_most(g: int, n: int) -> int | None:
        shown.append((g, n))
        return asked.get(g)

    made = make_policy(policy)
    result = prefill(decoder, SINGLE.embeds, SINGLE.layout, schedule, made, scene=SINGLE.scene, at_most=at_most)
    assert result.trace.spatial_per_layer == seen
    reached = result.trace.last_layer
    assert tuple(int((reached >= i).sum()) for i in range(N_LAYERS)) == seen
    assert result.cache.lengths == tuple(n + 12 for n in seen)
    assert [g for g, _ in shown] == list(range(N_LAYERS))
    assert all(n >= seen[g] for g, n in shown)
    assert_equals_oracle(decoder, SINGLE, result, n_steps=4, rope=made.rope)


def test_hurried_gates_choose_as_those_of_a_schedule(mha: Decoder) -> None:
    """The same tokens, scores and logits: what `at_most` asks for is a gate like any other."""
    schedule = Schedule.of([2, 4], [0.5, 0.25], withdraw_layer=5)
    planned = run(mha, SINGLE, schedule, "ours")
    counts = schedule.counts(40, N_LAYERS)
    made = make_policy("ours")
    hurried = prefill(
        mha, SINGLE.embeds, SINGLE.layout, Schedule(), made, scene=SINGLE.scene, at_most=lambda g, n: counts[g]
    )
    assert torch.equal(hurried.logits, planned.logits)
    assert torch.equal(hurried.trace.last_layer, planned.trace.last_layer)
    assert torch.equal(hurried.trace.contribution, planned.trace.contribution)
    assert hurried.trace.spatial_per_layer == planned.trace.spatial_per_layer


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_limit_that_asks_for_nothing_changes_nothing(mha: Decoder, schedule: Schedule) -> None:
    plain = run(mha, SINGLE, schedule, "ours")
    made = make_policy("ours")
    same = prefill(mha, SINGLE.embeds, SINGLE.layout, schedule, made, scene=SINGLE.scene, at_most=lambda g, n: None)
    assert torch.equal(same.logits, plain.logits) and torch.equal(same.trace.contribution, plain.trace.contribution)
    assert same.trace.spatial_per_layer == plain.trace.spatial_per_layer and same.cache.lengths == plain.cache.lengths


@pytest.mark.parametrize("most", [41, -1])
def test_a_limit_beyond_what_is_there_is_refused(mha: Decoder, most: int) -> None:
    with pytest.raises(GateError, match=f"{most} of 40 spatial tokens are asked for before layer 2"):
        prefill(
            mha,
            SINGLE.embeds,
            SINGLE.layout,
            Schedule(),
            make_policy("ours"),
            at_most=lambda g, n: most if g == 2 else None,
        )


@pytest.mark.parametrize("bucket", [1, 8, 64])
def test_whole_buckets_of_rows_equal_their_oracle(decoder: Decoder, bucket: int) -> None:
    """24 and 8 of 40 tokens beside 12 others: 36 and 20 rows, in buckets of 8 40 and 24."""
    schedule = SCHEDULES["two"]
    plain = run(decoder, SINGLE, schedule, "ours")
    result = prefill(
        decoder, SINGLE.embeds, SINGLE.layout, schedule, make_policy("ours"), scene=SINGLE.scene, bucket=bucket
    )
    rows = {1: [52, 36, 36, 36, 20, 20], 8: [52, 40, 40, 40, 24, 24], 64: [52] * 6}
    assert list(result.trace.rows_per_layer) == rows[bucket]
    if bucket == 1:
        assert torch.equal(result.logits, plain.logits) and torch.equal(result.trace.retained, plain.trace.retained)
    assert_equals_oracle(decoder, SINGLE, result, n_steps=2)
