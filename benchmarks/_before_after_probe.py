# SPDX-License-Identifier: Apache-2.0
"""What `before_after` measures inside a tree, given to its interpreter as text: the tree need not have this file.

All that it knows of the package is the command `ask`: that it has `add_parser`, `frames` and `run`, which takes the
frames one by one and encodes each before it takes the next. Prints one JSON object:

    ingest_ms     CPU time from a bag's messages to the frames that they make, by frame, one number a pass
    key_frame_ms  time until a frame is a view of the scene, observed and encoded, one number a frame
    package       where the package came from
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(model: str, bag: str, passes: int, threads: int, warm: int) -> None:
    import torch

    import adatoken3d_ros
    from adatoken3d_ros.cli import ask

    torch.set_num_threads(threads)
    parser = argparse.ArgumentParser()
    ask.add_parser(parser.add_subparsers())
    given = ["ask", "What is there?", "--model", model, "--device", "cpu", "--dtype", "float32", "--max-views", "1000"]
    args = parser.parse_args([*given, "--bag", bag])
    frames = list(ask.frames(args))  # the first pass imports what it needs
    ingest = []
    for _ in range(passes):
        began = time.process_time()
        count = sum(1 for _ in ask.frames(args))
        ingest.append(1000 * (time.process_time() - began) / count)

    key_frames = []

    def timed(_: argparse.Namespace) -> Iterator[Any]:
        for frame in frames:
            began = time.perf_counter()
            yield frame
            key_frames.append(1000 * (time.perf_counter() - began))

    setattr(ask, "frames", timed)  # noqa: B010
    # Of a folder each frame counts, sharp or not.
    ask.run(parser.parse_args([*given, "--folder", str(Path(bag).parent), "--max-new-tokens", "1"]))
    print(json.dumps({"ingest_ms": ingest, "key_frame_ms": key_frames[warm:], "package": adatoken3d_ros.__file__}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
