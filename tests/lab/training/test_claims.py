# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.lab.information import MEASURES
from adatoken3d_ros.lab.training.train import Trainer
from benchmarks import claims
from benchmarks._scenes import Reader, find_rooms


def shares(n: int) -> dict[str, np.ndarray]:
    """Projection shares rise with the token, the others fall."""
    rising = np.arange(1.0, n + 1) / (n * (n + 1) / 2)
    return {"attention": rising[::-1], "norm": rising[::-1], "projection": rising}


def test_what_is_left_by_hand() -> None:
    """Of ten tokens four stay, of eleven five: the least 60 % are six tokens of each."""
    assert claims.kept_tokens("least by projection", shares(10), [0]).tolist() == [6, 7, 8, 9]
    assert claims.kept_tokens("most by projection", shares(10), [0]).tolist() == [0, 1, 2, 3]
    assert claims.kept_tokens("least by attention", shares(11), [0]).tolist() == [0, 1, 2, 3, 4]
    drawn = [claims.kept_tokens("random", shares(10), [0, q]) for q in range(40)]
    assert all(len(one) == 4 and one.tolist() == sorted(set(one.tolist())) for one in drawn)
    assert len({tuple(one.tolist()) for one in drawn}) > 10
    assert drawn[3].tolist() == claims.kept_tokens("random", shares(10), [0, 3]).tolist()


def result(share: tuple[float, float], loss: tuple[float, float, float], kl_high: float) -> dict[str, Any]:
    """Every measure has S(0.60) in that interval; every removal that difference with its interval."""
    one = {
        "kl": {"mean": 0.1, "low": 0.0, "high": 0.2},
        "kl_to_random": {"mean": kl_high - 0.1, "low": kl_high - 0.2, "high": kl_high},
        "difference": loss[1],
        "difference_interval": [loss[0], loss[2]],
        "to_random_interval": [-0.1, 0.1],
    }
    low, high = share
    return {
        "contribution": {m: {"lowest_share": {"mean": (low + high) / 2, "low": low, "high": high}} for m in MEASURES},
        "removal": {"0": {"least by norm": one}},
    }


@pytest.mark.parametrize(
    ("share", "holds", "words"),
    [((0.01, 0.04), True, "holds"), ((0.2, 0.3), False, "does not hold"), ((0.04, 0.06), None, "with the measure")],
)
def test_the_sentence(share: tuple[float, float], holds: bool | None, words: str) -> None:
    found = claims.verdict(result(share, (-0.1, 0.0, 0.1), 0.1))
    assert found["sentence"] == dict.fromkeys(MEASURES, holds)
    assert words in found["in_words"][0] and len(found["in_words"]) == 1 + 3 + 1


@pytest.mark.parametrize(
    ("loss", "kl_high", "effect", "better"),
    [
        ((-0.019, -0.004, 0.01), 0.1, "harmless", False),
        ((-0.021, -0.004, 0.01), 0.1, "undecided", False),
        ((-0.03, -0.02, -0.001), -0.01, "harmful", True),
    ],
)
def test_removals(loss: tuple[float, float, float], kl_high: float, effect: str, better: bool) -> None:
    found = claims.verdict(result((0.2, 0.3), loss, kl_high))["removal"]["0"]["least by norm"]
    assert found == {"effect": effect, "better_than_random": better}


