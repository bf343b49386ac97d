# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d info`: what is installed, what is missing and how to get it, and what a model needs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros import __version__
from adatoken3d_ros.settings import DEFAULTS

if TYPE_CHECKING:
    from adatoken3d_ros.lmm.interface import SpatialLMM

DISTRIBUTIONS = ("torch", "transformers", "numpy", "scipy", "open3d", "open3d-cpu", "rosbags", "opencv-python-headless")
# (Python module or program, what it is for, how to get it)
ROS_MODULES = (
    ("rclpy", "the node and the demo", "source a ROS 2 installation, or pip install ros-kilted-rclpy (Linux, x86_64)"),
    ("adatoken3d", "the interfaces (Answer, AskScene, ...)", "pip install . or colcon build, in this package"),
    (
        "tf2_msgs",
        "the node, which reads /tf",
        "apt install ros-$ROS_DISTRO-tf2-msgs; without a ROS 2 installation pip install . makes it",
    ),
    ("launch_ros", "the launch files", "apt install ros-$ROS_DISTRO-launch-ros; 'adatoken3d demo' works without"),
)


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("info", help="versions, what is missing, what a model needs", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint to describe (the one in the package)")
    parser.add_argument("--vision-path", type=Path, metavar="DIR", help="its vision tower, if it has none")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 even where things are missing: that is the information."""
    for option, path in (("--model", args.model), ("--vision-path", args.vision_path)):
        if path is not None and not path.is_dir():
            raise NotADirectoryError(f"{option}: {path} is no directory")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    sections = [("Versions", versions()), ("What is here", presence())]
    if args.model is not None:
        sections.append(("Model", model_facts(args.model, args.vision_path)))
    else:
        sections.append(("Model in the package, which answers where no other is named", embedded_facts()))
    for title, facts in sections:
        table = Table(show_header=False, title=title, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts:
            table.add_row(name, Text(value))
        console.print(table)
    return 0


def versions() -> list[tuple[str, str]]:
    """(name, version) of this package, Python and the libraries that are installed."""
    found = [("adatoken3d_ros", __version__), ("Python", f"{platform.python_version()} ({sys.executable})")]
    for name in DISTRIBUTIONS:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return [*found, ("system", f"{platform.system()} {platform.release()} {platform.machine()}")]


def is_here(module: str) -> bool:
    """Whether this Python can import it."""
    return importlib.util.find_spec(module) is not None


def presence() -> list[tuple[str, str]]:
    """(part, "yes" or what is missing and how to get it)."""
    found = [
        (name, "yes" if is_here(name) else f"missing, needed for {purpose}: {remedy}")
        for name, purpose, remedy in ROS_MODULES
    ]
    rviz = shutil.which("rviz2")
    found.append(("rviz2", rviz or "missing, needed to see the tokens: apt install ros-$ROS_DISTRO-rviz2"))
    start = f"{sys.executable} -m adatoken3d_ros.ros.node --ros-args -p autostart:=true"
    without = f"not set: no ROS installation is sourced; the node starts by '{start}'"
    found.append(("ROS_DISTRO", os.environ.get("ROS_DISTRO") or without))
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    found.append(("display", display or "none: RViz has no screen here"))
    return [*found, ("CUDA", cuda())]


def cuda() -> str:
    """The GPUs that torch can use, with their memory, or why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "unknown: torch is not installed"
    import torch

    if not torch.cuda.is_available():
        from adatoken3d_ros.engine.loading import why_no_gpu

        return f"no: {why_no_gpu()}; the model runs on the CPU, slowly"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices)


def embedded_facts() -> list[tuple[str, str]]:
    """As `model_facts`, of the model in the package; why it cannot be described, where it cannot."""
    from adatoken3d_ros.weights import embedded_path

    try:
        path = embedded_path()
    except FileNotFoundError as error:
        return [("directory", str(error))]
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return [("directory", str(path)), ("shape", f"unknown: {' and '.join(missing)} not installed")]
    return [*model_facts(path), ("card", "docs/model_card.md: what it knows, and how often it is right")]


def model_facts(path: Path, vision_path: Path | None = None) -> list[tuple[str, str]]:
    """(fact, value) of a checkpoint, from its files and headers: the weights are not loaded.

    Raises:
        CheckpointError: for a config.json that is missing or describes no model we can build.
    """
    from adatoken3d_ros.lmm.quantized.foreign import kept_kind
    from adatoken3d_ros.lmm.registry import architecture_of, outline

    model = outline(path, vision_path)
    decoder, sizes, cut = model.decoder.size, model.sizes, model.sizes.patches
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parameters = sum(p.numel() for p in model.parameters())
    kind = f"means of voxels of {sizes.voxel_size:g} m" if sizes.tokens == "voxels" else "those of the views"
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return [
        ("directory", str(path)),
        ("architecture", architecture_of(path).model_type),
        ("shape", f"{decoder.n_layers} layers of {decoder.hidden}, hash {model.shape_hash}"),
        ("vision", f"{cut.width}x{cut.height} pixels, {cut.columns}x{cut.rows} patches a view"),
        ("spatial tokens", f"at most {sizes.max_spatial_tokens}, {kind}"),
        ("context", f"{sizes.context_length} tokens"),
        ("parameters", f"{parameters:,} ({', '.join(f'{name} {count:,}' for name, count in parts.items())})"),
        ("weight files", f"{_size(stored)}" if stored else "missing: no safetensors file"),
        *memory_facts(model, kept_kind(path)),
    ]


def memory_facts(model: SpatialLMM, kept: str) -> list[tuple[str, str]]:
    """(number type, memory that the model needs with the default settings), as a load asks for it.

    Args:
        kept: what the layers of a converted checkpoint are; empty for any other.
    """
    import torch

    from adatoken3d_ros.engine.preflight import need

    views = {"max_views": DEFAULTS["scene.max_views"], "max_new_tokens": DEFAULTS["max_new_tokens"]}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (kept,) if kept else ("none", "int8", "int4"):
            name = f"memory, {str(dtype).removeprefix('torch.')}{'' if kind == 'none' else f', {kind}'}"
            found.append((name, str(need(model, dtype, quantization=kind, **views))))
    return found


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
