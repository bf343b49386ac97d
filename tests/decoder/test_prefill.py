# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from adatoken3d_ros.decoder.prefill import (
    Cancelled,
    GateError,
    Layout,
    Prefill,
    decode,
    generate,
    generate_batch,
    prefill,
)
from adatoken3d_ros.pruning.policies import (
    POLICY_NAMES,
    GateView,
    PolicyError,
    Rope,
    SceneTokens,
    Selection,
    make_policy,
)
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError, at_least_one
from tests.pruning.oracle import N_LAYERS, Prompt, make_prompt, oracle_logits, tiny_llama

SINGLE = make_prompt((5,), (40,), (7,))
BATCH = make_prompt((5, 3, 9), (40, 31, 12), (7, 1, 11))
# Samples without a spatial token, with one, and with no text before the scene.
ODD_BATCH = make_prompt((5, 0, 2), (0, 31, 1), (7, 1, 3))
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


@pytest.mark.parametrize("prompt", [SINGLE, BATCH, ODD_BATCH], ids=["batch 1", "batch 3", "odd batch"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_equals_the_masked_full_length_run(language: LlamaForCausalLM, prompt: Prompt, schedule: Schedule) -> None:
    policy = "ours" if schedule.stages else "none"
    assert_equals_oracle(language, prompt, run(language, prompt, schedule, policy), n_steps=20)


@pytest.mark.parametrize("policy", ["random", "fastv", "pyramiddrop", "adatoken_release", "ours"])
@pytest.mark.parametrize("rope", ["original", "renumber"])
def test_every_dropping_policy_equals_its_oracle(language: LlamaForCausalLM, policy: str, rope: Rope) -> None:
    result = run(language, BATCH, SCHEDULES["two"], policy, rope)
    assert_equals_oracle(language, BATCH, result, n_steps=4, rope=rope)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_schedule_equals_its_oracle(data: st.DataObject) -> None:
    language = tiny_llama(n_kv_heads=data.draw(st.sampled_from([4, 2, 1])))
    layers = data.draw(st.lists(st.integers(0, N_LAYERS), max_size=4, unique=True).map(sorted))
    ratios = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=len(layers), max_size=len(layers))), reverse=True)
    schedule = Schedule.of(layers, ratios, data.draw(st.none() | st.integers(0, N_LAYERS)))
    sizes = data.draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=3)
    )
    before, spatial, after = (tuple(size) for size in zip(*sizes, strict=True))
    prompt = make_prompt(before, spatial, after, seed=data.draw(st.integers(0, 99)))
    rope: Rope = data.draw(st.sampled_from(["original", "renumber"]))
    policy = data.draw(st.sampled_from(["ours", "random", "pyramiddrop"]))
    assert_equals_oracle(language, prompt, run(language, prompt, schedule, policy, rope), n_steps=2, rope=rope)


