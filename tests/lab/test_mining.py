# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab import mining
from adatoken3d_ros.lab.information import ARRAYS, InformationError
from adatoken3d_ros.lab.mining import QUESTION_WEIGHT, SYSTEM_WEIGHT, mine, region_sums

# One system token, three spatial tokens (1, 2, 3), two question tokens.


HAND_MADE = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        [0.2, 0.3, 0.5, 0.0, 0.0, 0.0],
        [0.1, 0.2, 0.3, 0.4, 0.0, 0.0],
        [0.1, 0.1, 0.2, 0.2, 0.4, 0.0],
        [0.1, 0.2, 0.1, 0.1, 0.3, 0.2],
    ]
)


def config(heads: int = 4, kv_heads: int = 4, layers: int = 3, **more: object) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        **more,
    )


def model(settings: LlamaConfig, attention: str = "sdpa", kind: type = LlamaForCausalLM) -> LlamaForCausalLM:
    torch.manual_seed(0)
    language = kind._from_config(settings, attn_implementation=attention).eval()
    for parameter in language.parameters():
        if parameter.ndim == 1:  # norms start at one and biases at zero, which would hide a mistake in them
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(6.0)
    return language


def embeddings(n_tokens: int, width: int = 32) -> torch.Tensor:
    return torch.randn(1, n_tokens, width, generator=torch.Generator().manual_seed(1))


def test_regions_of_a_hand_made_map() -> None:
    intra, system, question = region_sums(HAND_MADE, 0, spatial_start=1, n_spatial=3)
    assert intra.item() == pytest.approx(0.3 + 0.2 + 0.3)
    assert system.item() == pytest.approx(0.5 + 0.2 + 0.1)
    assert question.item() == pytest.approx(0.1 + 0.2 + 0.2 + 0.2 + 0.1 + 0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_regions_are_the_same_from_chunks_of_rows(size: int) -> None:
    chunks = [region_sums(HAND_MADE[at : at + size, : at + size], at, 1, 3) for at in range(0, 6, size)]
    whole = region_sums(HAND_MADE, 0, 1, 3)
    assert torch.allclose(torch.tensor(chunks).double().sum(0), torch.stack(whole))


def release_region_sums(
    attention: torch.Tensor, spatial_start: int, n_spatial: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(intra, inter) by the index order of AdaToken-3D's published script: query index < key index.

    attention (n, n), rows = queries. All three regions lie above the diagonal, where a causal map is 0.
    """
    end = spatial_start + n_spatial
    among = attention[spatial_start:end, spatial_start:end]
    system, question = attention[:spatial_start, spatial_start:end], attention[spatial_start:end, end:]
    return torch.triu(among, diagonal=1).sum(), SYSTEM_WEIGHT * system.sum() + QUESTION_WEIGHT * question.sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**16))
def test_the_releases_formula_is_zero_on_every_causal_map(system: int, spatial: int, question: int, seed: int) -> None:
    n = system + spatial + question
    scores = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    causal = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert [value.item() for value in release_region_sums(causal, system, spatial)] == [0.0, 0.0]
    _, from_system, from_question = region_sums(causal, 0, system, spatial)
    assert from_system > 0 and from_question > 0


def test_the_releases_formula_counts_the_other_triangle() -> None:
    intra, inter = release_region_sums(HAND_MADE.T, 1, 3)
    assert intra.item() == pytest.approx(0.8)
    assert inter.item() == pytest.approx(0.7 * 0.8 + 0.3 * 0.9)


def dense_oracle(settings: LlamaConfig, embeds: torch.Tensor, start: int, n: int, kind: type) -> dict[str, np.ndarray]:
    """The slow obvious way: transformers' own eager attention maps and one explicit vector per (row, key)."""
    language = model(settings, "eager", kind)
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: inputs.append((args[0], output)))
        for layer in language.model.layers
    ]
    with torch.inference_mode():
        maps = language(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
        found: dict[str, list[object]] = {name: [] for name in ARRAYS}
        for layer, (hidden, _), weights in zip(language.model.layers, inputs, maps, strict=True):
            attention, weights = layer.self_attn, weights[0].double()
            heads, size = weights.shape[0], attention.head_dim
            value = (
                attention.v_proj(layer.input_layernorm(hidden))[0]
                .double()
                .view(-1, attention.v_proj.out_features // size, size)
            )
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
            output = attention.o_proj.weight.double().view(-1, heads, size)
            parts = torch.einsum("hij,jhd,ohd->ijo", weights, value, output)[start + n :]
            update = parts.sum(1)
            mean = weights.mean(0)
            spatial = slice(start, start + n)
            found["intra"].append(sum(mean[i, j] for i in range(start, start + n) for j in range(start, i)))
            found["inter"].append(0.7 * mean[spatial, :start].sum() + 0.3 * mean[start + n :, spatial].sum())
            found["attention"].append(mean[start + n :].mean(0)[spatial].numpy())
            norms = parts.norm(dim=-1)
            found["norm"].append((norms / norms.sum(1, keepdim=True)).mean(0)[spatial].numpy())
            along = (parts * update[:, None]).sum(-1) / update.square().sum(-1, keepdim=True)
            found["projection"].append(along.mean(0)[spatial].numpy())
            written = attention(
                layer.input_layernorm(hidden),
                language.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None]),
                causal(hidden),
            )[0][0]
            after = written + hidden[0]
            ratio = written.norm(dim=-1) / after.norm(dim=-1)
            found["residual_weight"].append(ratio[start + n :].mean().item())
    for hook in hooks:
        hook.remove()
    return {name: np.array([np.asarray(value, dtype=np.float64) for value in values]) for name, values in found.items()}


