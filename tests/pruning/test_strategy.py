# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import (
    MAX_BYTES,
    Strategy,
    StrategyError,
    default_strategy,
    parse,
)

EXAMPLE = Strategy(
    name="example",
    policy="ours",
    schedule=Schedule.of([2, 5], [0.5, 0.125], withdraw_layer=7),
    model_hash="00ff",
    options={"rows": "last", "coverage": 0.1},
    info={"kind": "adatoken", "figures": {"a": 0.1}},
    model_id="tiny",
)


def text_with(**changes: object) -> str:
    content = {
        "format": "adatoken3d-strategy/1",
        "name": "example",
        "policy": "ours",
        "options": {},
        "stages": [{"layer": 2, "ratio": 0.5}, {"layer": 5, "ratio": 0.25}],
        "withdraw_layer": None,
        "model": {"id": "tiny", "hash": "00ff"},
        "info": {},
    }
    content.update(changes)
    return yaml.safe_dump({key: value for key, value in content.items() if value is not ...})


def test_yaml_gives_back_what_was_saved(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "s.yaml")
    assert Strategy.load(tmp_path / "s.yaml") == EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(1e-3, 1.0)), max_size=5, unique_by=lambda pair: pair[0]),
    st.none() | st.integers(0, 40),
    st.none() | st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=16),
)
def test_any_schedule_survives_yaml(pairs, withdraw, model_hash) -> None:
    layers = sorted(layer for layer, _ in pairs)
    ratios = sorted((ratio for _, ratio in pairs), reverse=True)
    strategy = Strategy("s", "random", Schedule.of(layers, ratios, withdraw), model_hash)
    content = yaml.safe_dump(
        {
            "format": "adatoken3d-strategy/1",
            "name": "s",
            "policy": "random",
            "stages": [{"layer": a, "ratio": b} for a, b in zip(layers, ratios, strict=True)],
            "withdraw_layer": withdraw,
            "model": {"hash": model_hash},
        }
    )
    assert parse(content) == strategy


def test_a_strategy_for_another_model_is_refused() -> None:
    EXAMPLE.check("00ff")
    with pytest.raises(StrategyError, match=r"'example' was made for the model 00ff \(tiny\), this model is beef"):
        EXAMPLE.check("beef")
    default_strategy("ours", 8).check("beef")


