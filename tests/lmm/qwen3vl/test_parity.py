# SPDX-License-Identifier: Apache-2.0
"""The oracle is transformers' own model on the same tiny checkpoint: features, logits, greedy answers, pruned runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import SceneTokens
from tests.lmm.qwen3vl.conftest import splice_views

N_NEW = 12
EXACT = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def asked(qwen, original, rgb) -> Any:
    model, tokenizer = qwen
    prompt = model.prompt(tokenizer, "What is on the table?")
    return splice_views(model, prompt, rgb), original.inputs(prompt, rgb)


def test_features_are_those_of_the_tower(qwen, original, rgb, asked) -> None:
    model, _ = qwen
    _, inputs = asked
    with torch.no_grad():
        found = original.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    theirs = torch.cat([torch.cat(part) for part in (found.pooler_output, *found.deepstack_features)], dim=1)
    torch.testing.assert_close(torch.cat(model.encode_views(rgb)), theirs, **EXACT)
    same = [rgb[0], rgb[1]]
    assert torch.equal(model.encode_images(same), torch.stack(model.encode_views(same)))


def test_unpruned_logits_and_positions(qwen, original, asked) -> None:
    model, _ = qwen
    spliced, inputs = asked
    positions, delta = original.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    assert torch.equal(spliced.layout.positions, positions[:, 0])
    assert spliced.layout.next_position == spliced.n_tokens + int(delta)
    assert torch.equal(spliced.layout.rows, inputs["mm_token_type_ids"][0].nonzero()[:, 0])
    filled = prefill(model.decoder, spliced.embeds, spliced.layout, Schedule(), make_policy("none"))
    with torch.no_grad():
        theirs = original.model(**inputs).logits[0, -1]
    torch.testing.assert_close(filled.logits, theirs, **EXACT)


def test_greedy_answers_are_the_same(qwen, original, asked) -> None:
    model, tokenizer = qwen
    spliced, inputs = asked
    theirs = original.model.generate(
        **inputs, max_new_tokens=N_NEW, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )[0, inputs["input_ids"].shape[1] :]
    filled = prefill(model.decoder, spliced.embeds, spliced.layout, Schedule(), make_policy("none"))
    ours = list(generate(model.decoder, filled, max_new_tokens=N_NEW, eos_ids=[tokenizer.eos_token_id]))
    assert ours == [token for token in theirs.tolist() if token != tokenizer.eos_token_id]
    assert len(set(ours)) > 2

    end = spliced.layout.spatial_end
    prefix = ScenePrefix(
        model.decoder, spliced.embeds[:, :end], spliced.spatial_start, layout=spliced.layout, measure=True
    )
    with prefix.asking(spliced.embeds[:, end:]) as filled:
        assert list(generate(model.decoder, filled, max_new_tokens=N_NEW, eos_ids=[tokenizer.eos_token_id])) == ours


def masked(original: Any, inputs: dict[str, Tensor], last_layer: Tensor, tokens: list[int]) -> Tensor:
    """Logits (1 + T, V) of transformers' model at full length, each layer's rows blind to the tokens dropped there."""
    cache = DynamicCache()
    rows = inputs["mm_token_type_ids"][0].nonzero()[:, 0]

    def hide(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            q = args[0].shape[1]
            n = q + (cache.layers[layer].get_seq_length() if len(cache.layers) > layer else 0)
            visible = torch.ones(n, dtype=torch.bool)
            visible[rows] = last_layer >= layer
            mask = torch.ones(n, n, dtype=torch.bool).tril() & (visible | torch.eye(n, dtype=torch.bool))
            return args, {**kwargs, "attention_mask": mask[None, None, n - q :]}

        return hook

    layers = original.model.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(hide(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            found = [original.model(**inputs, past_key_values=cache).logits[0, -1]]
            for token in tokens:
                found.append(original.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize("layers", [(0, 4), (1, 2, 5), (3, 6)], ids=["before", "within", "after DeepStack"])
@pytest.mark.parametrize("name", ["ours", "random"])
def test_pruned_runs_equal_a_masked_run(qwen, original, asked, name: str, layers: tuple[int, ...]) -> None:
    model, _ = qwen
    spliced, inputs = asked
    generator = torch.Generator().manual_seed(1)
    spatial = spliced.embeds[0, spliced.layout.rows]
    scene = SceneTokens(torch.rand(spliced.n_spatial, 3, generator=generator) * 5, spatial)
    schedule = Schedule.of(list(layers), [0.6, 0.3, 0.1][: len(layers)])
    filled = prefill(model.decoder, spliced.embeds, spliced.layout, schedule, make_policy(name), scene=scene)
    first, last_layer = filled.logits, filled.trace.last_layer
    tokens = list(generate(model.decoder, filled, max_new_tokens=4, eos_ids=[]))
    theirs = masked(original, inputs, last_layer, tokens)
    torch.testing.assert_close(first, theirs[0], **EXACT)
    assert theirs[:-1].argmax(-1).tolist() == tokens
