# SPDX-License-Identifier: Apache-2.0
"""Other weights are another model, however they are stored, loaded or looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lmm.identity import shape_of, tensor_digest, weights_identity
from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint

LARGE = 3 * 16384 + 5  # float32 numbers: three chunks of 64 KiB and a rest


def test_digests_by_hand() -> None:
    small = torch.tensor([1.0, 2.0])
    assert tensor_digest(small) == hashlib.sha256(b"(2,) torch.float32" + small.numpy().tobytes()).digest()
    # A large one: 64-bit sums of its chunks, words from all over it, its rest.
    large = np.arange(LARGE, dtype=np.float32)
    words = large[: 3 * 16384].view(np.int64)
    expected = hashlib.sha256(f"({LARGE},) torch.float32".encode())
    for part in (words.reshape(3, -1).sum(1), words[:: 3 * 8192 // 1024], large[3 * 16384 :]):
        expected.update(part.tobytes())
    assert tensor_digest(torch.from_numpy(large)) == expected.digest()
    assert weights_identity([("b", b"2"), ("a", b"1")]) == hashlib.sha256(b"a\x001b\x002").hexdigest()[:16]


@settings(max_examples=60)
@given(st.integers(0, LARGE - 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_number_counts(index: int, dtype: torch.dtype) -> None:
    weights = torch.ones(LARGE, dtype=dtype)
    before = tensor_digest(weights)
    weights[index] = 1.0078125  # one step of bfloat16
    assert tensor_digest(weights) != before
    weights[index] = 1.0
    assert tensor_digest(weights) == before


def test_shape_dtype_and_order_count_and_where_it_lies_does_not() -> None:
    weights = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    digest = tensor_digest(weights)
    assert digest != tensor_digest(weights.view(1024, 64)) != tensor_digest(weights.view(torch.int32))
    assert digest != tensor_digest(weights.roll(2, 1)) and digest != tensor_digest(weights.flip(0))
    shifted = torch.empty(weights.numel() + 1)[1:].view(64, 1024).copy_(weights)  # 4 bytes off
    assert digest == tensor_digest(shifted) == tensor_digest(weights.t().contiguous().t())


def test_a_model_is_known_by_its_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_tiny_checkpoint(tmp_path / str(seed), seed=seed)
    model, other = (checkpoint.load(tmp_path / str(seed))[0] for seed in (0, 1))
    assert shape_of(model.identity) == model.config.hash() == other.config.hash()
    assert model.identity != other.identity
    assert model.identity == checkpoint.load(tmp_path / "0", dtype=torch.bfloat16)[0].identity
    # One that comes from no file has one, too, of what it holds at that moment.
    loaded, model.loaded_identity = model.identity, None
    assert model.identity == loaded
    with torch.no_grad():
        model.projector[0].bias[3] += 1.0
    assert model.identity != loaded


def test_the_strategies_of_a_checkpoint_can_be_adopted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dataclasses import replace

    from adatoken3d_ros.pruning.strategy import Strategy, StrategyError, default_strategy
    from scripts.adopt_strategies import adopt

    write_tiny_checkpoint(tmp_path, seed=0)
    model = checkpoint.load(tmp_path)[0]
    (tmp_path / "strategies").mkdir()
    given = default_strategy("ours", 8)
    for name, mark in (("old", model.config.hash()), ("stranger", "0123456789abcdef"), ("none", None)):
        replace(given, name=name, model_hash=mark).save(tmp_path / "strategies" / f"{name}.yaml")
    assert [path.stem for path in adopt(tmp_path)] == ["old"] and adopt(tmp_path) == []
    adopted = Strategy.load(tmp_path / "strategies" / "old.yaml")
    assert adopted == replace(given, name="old", model_hash=model.identity)
    adopted.check(model.identity)
    assert not caplog.records
    with pytest.raises(StrategyError, match=f"{model.identity}, this model is {model.config.hash()}-0123"):
        adopted.check(f"{model.config.hash()}-0123")
