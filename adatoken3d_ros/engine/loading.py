# SPDX-License-Identifier: Apache-2.0
"""From settings to an engine and a scene. torch and the model's code are imported when a model is loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.text import quoted
from adatoken3d_ros.weights import embedded_path

if TYPE_CHECKING:
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.pruning.strategy import Strategy
    from adatoken3d_ros.scene.keyframes import KeyFrameConfig


logger = logging.getLogger(__name__)

STRATEGIES = "strategies"  # folder of a checkpoint with those that were fitted to it

# Fields that are called as their parameters are.
_OF_THE_SCENE = (
    "origin_mode",
    "question_views",
    "max_voxels",
    "near",
    "far",
    "max_age",
    "min_gain",
    "min_sharpness",
    "sharpness_wait",
    "change_interval",
    "min_change",
    "carving",
)


@dataclass(frozen=True)
class ModelSettings:
    """What `configure` reads; see the table of parameters for meaning and units."""

    path: str
    vision_path: str
    dtype: str
    device: str
    template: str
    upstream_numerics: bool
    seed: int
    strategy: str
    max_views: int
    min_translation: float
    min_rotation: float
    max_depth: float
    origin: tuple[float, float, float]
    infeasible: str = "best_effort"
    reuse: str = "off"
    warm_up: bool = False
    latency_cache: str = ""
    origin_mode: str = "auto"
    question_views: int = 0
    max_voxels: int = 20_000
    near: float = 5.0
    far: float = 0.0
    max_age: float = 0.0
    min_gain: float = 0.02
    min_sharpness: float = 0.5
    sharpness_wait: float = 0.5
    change_interval: float = 1.0
    min_change: int = 8
    carving: bool = True

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any] | Any) -> ModelSettings:
        """Reads them by their parameters' names."""
        x, y, z = values["scene.origin"]
        return cls(
            path=values["model.path"],
            vision_path=values["model.vision_path"],
            dtype=values["model.dtype"],
            device=values["model.device"],
            template=values["model.template"],
            upstream_numerics=values["model.upstream_numerics"],
            seed=values["seed"],
            strategy=values["strategy"],
            max_views=values["scene.max_views"],
            min_translation=values["scene.min_translation"],
            min_rotation=values["scene.min_rotation"],
            max_depth=values["scene.max_depth"],
            origin=(x, y, z),
            infeasible=values["budget.infeasible"],
            reuse=values["budget.reuse"],
            warm_up=values["budget.warm_up"],
            latency_cache=values["budget.cache"],
            **{name: values[f"scene.{name}"] for name in _OF_THE_SCENE},
        )


def load_engine(settings: ModelSettings, progress: Callable[[float, str], None] | None = None) -> Engine:
    """Loads the checkpoint, and measures how fast it runs if that is asked for.

    Args:
        settings: what to load.
        progress: told (share of the present step that is done, what it is), from 0 to 1 for each step.

    Raises:
        ValueError, OSError: for a path, device, checkpoint or strategy that cannot be used; the text names it.
    """
    path = checkpoint_path(settings.path)
    import torch

    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.lmm.registry import load

    device = device_of(settings.device)
    if settings.dtype == "auto":
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, settings.dtype)
    model, tokenizer, _ = load(
        path,
        dtype=dtype,
        device=device,
        vision_path=Path(settings.vision_path) if settings.vision_path else None,
        progress=None if progress is None else lambda share, file: progress(share, f"reading {file}"),
    )
    identity = model.identity
    fitted = fitted_strategies(path, identity)
    engine = Engine(model, tokenizer, model_id=f"{path.resolve().name}@{identity}", fitted=fitted)
    strategy = make_strategy(settings.strategy, engine.n_layers, identity, fitted)  # a wrong one is told at once
    if settings.warm_up:
        cache = Path(settings.latency_cache) if settings.latency_cache else None
        known = engine.warm_up(
            strategy,
            cache,
            None if progress is None else lambda done, of: progress(done / of, "measuring how fast it runs"),
        )
        logger.info("speed of this machine: %s", "as measured before" if known else "measured")
    return engine


