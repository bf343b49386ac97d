# SPDX-License-Identifier: Apache-2.0
"""Marks the strategies of a checkpoint with the identity of its weights.

    python scripts/adopt_strategies.py MODEL_DIRECTORY

For files of the folder `strategies/` from before models' weights had an identity, whose maker knows that they were made
for just these weights. Those that name another model are left alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.pruning.strategy import Strategy


def adopt(directory: Path) -> list[Path]:
    """Rewrites the strategies in `directory`/strategies that name only the shape of the model; returns their files."""
    model, _, _ = load(directory)
    adopted = []
    for path in sorted((directory / "strategies").glob("*.yaml")):
        strategy = Strategy.load(path)
        if strategy.names_only_the_shape and strategy.fits(model.identity):
            replace(strategy, model_hash=model.identity).save(path)
            adopted.append(path)
    return adopted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="directory of the checkpoint")
    for file in adopt(parser.parse_args().directory):
        print(file)
