# SPDX-License-Identifier: Apache-2.0
"""The measurement when a model is loaded: what it covers, what it keeps, and what it does with a bad file."""

from __future__ import annotations

import json
import logging
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.budget import warmup
from adatoken3d_ros.engine.budget.latency import TERMS
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.pruning.strategy import default_strategy

STRATEGY = default_strategy("ours", 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("small"), layers=2, max_spatial_tokens=96)
    model, tokenizer, _ = registry.load(path)
    return model, tokenizer


def steady(seconds: float) -> Any:
    """A clock on which everything takes the same time."""
    ticks = count()
    return lambda: next(ticks) * seconds


def test_every_stage_is_measured_in_several_sizes(small: tuple[Any, Any]) -> None:
    steps: list[tuple[int, int]] = []
    measured, seconds = warmup.measure(*small, STRATEGY, lambda done, of: steps.append((done, of)), steady(1e-3))
    total = 2 + len(warmup.SIZES)
    assert steps == [(i + 1, total) for i in range(len(steps))] or steps[-1] == (total, total)
    for name, terms in TERMS.items():
        assert measured[name].shape == (len(seconds[name]), len(terms))
        assert (seconds[name] > 0).all() and len(np.unique(measured[name], axis=0)) >= 2
    # With and without gates, and over a prefix.
    assert (measured["prefill"][:, 3] > 0).any() and (measured["prefill"][:, 3] == 0).any()


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)

    def clock() -> float:
        seen.append("clock")
        return 7.0

    device = torch.device("cuda", 1)
    assert warmup.synchronised(clock, device)() == 7.0 and seen == [device, "clock"]
    assert warmup.synchronised(clock, torch.device("cpu")) is clock


def test_a_slow_machine_stops_early_but_not_before_three_sizes(small: tuple[Any, Any]) -> None:
    measured, _ = warmup.measure(*small, STRATEGY, None, steady(1.0))
    assert len(measured["tokens"]) == 3


def test_what_was_measured_is_kept_for_the_same_machine(small: tuple[Any, Any], tmp_path: Path) -> None:
    first, known = warmup.latency_model(*small, STRATEGY, tmp_path / "cache", clock=steady(1e-3))
    assert not known
    second, known = warmup.latency_model(*small, STRATEGY, tmp_path / "cache", clock=steady(1.0))
    assert known
    assert all(np.array_equal(first.coefficients[name], second.coefficients[name]) for name in TERMS)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # Its gates are of another policy: with none there were none to be measured.
    _, known = warmup.latency_model(*small, default_strategy("none", 2), tmp_path / "cache", clock=steady(1e-3))
    assert not known and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_broken_or_unwritable_cache_is_told_and_costs_nothing_but_time(
    small: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / warmup.file_name(warmup.key_of(small[0], STRATEGY))).write_text("{}")
    with caplog.at_level(logging.WARNING):
        _, known = warmup.latency_model(*small, STRATEGY, tmp_path, clock=steady(1e-3))
    assert not known and "measuring the latency model anew" in caplog.text
    _, known = warmup.latency_model(*small, STRATEGY, tmp_path, clock=steady(1e-3))
    assert known
    # A number that would make every question fail is none that was measured.
    file = tmp_path / warmup.file_name(warmup.key_of(small[0], STRATEGY))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "coefficients": {**content["coefficients"], "encode": [1e308]}}))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found, known = warmup.latency_model(*small, STRATEGY, tmp_path, clock=steady(1e-3))
    assert not known and "encode needs 1 coefficients" in caplog.text and found.coefficients["encode"][0] < 1
    with caplog.at_level(logging.WARNING):
        warmup.latency_model(*small, STRATEGY, tmp_path / "a\0b", clock=steady(1e-3))
    assert "could not be kept" in caplog.text
    caplog.clear()
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        warmup.latency_model(*small, STRATEGY, tmp_path / "file", clock=steady(1e-3))
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "context", "bucket"),
    [
        (lambda n: -(-n // 64), 2048, 64),
        (lambda n: -(-n // 128), 2048, 128),
        (lambda n: -(-n // 16), 300, 16),
        (lambda n: n, 2048, 1),
        (lambda n: 1 if n % 128 == 0 else 2, 100, 1),  # too small to tell
    ],
)
def test_buckets_are_as_large_as_costs_nothing(seconds: Any, context: int, bucket: int) -> None:
    now = [0.0]

    def run(rows: torch.Tensor, cos_sin: Any) -> None:
        assert rows.shape[1] == cos_sin[0].shape[1] <= context
        now[0] += seconds(rows.shape[1])

    decoder: Any = SimpleNamespace(
        context=context,
        device=torch.device("cpu"),
        dtype=torch.float32,
        size=SimpleNamespace(hidden=4),
        rotary=lambda rows, positions: (rows[..., :2], rows[..., :2]),
        layers=[SimpleNamespace(run=run)],
    )
    assert warmup.bucket_of(decoder, lambda: now[0]) == bucket


def test_a_bucket_is_measured_on_a_layer_of_the_model(small: tuple[Any, Any]) -> None:
    assert warmup.bucket_of(small[0].decoder, steady(1.0)) == max(warmup.BUCKETS)  # no length takes longer
    assert warmup.latency_model(*small, STRATEGY, clock=steady(0.01))[0].bucket == 1  # a CPU
