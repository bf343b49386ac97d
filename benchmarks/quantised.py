# SPDX-License-Identifier: Apache-2.0
"""What do eight and four bits cost in right answers?

The same questions about rooms of the split `test` are answered with the weights as they are and with each quantisation,
greedily, no token pruned. An answer counts as in `benchmarks.accuracy`.

    quantised.KIND.accuracy_loss  macro of the weights as they are less that of KIND, in points of a hundred
    quantised.KIND.interval       its 95 % interval: paired, bootstrap over rooms
    quantised.KIND.same           share of the answers that are the same to the letter

    python -m benchmarks.quantised --json F [--model DIR] [--questions 400] [--kinds int8 int4] [--scenes DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.lmm.quantized.formats import KINDS
from adatoken3d_ros.weights import embedded_path
from benchmarks._paired import Tally
from benchmarks._scenes import Reader, bar, find_rooms, machine, write_json
from benchmarks.accuracy import answers, outcomes

PLAIN = "none"


def accuracy_losses(
    model: Path, kinds: Sequence[str], questions: int, folder: Path, console: Console, *, seed: int = 0
) -> dict[str, Any]:
    """By kind `accuracy_loss` with its `interval`, `accuracy`, `same` and `questions`; of `none` the accuracy alone.

    Args:
        model: a checkpoint in 16 bits. kinds: of `formats.KINDS`. questions: at least so many.
        folder: where rooms are kept, encoded once.
    """
    reader = Reader(model)
    with bar(console, "rooms of test") as progress:
        rooms = find_rooms(reader, folder, "test", questions, seed=seed, progress=progress)
    ways = (PLAIN, *kinds)
    given: list[list[str]] = []
    scores: list[list[float]] = []
    for kind in ways:
        if kind != PLAIN:
            reader = Reader(model, quantization=kind)
        with bar(console, f"answers, {kind}") as progress:
            texts = []
            for done, room in enumerate(rooms, 1):
                texts.append(answers(reader, room))
                progress(done, len(rooms))
        found = outcomes(rooms, texts)
        scores.append([one.score for one in found])
        given.append([one.answer for one in found])
    tally = Tally([one.room for one in found], [one.family for one in found], np.array(scores), seed=seed)
    result: dict[str, Any] = {PLAIN: {"accuracy": float(tally.macro[0]), "interval": tally.interval(0)}}
    for way, kind in enumerate(kinds, 1):
        result[kind] = {
            "accuracy_loss": 100 * tally.difference(0, way),
            "interval": [100 * end for end in tally.difference_interval(0, way)],
            "accuracy": float(tally.macro[way]),
            "same": float(np.mean([a == b for a, b in zip(given[0], given[way], strict=True)])),
            "questions": len(found),
            "rooms": tally.rooms,
        }
    return result


def report(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table(title="Right answers that quantised weights cost, points of a hundred, 95 % interval")
    for name in ("weights", "macro", "loss", "interval", "same answer"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for kind, one in result.items():
        row = [kind, f"{one['accuracy']:.3f}"]
        if kind != PLAIN:
            low, high = one["interval"]
            row += [f"{one['accuracy_loss']:.2f}", f"[{low:.2f}, {high:.2f}]", f"{one['same']:.3f}"]
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--questions", type=int, default=400, help="at least so many (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int8", "int4"], help="(%(default)s)")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args()
    for name in ("questions", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    torch.set_num_threads(arguments.threads)
    console, model = Console(), arguments.model or embedded_path()
    with TemporaryDirectory() as temporary:
        folder = arguments.scenes or Path(temporary)
        result = accuracy_losses(model, arguments.kinds, arguments.questions, folder, console)
    console.print(report(result))
    write_json(arguments.json, {"quantised": result, "model": Reader(model).about(), "machine": machine()})


if __name__ == "__main__":
    main()
