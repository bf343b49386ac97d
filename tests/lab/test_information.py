# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lab.information import (
    ARRAYS,
    MEASURES,
    Concentration,
    Information,
    InformationError,
    InformationSet,
    accumulate,
    layer_contribution,
    lorenz,
)
from adatoken3d_ros.lab.picture import draw

# One system token, three spatial tokens (1, 2, 3), two question tokens.


def test_contribution_of_two_layers_by_hand() -> None:
    # Three layers: m = [0.8, 0.8 + 0.73 * 0.4, 0.8 + 0.73 * 0.5]
    intra, inter = np.array([0.8, 0.4, 0.1]), np.array([0.83, 0.5, 0.2])
    assert accumulate(intra) == pytest.approx([0.8, 1.092, 1.165])
    raw = np.array([0.32 + 0.249 + 0.24, 0.16 + 0.15 + 0.3276, 0.04 + 0.06 + 0.3495])
    assert layer_contribution(intra, inter) == pytest.approx((raw - raw[2]) / (raw[0] - raw[2]))


def test_equal_layers_contribute_alike() -> None:
    assert layer_contribution(np.zeros(3), np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


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
        for name in ARRAYS:
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
