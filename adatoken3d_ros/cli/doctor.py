# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d doctor`: what is missing on this machine and in the running graph, each with the command that mends it.

Looks at the installation, the GPU, memory and the model; where ROS is there, for some seconds at the node, the topics
that it listens to (publishers, types, quality of service, rates, stamps), TF, shared memory, and what the node says of
itself. It changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli import info
from adatoken3d_ros.cli.demo import share
from adatoken3d_ros.cli.options import check_files
from adatoken3d_ros.requirements import advice, missing
from adatoken3d_ros.settings import DEFAULTS

if TYPE_CHECKING:
    from adatoken3d_ros.ros.findings import Finding


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "doctor", help="what is missing in the running graph, and how to mend it", description=__doc__
    )
    parser.add_argument("--node", default="adatoken3d", metavar="NAME", help="the node's name (%(default)s)")
    parser.add_argument("--namespace", default="", metavar="NAME", help="its namespace")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="to count messages for (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if something keeps the node from answering, else 0."""
    if not 0 < args.seconds <= 600:
        raise ValueError(f"--seconds {args.seconds:g} must be above 0 and at most 600")
    check_files(args)
    name = f"{('/' + args.namespace.strip('/')).rstrip('/')}/{args.node}"
    if not re.fullmatch(r"(/[A-Za-z_]\w*)+", name, re.ASCII):
        raise ValueError(f"--namespace, --node: {name!r} is no node's name")
    found, loaded, settings = of_packages(), False, DEFAULTS
    if not any(one.about in ("rclpy", "adatoken3d") and one.level != "ok" for one in found):
        from adatoken3d_ros.ros.examination import examine

        seen, loaded, settings = _with_status(lambda told: examine(name, args.seconds, profile(), told))
        found += seen
    found += of_machine(loaded, settings)
    print_findings(found)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n", encoding="utf-8")
    return int(any(one.level == "error" for one in found))


def of_packages() -> list[Finding]:
    """Whether Python has what the node needs."""
    from adatoken3d_ros.ros.findings import ERROR, OK, WARNING, Finding

    # Without a ROS installation there are neither launch files nor a distribution, and the node runs all the same.
    optional = ("launch_ros", "tf2_msgs")
    found = [
        Finding(WARNING if name in optional else ERROR, name, f"missing, needed for {purpose}", remedy)
        for name, purpose, remedy in info.ROS_MODULES
        if not info.is_here(name)
    ]
    if lacking := missing():
        found.append(Finding(ERROR, "packages", f"missing: {', '.join(lacking)}", advice(lacking).partition(": ")[2]))
    distribution = os.environ.get("ROS_DISTRO")
    where = f"ROS 2 {distribution}" if distribution else "no ROS installation is sourced, the wheels' is used"
    return found or [Finding(OK, "packages", f"all there ({where})")]


def of_machine(loaded: bool, settings: Mapping[str, Any]) -> list[Finding]:
    """GPU, memory, and the model unless the node has it already."""
    from adatoken3d_ros.ros.findings import ERROR, OK, Finding, of_memory

    found = [Finding(OK, "GPU", info.cuda())]
    if missing():  # which `of_packages` says
        return found
    import psutil

    memory: dict[str, Any] = {"free": psutil.virtual_memory().available}
    if not loaded:
        from adatoken3d_ros.engine.loading import checkpoint_path, device_of, dtype_of
        from adatoken3d_ros.engine.quantization import plan
        from adatoken3d_ros.lmm.registry import architecture_of, outline

        try:
            path = checkpoint_path(settings["model.path"])
            device = device_of(settings["model.device"])
            dtype = dtype_of(settings["model.dtype"], device)
            model = outline(path, settings["model.vision_path"] or None)
            planned = plan(path, settings, device, dtype, model=model)
            kind = "" if planned.kinds[:1] in ((), ("none",)) else f" with {planned.kinds[0]} layers"
            memory = {
                "free": planned.free,
                "needed": str(planned.need),
                "what": f"{path.resolve().name} in {str(dtype).removeprefix('torch.')}{kind}",
                "device": device,
                "problem": planned.problem,
                "instead": planned.instead,
            }
            text = (
                f"{path}: {architecture_of(path).model_type}, at most {model.sizes.max_spatial_tokens} spatial tokens"
            )
            found.append(Finding(OK, "model", text))
            if not any(path.glob("*.safetensors")):
                found.append(Finding(ERROR, "model", f"{path} has no safetensors file", "see docs/models.md"))
        except (ValueError, OSError) as error:
            found.append(Finding(ERROR, "model", str(error), "model:=DIR, a checkpoint as docs/models.md says"))
    return found + of_memory(**memory)


def profile() -> Path:
    """The profile of Fast DDS with more shared memory."""
    try:
        return share() / "config" / "fastdds_shm.xml"
    except FileNotFoundError:
        return Path("config/fastdds_shm.xml")


def _with_status(work: Any) -> Any:
    """What `work` returns; on a terminal it is shown what it is at."""
    from rich.console import Console

    console = Console()
    with console.status("") as status:
        return work(lambda step: status.update(step))


def print_findings(found: list[Finding]) -> None:
    """A table, and in the end how many things are wrong."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table = Table(show_header=False, title="Doctor", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for one in found:
        text = Text(one.text)
        if one.mend:
            text.append(f"\n-> {one.mend}")
        table.add_row(Text(one.level, style=colours[one.level]), Text(one.about), text)
    console = Console()
    console.print(table)
    wrong = {level: sum(one.level == level for one in found) for level in ("error", "warning")}
    console.print(", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in wrong.items()))
