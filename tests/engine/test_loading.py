# SPDX-License-Identifier: Apache-2.0
"""From settings to a session: everything that is set arrives, everything that cannot be used is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adatoken3d_ros.engine import loading
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Infeasible, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.loading import load_engine, make_strategy, strategy_of
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy, StrategyError, default_strategy
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.settings import Settings
from tests.engine.scenes import load_scene

SETTINGS = Settings(
    {
        "model.device": "cpu",
        "model.template": "vicuna_v1",
        "seed": 7,
        "strategy": "random",
        "budget.infeasible": "refuse",
        "budget.reuse": "prefix",
        "budget.warm_up": False,
        "scene.max_views": 5,
        "scene.min_translation": 0.3,
        "scene.min_rotation": 20.0,
        "scene.max_depth": 4.0,
        "scene.origin": (1.0, 2.0, 0.5),
        "scene.origin_mode": "fixed",
        "scene.question_views": 7,
        "scene.max_voxels": 9,
        "scene.near": 2.0,
        "scene.far": 3.0,
        "scene.min_gain": 0.1,
        "scene.min_sharpness": 0.2,
        "scene.sharpness_wait": 0.3,
        "scene.change_interval": 4.0,
        "scene.min_change": 5,
        "scene.max_disagreement": 0.1,
        "scene.max_height": 3.5,
        "scene.carving": False,
    }
)


def test_every_setting_arrives(tiny_directory: Path) -> None:
    session = load_scene(SETTINGS | {"model.path": str(tiny_directory), "model.dtype": "bfloat16"})
    assert session.config == SessionConfig(
        key_frames=KeyFrameConfig(0.3, 20.0, 5, 9, 2.0, 3.0, 0.0, 0.1, 0.2, 0.3, 4.0, 5, 0.1, 3.5, None),
        max_depth=4.0,
        origin=(1.0, 2.0, 0.5),
        question_views=7,
        template="vicuna_v1",
        seed=7,
        budget=BudgetConfig(Infeasible.REFUSE, Reuse.PREFIX),
    )
    assert session.strategy.policy == "random"
    assert session.runtime.model_id == f"{tiny_directory.name}@{session.runtime.model.identity}"
    assert {parameter.dtype for parameter in session.runtime.model.parameters()} == {torch.bfloat16}


def test_a_template_that_the_model_has_not_is_told_at_once(tiny_directory: Path) -> None:
    with pytest.raises(ValueError, match="'chatml' is unknown, known: llava_v1, vicuna_v1"):
        load_engine(SETTINGS | {"model.path": str(tiny_directory), "model.template": "chatml"})


def test_no_path_is_the_model_in_the_package(monkeypatch: pytest.MonkeyPatch, tiny_directory: Path) -> None:
    monkeypatch.setattr(loading, "embedded_path", lambda: tiny_directory)
    session = load_scene(SETTINGS | {"model.path": ""})
    assert session.runtime.model_id == f"{tiny_directory.name}@{session.runtime.model.identity}"

    def missing() -> Path:
        raise FileNotFoundError("the package has none")

    monkeypatch.setattr(loading, "embedded_path", missing)
    with pytest.raises(ValueError, match="model.path is empty.*the package has none"):
        load_scene(SETTINGS | {"model.path": ""})


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"model.path": "/no/such/model"}, FileNotFoundError, "/no/such/model"),
        ({"strategy": "best"}, ValueError, "'best'"),
        ({"strategy": "/no/such/strategy.yaml"}, OSError, "/no/such/strategy.yaml"),
    ],
)
def test_what_cannot_be_used_is_named(
    change: dict[str, Any], kind: type[Exception], named: str, tiny_directory: Path
) -> None:
    with pytest.raises(kind, match=named):
        load_scene(SETTINGS | {"model.path": str(tiny_directory), **change})


def test_why_a_gpu_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A driver that is too old, in torch's own words: as an error where a GPU was asked for, else as a warning."""

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(ValueError, match="the device is 'cuda', but torch .* cannot use it: The NVIDIA driver .* old"):
        loading.device_of("cuda")
    for found, warned in (("/dev/null", True), ("/dev/no-such-gpu", False)):
        caplog.clear()
        monkeypatch.setattr(loading, "_OF_GPUS", (found,))
        assert loading.device_of("auto") == "cpu"
        assert ("driver on your system is too old" in caplog.text) == warned