def open_scene(engine: Engine, settings: ModelSettings) -> Scene:
    """An empty scene as the settings want it.

    Raises:
        ValueError, OSError: for a strategy or a setting that cannot be used; the text names it.
    """
    from adatoken3d_ros.engine.budget.controller import BudgetConfig, Infeasible, Reuse
    from adatoken3d_ros.engine.config import SessionConfig
    from adatoken3d_ros.scene.window import OriginMode

    config = SessionConfig(
        key_frames=_key_frames(settings),
        max_depth=settings.max_depth,
        origin=settings.origin,
        origin_mode=OriginMode(settings.origin_mode),
        question_views=settings.question_views,
        template=settings.template,
        upstream_numerics=settings.upstream_numerics,
        seed=settings.seed,
        budget=BudgetConfig(Infeasible(settings.infeasible), Reuse(settings.reuse)),
    )
    return engine.open(config, make_strategy(settings.strategy, engine.n_layers, engine.model.identity, engine.fitted))


def _key_frames(settings: ModelSettings) -> KeyFrameConfig:
    from adatoken3d_ros.scene.carving import CarvingConfig
    from adatoken3d_ros.scene.keyframes import KeyFrameConfig

    return KeyFrameConfig(
        settings.min_translation,
        settings.min_rotation,
        settings.max_views,
        settings.max_voxels,
        near=settings.near,
        far=settings.far or math.inf,
        max_age=settings.max_age or math.inf,
        min_gain=settings.min_gain,
        min_sharpness=settings.min_sharpness,
        sharpness_wait=settings.sharpness_wait,
        change_interval=settings.change_interval,
        min_change=settings.min_change,
        carving=CarvingConfig() if settings.carving else None,
    )


def device_of(name: str) -> str:
    """Name of a device for torch; `auto`: a GPU where there is one. Raises ValueError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"the device is {quoted(name)}, but torch sees no CUDA device")
    return name


def checkpoint_path(path: str) -> Path:
    """The directory that `model.path` names; where that is empty, of the model that comes with the package.

    Raises:
        ValueError: if it is empty and the package has no model.
        FileNotFoundError: if there is no such directory.
    """
    if not path:
        try:
            return embedded_path()
        except FileNotFoundError as error:
            raise ValueError(f"model.path is empty: set it to the directory of a checkpoint ({error})") from error
    if not Path(path).is_dir():
        raise FileNotFoundError(f"model.path: {path} is no directory")
    return Path(path)


def fitted_strategies(path: Path, model_hash: str) -> dict[str, Strategy]:
    """Strategies in the folder `strategies` of a checkpoint, by the files' names without .yaml; those made for another
    model are left out, and logged.

    Raises:
        StrategyError, OSError: for a file that cannot be read.
    """
    from adatoken3d_ros.pruning.strategy import Strategy

    found = {file.stem: Strategy.load(file) for file in sorted((path / STRATEGIES).glob("*.yaml"))}
    other = [name for name, one in found.items() if not one.fits(model_hash)]
    if other:
        logger.warning("%s: not made for this model %s: %s", path / STRATEGIES, model_hash, ", ".join(other))
    fitted = {name: one for name, one in found.items() if name not in other}
    unsure = [name for name, one in fitted.items() if one.names_only_the_shape]
    if unsure:
        which = ", ".join(unsure)
        logger.warning("%s: made for a model of this shape, but maybe other weights: %s", path / STRATEGIES, which)
    return fitted


def make_strategy(name: str, n_layers: int, model_hash: str, fitted: Mapping[str, Strategy] | None = None) -> Strategy:
    """A strategy from a .yaml file or by name: one that was fitted to the model, else a policy with its own schedule.

    Raises:
        ValueError, OSError: for an unknown name, an unreadable file or a strategy that was made for another model.
    """
    from adatoken3d_ros.pruning.policies import POLICY_NAMES
    from adatoken3d_ros.pruning.strategy import Strategy, default_strategy

    if Path(name).suffix in (".yaml", ".yml"):
        strategy = Strategy.load(name)
        strategy.check(model_hash)
        strategy.schedule.check(n_layers)
        return strategy
    if fitted and name in fitted:
        fitted[name].schedule.check(n_layers)
        return fitted[name]
    if name not in POLICY_NAMES:
        known = dict.fromkeys((*POLICY_NAMES, *(fitted or ())))
        raise ValueError(f"strategy {quoted(name)} is none of {', '.join(known)} and no .yaml file")
    return default_strategy(name, n_layers)