@pytest.mark.parametrize(
    "shape", [{"head_dim": 24}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_other_shapes_equal_their_oracle(shape: dict[str, Any]) -> None:
    language = tiny_llama(n_kv_heads=2, **shape)
    assert_equals_oracle(language, BATCH, run(language, BATCH, SCHEDULES["four"], "ours"), n_steps=3)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
@pytest.mark.parametrize("policy", [name for name in POLICY_NAMES if name not in ("none", "coarse_voxel")])
def test_half_precision_equals_its_oracle_but_for_rounding(policy: str, dtype: torch.dtype, rounding: float) -> None:
    language = tiny_llama(n_kv_heads=2).to(dtype)
    prompt = Prompt(BATCH.embeds.to(dtype), BATCH.layout, BATCH.scene)
    result = run(language, prompt, SCHEDULES["two"], policy, "original")
    assert result.logits.dtype == result.trace.contribution.dtype == torch.float32
    expected = oracle_logits(language, prompt, result.trace, torch.zeros(0, 3, dtype=torch.long))[0]
    torch.testing.assert_close(result.logits, expected.float(), rtol=0, atol=rounding)


def test_without_gates_equals_the_stock_model(language: LlamaForCausalLM) -> None:
    result = run(language, SINGLE, Schedule(), "none")
    with torch.no_grad():
        expected = language(inputs_embeds=SINGLE.embeds).logits[:, -1]
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=1e-5)


def test_padded_batch_without_gates_equals_the_stock_model(language: LlamaForCausalLM) -> None:
    pads = torch.tensor([BATCH.layout.n_rows - n for n in BATCH.layout.n_tokens])
    real = torch.arange(BATCH.layout.n_rows) >= pads[:, None]
    with torch.no_grad():
        positions = (real.cumsum(1) - 1).clamp(min=0)
        stock = language(inputs_embeds=BATCH.embeds, attention_mask=real.long(), position_ids=positions)
    result = run(language, BATCH, Schedule(), "none")
    torch.testing.assert_close(result.logits, stock.logits[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [1e3, torch.nan, torch.inf])
def test_what_the_padding_holds_does_not_matter(mha: LlamaForCausalLM, value: float) -> None:
    noisy = BATCH.embeds.clone()
    for b, n in enumerate(BATCH.layout.n_tokens):
        noisy[b, : BATCH.layout.n_rows - n] = value
    a = run(mha, BATCH, SCHEDULES["two"], "ours")
    b = run(mha, Prompt(noisy, BATCH.layout, BATCH.scene), SCHEDULES["two"], "ours")
    torch.testing.assert_close(a.logits, b.logits)
    assert a.logits.isfinite().all()
    torch.testing.assert_close(noisy[1, 0, 0], torch.tensor(value), equal_nan=True)  # the caller's stays as it is


def test_a_batch_equals_its_samples(language: LlamaForCausalLM) -> None:
    together = run(language, BATCH, SCHEDULES["three"], "ours")
    answers = generate_batch(language, together, max_new_tokens=8, eos_ids={7})
    for b in range(3):
        start, n_spatial, n_tokens = (
            values[b] for values in (BATCH.layout.spatial_start, BATCH.layout.n_spatial, BATCH.layout.n_tokens)
        )
        alone = Prompt(BATCH.embeds[b : b + 1, -n_tokens:], Layout.single(start, n_spatial, n_tokens), [BATCH.scene[b]])
        result = run(language, alone, SCHEDULES["three"], "ours")
        assert result.trace.last_layer[0].tolist() == together.trace.last_layer[b, :n_spatial].tolist()
        torch.testing.assert_close(result.trace.contribution[0], together.trace.contribution[b, :n_spatial])
        assert list(generate(language, result, max_new_tokens=8, eos_ids={7})) == answers[b]


# What shrinks, and what is reported of it


def test_later_layers_hold_fewer_tokens(mha: LlamaForCausalLM) -> None:
    result = run(mha, SINGLE, Schedule.of([1, 4], [0.5, 0.1], withdraw_layer=5), "ours")
    assert result.trace.spatial_per_layer == (40, 20, 20, 20, 4, 0)
    assert result.cache.lengths == (52, 32, 32, 32, 16, 12)
    assert result.cache.nbytes() == sum(result.cache.lengths) * 64 * 4 * 2
    reached = result.trace.last_layer[0]
    assert [(reached == i).sum().item() for i in (0, 3, 4, 5)] == [20, 16, 4, 0]
    assert torch.equal(result.trace.retained[0], reached == 4)
    assert result.trace.contribution.sum().item() == pytest.approx(1)
    assert result.trace.contribution.min() > 0
    assert result.trace.gate_seconds > 0


def test_nothing_measured_is_zero(mha: LlamaForCausalLM) -> None:
    for policy, schedule in (("none", Schedule()), ("random", SCHEDULES["one"])):
        trace = run(mha, SINGLE, schedule, policy).trace
        assert not trace.contribution.any()
    assert run(mha, SINGLE, Schedule(), "none").trace.retained.all()


def test_the_score_is_the_attention_that_the_layer_below_paid(language: LlamaForCausalLM) -> None:
    result = run(language, SINGLE, Schedule.of([3], [0.5]), "ours")
    language.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attention = language(inputs_embeds=SINGLE.embeds, output_attentions=True).attentions[2]
    finally:
        language.set_attn_implementation("sdpa")
    share = attention[0, :, -7:, 5:45].mean((0, 1))
    torch.testing.assert_close(result.trace.contribution[0], share / share.sum(), rtol=1e-4, atol=1e-7)


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
def test_what_needs_no_choice_asks_no_policy(mha: LlamaForCausalLM, schedule: Schedule) -> None:
    recorder = Recorder()
    prefill(mha, SINGLE.embeds, SINGLE.layout, schedule, recorder)
    assert not recorder.views


def test_equal_consecutive_ratios_are_one_gate(mha: LlamaForCausalLM) -> None:
    recorder = Recorder()
    result = prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule.of([1, 2, 4], [0.5, 0.5, 0.2]), recorder)
    assert [view.layer for view in recorder.views] == [1, 4]
    assert [len(view.alive) for view in recorder.views] == [40, 20]
    assert result.cache.lengths == (52, 32, 32, 32, 20, 20)


def test_no_spatial_tokens_is_the_stock_model(mha: LlamaForCausalLM) -> None:
    prompt = make_prompt((4,), (0,), (9,))
    recorder = Recorder()
    result = prefill(mha, prompt.embeds, prompt.layout, SCHEDULES["four"], recorder)
    with torch.no_grad():
        expected = mha(inputs_embeds=prompt.embeds).logits[:, -1]
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=1e-5)
    assert not recorder.views
    assert result.trace.contribution.shape == (1, 0)