def test_a_removal_goes_through_the_gate(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Removing nothing moves nothing; what is removed is what the model then does not see."""
    make_trainer().save(tmp_path / "model")
    reader = Reader(tmp_path / "model")
    (room,) = find_rooms(reader, tmp_path / "scenes", "test", 1, per_family=1)
    found = claims.examine(reader, room)
    n, columns = len(room.questions), 1 + len(claims.ways(reader.n_layers))
    assert claims.removal_layers(reader.n_layers) == (0, 2)
    assert found.kl.shape == found.score.shape == (n, columns) and found.by_layer.shape == (n, 3, reader.n_layers)
    assert (found.kl[:, 0] == 0).all() and (found.kl[:, 1:] > 0).all()
    assert ((found.figures[..., 0] > 0) & (found.figures[..., 0] < 0.6)).all()  # less than equal shares
    np.testing.assert_allclose(found.curves[:, :, [0, -1]], [[[0.0, 1.0]] * 3] * n)
    np.testing.assert_allclose(found.curves[:, :, 60], found.figures[..., 0], atol=1e-3)

    # One of them by hand: the prompt without those rows, which keep their positions.
    sample = reader.samples(room.scene(), room.questions)[0]
    measured = claims.mine(
        reader.decoder, sample.embeds, spatial_start=sample.spatial_start, n_spatial=sample.n_spatial
    )
    keep = claims.kept_tokens("least by norm", {m: measured.token_shares(m) for m in MEASURES}, [0])
    end = sample.spatial_start + sample.n_spatial
    rows = torch.cat(
        [torch.arange(sample.spatial_start), sample.spatial_start + keep, torch.arange(end, sample.n_tokens)]
    )
    with torch.inference_mode():
        model = reader.model.language.model
        hidden, cos_sin = sample.embeds[:, rows], model.rotary_emb(sample.embeds, rows[None])
        for layer in model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=cos_sin)
        removed = reader.model.language.lm_head(model.norm(hidden[0, -1])).double().log_softmax(-1)
        whole, cos_sin = sample.embeds, model.rotary_emb(sample.embeds, torch.arange(sample.n_tokens)[None])
        for layer in model.layers:
            whole = layer(whole, attention_mask=None, position_embeddings=cos_sin)
        before = reader.model.language.lm_head(model.norm(whole[0, -1])).double().log_softmax(-1)
    column = 1 + claims.ways(reader.n_layers).index((0, "least by norm"))
    assert found.kl[0, column] == pytest.approx(float((before.exp() * (before - removed)).sum()), rel=1e-3, abs=1e-7)

    summary = claims.summarise([room], [found], reader.n_layers)
    assert summary["questions"] == n and set(summary["removal"]) == {"0", "2"}
    at_random = summary["removal"]["0"]["random"]
    assert at_random["to_random"] == 0 and at_random["kl_to_random"]["mean"] == 0
    assert at_random["difference"] == pytest.approx(at_random["macro"] - summary["unpruned"]["macro"])


def test_the_whole_benchmark(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer().save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "model", "--json", "c.json", "--picture", "c.png", "--questions", "24", "--workers", "1"]
    arguments += ["--rooms", "2", "--beside", "model", "--scenes", "scenes", "--beside-scenes", "scenes"]
    monkeypatch.setattr(sys, "argv", ["claims", *arguments])
    claims.main()
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["claim"] == {"tokens": 0.6, "share": 0.05} and found["rooms"] == 2
    beside = found.pop("beside")
    assert {k: v for k, v in beside.items() if k != "machine"} == {k: v for k, v in found.items() if k != "machine"}
    asked = {family: n for family, n in found["asked"].items() if n}
    assert sum(asked.values()) == found["questions"] and len(asked) > 6
    by_family = found["removal"]["0"]["random"]["families"]
    assert {name.partition("@")[0] for name in by_family} == set(asked)
    weights = [by_family[name]["difference"] for name in by_family if "@" not in name]
    assert np.mean(weights) == pytest.approx(found["removal"]["0"]["random"]["difference"])
    for measure in MEASURES:
        of = found["contribution"][measure]
        assert of["lowest_share"]["low"] <= of["lowest_share"]["mean"] <= of["lowest_share"]["high"]
        assert set(of["families"]) == set(asked)
        assert len(of["lowest_share_by_layer"]) == found["model"]["layers"]
    assert set(found["verdict"]["sentence"]) == set(MEASURES) and found["verdict"]["in_words"]
    assert (tmp_path / "c.png").stat().st_size > 10_000
