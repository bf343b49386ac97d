# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds, SpliceError
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.prompt import build_prompt
from adatoken3d_ros.lmm.text_places import parse_clicks

IMAGE = Placeholder("image")


def _rows(model: Llava3D, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, model.config.language.hidden_size, generator=torch.Generator().manual_seed(seed))


def _images(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(n)]


def test_splice_puts_every_row_in_its_place(model):
    prompt = PromptIds(((1, 5), IMAGE, (7,), Placeholder("click", 1), Placeholder("click", 0), (9, 11)))
    spatial, clicks = _rows(model, 3), _rows(model, 2, seed=1)
    spliced = model.splice(prompt, spatial, clicks)
    table = model.language.model.embed_tokens.weight
    expected = [table[1], table[5], *spatial, table[7], clicks[1], clicks[0], table[9], table[11]]
    assert torch.equal(spliced.embeds, torch.stack(expected)[None])
    assert (spliced.spatial_start, spliced.n_spatial, spliced.n_question, spliced.n_tokens) == (2, 3, 5, 10)


def test_real_prompt_layout(model, tokenizer):
    text, points = parse_clicks("What is at [1.0, 2.0, 0.5]?")
    prompt = build_prompt(tokenizer, text, n_clicks=1)
    clicks = model.embed_clicks(torch.tensor(points))
    spliced = model.splice(prompt, _rows(model, 10), clicks)
    before, _, question, _, rest = prompt.pieces
    assert spliced.spatial_start == len(before)
    assert spliced.n_question == len(question) + 1 + len(rest)
    assert spliced.n_tokens == prompt.n_tokens + 10
    assert torch.equal(spliced.embeds[0, len(before) + 10 + len(question)], clicks[0])


def test_only_ids_of_the_vocabulary_reach_the_embedding(model, tokenizer):
    seen: list[torch.Tensor] = []
    hook = model.language.model.embed_tokens.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    try:
        prompt = build_prompt(tokenizer, "Describe it.", n_clicks=3)
        model.splice(prompt, _rows(model, 2), _rows(model, 3))
    finally:
        hook.remove()
    ids = torch.cat(seen)
    assert ids.tolist() == [i for piece in prompt.pieces if not isinstance(piece, Placeholder) for i in piece]
    assert int(ids.min()) >= 0 and int(ids.max()) < model.config.language.vocab_size


def test_one_spatial_token_and_no_click(model, tokenizer):
    prompt = build_prompt(tokenizer, "What is it?")
    spliced = model.splice(prompt, _rows(model, 1), model.embed_clicks(torch.zeros(0, 3)))
    assert spliced.n_spatial == 1
    assert torch.equal(spliced.embeds, model.splice(prompt, _rows(model, 1)).embeds)
    with torch.no_grad():
        assert torch.isfinite(model.language(inputs_embeds=spliced.embeds).logits).all()


def test_context_is_full_at_its_length_and_not_before(model, tokenizer):
    prompt = build_prompt(tokenizer, "What is it?")
    context = model.config.context_length
    most = context - prompt.n_tokens
    assert model.splice(prompt, _rows(model, most)).n_tokens == context
    with pytest.raises(SpliceError, match=rf"{most + 1} spatial .* {context + 1}, more than the context of {context}"):
        model.splice(prompt, _rows(model, most + 1))


@pytest.mark.parametrize(
    ("spatial", "clicks", "message"),
    [
        (torch.zeros(0, 64), torch.zeros(1, 64), "no spatial token"),
        (torch.zeros(2, 63), torch.zeros(1, 64), r"spatial must be \(n, 64\), got \(2, 63\)"),
        (torch.zeros(1, 2, 64), torch.zeros(1, 64), r"got \(1, 2, 64\)"),
        (torch.zeros(2, 64), torch.zeros(1, 3), r"clicks must be \(n, 64\), got \(1, 3\)"),
        (torch.zeros(2, 64), torch.zeros(2, 64), "has 1 clicks, but 2"),
        (torch.zeros(2, 64), None, "has 1 clicks, but 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(model, spatial, clicks, message):
    prompt = PromptIds(((1,), IMAGE, (5,), Placeholder("click"), (6,)))
    with pytest.raises(SpliceError, match=message):
        model.splice(prompt, spatial, clicks)


def test_projector_is_linear_gelu_linear(model):
    features = torch.randn(5, 32)
    first, _, last = model.projector
    expected = functional.linear(functional.gelu(features @ first.weight.T + first.bias), last.weight, last.bias)
    torch.testing.assert_close(model.project(features), expected)
    assert model.project(features[:0]).shape == (0, 64)