def test_renumbered_positions_give_another_answer(mha: LlamaForCausalLM) -> None:
    a = run(mha, SINGLE, SCHEDULES["two"], "fastv", "original")
    b = run(mha, SINGLE, SCHEDULES["two"], "fastv", "renumber")
    assert (a.logits - b.logits).abs().max() > 1e-2
    assert run(mha, SINGLE, SCHEDULES["two"], "pyramiddrop").cache.facts[5].shifts == (0,)
    default = prefill(mha, SINGLE.embeds, SINGLE.layout, SCHEDULES["two"], make_policy("pyramiddrop"))
    assert [facts.shifts for facts in default.cache.facts] == [(0,), (16,), (16,), (16,), (32,), (32,)]


# Silent errors of transformers 5 with ragged caches, and why they do not happen here


def spy_on_layers(
    language: LlamaForCausalLM, calls: list[dict[str, object]]
) -> list[torch.utils.hooks.RemovableHandle]:
    def note(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        calls.append({"n": args[0].shape[1], **kwargs})

    return [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in language.model.layers]


@pytest.mark.parametrize("prompt", [SINGLE, BATCH], ids=["batch 1", "batch 3"])
def test_layers_get_no_position_ids_and_a_mask_of_their_own_length(mha: LlamaForCausalLM, prompt: Prompt) -> None:
    # Gapped position ids without a mask are taken for packed sequences; one mask for all layers has the wrong length.
    calls: list[dict[str, object]] = []
    hooks = spy_on_layers(mha, calls)
    try:
        result = run(mha, prompt, SCHEDULES["two"], "ours")
        before = list(result.cache.lengths)
        decode(mha, result, torch.zeros(len(result.logits), dtype=torch.long))
    finally:
        for hook in hooks:
            hook.remove()
    lengths = before + [n + 1 for n in before]
    for call, length in zip(calls, lengths, strict=True):
        assert "position_ids" not in call
        mask = call["attention_mask"]
        if prompt is SINGLE:
            # None means causal only where queries and keys are equally many: with more keys SDPA would cut them off.
            assert mask is None and call["n"] in (length, 1)
        else:
            assert isinstance(mask, Tensor) and mask.shape[-2:] == (call["n"], length)


def test_stock_forward_decodes_over_the_ragged_cache(language: LlamaForCausalLM) -> None:
    ours, stock = (run(language, SINGLE, SCHEDULES["two"], "ours") for _ in range(2))
    for token in (3, 141, 59):
        expected = decode(language, ours, torch.tensor([token]))
        with torch.no_grad():
            actual = language(input_ids=torch.tensor([[token]]), past_key_values=stock.cache).logits[:, -1]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_stock_generate_decodes_over_the_ragged_cache(language: LlamaForCausalLM) -> None:
    ours, stock = (run(language, SINGLE, SCHEDULES["two"], "ours") for _ in range(2))
    expected = list(generate(language, ours, max_new_tokens=6, eos_ids=()))
    seen = torch.zeros(1, 53, dtype=torch.long)  # 52 cached tokens, whose ids do not matter, and the first new one
    seen[0, -1] = expected[0]
    out = language.generate(input_ids=seen, past_key_values=stock.cache, max_new_tokens=5, do_sample=False)
    assert out[0, 52:].tolist() == expected


def test_positions_do_not_shrink_when_tokens_go_before_the_model(mha: LlamaForCausalLM) -> None:
    # transformers would take the next position from layer 0's length.
    result = run(mha, SINGLE, Schedule.of([0], [0.25]), "random")
    assert result.cache.lengths == (22,) * N_LAYERS
    assert result.next_position.tolist() == [52]
    assert_equals_oracle(mha, SINGLE, result, n_steps=3)


def test_the_ragged_cache_rolls_back(mha: LlamaForCausalLM) -> None:
    result = run(mha, SINGLE, SCHEDULES["two"], "ours")
    mark, position = result.cache.lengths, result.next_position
    first = [decode(mha, result, torch.tensor([token])) for token in (5, 6, 7)]
    result.cache.crop(-1)
    result.cache.roll_back(mark)
    result.next_position = position
    again = [decode(mha, result, torch.tensor([token])) for token in (5, 6, 7)]
    assert torch.equal(torch.stack(first), torch.stack(again))


# Decoding


def test_greedy_ids_equal_the_stock_model(language: LlamaForCausalLM) -> None:
    ids = list(generate(language, run(language, SINGLE, Schedule(), "none"), max_new_tokens=10, eos_ids=()))
    expected = language.generate(inputs_embeds=SINGLE.embeds, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert ids == expected[0].tolist()


def test_generation_ends_at_eos_and_at_the_limit(mha: LlamaForCausalLM) -> None:
    def ids(**options: object) -> list[int]:
        return list(generate(mha, run(mha, SINGLE, SCHEDULES["one"], "ours"), **options))

    full = ids(max_new_tokens=9, eos_ids=())
    assert len(full) == 9
    end = next(i for i in range(1, 9) if full[i] not in full[:i])
    assert ids(max_new_tokens=9, eos_ids={full[end]}) == full[:end]
    assert ids(max_new_tokens=0, eos_ids=()) == []


def test_generation_stops_within_one_step(mha: LlamaForCausalLM) -> None:
    stop = False
    stream = generate(
        mha, run(mha, SINGLE, SCHEDULES["one"], "ours"), max_new_tokens=50, eos_ids=(), should_stop=lambda: stop
    )
    got = [next(stream), next(stream)]
    stop = True
    assert len(got + list(stream)) == 2


def test_prefill_is_cancelled_between_layers(mha: LlamaForCausalLM) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Cancelled, match="before layer 2"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule(), make_policy("none"), should_stop=lambda: next(answers))


# Bad input


class NotANumber(Recorder):
    def select(self, view: GateView) -> Selection:
        return Selection(torch.arange(view.n_keep), torch.full((len(view.alive),), torch.nan))


def test_scores_that_are_not_finite_name_their_gates(mha: LlamaForCausalLM) -> None:
    with pytest.raises(GateError, match=r"not finite.*\[2, 4\]"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule.of([2, 4], [0.5, 0.2]), NotANumber())


class Keeps(Recorder):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def select(self, view: GateView) -> Selection:
        return Selection(torch.arange(self.n), torch.zeros(len(view.alive)))


@pytest.mark.parametrize("n", [0, 19, 21])
def test_a_policy_that_keeps_another_number_is_refused(mha: LlamaForCausalLM, n: int) -> None:
    with pytest.raises(GateError, match=f"recorder keeps {n} of 40 tokens before layer 2, the schedule 20"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, SCHEDULES["one"], Keeps(n))


def test_a_question_that_looks_only_at_text_leaves_contributions_of_zero(mha: LlamaForCausalLM) -> None:
    trace = prefill(mha, SINGLE.embeds, SINGLE.layout, SCHEDULES["one"], Keeps(20)).trace
    assert torch.equal(trace.contribution, torch.zeros(1, 40))


def test_nan_embeddings_do_not_pass_the_gate(mha: LlamaForCausalLM) -> None:
    embeds = SINGLE.embeds.clone()
    embeds[0, 20] = torch.nan
    with pytest.raises(GateError, match="not finite"):
        prefill(mha, embeds, SINGLE.layout, SCHEDULES["one"], make_policy("ours"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (lambda: Layout.single(5, 40, 45), "question has 0 rows"),
        (lambda: Layout.single(5, 41, 45), "question has -1 rows"),
        (lambda: Layout.single(-1, 4, 9), "row -1"),
        (lambda: Layout((1, 2), (3,), (9, 9), 9), "disagree"),
        (lambda: Layout((1,), (3,), (9,), 8), "padded to 8"),
    ],
)
def test_bad_layouts(layout: object, message: str) -> None:
    with pytest.raises(GateError, match=message):
        layout()  # type: ignore[operator]


def test_bad_calls(mha: LlamaForCausalLM) -> None:
    with pytest.raises(ScheduleError, match="layer 7 is outside a model of 6"):
        run(mha, SINGLE, Schedule.of([7], [0.5]), "ours")
    with pytest.raises(ScheduleError, match="0.6 follows 0.5"):
        Schedule.of([1, 2], [0.5, 0.6])
    with pytest.raises(ScheduleError, match=r"1\.5"):
        Schedule.of([1], [1.5])
    with pytest.raises(GateError, match=r"\(1, 52, 64\) for 1 samples of 51 rows"):
        prefill(mha, SINGLE.embeds, Layout.single(5, 40, 51), Schedule(), make_policy("none"))
    with pytest.raises(GateError, match="10052 tokens and 0 new ones exceed the context of 512"):
        long = torch.zeros(1, 10_052, 64)
        prefill(mha, long, Layout.single(5, 40, 10_052), Schedule(), make_policy("none"))
    with pytest.raises(GateError, match="52 tokens and 500 new ones exceed the context of 512"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule(), make_policy("none"), max_new_tokens=500)
    with pytest.raises(GateError, match="52 tokens and 461 new ones"):
        generate(mha, run(mha, SINGLE, Schedule(), "none"), max_new_tokens=461, eos_ids=())
    with pytest.raises(GateError, match="max_new_tokens is -1"):
        generate(mha, run(mha, SINGLE, Schedule(), "none"), max_new_tokens=-1, eos_ids=())
    with pytest.raises(GateError, match="has 3: use generate_batch"):
        generate(mha, run(mha, BATCH, Schedule(), "none"), max_new_tokens=1, eos_ids=())


def test_attention_other_than_sdpa_is_refused() -> None:
    language = tiny_llama()
    language.set_attn_implementation("eager")
    with pytest.raises(GateError, match="'eager'"):
        run(language, SINGLE, Schedule(), "none")


def test_a_policy_says_what_it_lacks(mha: LlamaForCausalLM) -> None:
    with pytest.raises(PolicyError, match="fastv scores by the attention of the layer below; layer 0 has none"):
        run(mha, SINGLE, Schedule.of([0], [0.5]), "fastv")
    with pytest.raises(PolicyError, match="coarse_voxel at layer 0 needs the tokens' positions"):
        prefill(mha, SINGLE.embeds, SINGLE.layout, Schedule.of([0], [0.5]), make_policy("coarse_voxel"))
    with pytest.raises(PolicyError, match="none was given a gate at layer 2 that keeps 20 of 40"):
        run(mha, SINGLE, SCHEDULES["one"], "none")


def test_one_scene_serves_a_batch_of_questions(mha: LlamaForCausalLM) -> None:
    prompt = make_prompt((4, 4), (30, 30), (6, 3))
    shared = SceneTokens(torch.rand(30, 3, generator=torch.Generator().manual_seed(1)))
    result = prefill(mha, prompt.embeds, prompt.layout, Schedule.of([0], [0.5]), make_policy("ours"), scene=shared)
    assert torch.equal(result.trace.retained[0], result.trace.retained[1])


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
    language: LlamaForCausalLM, policy: str, schedule: Schedule, asked: dict[int, int], seen: tuple[int, ...]
) -> None:
    shown: list[tuple[int, int]] = []

    def pace(g: int, n: int) -> int | None:
        shown.append((g, n))
        return asked.get(g)

    made = make_policy(policy)
    result = prefill(language, SINGLE.embeds, SINGLE.layout, schedule, made, scene=SINGLE.scene, pace=pace)
    assert result.trace.spatial_per_layer == seen
    reached = result.trace.last_layer[0]
    assert tuple(int((reached >= i).sum()) for i in range(N_LAYERS)) == seen
    assert result.cache.lengths == tuple(n + 12 for n in seen)
    assert [g for g, _ in shown] == list(range(N_LAYERS))
    assert all(n >= seen[g] for g, n in shown)
    assert_equals_oracle(language, SINGLE, result, n_steps=4, rope=made.rope)


