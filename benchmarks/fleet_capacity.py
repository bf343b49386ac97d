# SPDX-License-Identifier: Apache-2.0
"""How many robots does one GPU carry, at which latency budgets? Computed, by a simulation; nothing is measured here.

How long a question takes is said by the engine's own latency model (`engine.budget.latency`) with coefficients from
the peaks that a maker publishes, times the share of them that good programs reach (`benchmarks.machines`): a prefill
multiplies and reads the layers once, a step reads all weights, and keys and values. Questions of each robot come at
random (Poisson); one is answered at a time, the one whose deadline is nearest first; one that cannot be kept any more
when its turn comes is refused. A number of robots is carried if at most one question in fifty is refused or late.

Where a robot has not moved, its scene's prefix is there and a question is read over it; else the scene is read through
the gates of `ours`, or, for comparison, unpruned. Robots encode their key frames themselves.

    python -m benchmarks.fleet_capacity --json F [--picture PNG] [--model llava-3d-7b] [--every 20] [--moved 0.5]
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.engine.budget.latency import LatencyModel, decode_terms, follow_up_terms, read_terms
from adatoken3d_ros.pruning.flops import layer_flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from benchmarks.machines import MULTIPLYING, READING, TEXT, VIEWS, Machine, outline_of
from benchmarks.real_size import MODELS

FloatArray = NDArray[np.float64]
MACHINES = (
    Machine("AGX Thor 128 GB", 128, 273, 258),
    Machine("RTX 4090 24 GB", 24, 1008, 165, shared=False),
    Machine("L40S 48 GB", 48, 864, 362, shared=False),
    Machine("A100 80 GB", 80, 2039, 312, shared=False),
    Machine("H100 SXM 80 GB", 80, 3350, 989, shared=False),
    Machine("H200 141 GB", 141, 4800, 989, shared=False),
)
BUDGETS = (0.25, 0.5, 1.0, 2.0)  # seconds
LATE = 0.02  # share of questions
NETWORK = 0.02  # seconds of a budget that the way there and back takes
TOKENS = (1, 16)  # of an answer, all alike
QUESTIONS = 20_000


class Queue(NamedTuple):
    """What became of each question: seconds from its arrival to the end of its answer, infinite if it was refused."""

    took: FloatArray
    busy: float  # share of the time


def computed_model(machine: Machine, decoder: Decoder) -> LatencyModel:
    """The latency model of a machine as its published peaks, weights and keys in bfloat16."""
    size = decoder.size
    operations, read = MULTIPLYING * machine.tera * 1e12, READING * machine.bandwidth * 1e9
    # layer_flops(n) is n a + n^2 b.
    one, two = layer_flops(size, 1), layer_flops(size, 2)
    b = (two - 2 * one) / 2
    weights = 2 * sum(part.weight.numel() for part in decoder.linears())
    head = 2 * size.hidden * size.vocabulary
    key = 2 * 2 * size.keys  # bytes of a row's key and value in a layer
    return LatencyModel(
        {
            "encode": [0.0],
            "tokens": [0.0, 0.0, 0.0],
            "prefill": [weights / size.n_layers / read, (one - b) / operations, b / operations, 0.0, 0.0],
            "decode": [(weights + head) / read, key / read],
        }
    )


def service(
    model: LatencyModel, decoder: Decoder, n_spatial: int, schedule: Schedule | None, rng: np.random.Generator,
    count: int, moved: float,
) -> FloatArray:  # fmt: skip
    """(count,) seconds on the GPU of questions; schedule: gates of those that read the scene, None: all is read."""
    layers = decoder.size.n_layers
    counts = np.full(layers, n_spatial) if schedule is None else _counts(schedule, n_spatial, layers)
    fresh = model.p50("prefill", read_terms(counts, n_spatial, TEXT))
    again = model.p50("follow_up", follow_up_terms(TEXT, n_spatial, layers))
    steps = rng.integers(TOKENS[0], TOKENS[1], count, endpoint=True)
    reads = rng.random(count) < moved
    cached = np.where(reads, counts.sum() + layers * TEXT, layers * (n_spatial + TEXT))
    return np.where(reads, fresh, again) + model.p50("decode", decode_terms(steps, cached, layers))


def _counts(schedule: Schedule, n_spatial: int, layers: int) -> FloatArray:
    return np.array(schedule.counts(n_spatial, layers, make_policy("ours").kept), dtype=np.float64)


def queue(arrivals: FloatArray, services: FloatArray, budgets: FloatArray) -> Queue:
    """One server, the earliest deadline first, nothing interrupted; what can no longer be kept is refused at its turn.

    Args:
        arrivals: (n,) seconds, rising. services: (n,) seconds. budgets: (n,) seconds, infinite: no deadline.
    """
    took = np.full(len(arrivals), np.inf)
    waiting: list[tuple[float, int]] = []
    now = busy = 0.0
    coming = 0
    while coming < len(arrivals) or waiting:
        if not waiting:
            now = max(now, float(arrivals[coming]))
        while coming < len(arrivals) and arrivals[coming] <= now:
            heapq.heappush(waiting, (float(arrivals[coming] + budgets[coming]), coming))
            coming += 1
        deadline, index = heapq.heappop(waiting)
        end = now + float(services[index])
        if end > deadline:
            continue
        took[index], busy, now = end - arrivals[index], busy + float(services[index]), end
    return Queue(took, busy / now if now else 0.0)


def carried(make: Any, every: float, budget: float, rng: np.random.Generator) -> tuple[int, float]:
    """The most robots, each asking once in `every` seconds, with at most LATE of their questions late; the load then.

    make: (rng, count) -> seconds of service.
    """

    def run(robots: int) -> tuple[float, float]:
        own = np.random.default_rng(rng.bit_generator.seed_seq.spawn(1)[0])  # type: ignore[attr-defined]
        arrivals = np.cumsum(own.exponential(every / robots, QUESTIONS))
        found = queue(arrivals, make(own, QUESTIONS), np.full(QUESTIONS, budget - NETWORK))
        return float(np.isinf(found.took).mean()), found.busy

    low, high = 0, 1
    loads = {0: 0.0}
    while True:
        late, loads[high] = run(high)
        if late > LATE:
            break
        low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        late, loads[middle] = run(middle)
        low, high = (middle, high) if late <= LATE else (low, middle)
    return low, loads[low]


def figures(name: str, every: float, moved: float, machines: Sequence[Machine] = MACHINES) -> dict[str, Any]:
    """Of each machine and budget the robots that it carries, with the gates of `ours` and unpruned."""
    lmm = outline_of(MODELS[name][1])
    decoder, sizes = lmm.decoder, lmm.sizes
    n_spatial = min(sizes.max_spatial_tokens, VIEWS * sizes.max_spatial_tokens // sizes.num_views)
    ours = make_policy("ours").default_schedule(decoder.size.n_layers)
    found: dict[str, Any] = {}
    for machine in machines:
        model = computed_model(machine, decoder)
        rows: dict[str, Any] = {}
        for way, schedule in (("ours", ours), ("unpruned", None)):

            def make(rng: np.random.Generator, count: int, model: Any = model, schedule: Any = schedule) -> FloatArray:
                return service(model, decoder, n_spatial, schedule, rng, count, moved)

            rng = np.random.default_rng(0)
            robots = [carried(make, every, budget, rng) for budget in BUDGETS]
            mean = float(make(np.random.default_rng(0), 2000).mean())
            rows[way] = {
                "service_ms": round(1e3 * mean, 1),
                "robots": {f"{budget:g}": count for budget, (count, _) in zip(BUDGETS, robots, strict=True)},
                "load": {f"{budget:g}": round(load, 3) for budget, (_, load) in zip(BUDGETS, robots, strict=True)},
            }
        found[machine.name] = rows
    return {
        "computed": True, "model": name, "spatial_tokens": n_spatial, "every_s": every, "moved": moved,
        "answer_tokens": list(TOKENS), "late": LATE, "network_s": NETWORK, "machines": found,
    }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Robots over budgets, a colour a machine; dashed: unpruned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, rows) in enumerate(result["machines"].items()):
        for way, style in (("ours", "-o"), ("unpruned", "--")):
            robots = rows[way]["robots"]
            axes.plot(
                [float(budget) for budget in robots], [count or np.nan for count in robots.values()], style,
                color=f"C{number}", label=name if way == "ours" else None, markersize=4, linewidth=1.4,
            )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="latency budget, s", ylabel="robots that one GPU carries",
        title=f"{result['model']}, a question every {result['every_s']:g} s a robot: computed from published peaks",
    )  # fmt: skip
    budgets = [float(budget) for budget in next(iter(result["machines"].values()))["ours"]["robots"]]
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.plot([], [], "--", color="grey", label="unpruned")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| GPU | a question, ms | " + " | ".join(f"{budget:g} s" for budget in BUDGETS) + " |"]
    lines.append("|---" * (2 + len(BUDGETS)) + "|")
    for name, rows in result["machines"].items():
        ours, whole = rows["ours"], rows["unpruned"]
        cells = [f"{ours['robots'][key]} ({whole['robots'][key]})" for key in ours["robots"]]
        lines.append(f"| {name} | {ours['service_ms']:.0f} ({whole['service_ms']:.0f}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet_capacity", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="file to write the figures to")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    parser.add_argument("--model", choices=MODELS, default="llava-3d-7b", help="whose sizes (%(default)s)")
    parser.add_argument("--every", type=float, default=20.0, metavar="S", help="seconds between questions of a robot")
    parser.add_argument("--moved", type=float, default=0.5, metavar="P", help="share of them about a changed scene")
    args = parser.parse_args()
    if not args.every > 0 or not 0 <= args.moved <= 1:
        parser.error(f"--every {args.every:g} must be positive, --moved {args.moved:g} from 0 to 1")
    result = figures(args.model, args.every, args.moved)
    print(table(result))
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.picture is not None:
        draw(result, args.picture)


if __name__ == "__main__":
    main()
