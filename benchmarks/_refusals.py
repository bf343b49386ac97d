# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's command refuses before it measures, and not when an hour of it is done."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._kept import read_kept
from benchmarks._pages import check


def told_before(
    commands: argparse.ArgumentParser, args: argparse.Namespace, block: str = "", keys: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The figures of --from, which have these keys, None without it; ends with an error where --json, --resume,
    --from or a page of --docs, of those that the command has, cannot be used."""
    if args.json is not None and args.json.is_dir():
        commands.error(f"--json {args.json} is a folder")
    try:
        check(getattr(args, "docs", ()), block)
        if getattr(args, "resume", None) is not None:
            read_kept(args.resume)
        source: Path | None = getattr(args, "source", None)
        return None if source is None else read_figures(source, keys)
    except (ValueError, OSError) as error:
        commands.error(str(error))


def refuse_missing(commands: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Ends with an error of the command's for an option that names a folder which is not there, before any work."""
    for name in names:
        path: Path | None = getattr(args, name)
        if path is not None and not path.is_dir():
            commands.error(f"--{name} {path} is no folder")


def read_figures(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        ValueError: for a file without these keys, or with none; the message names them and the file.
        OSError: for one that cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"{path} holds no figures of this benchmark, or of another version: without {missing}")
    return dict(found)
