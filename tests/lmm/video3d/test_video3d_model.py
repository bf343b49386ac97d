# SPDX-License-Identifier: Apache-2.0
"""Pooling, sines, newlines and clicks by hand, and the whole beside transformers' own modules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds, SpliceError, ViewTokens
from adatoken3d_ros.lmm.text_places import CLICK_MARK, PromptError
from adatoken3d_ros.lmm.video3d.config import Video3DConfig
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.position import cells, sine
from adatoken3d_ros.lmm.video3d.prompt import build_prompt


def in_rows(cells_: list[int], views: list[int]) -> ViewTokens:
    """Tokens in grids of 4 x 4."""
    return ViewTokens(torch.tensor(views), torch.tensor(cells_), ((4, 4),) * (max(views) + 1))


LOW, HIGH = (-15.0, -15.0, -5.0), (15.0, 15.0, 5.0)


def test_cells_are_counted_from_the_corner_rounded_and_clamped():
    xyz = torch.tensor([[0.0, -15.0, 0.04], [0.06, 99.0, -99.0], [-1.0, 1.26, 4.96]])
    assert cells(xyz, LOW, HIGH, 0.1).tolist() == [[150, 0, 50], [151, 300, 0], [140, 163, 100]]


@pytest.mark.parametrize("width", [64, 3584, 20, 6])
def test_sine_by_the_formula(width):
    numbers = torch.tensor([[3.0, 150.0, 0.0], [300.0, 7.0, 42.0]])
    third, found = width // 3, sine(numbers, width)
    expected = torch.zeros(2, width, dtype=torch.float64)
    for row in range(2):
        for axis in range(3):
            for k in range(third):
                angle = float(numbers[row, axis]) / 10000 ** (2 * (k // 2) / third)
                expected[row, axis * third + k] = math.cos(angle) if k % 2 else math.sin(angle)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)  # float32 angles up to 300
    assert found[:, 3 * third :].abs().sum() == 0


def test_pooling_weighs_the_four_patches_around_each_middle(model):
    # 7 patches become 4: middle (k + 0.5) * 7 / 4 - 0.5 = 0.375, 2.125, 3.875, 5.625.
    patches = torch.randn(2, 49, 32, generator=torch.Generator().manual_seed(0))
    projected = model.projector(patches).reshape(2, 7, 7, 64)
    found = model._pooled(patches).reshape(2, 4, 4, 64)
    for i in range(4):
        for j in range(4):
            y, x = 0.375 + 1.75 * i, 0.375 + 1.75 * j
            r, c = int(y), int(x)
            expected = sum(
                projected[:, r + a, c + b] * (1 - abs(y - r - a)) * (1 - abs(x - c - b)) for a in (0, 1) for b in (0, 1)
            )
            torch.testing.assert_close(found[:, i, j], expected, atol=1e-5, rtol=0)


def test_tower_runs_all_layers_but_the_last_without_norm(model, loaded):
    image = np.random.default_rng(0).integers(0, 255, (102, 102, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - 0.5) / 0.5  # no resize to be done
    tower = model.vision.tower
    hidden = tower.embeddings(pixels[None])
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    assert len(tower.encoder.layers) == 2  # of 3 in config.json
    torch.testing.assert_close(model.vision([image]), hidden, atol=1e-5, rtol=0)
    tokens = model.encode_images([image] * 9)  # more than go through the projector at a time
    assert tokens.shape == (9, 16, 64)
    torch.testing.assert_close(tokens[8], model._pooled(hidden)[0], atol=1e-5, rtol=0)
    assert model.encode_images([]).shape == (0, 16, 64)


def test_token_is_what_it_shows_and_the_sine_of_its_cell(model):
    features, places = torch.randn(3, 64), torch.tensor([[0.0, 1.0, 2.0], [0.31, -4.0, 0.5], [99.0, 0.0, 0.0]])
    expected = features + sine(cells(places, LOW, HIGH, 0.1), 64)
    torch.testing.assert_close(model.scene_tokens(features, model.lift_places(places)), expected)
    torch.testing.assert_close(model.scene_tokens(features, places[:, :0]), features)  # they are in it already
    torch.testing.assert_close(
        model.embed_clicks(places)[1], model.decoder.embed(torch.tensor(592)) + expected[1] - features[1]
    )
    assert model.embed_clicks(places[:0]).shape == (0, 64)


def test_a_newline_ends_each_line(model):
    prompt = PromptIds(((1, 2), Placeholder("image"), (3,)))
    spatial = torch.arange(5.0)[:, None].expand(5, 64)
    spliced = model.splice(prompt, spatial, where=in_rows([0, 1, 6, 7, 11], [0] * 5))
    rows = spliced.embeds[0, 2:-1]
    for row, token in zip(rows, [0, 1, None, 2, 3, None, 4, None], strict=True):
        torch.testing.assert_close(row, model.newline.data if token is None else spatial[token])
    assert (spliced.spatial_start, spliced.n_spatial, spliced.n_question, spliced.n_tokens) == (
        2,
        5,
        2,
        11,
    )  # the last newline is read with the question
    assert spliced.layout.rows.tolist() == [2, 3, 5, 6, 8]
    assert spliced.layout.closing.tolist() == [4, 4, 7, 7, -1]
    views = model.splice(prompt, spatial, where=in_rows([3, 0, 1, 2, 0], [0, 1, 1, 1, 2]))  # the same rows of others
    assert views.layout.rows.tolist() == [2, 4, 5, 6, 8]
    with pytest.raises(SpliceError, match="for 2 tokens, there are 5"):
        model.splice(prompt, spatial, where=in_rows([0, 1], [0, 0]))
    with pytest.raises(SpliceError, match="more than the context of 4096"):
        model.splice(prompt, torch.zeros(4093, 64))


def test_conversation(tokenizer):
    prompt = build_prompt(tokenizer, f"What is at {CLICK_MARK}?", n_clicks=1)
    texts = [one.kind if isinstance(one, Placeholder) else tokenizer.decode(list(one)) for one in prompt.pieces]
    assert texts == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "image",
        "\n",
        " What is at ",
        "click",
        "?",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    added = build_prompt(tokenizer, "what is it?", n_clicks=1)
    assert tokenizer.decode(list(added.pieces[3])) == " Given an object located at "
    spatial = build_prompt(tokenizer, "what?", template="qwen_1_5_spatial").pieces[3]
    assert tokenizer.decode(list(spatial)).startswith("The video captures")
    for bad in ("", "x <|im_end|>", "the <coord> there", "<image>"):
        with pytest.raises(PromptError):
            build_prompt(tokenizer, bad)
    with pytest.raises(PromptError, match="template 'x' is unknown"):
        build_prompt(tokenizer, "what?", template="x")


def test_unpruned_logits_are_transformers_own(model, tokenizer):
    """Slow and obvious: one view after the other, row by row, token by token, then Qwen2's own forward."""
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (120, 160, 3), dtype=np.uint8) for _ in range(3)]
    places = torch.from_numpy(rng.uniform(-4, 4, (3, 16, 3))).float()
    prompt = model.prompt(tokenizer, f"What is at {CLICK_MARK}?", n_clicks=1)
    click = torch.tensor([[0.5, 1.0, -0.25]])
    features = model.encode_images(images)
    rows: list[torch.Tensor] = []
    for piece in prompt.pieces:
        if isinstance(piece, tuple):
            rows += [model.language.model.embed_tokens.weight[i] for i in piece]
        elif piece.kind == "click":
            cell = ((click[0] - torch.tensor(LOW)) / 0.1).round()
            rows.append(model.language.model.embed_tokens.weight[592] + sine(cell, 64))
        else:
            for view in range(3):
                for y in range(4):
                    for x in range(4):
                        cell = ((places[view, 4 * y + x] - torch.tensor(LOW)) / 0.1).round()
                        rows.append(features[view, 4 * y + x] + sine(cell, 64))
                    rows.append(model.newline)
    with torch.no_grad():
        expected = model.language(inputs_embeds=torch.stack(rows)[None]).logits[0, -1]
        tokens = model.scene_tokens(features.flatten(0, 1), model.lift_places(places.flatten(0, 1)))
        spliced = model.splice(
            prompt, tokens, model.embed_clicks(click), where=in_rows([*range(16)] * 3, [0] * 16 + [1] * 16 + [2] * 16)
        )
        hidden = spliced.embeds
        cos_sin = model.decoder.rotary(hidden, torch.arange(spliced.n_tokens))
        for layer in model.decoder.layers:
            hidden = layer.run(hidden, cos_sin)
    torch.testing.assert_close(model.decoder.logits(hidden[0, -1]), expected, atol=1e-5, rtol=0)


