# SPDX-License-Identifier: Apache-2.0
"""From settings to an engine and a scene. torch and the model's code are imported when a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import quoted, shown
from adatoken3d_ros.weights import embedded_path

if TYPE_CHECKING:
    import torch

    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.runtime import Runtime
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.pruning.strategy import Strategy

logger = logging.getLogger(__name__)

_OF_GPUS = "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu"  # of a computer, and of a Jetson
STRATEGIES = "strategies"  # folder of a checkpoint with those that were fitted to it


def load_engine(settings: Settings, progress: Callable[[float, str], None] | None = None) -> Engine:
    """Loads the checkpoint, tests it, and measures how fast it runs if that is asked for.

    Args:
        settings: what to load, and how scenes are to be.
        progress: told (share of the present step that is done, what it is), from 0 to 1 for each step.

    Raises:
        ValueError, OSError: for a path, device, checkpoint or strategy that cannot be used, too little memory, and for
            a model that gives garbage; the text names it.
    """
    path = checkpoint_path(settings["model.path"])
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.quantization import load_checked
    from adatoken3d_ros.engine.understanding import read_understanding

    device = device_of(settings["model.device"])
    model, tokenizer = load_checked(path, settings, device, dtype_of(settings["model.dtype"], device), progress)
    identity = model.identity
    fitted = fitted_strategies(path, identity)
    known = read_understanding(path, identity)
    model_id = f"{path.resolve().name}@{identity}"
    engine = Engine(model, tokenizer, model_id=model_id, fitted=fitted, understanding=known)
    # A wrong strategy or template is told at once.
    strategy = strategy_of(engine, settings["strategy"])
    model.prompt(tokenizer, "What is this?", template=settings["model.template"])
    if settings["model.tell_poses"] and not model.tells_poses:
        raise ValueError("model.tell_poses is true, but this model reads no views and cannot be told where they are")
    if _in_one_piece(settings["model.decoding"], device, settings["budget.cache"]):
        if progress is not None:
            progress(0.0, "preparing decode steps, for up to minutes the first time")
        engine.prepare_decoding(Path(settings["budget.cache"]) if settings["budget.cache"] else None)
    if settings["budget.warm_up"]:
        cache = Path(settings["budget.cache"]) if settings["budget.cache"] else None
        measured = engine.warm_up(
            strategy,
            cache,
            None if progress is None else lambda done, of: progress(done / of, "measuring how fast it runs"),
        )
        logger.info("speed of this machine: %s", "as measured before" if measured else "measured")
    return engine


def _in_one_piece(decoding: str, device: str, cache: str) -> bool:
    """Whether decode steps are prepared. Compiling takes a minute: by itself only where it is kept for later starts."""
    return decoding == "graph" or (decoding == "auto" and (device != "cpu" or bool(cache)))


def open_scene(engine: Engine, settings: Settings) -> Scene:
    """An empty scene as the settings want it.

    Raises:
        ValueError, OSError: for a strategy or a setting that cannot be used; the text names it.
    """
    from adatoken3d_ros.engine.config import session_config

    return engine.open(session_config(settings), strategy_of(engine, settings["strategy"]))


def strategy_of(engine: Runtime, name: str) -> Strategy:
    """The strategy of that name or file for an engine's model; raises as `make_strategy`."""
    model = engine.model
    return make_strategy(name, engine.n_layers, model.identity, engine.fitted, model.decoder.first_gate)


def strategy_names(engine: Runtime) -> tuple[str, ...]:
    """Strategies that `strategy_of` makes by their names."""
    from adatoken3d_ros.pruning.policies import POLICY_NAMES

    return tuple(dict.fromkeys((*POLICY_NAMES, *engine.fitted)))


