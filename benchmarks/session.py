# SPDX-License-Identifier: Apache-2.0
"""How long until the first word of an answer, with the scene read anew and with its prefix kept?

Both ways see every token of the prompt and end with the id of the first new one:

    ttft_full_ms        system, scene and question in one prefill, nothing pruned
    ttft_follow_up_ms   the question over the kept prefix, rolled back afterwards
    ratio               the first over the second

    python -m benchmarks.session --json F
    python -m benchmarks.session --device cuda --dtype bfloat16 --layers 32 --heads 32 --hidden 4096 \\
        --intermediate 11008 --json F
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from rich.console import Console

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from benchmarks._timing import Case, argument_parser, interleaved, make_case, rounded, setting


def compare(case: Case, args: Any) -> dict[str, Any]:
    """Both ways in turn; they must find the same token."""
    start = case.layout.spatial_start
    n_prefix = start + case.layout.n_spatial
    prefix = ScenePrefix(case.decoder, case.embeds[:, :n_prefix], start)
    unpruned = make_policy("none")

    def full() -> int:
        return int(prefill(case.decoder, case.embeds, case.layout, Schedule(), unpruned).logits.argmax())

    def follow_up() -> int:
        with prefix.asking(case.embeds[:, n_prefix:]) as result:
            return int(result.logits.argmax())

    runs = interleaved({"full": full, "follow up": follow_up}, args)
    full_ms, follow_up_ms = (1000 * median(seconds for seconds, _ in runs[name]) for name in ("full", "follow up"))
    return {
        **rounded({"ttft_full_ms": full_ms, "ttft_follow_up_ms": follow_up_ms, "ratio": full_ms / follow_up_ms}),
        "same_token": len({token for way in runs.values() for _, token in way}) == 1,
        "prefix_mb": prefix.cache.nbytes() / 1e6,
        "setting": setting(args),
    }


def main() -> None:
    args = argument_parser("Time to the first token with and without a kept scene prefix.").parse_args()
    figures = compare(make_case(args), args)
    console = Console()
    console.print(f"first token, scene read anew: {figures['ttft_full_ms']:9.1f} ms")
    console.print(
        f"first token, prefix kept:     {figures['ttft_follow_up_ms']:9.1f} ms, {figures['ratio']:.1f} times faster"
    )
    console.print(
        f"the prefix takes {figures['prefix_mb']:.0f} MB; the same token: {'yes' if figures['same_token'] else 'NO'}"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