def test_published_sizes():
    config = Video3DConfig.from_dict(
        {
            "model_type": "llava_qwen",
            "vocab_size": 151649,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_spatial_pool_mode": "bilinear",
            "mm_spatial_pool_stride": 2,
            "world_position_embedding_type": "avg-discrete-sin3d",
            "tie_word_embeddings": False,
        }
    )
    with torch.device("meta"):
        model = Video3D(config)
    sizes = model.sizes
    assert (sizes.patches.rows, sizes.max_spatial_tokens, sizes.feature_width, sizes.num_views) == (14, 6272, 3584, 32)
    assert 32 * 14 * (14 + 1) == 6720  # rows of the block with its newlines
    # By hand: embeddings and head, layers of Qwen2-7B, final norm; 26 layers of SigLIP with its embeddings; projector.
    d, m, c, i = 3584, 18944, 1152, 4304
    layer = 2 * d * d + d + 2 * (d * 512 + 512) + 3 * d * m + 2 * d
    tower = 26 * (4 * (c * c + c) + 2 * c * i + i + c + 4 * c) + c * 3 * 14 * 14 + c + 729 * c
    projector = c * d + d + d * d + d
    expected = 2 * 151649 * d + 28 * layer + d + tower + projector + d
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.decoder.size.keys == 512
    assert model.vision.flops_per_view * 32 == pytest.approx(20.5e12, rel=0.05)