def device_of(name: str) -> str:
    """Name of a device for torch; `auto`: a GPU where there is one, and where that cannot be used, a warning says why.

    Raises:
        ValueError: for one that is not there; the text says why.
    """
    import torch

    if name == "cpu":
        return name
    problem = without_code(name) if torch.cuda.is_available() else why_no_gpu()
    if not problem:
        return "cuda" if name == "auto" else name
    if name != "auto":
        raise ValueError(f"the device is {quoted(name)}, but {problem}")
    if torch.cuda.is_available() or any(Path(path).exists() for path in _OF_GPUS):
        logger.warning("there is a GPU, but %s; the model runs on the CPU, slowly", problem)
    return "cpu"


def without_code(name: str) -> str:
    """What to do about a GPU that this torch was not built for; empty if it was, or has code to be translated for it.

    Args:
        name: of the device for torch, or `auto` for the first one.
    """
    import torch

    device = torch.device("cuda" if name == "auto" else name)
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} CUDA devices"
    found, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    for arch in built:  # "sm_86" runs on 8.6 to 8.9, "compute_90" is translated for 9.0 and all later ones
        kind, _, digits = arch.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        least = divmod(number, 10)
        if found >= least and (kind == "compute" or found[0] == least[0]):
            return ""
    if not built:
        return ""
    return (
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)}, compute capability "
        f"{found[0]}.{found[1]} (it has {', '.join(built)}): take a torch that was built for it, or model.device: cpu"
    )


def why_no_gpu() -> str:
    """Why torch cannot use a GPU, in words; what torch itself says of it, of a driver that is too old for instance."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built for the CPU (pytorch.org has CUDA builds)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} cannot use it: {shown(error, 300)}"
    return "torch sees no CUDA device (CUDA_VISIBLE_DEVICES?)"


def dtype_of(name: str, device: str) -> torch.dtype:
    """Number type of the weights by its name; `auto`: as the device is best at."""
    import torch

    found: torch.dtype = getattr(torch, ("float32" if device == "cpu" else "bfloat16") if name == "auto" else name)
    return found


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


def strategy_files(path: Path) -> list[Path]:
    """Files of a checkpoint's folder `strategies`, each with the name of its strategy."""
    return sorted((path / STRATEGIES).glob("*.yaml"))


def fitted_strategies(path: Path, model_hash: str) -> dict[str, Strategy]:
    """Strategies in the folder `strategies` of a checkpoint, by the files' names without .yaml; those made for another
    model are left out, and logged.

    Raises:
        StrategyError, OSError: for a file that cannot be read.
    """
    from adatoken3d_ros.pruning.strategy import Strategy

    found = {file.stem: Strategy.load(file) for file in strategy_files(path)}
    other = [name for name, one in found.items() if not one.fits(model_hash)]
    if other:
        logger.warning("%s: not made for this model %s: %s", path / STRATEGIES, model_hash, ", ".join(other))
    fitted = {name: one for name, one in found.items() if name not in other}
    unsure = [name for name, one in fitted.items() if one.names_only_the_shape]
    if unsure:
        which = ", ".join(unsure)
        logger.warning("%s: made for a model of this shape, but maybe other weights: %s", path / STRATEGIES, which)
    return fitted


def make_strategy(
    name: str,
    n_layers: int,
    model_hash: str,
    fitted: Mapping[str, Strategy] | None = None,
    first_gate: int = 0,
) -> Strategy:
    """A strategy from a .yaml file or by name: one that was fitted to the model, else a policy with its own schedule.

    Raises:
        ValueError, OSError: for an unknown name, an unreadable file or a strategy that was made for another model.
    """
    from adatoken3d_ros.pruning.policies import POLICY_NAMES
    from adatoken3d_ros.pruning.strategy import Strategy, default_strategy

    if Path(name).suffix in (".yaml", ".yml"):
        strategy = Strategy.load(name)
        strategy.check(model_hash)
        strategy.schedule.check(n_layers, first_gate)
        return strategy
    if fitted and name in fitted:
        fitted[name].schedule.check(n_layers, first_gate)
        return fitted[name]
    if name not in POLICY_NAMES:
        known = dict.fromkeys((*POLICY_NAMES, *(fitted or ())))
        raise ValueError(f"strategy {quoted(name)} is none of {', '.join(known)} and no .yaml file")
    return default_strategy(name, n_layers, first_gate)
