# SPDX-License-Identifier: Apache-2.0
"""The formula, its fit and its correction, on numbers worked out by hand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.engine.budget.latency import (
    TERMS,
    LatencyError,
    LatencyModel,
    Ratio,
    decode_terms,
    encode_terms,
    fit,
    follow_up_terms,
    read_terms,
    token_terms,
)

COEFFICIENTS = {
    "encode": [0.030],
    "tokens": [0.001, 2e-6, 1e-9],
    "prefill": [2e-4, 3e-6, 4e-10, 1e-3, 1e-6],
    "decode": [5e-3, 2e-7],
}
KEY = {"model": "0123", "dtype": "float32", "device": "cpu", "machine": "here", "threads": "2", "policy": "ours"}


def measured(seed: int = 0, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """What COEFFICIENTS would show for several sizes."""
    random = np.random.default_rng(seed)
    sizes = (50, 200, 400, 900, 2000)
    terms = {
        "encode": np.stack([encode_terms(v) for v in (1, 2, 4)]),
        "tokens": np.stack([token_terms(n) for n in sizes]),
        "prefill": np.stack(
            [read_terms([n] * 8, n, 40) for n in sizes]
            + [read_terms([n, n, n // 2, n // 2, n // 4, n // 4, n // 8, n // 8], n, 40) for n in sizes]
            + [follow_up_terms(30, n, 8) for n in sizes]
        ),
        "decode": np.stack([decode_terms(1, 8 * n, 8) for n in sizes]),
    }
    seconds = {name: rows @ np.array(COEFFICIENTS[name]) for name, rows in terms.items()}
    return terms, {name: t * np.exp(noise * random.standard_normal(len(t))) for name, t in seconds.items()}


def test_terms_by_hand() -> None:
    # Two layers see 10 tokens, two see 4; 5 rows of text. The gate is in front of layer 2, where 15 rows come in.
    assert read_terms([10, 10, 4, 4], 10, 5).tolist() == [4, 15 + 15 + 9 + 9, 2 * 225 + 2 * 81, 1, 15]
    # A withdrawal of everything chooses nothing; a gate before the first layer is one.
    assert read_terms([4, 4, 0], 10, 5).tolist() == [3, 9 + 9 + 5, 81 + 81 + 25, 1, 15]
    assert follow_up_terms(3, 10, 2).tolist() == [2, 6, 2 * 3 * 13, 0, 0]
    # Three steps over 100 cached rows in 2 layers: 100, 102, 104.
    assert decode_terms(3, 100, 2).tolist() == [3, 306]
    assert token_terms(0).tolist() == [0, 0, 0] and token_terms(7).tolist() == [1, 7, 49]


def test_the_fit_recovers_known_coefficients() -> None:
    model = LatencyModel.fitted(*measured(), KEY)
    for name, expected in COEFFICIENTS.items():
        assert np.allclose(model.coefficients[name], expected, rtol=1e-6), name
        # Nothing was measured at run time yet.
    assert all(ratio.guard == pytest.approx(1.3) for ratio in model.ratios.values())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_noisy_fit_is_never_negative_and_predicts_within_the_noise(seed: int) -> None:
    found = LatencyModel.fitted(*measured(seed, noise=0.05), KEY)
    terms = read_terms([700, 700, 350, 350, 100, 100, 0, 0], 700, 60)
    assert all((values >= 0).all() for values in found.coefficients.values())
    assert found.p50("prefill", terms) == pytest.approx(terms @ np.array(COEFFICIENTS["prefill"]), rel=0.2)


def test_a_fit_refuses_what_it_cannot_use() -> None:
    with pytest.raises(LatencyError, match="positive and finite"):
        fit("encode", np.ones((2, 1)), np.array([0.1, math.nan]))
    with pytest.raises(LatencyError, match="positive and finite"):
        fit("encode", np.ones((1, 1)), np.array([0.0]))
    with pytest.raises(LatencyError, match="terms"):
        fit("decode", np.ones((2, 3)), np.ones(2))
    with pytest.raises(LatencyError, match="tokens needs 3"):
        LatencyModel({**COEFFICIENTS, "tokens": [1.0, -1.0, 0.0]})
    with pytest.raises(LatencyError, match="prefill needs 5"):
        LatencyModel({name: values for name, values in COEFFICIENTS.items() if name != "prefill"})


def test_the_ratio_follows_what_is_measured() -> None:
    ratio = Ratio()
    for _ in range(40):
        ratio.observe(1.3)
    assert ratio.value == pytest.approx(1.3, rel=1e-3)


def test_one_outlier_changes_nothing() -> None:
    ratio = Ratio()
    for _ in range(20):
        ratio.observe(1.0)
    ratio.observe(40.0)
    assert ratio.value == pytest.approx(1.0)
    for _ in range(40):
        ratio.observe(1.0)
    assert ratio.value == pytest.approx(1.0) and ratio.guard < 1.1


def test_outliers_on_both_sides_change_nothing() -> None:
    ratio = Ratio()
    ratio.observe(1.0)
    for _ in range(10):
        ratio.observe(4.0)
        ratio.observe(0.25)
    assert ratio.value == pytest.approx(1.0)


def test_two_outliers_in_a_row_are_a_new_pace_at_once() -> None:
    ratio = Ratio()
    for _ in range(20):
        ratio.observe(1.0)
    ratio.observe(2.0)
    ratio.observe(2.0)
    assert ratio.value == pytest.approx(2.0)
    ratio.observe(2.0)
    assert ratio.value == pytest.approx(2.0) and ratio.guard < 1.2


def test_p95_covers_nineteen_of_twenty() -> None:
    ratio, random = Ratio(), np.random.default_rng(0)
    times = np.exp(0.1 * random.standard_normal(400))
    late = 0
    for i, one in enumerate(times):
        late += i >= 100 and one > ratio.value * ratio.guard
        ratio.observe(float(one))
    assert late / 300 < 0.1
    assert 1.1 < ratio.guard < 1.5


def test_few_measurements_are_guarded_widely() -> None:
    ratio = Ratio([1.0] * 40)
    seen = [ratio.guard]
    for _ in range(20):
        ratio.observe(1.0)
        seen.append(ratio.guard)
    assert seen[:3] == [pytest.approx(1.3), pytest.approx(1.15), pytest.approx(1.1)]
    assert seen == sorted(seen, reverse=True) and seen[-1] < 1.02


def test_what_slows_whole_answers_widens_their_p95() -> None:
    model = LatencyModel(COEFFICIENTS)
    # The stages' own p95 is the floor.
    assert model.p95_answer(1.0, 5.0) == pytest.approx(5.0)
    for _ in range(40):
        model.observe_answer(0.1, 0.12)
    assert model.answers.value == pytest.approx(1.2, rel=1e-3)
    assert model.p95_answer(np.array([1.0, 1.0]), np.array([1.05, 2.0])) == pytest.approx([1.2, 2.0], rel=0.02)
    model.observe_answer(0.0, 0.1)
    assert model.version == 40 and model.drift == {}


def test_nothing_to_do_says_nothing() -> None:
    model = LatencyModel(COEFFICIENTS)
    model.observe("encode", encode_terms(0), 0.5)
    model.observe("tokens", token_terms(0), 0.5)
    assert model.drift == {} and model.version == 0
    model.observe("encode", encode_terms(2), 0.120)
    assert model.drift == {"encode": pytest.approx(2.0)} and model.version == 1
    assert model.p50("encode", encode_terms(1)) == pytest.approx(0.060)
    assert model.p95("encode", encode_terms(1)) >= 0.060
    with pytest.raises(LatencyError, match="nan"):
        model.ratios["encode"].observe(math.nan)


def test_a_follow_up_has_a_ratio_of_its_own() -> None:
    model = LatencyModel(COEFFICIENTS)
    terms = follow_up_terms(20, 500, 8)
    model.observe("follow_up", terms, 3 * float(model.fitted_seconds("follow_up", terms)))
    assert model.ratios["follow_up"].value == pytest.approx(3.0) and model.ratios["prefill"].value == 1.0


def test_a_fit_is_stored_and_read_back_for_the_same_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "fit.json"
    model = LatencyModel.fitted(*measured(noise=0.05), KEY, 64)
    model.save(path)
    again = LatencyModel.load(path, KEY)
    assert again.bucket == again.for_policy("other").bucket == 64
    for name in TERMS:
        assert np.array_equal(model.coefficients[name], again.coefficients[name])
    assert [r.guard for r in again.ratios.values()] == [r.guard for r in model.ratios.values()]
    for name in KEY:
        with pytest.raises(LatencyError, match=f"{name} '{KEY[name]}', this is 'other'"):
            LatencyModel.load(path, {**KEY, name: "other"})
    assert [file.name for file in path.parent.iterdir()] == ["fit.json"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"format": "adatoken3d-latency/9"}', '{"format": "adatoken3d-latency/1", "key": 3}'],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "fit.json"
    path.write_text(content)
    with pytest.raises(LatencyError, match=r"fit\.json"):
        LatencyModel.load(path, KEY)
    path.write_text(json.dumps({"format": "adatoken3d-latency/1", "key": KEY, "coefficients": {}, "scatter": {}}))
    with pytest.raises(LatencyError, match="encode needs 1"):
        LatencyModel.load(path, KEY)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("coefficients", {**COEFFICIENTS, "encode": [1e308]}, "encode needs 1 coefficients from 0 to 3600"),
        ("coefficients", {**COEFFICIENTS, "encode": [10**400]}, "fit.json"),
        ("coefficients", {**COEFFICIENTS, "encode": ["1"]}, "encode holds"),
        ("coefficients", {**COEFFICIENTS, "encode": [[[]]]}, "encode holds"),
        ("coefficients", {**COEFFICIENTS, "encode": [math.nan]}, "encode needs 1"),
        ("coefficients", 3, "fit.json"),
        ("scatter", {"encode": [0.0]}, "scatter of encode"),
        ("scatter", {"encode": [1e308]}, "scatter of encode"),
        ("scatter", {"encode": [math.nan]}, "scatter of encode"),
        ("scatter", {"encode": "x"}, "encode holds"),
        ("key", None, "fit.json"),
        ("bucket", 0, "bucket is 0"),
        ("bucket", 10**9, "bucket is 1000000000"),
        ("bucket", "64", "bucket is '64'"),
    ],
)
def test_numbers_that_no_measurement_gives_are_refused(tmp_path: Path, name: str, value: object, named: str) -> None:
    content = {"format": "adatoken3d-latency/1", "key": KEY, "coefficients": COEFFICIENTS, "scatter": {}, name: value}
    (tmp_path / "fit.json").write_text(json.dumps(content))
    with pytest.raises(LatencyError, match=named):
        LatencyModel.load(tmp_path / "fit.json", KEY)


def test_a_cache_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fit.json")
    with pytest.raises(LatencyError, match="no regular file"):
        LatencyModel.load(tmp_path / "fit.json", KEY)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(LatencyError, match=r"deep\.json"):
        LatencyModel.load(tmp_path / "deep.json", KEY)


def test_one_accident_among_few_measurements_is_no_rule() -> None:
    """It would be the 95th percentile of fewer than 20; what happens in one of ten cases is one all the same."""
    ratio = Ratio([1.0, 1.0])
    for _ in range(8):
        ratio.observe(1.0)
    ratio.observe(40.0)
    assert ratio.value == 1.0 and ratio.guard < 1.5
    for _ in range(12):
        ratio.observe(1.0)
    assert ratio.guard < 1.1
    for k in range(40):
        ratio.observe(3.0 if k % 10 == 0 else 1.0)
    assert ratio.guard == pytest.approx(3.0, rel=0.1)


def test_observing_says_whether_it_is_another_pace() -> None:
    ratio = Ratio()
    assert [ratio.observe(value) for value in (1.0, 3.0, 1.0, 3.0, 3.0, 3.0)] == [
        True,  # until then nothing was known
        *[False] * 3,
        True,
        False,
    ]


def test_gates_that_were_not_measured_count_as_layers_until_questions_tell() -> None:
    key = {**KEY, "policy": "none"}
    model = LatencyModel({**COEFFICIENTS, "prefill": [2e-4, 3e-6, 4e-10, 0.0, 5e-6]}, key)
    gated = read_terms([100] * 4 + [50] * 4, 100, 20)
    free = float(model.p50("prefill", gated))
    for _ in range(20):
        model.observe("prefill", gated, 2 * free)
    version, guard = model.version, model.ratios["prefill"].guard
    assert model.for_policy("none") is model
    assert (model.version, model.p50("prefill", gated)) == (version, pytest.approx(2 * free))
    other = model.for_policy("divprune")
    # At the same pace, a gate now costs what a layer does, or what was measured where that is more.
    assert float(other.p50("prefill", gated)) == pytest.approx(2 * (free + 2e-4))
    assert other.ratios["prefill"].guard > guard
    other.observe("prefill", gated, 5.0)
    assert float(other.p50("prefill", gated)) == pytest.approx(5.0)
    assert model.for_policy("divprune") is other.for_policy("divprune") is other
    # What has no gates is learned for both, what has them for one.
    assert other.for_policy("none") is model and float(model.p50("prefill", gated)) == pytest.approx(2 * free)
    model.observe("decode", decode_terms(1, 100, 8), 1.0)
    assert other.ratios["decode"].count == 1 and other.ratios["prefill"].count == 1
    # Of one that does not say what it was measured with, nothing is known to be wrong.
    unsaid = LatencyModel(COEFFICIENTS)
    assert unsaid.for_policy("divprune").coefficients["prefill"].tolist() == COEFFICIENTS["prefill"]