def test_hurried_gates_choose_as_those_of_a_schedule(mha: LlamaForCausalLM) -> None:
    """The same tokens, scores and logits: what `pace` asks for is a gate like any other."""
    schedule = Schedule.of([2, 4], [0.5, 0.25], withdraw_layer=5)
    planned = run(mha, SINGLE, schedule, "ours")
    counts = schedule.counts(40, N_LAYERS)
    made = make_policy("ours")
    hurried = prefill(
        mha, SINGLE.embeds, SINGLE.layout, Schedule(), made, scene=SINGLE.scene, pace=lambda g, n: counts[g]
    )
    assert torch.equal(hurried.logits, planned.logits)
    assert torch.equal(hurried.trace.last_layer, planned.trace.last_layer)
    assert torch.equal(hurried.trace.contribution, planned.trace.contribution)
    assert hurried.trace.spatial_per_layer == planned.trace.spatial_per_layer


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_pace_that_asks_for_nothing_changes_nothing(mha: LlamaForCausalLM, schedule: Schedule) -> None:
    plain = run(mha, SINGLE, schedule, "ours")
    made = make_policy("ours")
    same = prefill(mha, SINGLE.embeds, SINGLE.layout, schedule, made, scene=SINGLE.scene, pace=lambda g, n: None)
    assert torch.equal(same.logits, plain.logits) and torch.equal(same.trace.contribution, plain.trace.contribution)
    assert same.trace.spatial_per_layer == plain.trace.spatial_per_layer and same.cache.lengths == plain.cache.lengths


@pytest.mark.parametrize("most", [41, -1])
def test_a_pace_beyond_what_is_there_is_refused(mha: LlamaForCausalLM, most: int) -> None:
    with pytest.raises(GateError, match=f"asks for {most} of 40 spatial tokens before layer 2"):
        prefill(
            mha,
            SINGLE.embeds,
            SINGLE.layout,
            Schedule(),
            make_policy("ours"),
            pace=lambda g, n: most if g == 2 else None,
        )
    with pytest.raises(GateError, match="one sample, the prompt has 3"):
        prefill(mha, BATCH.embeds, BATCH.layout, Schedule(), make_policy("ours"), pace=lambda g, n: None)
