# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab import information
from adatoken3d_ros.lab.information import (
    MEASURES,
    Concentration,
    Information,
    InformationError,
    InformationSet,
    accumulate,
    draw,
    layer_contribution,
    lorenz,
    mine,
    region_sums,
    release_region_sums,
)

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


def test_contribution_of_two_layers_by_hand() -> None:
    # Three layers: m = [0.8, 0.8 + 0.73 * 0.4, 0.8 + 0.73 * 0.5]
    intra, inter = np.array([0.8, 0.4, 0.1]), np.array([0.83, 0.5, 0.2])
    assert accumulate(intra) == pytest.approx([0.8, 1.092, 1.165])
    raw = np.array([0.32 + 0.249 + 0.24, 0.16 + 0.15 + 0.3276, 0.04 + 0.06 + 0.3495])
    assert layer_contribution(intra, inter) == pytest.approx((raw - raw[2]) / (raw[0] - raw[2]))


def test_equal_layers_contribute_alike() -> None:
    assert layer_contribution(np.zeros(3), np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


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
        found: dict[str, list[object]] = {name: [] for name in information._ARRAYS}
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
    rows_of = information._attention_rows

    def recorded(*args: object) -> torch.Tensor:
        weights = rows_of(*args)  # type: ignore[arg-type]
        sizes.append(4 * weights.numel())
        return weights

    monkeypatch.setattr(information, "_attention_rows", recorded)
    mine(Decoder(model(config())), embeddings(60), spatial_start=4, n_spatial=50, chunk_bytes=4 * 4 * 60 * 2)
    assert max(sizes) <= 4 * 4 * 60 * 2
    assert len(sizes) == 3 * (50 // 2 + 6 // 2)


@pytest.mark.parametrize("shape", ["mha", "gqa", "biased"])
def test_shares_sum_to_one_over_all_tokens(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, kind = SHAPES[shape]
    language = model(settings, kind=kind)
    seen: list[torch.Tensor] = []
    for name in ("_norm_shares", "_projection_shares"):
        function = getattr(information, name)
        monkeypatch.setattr(information, name, lambda *a, f=function: seen.append(f(*a)) or seen[-1])
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


def test_lorenz_by_hand() -> None:
    tokens, mass = lorenz(np.array([4.0, 1.0, 3.0, 2.0]))
    assert tokens.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert mass == pytest.approx([0.0, 0.1, 0.3, 0.6, 1.0])
    figures = Concentration.of(np.array([4.0, 1.0, 3.0, 2.0]))
    assert figures.lowest_share == pytest.approx(0.3 + 0.4 * 0.3)  # 60 % lies two fifths of the way from 0.5 to 0.75
    assert figures.largest_q == pytest.approx(0.125)
    assert figures.gini == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("shares", "lowest", "largest_q", "gini"),
    [([1.0] * 10, 0.6, 0.05, 0.0), ([0.0] * 9 + [1.0], 0.0, 0.905, 0.9), ([0.0, 0.0], 0.6, 0.05, 0.0)],
)
def test_concentration_of_extremes(shares: list[float], lowest: float, largest_q: float, gini: float) -> None:
    figures = Concentration.of(np.array(shares))
    assert (figures.lowest_share, figures.largest_q, figures.gini) == pytest.approx((lowest, largest_q, gini))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30))
def test_lorenz_curves_are_convex_below_the_diagonal(values: list[float]) -> None:
    tokens, mass = lorenz(np.array(values))
    assert (mass <= tokens + 1e-9).all()
    assert (np.diff(mass, 2) >= -1e-9).all()
    figures = Concentration.of(np.array(values))
    assert np.interp(figures.largest_q, tokens, mass) == pytest.approx(0.05, abs=1e-6)
    assert -1e-9 <= figures.gini <= 1.0


def test_negative_or_missing_contributions_have_no_lorenz_curve() -> None:
    for values in ([0.5, -0.1], [0.5, np.nan], []):
        with pytest.raises(InformationError, match="finite contributions"):
            lorenz(np.array(values))


def mined(n_spatial: int, seed: int, layers: int = 3) -> Information:
    random = np.random.default_rng(seed)
    shares = [random.dirichlet(np.full(n_spatial, 0.2), size=layers) * 0.7 for _ in range(2)]
    signed = shares[0] - 0.05 * random.random((layers, n_spatial))
    return Information(5, 7, random.random(layers), random.random(layers), random.random(layers), *shares, signed)


def test_token_shares_weigh_layers_by_their_residual_weight() -> None:
    tokens = np.array([[0.2, 0.4], [0.6, -0.2]])
    one = Information(1, 1, np.ones(2), np.ones(2), np.array([1.0, 0.5]), tokens, tokens, tokens)
    assert one.token_shares("projection") == pytest.approx([0.5 / 0.9, 0.4 / 0.9])
    assert one.layer_token_shares("projection") == pytest.approx(np.array([[1 / 3, 2 / 3], [1.0, 0.0]]))
    with pytest.raises(InformationError, match="'taste'"):
        one.token_shares("taste")