def causal(hidden: torch.Tensor) -> torch.Tensor:
    n = hidden.shape[1]
    return torch.full((n, n), -torch.inf).triu(1)[None, None]


SHAPES = {
    "mha": (config(4, 4), LlamaForCausalLM),
    "gqa": (config(4, 2), LlamaForCausalLM),
    "mqa": (config(4, 1), LlamaForCausalLM),
    "biased": (config(4, 2, attention_bias=True), LlamaForCausalLM),
    "query and key norms": (
        Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=64,
        ),
        Qwen3ForCausalLM,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_streaming_equals_the_dense_maps(shape: str, rows: int) -> None:
    settings, kind = SHAPES[shape]
    embeds, start, n = embeddings(23), 4, 13
    language = model(settings, kind=kind)
    found = mine(Decoder(language), embeds, spatial_start=start, n_spatial=n, chunk_bytes=rows * 4 * 4 * 23)
    oracle = dense_oracle(settings, embeds, start, n, kind)
    for name, expected in oracle.items():
        assert getattr(found, name) == pytest.approx(expected, abs=1e-5), name
    assert found.n_question == 6 and found.n_system == 4


def test_one_chunk_of_rows_is_the_most_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    rows_of = mining.attention_rows

    def recorded(*args: object) -> torch.Tensor:
        weights = rows_of(*args)  # type: ignore[arg-type]
        sizes.append(4 * weights.numel())
        return weights

    monkeypatch.setattr(mining, "attention_rows", recorded)
    mine(Decoder(model(config())), embeddings(60), spatial_start=4, n_spatial=50, chunk_bytes=4 * 4 * 60 * 2)
    assert max(sizes) <= 4 * 4 * 60 * 2
    assert len(sizes) == 3 * (50 // 2 + 6 // 2)


@pytest.mark.parametrize("shape", ["mha", "gqa", "biased"])
def test_shares_sum_to_one_over_all_tokens(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, kind = SHAPES[shape]
    language = model(settings, kind=kind)
    seen: list[torch.Tensor] = []
    for name in ("_norm_shares", "_projection_shares"):
        function = getattr(mining, name)
        monkeypatch.setattr(mining, name, lambda *a, f=function: seen.append(f(*a)) or seen[-1])
    mine(Decoder(language), embeddings(23), spatial_start=4, n_spatial=13)
    assert len(seen) == 2 * 3
    assert any((shares < 0).any() for shares in seen[1::2])
    for shares in seen:
        assert torch.allclose(shares.sum(-1), torch.ones(6), atol=1e-5)


def test_bfloat16_models_are_scored_in_float32() -> None:
    exact = mine(Decoder(model(config())), embeddings(23), spatial_start=4, n_spatial=13)
    rough = mine(Decoder(model(config()).bfloat16()), embeddings(23).bfloat16(), spatial_start=4, n_spatial=13)
    assert rough.attention.dtype == np.float64
    assert rough.intra == pytest.approx(exact.intra, rel=0.1)


def test_progress_counts_the_layers() -> None:
    seen: list[tuple[int, int]] = []
    mine(Decoder(model(config())), embeddings(9), spatial_start=2, n_spatial=4, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("start", "n", "match"), [(2, 7, "9 tokens cannot hold 7"), (2, 0, "hold 0 spatial"), (-1, 4, "at -1")]
)
def test_layouts_without_room_for_a_question_are_refused(start: int, n: int, match: str) -> None:
    with pytest.raises(InformationError, match=match):
        mine(Decoder(model(config())), embeddings(9), spatial_start=start, n_spatial=n)


def test_what_cannot_be_mined_is_refused() -> None:
    with pytest.raises(InformationError, match=r"\(2, 9, 32\)"):
        mine(Decoder(model(config())), embeddings(9).expand(2, -1, -1), spatial_start=2, n_spatial=4)
    with pytest.raises(InformationError, match="9 tokens exceed the context of 8"):
        mine(Decoder(model(config(max_position_embeddings=8))), embeddings(9), spatial_start=2, n_spatial=4)
    with pytest.raises(InformationError, match="'eager'"):
        mine(Decoder(model(config(), "eager")), embeddings(9), spatial_start=2, n_spatial=4)
    with pytest.raises(InformationError, match="layer 0"):
        mine(Decoder(model(config())), embeddings(9) * torch.nan, spatial_start=2, n_spatial=4)
    windowed = MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=64,
        sliding_window=5,
    )
    with pytest.raises(InformationError, match="window of 5"):
        mine(Decoder(model(windowed, kind=MistralForCausalLM)), embeddings(9), spatial_start=2, n_spatial=4)
