# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d convert MODEL OUT`: a checkpoint as safetensors, its linear layers in eight or four bits if asked.

What is written loads without conversion and answers as the original does with the same model.quantization. PyTorch
files are opened in a process of their own, for weights alone, and each is named. What the 16-bit weights answer to the
self-test's question is written beside it, where there is memory for them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("convert", help="a checkpoint as safetensors, quantised or not", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to be made")
    parser.add_argument(
        "--quantization", choices=("none", "int8", "int4", "fp8"), default="none", help="of its layers (%(default)s)"
    )
    parser.add_argument("--vision-path", type=Path, metavar="DIR", help="its vision tower, if it has none")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if not args.model.is_dir():
        raise NotADirectoryError(f"MODEL: {args.model} is no directory")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise FileExistsError(f"OUT: {args.out} is there already and not an empty directory")
    parent = args.out.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"OUT: {parent} is no directory")
    from rich.console import Console

    from adatoken3d_ros.cli.progress import step_progress
    from adatoken3d_ros.lmm.quantized.writing import from_pickles, has_pickles_alone, write

    console = Console()
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{args.out.name}-") as temporary:
        source, made = args.model, Path(temporary) / "made"
        made.mkdir()
        if has_pickles_alone(args.model):
            source = Path(temporary) / "safetensors"
            source.mkdir()
            from_pickles(args.model, source, lambda line: console.print(line, markup=False, highlight=False))
        with step_progress(console) as report:
            size = write(
                source,
                made,
                args.quantization,
                vision_path=args.vision_path,
                progress=lambda share, _file: report("convert", round(100 * share), 100),
            )
        said = _self_test(source, made, args.vision_path)
        made.chmod(0o755)
        if args.out.exists():
            args.out.rmdir()
        shutil.move(made, args.out)
    console.print(f"{args.out}: {size / 1e9:.2f} GB of weights; {said}", markup=False, highlight=False)
    return 0


def _self_test(source: Path, made: Path, vision_path: Path | None) -> str:
    """Writes down what the original answers, unless that was known; returns what became of it."""
    import torch

    from adatoken3d_ros.engine.preflight import gb, need
    from adatoken3d_ros.engine.self_test import FILE, write_known
    from adatoken3d_ros.lmm import registry, safetensors_files

    if (made / FILE).exists():
        return f"{FILE} is the original's"
    wide = any(one.kind in ("F32", "F64") for one in safetensors_files.inventory(source).values())
    dtype = torch.float32 if wide else torch.bfloat16
    needed = need(registry.outline(source, vision_path), dtype, max_views=1).total
    free = safetensors_files.free_bytes(torch.device("cpu"))
    if needed > free:
        return f"no {FILE}: its weights need {gb(needed)} to answer its question, {gb(free)} are free"
    model, tokenizer, _ = registry.load(source, dtype=dtype, vision_path=vision_path)
    write_known(made, model, tokenizer)
    return f"{FILE} has what its 16-bit weights answer"
