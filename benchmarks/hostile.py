# SPDX-License-Identifier: Apache-2.0
"""Does anything that comes from outside end, freeze or blind the node, or get out as an error that nobody announced?

Valid inputs are spoilt at random: messages, questions, files (in a process under a watchdog, through the same functions
as in the node), and questions in bursts, parameters, transitions, storms of frames, files behind the services and
signals on the real node, over DDS, in a process of its own. After each try the next good input has to work.

    tries         of each kind, and what became of them: accepted, or refused with which documented error
    undocumented  an error that the attacked function does not document, or one without words
    hangs         nothing within ten seconds (of the node: within --patience)
    crashes       the process ended by itself, with a traceback, or took gigabytes
    losses        a request without an answer, a frame without a fate, or a good input that did not work afterwards

The goal is 0 of the last four. Each failure is kept with its kind and seed, and is repeated by
`python -m benchmarks.hostile --only KIND --seed N --tries 1`.

    python -m benchmarks.hostile --minutes 10 --json F
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._hostile import FAILED, Outcome, Tally, tries
from benchmarks._hostile_kinds import ATTACKS
from benchmarks._ros import argument_parser, setting, write
from benchmarks._ros_hostile import LIVE

APART = 10_000_000  # seeds between two kinds' first ones, so that --seed 1 begins where --seed 0 never comes
LIVE_SHARE = 0.5  # of the time, for the real node


def outcomes(kind: str, args: argparse.Namespace, first: int, count: int, seconds: float) -> Iterator[Outcome]:
    if kind in ATTACKS:
        return tries(kind, first, count, seconds)
    return LIVE[kind](first, count, seconds, args)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each kind has its share of the time, one after the other."""
    kinds = args.only or [*ATTACKS, *LIVE]
    tallies = {kind: Tally() for kind in kinds}
    first = {kind: args.seed if args.only else args.seed * APART for kind in kinds}
    live = [kind for kind in kinds if kind in LIVE]
    shares = {True: LIVE_SHARE, False: 1 - LIVE_SHARE} if 0 < len(live) < len(kinds) else {True: 1.0, False: 1.0}
    for kind in kinds:
        among = len(live) if kind in LIVE else len(kinds) - len(live)
        seconds, began = 60 * args.minutes * shares[kind in LIVE] / among, time.monotonic()
        for outcome in outcomes(kind, args, first[kind], args.tries, seconds):
            tallies[kind].add(kind, outcome)
            if outcome.what in FAILED:
                print(f"{kind} {outcome.seed}: {outcome.what} {outcome.error}", file=sys.stderr, flush=True)
        tallies[kind].seconds = time.monotonic() - began
        found = figures(tallies)
        write(args.json, found | {"setting": setting(args)})  # a run that is broken off has not been for nothing
    return found


def figures(tallies: dict[str, Tally]) -> dict[str, Any]:
    sums = {name: sum(tally.failed[name] for tally in tallies.values()) for name in FAILED.values()}
    return {
        "tries": sum(tally.tries for tally in tallies.values()),
        **sums,
        "kinds": {kind: tally.figures() for kind, tally in tallies.items()},
        "failures": [failure for tally in tallies.values() for failure in tally.failures],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Hostile messages, questions, files, parameters, transitions and signals, for a while.")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, without the starts of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run; with --only, of the first try")
    parser.add_argument("--only", action="append", choices=[*ATTACKS, *LIVE], metavar="KIND", help="this kind alone")
    parser.add_argument("--tries", type=int, default=10**6, help="of each kind at most")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds until an answer of the node is lost")
    args = parser.parse_args(arguments)
    if not args.minutes > 0 or not args.patience > 0 or args.tries < 1 or args.seed < 0:
        parser.error("--minutes, --patience and --tries must be positive, --seed not negative")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    found = measure(args)
    table = Table("kind", "tries", "accepted", "refused", *FAILED.values(), "slowest, s")
    for kind, counts in found["kinds"].items():
        refused = ", ".join(f"{name} {n}" for name, n in counts["refused"].items())
        numbers = [counts[name] for name in ("tries", "accepted")], [counts[name] for name in FAILED.values()]
        table.add_row(kind, *map(str, numbers[0]), refused, *map(str, numbers[1]), str(counts["slowest_s"]))
    console = Console()
    console.print(table)
    for failure in found["failures"][:20]:
        console.print(f"{failure['kind']} {failure['seed']}: {failure['what']}: {failure['text']}", markup=False)
    return int(any(found[name] for name in FAILED.values()))


if __name__ == "__main__":
    sys.exit(main())