MALFORMED = {
    "format": (text_with(format="other/2"), "key format is another than"),
    "missing format": (text_with(format=...), "key format is missing, expected"),
    "missing stages": (text_with(stages=...), "key stages is missing"),
    "unknown key": (text_with(stagse=[]), "unknown key stagse"),
    "policy": (text_with(policy="magic"), "'magic'"),
    "policy option": (text_with(options={"colour": 1}), "colour"),
    "policy option value": (text_with(options={"coverage": 7}), "coverage 7"),
    "option kind": (text_with(options={"rows": {"a": 1}}), r"options\.rows"),
    "option name": (text_with(options={3: 1}), "key 3"),
    "stages kind": (text_with(stages={"layer": 2}), "stages is .* expected list"),
    "stage kind": (text_with(stages=[8]), r"stages\[0\] is 8"),
    "layer kind": (text_with(stages=[{"layer": 2.5, "ratio": 0.5}]), r"stages\[0\]\.layer is 2\.5, expected int"),
    "layer switch": (text_with(stages=[{"layer": True, "ratio": 0.5}]), r"stages\[0\]\.layer is True"),
    "layer": (text_with(stages=[{"layer": -2, "ratio": 0.5}]), r"stages\[0\].*-2"),
    "ratio": (text_with(stages=[{"layer": 2, "ratio": 1.5}]), r"stages\[0\].*1\.5"),
    "ratio not a number": (text_with(stages=[{"layer": 2, "ratio": float("nan")}]), "nan"),
    "ratio text": (text_with(stages=[{"layer": 2, "ratio": "half"}]), r"ratio is 'half'"),
    "ratio missing": (text_with(stages=[{"layer": 2}]), r"stages\[0\]\.ratio is missing"),
    "stage key": (text_with(stages=[{"layer": 2, "ratio": 0.5, "x": 1}]), r"unknown key stages\[0\]\.x"),
    "rising": (text_with(stages=[{"layer": 2, "ratio": 0.5}, {"layer": 3, "ratio": 0.6}]), "0.6 follows 0.5"),
    "order": (text_with(stages=[{"layer": 3, "ratio": 0.5}, {"layer": 2, "ratio": 0.4}]), "2 follows 3"),
    "withdraw": (text_with(withdraw_layer="late"), "withdraw_layer is 'late', expected int or nothing"),
    "model": (text_with(model="7b"), "model is '7b'"),
    "hash": (text_with(model={"id": "x"}), r"model\.hash is missing"),
    "hash kind": (text_with(model={"hash": 12}), r"model\.hash is 12"),
    "not a mapping": ("[1, 2]", "mapping"),
    "empty": ("", "mapping"),
    "broken": ("a: [1", "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "tag": ("a: !!python/object/apply:os.getcwd []", "line 1: tags"),
    "alias": ("a: &x [1]\nb: *x", "line 2: aliases"),
    **{
        f"forced {kind}": (f"a: !!{kind} {value}", "line 1: tags")
        for kind, value in [
            ("int", '""'),
            ("float", '""'),
            ("bool", '"x"'),
            ("timestamp", '"abc"'),
            ("binary", '"%"'),
            ("set", "{a}"),
        ]
    },
    "no date": ("a: 2001-99-99", "not valid YAML: a ValueError"),
    "sexagesimal": ("a: " + "1" + ":59" * 5000 + ".5", "not valid YAML: a OverflowError"),
    "digits": (text_with() + "x: " + "9" * 5000, "unknown key x|not valid YAML"),
    "huge layer": (text_with().replace("layer: 2", "layer: 0x" + "f" * 5000), "20000 bits"),
    "huge ratio": (text_with().replace("ratio: 0.5", "ratio: 0x" + "f" * 5000), "20000 bits"),
    "huge option": (text_with().replace("options: {}", "options: {seed: 0x" + "f" * 5000 + "}"), "20000 bits"),
    "twice": (text_with() + "name: other\n", "key name is given twice"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested deeper"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_yaml_is_refused_by_key_and_value(case: str, tmp_path: Path) -> None:
    text, match = MALFORMED[case]
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(StrategyError, match=match) as caught:
        Strategy.load(tmp_path / "s.yaml")
    assert "s.yaml" in str(caught.value)


SECRETS = [
    "password: hunter2\n",
    "- hunter2\n",
    "hunter2",
    "a: [hunter2",
    "a: 'hunter2",
    "%hunter2 hunter2",
    "a: &hunter2 1\nb: *hunter2",
    "a: !hunter2 1",
    "format: hunter2",
    "format: {hunter2: hunter2}",
    "\t- hunter2: hunter2",
    "a: b: hunter2",
]


@pytest.mark.parametrize("text", SECRETS)
def test_of_a_file_that_is_no_strategy_no_value_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(StrategyError) as caught:
        Strategy.load(tmp_path / "s.yaml")
    assert "hunter2" not in str(caught.value)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml"):
        with pytest.raises(StrategyError, match=f"{name} is no regular file"):
            Strategy.load(tmp_path / name)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 400),
    st.integers(0, 30),
    st.text(st.sampled_from("!&*:-[]{}\"'%@\n 0123456789.exyaftni"), max_size=12),
)
def test_any_text_gives_a_strategy_or_the_documented_error(at: int, cut: int, noise: str) -> None:
    text = text_with()
    with contextlib.suppress(StrategyError):
        parse(text[:at] + noise + text[at + cut :])


def test_files_that_are_no_strategy(tmp_path: Path) -> None:
    (tmp_path / "large").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(StrategyError, match=str(MAX_BYTES)):
        Strategy.load(tmp_path / "large")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StrategyError, match="binary"):
        Strategy.load(tmp_path / "binary")
    with pytest.raises(FileNotFoundError):
        Strategy.load(tmp_path / "none")
    with pytest.raises(StrategyError, match=str(MAX_BYTES)):
        Strategy("s", "ours", Schedule(), info={"notes": "x" * MAX_BYTES}).save(tmp_path / "s")


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_policy_by_its_name_alone_brings_its_own_schedule(policy: str) -> None:
    strategy = default_strategy(policy, 12)
    assert strategy.schedule == make_policy(policy).default_schedule(12)
    assert strategy.name == f"{policy}-default" and strategy.policy == policy


def test_default_strategy_without_pruning() -> None:
    assert default_strategy("none", 32).schedule == Schedule()
