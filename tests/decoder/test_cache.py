# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adatoken3d_ros.decoder.cache import MIN_HEADROOM, RaggedCache


def chunk(n: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, n, 4, generator=generator), torch.randn(batch, 3, n, 4, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "roll back"]), st.integers(0, 1), st.integers(1, 200)), max_size=12))
def test_holds_what_plain_concatenation_holds(steps: list[tuple[str, int, int]]) -> None:
    cache = RaggedCache(2)
    expected: list[list[tuple[Tensor, Tensor]]] = []
    for i in range(2):
        cache.update(*chunk(3), i)
        expected.append([chunk(3)])
    for seed, (step, i, n) in enumerate(steps):
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*expected[i], strict=True))
        if step == "add":
            expected[i].append(chunk(n, seed))
            cache.update(*chunk(n, seed), i)
        else:
            n = min(n, keys.shape[2])
            lengths = list(cache.lengths)
            lengths[i] = n
            cache.roll_back(lengths)
            expected[i] = [(keys[:, :, :n], values[:, :, :n])]
    for layer, parts in zip(cache.layers, expected, strict=True):
        keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_step_copies_one_token_not_the_cache() -> None:
    cache = RaggedCache(1)
    cache.update(*chunk(300), 0)
    places = set()
    for step in range(1000):
        keys, _ = cache.update(*chunk(1, step), 0)
        places.add(keys.data_ptr())
    assert len(places) <= 4  # 300 -> 451 -> 678 -> 1018 -> 1528


def test_the_first_chunk_is_not_copied_and_later_ones_have_room() -> None:
    cache = RaggedCache(1)
    keys, values = chunk(5)
    cache.update(keys, values, 0)
    assert cache.layers[0].keys is keys
    before = cache.nbytes()
    assert cache.held == before
    grown, _ = cache.update(*chunk(1), 0)
    assert grown.stride(1) == (6 + MIN_HEADROOM) * 4
    assert cache.nbytes() == before * 6 // 5
    assert before < cache.nbytes() < cache.held == before * (6 + MIN_HEADROOM) // 5


def test_layers_replaced_from_outside_are_noticed() -> None:
    cache = RaggedCache(1)
    cache.update(*chunk(5), 0)
    cache.update(*chunk(1, 1), 0)
    before = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.update(*chunk(1, 2), 0)
    assert torch.equal(cache.layers[0].keys[:, :, :6], before[[1, 0]])


def test_crop_takes_as_many_from_every_layer() -> None:
    cache = RaggedCache(2)
    cache.update(*chunk(9), 0)
    cache.update(*chunk(4), 1)
    cache.crop(-3)
    assert cache.lengths == (6, 1)


def test_bad_marks() -> None:
    cache = RaggedCache(2)
    for i in range(2):
        cache.update(*chunk(3), i)
    with pytest.raises(ValueError, match="layer 1 back to 4 tokens: it holds 3"):
        cache.roll_back((3, 4))
    with pytest.raises(ValueError, match="mark of 1 layers for a cache of 2"):
        cache.roll_back((3,))
    with pytest.raises(ValueError, match="-1"):
        cache.roll_back((-1, 3))
