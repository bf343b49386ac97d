# SPDX-License-Identifier: Apache-2.0
"""Decoders of other families: what is asked of their layers is what the layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from adatoken3d_ros.decoder.adapter import Decoder, DecoderError
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.decoder.stem import Stems
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from tests.decoder.oracle import N_LAYERS, make_prompt, oracle_logits, randomised

FAMILIES = {
    "biases on queries, keys and values": (Qwen2Config, Qwen2ForCausalLM, {}),
    "norms on queries and keys": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "norms and biases, tied": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "no window": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
PROMPT = make_prompt(5, 40, 7)
SCHEDULE = Schedule.of([1, 2, 4], [0.7, 0.4, 0.2])


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    config, language, further = request.param
    sizes: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "attn_implementation": "sdpa",
        **further,
    }
    return Decoder(randomised(language, config(**sizes)))


@pytest.mark.parametrize("policy", ["ours", "fastv", "pyramiddrop", "random"])
def test_a_gated_prefill_equals_the_masked_oracle(decoder: Decoder, policy: str) -> None:
    filled = prefill(
        decoder, PROMPT.embeds, PROMPT.layout, SCHEDULE, make_policy(policy), scene=PROMPT.scene, rope="original"
    )
    assert filled.trace.retained.sum() == 8
    tokens = [3, 141, 59]
    expected = oracle_logits(decoder, PROMPT, filled.trace, tokens)
    actual = torch.stack([filled.logits] + [decode(decoder, filled, token) for token in tokens])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_without_gates_equals_the_stock_model_and_a_prefix(decoder: Decoder) -> None:
    with torch.no_grad():
        expected = decoder.language(inputs_embeds=PROMPT.embeds).logits[0, -1]
    filled = prefill(decoder, PROMPT.embeds, PROMPT.layout, Schedule(), make_policy("none"))
    torch.testing.assert_close(filled.logits, expected, rtol=0, atol=1e-5)
    prefix = ScenePrefix(decoder, PROMPT.embeds[:, :45], 5, measure=True)
    with prefix.asking(PROMPT.embeds[:, 45:]) as asked:
        torch.testing.assert_close(asked.logits, expected, rtol=0, atol=1e-5)


def test_queries_keys_and_values_are_those_of_the_layer(decoder: Decoder) -> None:
    """To the bit: of what transformers' own attention projects, normalises and turns."""
    rows, positions = PROMPT.embeds[0], torch.arange(PROMPT.layout.n_tokens)
    cos, sin = decoder.rotary(PROMPT.embeds, positions)
    for layer in decoder.layers:
        attention = layer.module.self_attn
        states = layer.module.input_layernorm(rows)
        q, k, v = (
            getattr(attention, f"{name}_proj")(states).view(len(rows), -1, attention.head_dim).transpose(0, 1)
            for name in "qkv"
        )
        q, k = (getattr(attention, f"{name}_norm", nn.Identity())(heads) for name, heads in (("q", q), ("k", k)))
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        assert torch.equal(layer.queries(rows, cos[0], sin[0]), q[0])
        assert torch.equal(layer.keys(rows, cos[0], sin[0]), k[0])
        assert torch.equal(layer.values(rows), v)
        with layer.asked(7) as noted, torch.no_grad():
            layer.run(PROMPT.embeds, (cos, sin))
        assert torch.equal(layer.queries_of(noted[0], cos[0, -7:], sin[0, -7:]), q[0][:, -7:])


def test_a_gate_takes_the_queries_that_its_layer_has_made(decoder: Decoder) -> None:
    """No projection is made twice, for a scene read before neither."""
    rows, hooks = [], []
    for layer in decoder.layers:
        projection = layer.module.self_attn.q_proj
        hooks.append(projection.register_forward_hook(lambda _module, args, _out: rows.append(args[0].shape[1])))
    stems, schedule = Stems(), Schedule.of([2, 3], [0.5, 0.2])
    for given in ({}, {"stems": stems}, {"stems": stems}, {"at_most": lambda g, n: n // 2 if g == 1 else None}):
        filled = prefill(
            decoder, PROMPT.embeds, PROMPT.layout, schedule, make_policy("ours"), scene=PROMPT.scene, **given
        )
        if not given:
            assert tuple(rows) == filled.trace.rows_per_layer
        assert len(rows) == len(decoder) + (2 if given and not stems.used and "stems" in given else 0)
        rows.clear()
    for hook in hooks:
        hook.remove()


def test_sizes_are_read_off_the_projections(decoder: Decoder) -> None:
    attention = decoder.layers[0].module.self_attn
    assert decoder.size.queries == attention.q_proj.out_features
    assert decoder.size.keys == attention.k_proj.out_features
    assert (decoder.window, decoder.context, len(decoder)) == (None, 512, N_LAYERS)


def test_what_cannot_be_driven_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(DecoderError, match=r"Linear has no model\.layers, model\.norm, model\.rotary_emb"):
        Decoder(nn.Linear(2, 2))
    language = randomised(
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=9,
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=8,
            num_hidden_layers=2,
        ),
    )
    del language.model.layers[1].self_attn.k_proj
    with pytest.raises(DecoderError, match=r"layer 1 \(Qwen2Attention\) has no k_proj"):
        Decoder(language)
