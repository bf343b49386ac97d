# SPDX-License-Identifier: Apache-2.0
"""The question after a load: what passes, what is garbage, by what a model was known to answer and without it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adatoken3d_ros.engine import quantization, self_test
from adatoken3d_ros.engine.loading import load_engine
from adatoken3d_ros.engine.self_test import SelfTestError, answer, check, divergence, read_known, write_known
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.settings import Settings
from tests.architectures import NAMES, write_tiny


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each architecture, with what it answers."""
    path = write_tiny(request.param, tmp_path_factory.mktemp(request.param), layers=3)
    model, tokenizer, _ = registry.load(path)
    write_known(path, model, tokenizer)
    return path


def test_divergence_by_hand() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    assert divergence({0: 0.5}, logits) == pytest.approx(0.0, abs=1e-9)
    assert divergence({0: 0.25, 1: 0.25}, logits) == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2))
    assert divergence({7: 1.0}, logits) == math.inf == divergence({0: 1.0}, torch.tensor([math.nan, 0.0]))


def test_the_same_model_and_a_quantised_one_pass(checkpoint: Path) -> None:
    known = read_known(checkpoint)
    assert known is not None and len(known.tokens) == len(known.steps) <= self_test.STEPS
    model, tokenizer, _ = registry.load(checkpoint)
    tokens, _ = answer(model, tokenizer)
    assert tuple(tokens) == known.tokens and model.identity == known.model
    assert check(model, tokenizer, known).startswith(f"self-test: {len(tokens)} of {len(tokens)} tokens as known")
    model, tokenizer, _ = registry.load(checkpoint, quantization="int8")
    assert "nats from the known distributions" in check(model, tokenizer, known)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda head: head.fill_(float("nan")), "logits that are not finite at step 0"),
        (lambda head: head.zero_(), "every token is as likely as any other"),
        (lambda head: head.copy_(head.roll(3, 0) * 8), "nats from the known distributions.*try model.quantization"),
    ],
)
def test_garbage_is_refused(checkpoint: Path, spoil: Any, named: str) -> None:
    model, tokenizer, _ = registry.load(checkpoint)
    with torch.no_grad():
        spoil(model.decoder.language.lm_head.weight)
    with pytest.raises(SelfTestError, match=f"garbage: .*{named}"):
        check(model, tokenizer, read_known(checkpoint))


def test_without_a_known_answer_garbage_is_what_no_model_gives(checkpoint: Path) -> None:
    model, tokenizer, _ = registry.load(checkpoint)
    assert "sane" in check(model, tokenizer, None)
    model.decoder.logits = lambda hidden: 50.0 * torch.eye(300)[7].expand(*hidden.shape[:-1], -1)
    with pytest.raises(SelfTestError, match=r"garbage: \[7\] again and again"):
        check(model, tokenizer, None)


def test_an_answer_of_another_model_is_not_compared(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    content = json.loads((path / self_test.FILE).read_text())
    (path / self_test.FILE).write_text(json.dumps({**content, "model": "another"}))
    model, tokenizer, _ = registry.load(path)
    assert "sane" in check(model, tokenizer, read_known(path)) and "of another model, another" in caplog.text
    for damage in ("{", json.dumps({**content, "tokens": [1]}), json.dumps({"model": "x"})):
        (path / self_test.FILE).write_text(damage)
        with pytest.raises(SelfTestError, match="self_test.json is damaged"):
            read_known(path)


def test_losses_that_were_measured_stay_and_count(tmp_path: Path) -> None:
    path = write_tiny(NAMES[0], tmp_path, layers=2)
    model, tokenizer, _ = registry.load(path)
    auto = Settings({"model.path": str(path), "model.quantization": "auto", "budget.warm_up": False})

    def offered() -> tuple[str, ...]:
        return quantization.plan(path, auto, "cpu", torch.float32, free=10**12).kinds

    assert offered() == ("none", "int8", "int4")  # nothing was measured
    write_known(path, model, tokenizer, {"int8": 0.7, "int4": 0.2})
    write_known(path, model, tokenizer)
    known = read_known(path)
    assert known is not None and known.losses == {"int8": 0.7, "int4": 0.2}
    assert offered() == ("none", "int4")
    write_known(path, model, tokenizer, {"int4": 0.8})
    assert offered() == ("none",)
    (path / self_test.FILE).unlink()
    write_known(path, model, tokenizer, {"int8": 0.2})
    assert offered() == ("none", "int8")  # of int4 nobody knows


def test_that_a_loss_was_never_measured_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = quantization.plan(
        checkpoint, Settings({"model.quantization": "int8"}), "cpu", torch.float32, free=10**12
    ).need
    monkeypatch.setattr(quantization.safetensors_files, "free_bytes", lambda _: needed.total)
    auto = Settings({"model.path": str(checkpoint), "model.quantization": "auto", "budget.warm_up": False})
    assert load_engine(auto).model.quantization == "int8"
    assert "what int8 costs this model in right answers was never measured" in caplog.text


def test_a_load_refuses_garbage_unless_it_is_told_not_to(checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    settings = Settings({"model.path": str(path), "budget.warm_up": False})
    content = json.loads((path / self_test.FILE).read_text())
    wrong = [{"0": 1.0} for _ in content["steps"]]
    (path / self_test.FILE).write_text(json.dumps({**content, "steps": wrong}))
    with pytest.raises(SelfTestError, match="model.self_test: false loads it all the same"):
        load_engine(settings)
    assert load_engine(settings | {"model.self_test": False}).n_layers == 3
    with pytest.raises(SelfTestError):  # none of them is better
        load_engine(settings | {"model.quantization": "auto"})
