# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.cache import MIN_HEADROOM
from adatoken3d_ros.decoder.decode import decode, follow, generate
from adatoken3d_ros.decoder.prefill import Cancelled, GateError, prefill
from adatoken3d_ros.decoder.prefix import PrefixError, ScenePrefix
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.scores import diverse_features, farthest_points
from adatoken3d_ros.pruning.view import GateView, Selection
from tests.decoder.oracle import N_LAYERS, make_prompt, oracle_logits

PROMPT = make_prompt(5, 40, 7)
SCENE = PROMPT.embeds[:, :45]
QUESTIONS = [torch.randn(1, n, 64, generator=torch.Generator().manual_seed(n)) for n in (7, 1, 12)]


def answer(decoder: Decoder, prefix: ScenePrefix, question: Tensor) -> Tensor:
    """Logits (4, V) of the question and of three tokens after it."""
    with prefix.asking(question) as result:
        steps = [result.logits] + [decode(decoder, result, token) for token in (11, 22, 33)]
    return torch.stack(steps)


class TheseTokens:
    name, rope = "these", "original"
    kept = staticmethod(at_least_one)

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def select(self, view: GateView) -> Selection:
        return Selection(self.keep)


@pytest.mark.parametrize("kept", [40, 13])
def test_equals_a_prefill_from_scratch(decoder: Decoder, kept: int) -> None:
    keep = farthest_points(PROMPT.scene.xyz)[:kept]
    prefix = ScenePrefix(decoder, SCENE, 5, keep=keep)
    for question in QUESTIONS:
        prompt = make_prompt(5, 40, question.shape[1])
        embeds = torch.cat([SCENE, question], dim=1)
        schedule = Schedule.of([0], [kept / 40])
        fresh = prefill(decoder, embeds, prompt.layout, schedule, TheseTokens(keep.sort().values))
        steps = [fresh.logits] + [decode(decoder, fresh, token) for token in (11, 22, 33)]
        torch.testing.assert_close(answer(decoder, prefix, question), torch.stack(steps), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 9},
        {"keep": torch.arange(0, 40, 3), "top_k": 6},
        {"keep": farthest_points(PROMPT.scene.xyz)[:15]},
        {"keep": diverse_features(SCENE[0, 5:], 15), "top_k": 4},
    ],
    ids=["whole", "top k", "every third, top k", "spread", "diverse, top k"],
)
def test_the_order_of_questions_does_not_matter(decoder: Decoder, options: dict[str, object]) -> None:
    fresh = [answer(decoder, ScenePrefix(decoder, SCENE, 5, **options), question) for question in QUESTIONS]
    prefix = ScenePrefix(decoder, SCENE, 5, **options)
    for i in (2, 0, 1, 1, 2, 0, 0):
        torch.testing.assert_close(answer(decoder, prefix, QUESTIONS[i]), fresh[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"keep": torch.arange(0, 40, 2)}, {"top_k": 9}])
def test_memory_does_not_grow_with_the_number_of_questions(mha: Decoder, options: dict[str, object]) -> None:
    prefix = ScenePrefix(mha, SCENE, 5, **options)
    n_kept = len(prefix.keep)
    before = prefix.cache.nbytes()
    assert before == N_LAYERS * (5 + n_kept) * 64 * 4 * 2
    places = set()
    for i in range(30):
        answer(mha, prefix, QUESTIONS[i % 3])
        assert prefix.cache.nbytes() == before
        places.add(prefix.cache.layers[0].keys.untyped_storage().data_ptr())
        held = prefix.cache.layers[0].keys.untyped_storage().nbytes()
        assert held <= (5 + n_kept + 12 + 3 + MIN_HEADROOM) * 64 * 4
    assert len(places) == 1


