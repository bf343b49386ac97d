# SPDX-License-Identifier: Apache-2.0
"""The command `adatoken3d`. Each command is a module with `add_parser(subparsers)` and `run(args) -> int`.

Those modules import what is heavy (torch, ROS, Open3D) inside `run`: help and errors come at once, and a command works
where what only another one needs is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import sys
from types import ModuleType

from adatoken3d_ros import __version__
from adatoken3d_ros.cli import interrupts

COMMANDS = (
    "demo",
    "ask",
    "view",
    "serve",
    "replay",
    "record",
    "evaluate",
    "benchmark",
    "calibrate",
    "train",
    "convert",
    "info",
    "doctor",
)
USAGE_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT


def parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The whole command line, and the module of each command."""
    top = argparse.ArgumentParser(
        prog="adatoken3d", description="Ask free questions about the 3D scene around a robot."
    )
    top.add_argument("--version", action="version", version=f"adatoken3d {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="command")
    modules = {}
    for name in COMMANDS:
        modules[name] = importlib.import_module(f"adatoken3d_ros.cli.{name}")
        modules[name].add_parser(subparsers)
    return top, modules


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 well, 2 for an error (one line on stderr), 130 for Ctrl-C."""
    interrupts.arm()
    top, modules = parser()
    args = top.parse_args(argv)
    args.typed = shlex.join(["adatoken3d", *(sys.argv[1:] if argv is None else argv)])
    try:
        return int(modules[args.command].run(args))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if interrupts.came():  # it was interrupted where something made another exception of it
            return INTERRUPTED
        if args.debug:
            raise
        print(f"adatoken3d {args.command}: {describe(error)}", file=sys.stderr)
        return USAGE_ERROR


def describe(error: Exception) -> str:
    """One line for people. An error that is none of the expected kinds is a defect, and says how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"the Python module {error.name} is missing: install it, or look at 'adatoken3d info'"
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (adatoken3d --debug ... shows where)"


if __name__ == "__main__":
    sys.exit(main())