@pytest.mark.parametrize(
    ("capability", "built", "works"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90"], False),
        ((8, 7), ["sm_75", "sm_80", "sm_90"], True),  # of a minor version below
        ((8, 0), ["sm_75", "sm_86", "sm_90"], False),
        ((11, 0), ["sm_75", "sm_90a"], False),
        ((11, 0), ["sm_75", "compute_90"], True),  # translated
        ((9, 0), [], True),  # it does not say
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_named(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    built: list[str],
    works: bool,
) -> None:
    for name, told in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", capability),
        ("get_arch_list", built),
        ("get_device_name", "Old GPU"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, told=told: told)
    assert loading.device_of("cpu") == "cpu"
    if works:
        assert (loading.device_of("auto"), loading.device_of("cuda:0")) == ("cuda", "cuda:0")
    else:
        major, minor = capability
        with pytest.raises(
            ValueError, match=rf"no code for Old GPU, compute capability {major}\.{minor} \(it has {built[0]}"
        ):
            loading.device_of("cuda")
        assert loading.device_of("auto") == "cpu" and "no code for Old GPU" in caplog.text
    with pytest.raises(ValueError, match="'cuda:1', but there are 1 CUDA devices"):
        loading.device_of("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there(tiny_directory: Path) -> None:
    with pytest.raises(ValueError, match="'cuda:1'"):
        load_scene(SETTINGS | {"model.path": str(tiny_directory), "model.device": "cuda:1"})


def test_a_checkpoint_brings_its_fitted_strategies(tiny_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_directory, tmp_path / "model")
    settings = SETTINGS | {"model.path": str(tmp_path / "model"), "strategy": "ours"}
    plain = load_scene(settings)
    assert plain.runtime.fitted == {} and plain.strategy.name == "ours-default"
    own = plain.runtime.model.identity
    folder = tmp_path / "model" / "strategies"
    folder.mkdir()
    made = Strategy("ours", "ours", Schedule.of([0, 1], [0.5, 0.3]), own, info={"figures": {"kl": 0.02}})
    strong = replace(made, name="ours-0.2", schedule=Schedule.of([0], [0.1]), info={"figures": {"kl": 0.3}})
    for one in (made, strong, replace(made, name="stranger", model_hash="0123")):
        one.save(folder / f"{one.name}.yaml")
    session = load_scene(settings)
    assert session.strategy == made and session.runtime.fitted == {"ours": made, "ours-0.2": strong}
    losses = {option.strategy.name: option.loss for option in session.controller.options}
    assert losses["ours"] == 0.02 and losses["ours-0.2"] == 0.3
    assert load_scene(settings | {"strategy": "ours-0.2"}).strategy == strong
    with pytest.raises(ValueError, match="'mine' is none of none, random.* ours, ours-0.2 and no .yaml file"):
        load_scene(settings | {"strategy": "mine"})
    # A policy with the same name as no fitted strategy is as ever, and plans with its own schedules alone.
    assert load_scene(settings | {"strategy": "fastv"}).strategy.name == "fastv-default"
    session.set_strategy(default_strategy("fastv", session.runtime.n_layers))
    assert {option.strategy.policy for option in session.controller.options} == {"fastv"}


def test_a_strategy_file_belongs_to_one_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    replace(default_strategy("ours", 8), model_hash="abc").save(path)
    assert make_strategy(str(path), 8, "abc").policy == "ours"
    with pytest.raises(StrategyError, match="abc"):
        make_strategy(str(path), 8, "def")


def test_a_strategy_that_is_chosen_later_keeps_to_the_models_first_gate() -> None:
    decoder = SimpleNamespace(first_gate=3)
    engine: Any = SimpleNamespace(model=SimpleNamespace(identity="0" * 64, decoder=decoder), n_layers=12, fitted={})
    assert min(stage.layer for stage in strategy_of(engine, "ours").schedule.stages) >= 3
    decoder.first_gate = 0
    assert min(stage.layer for stage in strategy_of(engine, "ours").schedule.stages) < 3