def question_over_best_tokens(decoder: Decoder, question: Tensor, k: int) -> Iterator[Tensor]:
    """Slow and obvious: in each layer full attention maps choose the k tokens that the question's rows may see."""
    model, n = decoder.language.model, 45 + question.shape[1]
    hidden = torch.cat([SCENE, question], dim=1)
    cos, sin = model.rotary_emb(hidden, torch.arange(n)[None])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    for layer in model.layers:
        attention, maps = layer.self_attn, []

        def turned(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return x * cos[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[0]

        states = layer.input_layernorm(hidden)[0]
        for head in range(4):
            group = head // attention.num_key_value_groups
            q = turned(attention.q_proj(states)[:, 16 * head : 16 * (head + 1)])
            key = turned(attention.k_proj(states)[:, 16 * group : 16 * (group + 1)])
            maps.append((q @ key.T / math.sqrt(16)).masked_fill(~causal, -torch.inf).softmax(-1))
        score = torch.stack(maps).mean(0)[45:, 5:45].mean(0)
        seen = causal.clone()
        seen[45:, 5:45] = False
        seen[45:, 5 + score.topk(k).indices] = True
        hidden = layer(hidden, attention_mask=seen[None, None], position_embeddings=(cos, sin))
    yield decoder.language.lm_head(model.norm(hidden[0, -1]))


@pytest.mark.parametrize("k", [1, 9, 39])
def test_retrieval_equals_the_slow_way(decoder: Decoder, k: int) -> None:
    prefix = ScenePrefix(decoder, SCENE, 5, top_k=k)
    for question in QUESTIONS:
        with torch.no_grad():
            (expected,) = question_over_best_tokens(decoder, question, k)
        with prefix.asking(question) as result:
            torch.testing.assert_close(result.logits, expected, rtol=0, atol=1e-5)
            assert result.trace.rows_per_layer == result.cache.lengths == (5 + k + question.shape[1],) * N_LAYERS
            assert result.trace.retained.sum() == k


def test_retrieving_everything_is_seeing_everything(decoder: Decoder) -> None:
    full, retrieved = (ScenePrefix(decoder, SCENE, 5, top_k=k) for k in (None, 1000))
    for question in QUESTIONS:
        torch.testing.assert_close(
            answer(decoder, retrieved, question), answer(decoder, full, question), rtol=0, atol=1e-5
        )


def test_the_trace_measures_on_demand(mha: Decoder) -> None:
    keep = torch.arange(0, 40, 2)
    plain, measured = (ScenePrefix(mha, SCENE, 5, keep=keep, measure=measure) for measure in (False, True))
    with plain.asking(QUESTIONS[0]) as a, measured.asking(QUESTIONS[0]) as b:
        assert torch.equal(a.logits, b.logits)
        assert not a.trace.contribution.any()
        share = b.trace.contribution
        assert share.sum().item() == pytest.approx(1, abs=1e-5)
        assert share[0::2].min() > 0 and not share[1::2].any()
        assert b.trace.last_layer.tolist() == [5, -1] * 20
        assert b.trace.spatial_per_layer == (20,) * N_LAYERS


def test_a_question_over_a_ragged_cache(decoder: Decoder) -> None:
    # The stock model builds one mask for all layers and fails here; without a mask SDPA would cut the keys.
    gated = [
        prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule.of([1, 3], [0.5, 0.2]), make_policy("ours"))
        for _ in range(2)
    ]
    tokens = [3, 141, 59, 7]
    one_by_one = torch.stack([decode(decoder, gated[0], token) for token in tokens])
    expected = oracle_logits(decoder, PROMPT, gated[1].trace, tokens)[1:]
    at_once = follow(decoder, gated[1], tokens)
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-5)
    torch.testing.assert_close(at_once, expected, rtol=0, atol=1e-5)


def test_generation_from_a_prefix(mha: Decoder) -> None:
    prefix = ScenePrefix(mha, SCENE, 5)
    embeds = torch.cat([SCENE, QUESTIONS[0]], dim=1)
    fresh = prefill(mha, embeds, PROMPT.layout, Schedule(), make_policy("none"))
    expected = list(generate(mha, fresh, max_new_tokens=8, eos_ids=()))
    for _ in range(2):
        with prefix.asking(QUESTIONS[0]) as result:
            assert list(generate(mha, result, max_new_tokens=8, eos_ids=())) == expected


def test_what_goes_wrong_leaves_the_prefix_whole(mha: Decoder) -> None:
    prefix = ScenePrefix(mha, SCENE, 5, measure=True)
    expected = answer(mha, prefix, QUESTIONS[0])
    with pytest.raises(PrefixError, match="not finite"), prefix.asking(torch.full((1, 3, 64), torch.nan)):
        pass
    stops = iter([False, False, True])
    with pytest.raises(Cancelled), prefix.asking(QUESTIONS[1], should_stop=lambda: next(stops)):
        pass
    with pytest.raises(RuntimeError, match="mine"), prefix.asking(QUESTIONS[1]):
        raise RuntimeError("mine")
    with prefix.asking(QUESTIONS[0]), pytest.raises(PrefixError, match="still open"), prefix.asking(QUESTIONS[1]):
        pass
    assert torch.equal(answer(mha, prefix, QUESTIONS[0]), expected)


def test_bad_input(mha: Decoder) -> None:
    for embeds, start in ((SCENE[0], 5), (SCENE, 45), (SCENE, -1), (SCENE.expand(2, -1, -1), 5)):
        with pytest.raises(PrefixError, match=f"spatial tokens from row {start}"):
            ScenePrefix(mha, embeds, start)
    with pytest.raises(PrefixError, match="top_k is 0"):
        ScenePrefix(mha, SCENE, 5, top_k=0)
    for keep in ([], [40], [-1], [1, 1]):
        with pytest.raises(PrefixError, match="distinct indices below 40"):
            ScenePrefix(mha, SCENE, 5, keep=torch.tensor(keep, dtype=torch.long))
    with pytest.raises(GateError, match="exceed the context of 512"):
        ScenePrefix(mha, torch.zeros(1, 513, 64), 5)
    prefix = ScenePrefix(mha, SCENE, 5)
    with pytest.raises(PrefixError, match=r"\(1, 0, 64\)"), prefix.asking(QUESTIONS[0][:, :0]):
        pass
    with pytest.raises(GateError, match="52 tokens and 461 new ones"), prefix.asking(QUESTIONS[0], max_new_tokens=461):
        pass
    with pytest.raises(GateError, match="10045 tokens"), prefix.asking(torch.zeros(1, 10_000, 64)):
        pass