def sample_set() -> InformationSet:
    prompts = tuple(mined(20 + 3 * seed, seed) for seed in range(6))
    return InformationSet(prompts, ("a", "a", "a", "a", "b", "c"), tuple(f"q{i}?" for i in range(6)), "feed")


def test_scenes_count_alike_however_many_questions_they_have() -> None:
    found = sample_set()
    values = [Concentration.of(p.token_shares("norm")).gini for p in found.prompts]
    estimate = found.concentration("norm")["gini"]
    assert estimate.mean == pytest.approx(np.mean([np.mean(values[:4]), values[4], values[5]]))
    assert estimate.low is not None and estimate.high is not None
    assert min(np.mean(values[:4]), *values[4:]) <= estimate.low <= estimate.mean <= estimate.high
    assert found.concentration("norm")["gini"] == estimate  # seeded


def test_attention_by_position_by_hand() -> None:
    # Layer shares 1:2:3 and 3:2:1 of three tokens, the last layer not counted; a second prompt of five tokens.
    three = replace(mined(3, 0), attention=np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [9.0, 0.0, 0.0]]))
    five = replace(mined(5, 1), attention=np.tile([0.5, 0.1, 0.1, 0.1, 0.2], (3, 1)))
    assert InformationSet((three,), ("a",), ("x",), "feed").position_curve(3) == [1.0, 1.0, 1.0]
    one = InformationSet((five,), ("a",), ("x",), "feed")
    assert one.position_curve(5) == [2.5, 0.5, 0.5, 0.5, 1.0]
    # Two points: each token counts for both ends, by nearness.
    ends = [(2.5 + 0.5 * (0.75 + 0.5 + 0.25)) / 2.5, (0.5 * (0.25 + 0.5 + 0.75) + 1.0) / 2.5]
    assert one.position_curve(2) == pytest.approx(ends, abs=1e-4)
    both = InformationSet((three, five), ("a", "b"), ("x", "y"), "feed").position_curve(3)
    assert both == pytest.approx([(1 + 2.5 + 0.25) / 2.5, (1 + 0.25 + 0.5 + 0.25) / 3, (1 + 0.25 + 1) / 2.5], abs=1e-4)
    assert one.position_curve(1) == [1.0] and len(one.position_curve(40)) == 40
    with pytest.raises(InformationError, match="0 points"):
        one.position_curve(0)


def test_one_scene_has_no_interval() -> None:
    one = InformationSet((mined(9, 0), mined(9, 1)), ("a", "a"), ("x", "y"), "feed")
    assert one.concentration("attention")["gini"].low is None


def test_sets_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(InformationError, match=r"\[3, 4\] layers"):
        InformationSet((mined(9, 0), mined(9, 1, layers=4)), ("a", "b"), ("x", "y"), "feed")
    with pytest.raises(InformationError, match="1 mined prompts, 2 scene"):
        InformationSet((mined(9, 0),), ("a", "b"), ("x",), "feed")
    with pytest.raises(InformationError, match="0 mined prompts"):
        InformationSet((), (), (), "feed")


def test_files_give_back_what_was_saved(tmp_path) -> None:
    found = sample_set()
    tensors, text = found.save(tmp_path / "llava-v1.5")
    assert (tensors.name, text.name) == ("llava-v1.5.safetensors", "llava-v1.5.json")
    again = InformationSet.load(tmp_path / "llava-v1.5")
    assert again.scenes == found.scenes and again.questions == found.questions and again.model_hash == "feed"
    for one, other in zip(found.prompts, again.prompts, strict=True):
        assert (one.n_system, one.n_question) == (other.n_system, other.n_question)
        for name in information._ARRAYS:
            assert (getattr(one, name) == getattr(other, name)).all()
    figures = json.loads(text.read_text())["figures"]
    assert set(figures["concentration"]) == set(MEASURES)
    assert len(figures["contribution"]) == 3


def test_broken_files_are_refused(tmp_path) -> None:
    found = sample_set()
    tensors, text = found.save(tmp_path / "set")
    content = json.loads(text.read_text())
    text.write_text(json.dumps({**content, "format": "other"}))
    with pytest.raises(InformationError, match="adatoken3d-information/1"):
        InformationSet.load(tmp_path / "set")
    text.write_text(json.dumps({key: value for key, value in content.items() if key != "model_hash"}))
    with pytest.raises(InformationError, match="model_hash"):
        InformationSet.load(tmp_path / "set")
    text.write_text(json.dumps({**content, "prompts": content["prompts"] * 2}))
    with pytest.raises(InformationError, match="6.intra"):
        InformationSet.load(tmp_path / "set")
    text.write_text(json.dumps(content))
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(InformationError, match="set"):
        InformationSet.load(tmp_path / "set")
    with pytest.raises(FileNotFoundError):
        InformationSet.load(tmp_path / "nowhere")


def test_the_picture_is_drawn(tmp_path) -> None:
    draw(sample_set(), tmp_path / "p.png", curve=np.array([1.0, 0.4, 0.1]), kept=np.array([1.0, 0.5, 0.5]))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
