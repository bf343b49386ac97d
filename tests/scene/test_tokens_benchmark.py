# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tokens


def test_all_ways_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "tokens.json"
    arguments = ["tokens", "--json", str(target), "--views", "3", "--channels", "8", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    tokens.main()
    result = json.loads(target.read_text())
    assert result["same_tokens"] is True
    assert result["views"] == 3 and result["n_tokens"] > 100
    assert 0.9 < result["valid_share"] < 1, "some depth is missing, so that the masks are compared too"
    assert all(result[key] > 0 for key in ("ours_ms", "upstream_ms", "speedup", "add_view_ms"))


def test_tokens_that_differ_are_seen() -> None:
    voxel = torch.tensor([[0, 0, 0], [0, 0, 1]])
    features = torch.ones(2, 4)
    assert tokens.same((features, voxel), (features + 5e-5, voxel))
    assert not tokens.same((features, voxel), (features + 2e-4, voxel))
    assert not tokens.same((features, voxel), (features, voxel.flip(0)))
    assert not tokens.same((features, voxel), (features[:1], voxel[:1]))
