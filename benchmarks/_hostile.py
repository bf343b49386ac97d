# SPDX-License-Identifier: Apache-2.0
"""What the attacks share: what an attack is, how one try is judged, and a process that makes tries under a watchdog.

A try is drawn from its seed alone and can be repeated: `python -m benchmarks.hostile --only KIND --seed N --tries 1`.
It is accepted, refused with an error that the attacked function documents, or one of

    undocumented    another error came out, or a refusal whose text is empty, or what was accepted breaks a promise
    hang            it took longer than PATIENCE seconds
    crash           the process ended by itself, or took more than MEMORY bytes
    loss            the next good input did not work, or a question went without an answer
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 10.0  # seconds for one message, file or question; all of them take milliseconds
START = 120.0  # seconds until the first try of a process: it imports torch and makes its inputs
MEMORY = 2 * 10**9  # bytes that a process may take; torch and the tiny model are half of them
LOOK = 0.05  # seconds between two looks at its memory
KEPT = 50  # failures that are kept in words
CUT = 2000  # characters of a failure that are kept

CHILD = "import sys; from benchmarks._hostile import child; child(sys.argv[1], *map(int, sys.argv[2:]))"

ACCEPTED, REFUSED, UNDOCUMENTED, HANG, CRASH, LOSS = "accepted", "refused", "undocumented", "hang", "crash", "loss"
FAILED = {UNDOCUMENTED: "undocumented", HANG: "hangs", CRASH: "crashes", LOSS: "losses"}  # and what they are counted as


class Loss(AssertionError):
    """The next good input did not work, or a request was not answered."""


@dataclass(frozen=True)
class Attack:
    """A kind of hostile input.

    Attributes:
        target: the function or class that is attacked.
        documented: the errors that its docstring names.
        prepare: given an empty folder, makes what the tries share, and returns what makes one of a seed: it returns if
            the input was accepted, and raises what comes out.
    """

    target: Callable[..., Any]
    documented: tuple[type[BaseException], ...]
    prepare: Callable[[Path], Callable[[random.Random], object]]


@dataclass
class Outcome:
    """What became of one try."""

    seed: int
    what: str
    error: str = ""  # name of its class
    text: str = ""
    seconds: float = 0.0


def judge(attack: Attack, attempt: Callable[[random.Random], object], seed: int) -> Outcome:
    """Makes one try; nothing is raised."""
    began = time.monotonic()
    try:
        attempt(random.Random(seed))
        found = Outcome(seed, ACCEPTED)
    except Loss as error:
        found = Outcome(seed, LOSS, "Loss", str(error))
    except attack.documented as error:
        found = Outcome(seed, REFUSED if str(error).strip() else UNDOCUMENTED, type(error).__name__, str(error))
    except (Exception, SystemExit, RecursionError) as error:
        found = Outcome(seed, UNDOCUMENTED, type(error).__name__, traceback.format_exc())
    found.seconds = time.monotonic() - began
    found.text = found.text if len(found.text) <= CUT else f"{found.text[: CUT // 2]} ... {found.text[-CUT // 2 :]}"
    return found


@dataclass
class Tally:
    """What became of the tries of one kind."""

    tries: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    seconds: float = 0.0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, outcome: Outcome) -> None:
        self.tries += 1
        self.slowest_s = max(self.slowest_s, outcome.seconds)
        if outcome.what == ACCEPTED:
            self.accepted += 1
        elif outcome.what == REFUSED:
            self.refused[outcome.error] += 1
        else:
            self.failed[FAILED[outcome.what]] += 1
            if len(self.failures) < KEPT:
                self.failures.append({"kind": kind, **asdict(outcome)})

    def figures(self) -> dict[str, Any]:
        return {
            "tries": self.tries,
            "accepted": self.accepted,
            "refused": dict(sorted(self.refused.items())),
            **{name: self.failed[name] for name in FAILED.values()},
            "slowest_s": round(self.slowest_s, 2),
            "seconds": round(self.seconds, 1),
        }


# --- the process that makes tries ------------------------------------------------------------------------------------


def child(kind: str, first: int, count: int) -> None:
    """Makes `count` tries, and writes a line before the first and after each, to the standard output alone."""
    from benchmarks._hostile_kinds import ATTACKS

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not count
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    with TemporaryDirectory(prefix="adatoken3d-hostile-") as folder:
        attack = ATTACKS[kind]
        attempt = attack.prepare(Path(folder))
        print("ready", file=lines, flush=True)
        for seed in range(first, first + count):
            print(json.dumps(asdict(judge(attack, attempt, seed))), file=lines, flush=True)
    lines.flush()
    os._exit(0)


def tries(kind: str, first: int, count: int, seconds: float) -> Iterator[Outcome]:
    """Tries from the seed `first` on, for so long, in a process that is begun anew where one of them ended it."""
    seed, left = first, [seconds]
    while seed < first + count and left[0] > 0:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, kind, str(seed), str(first + count - seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        try:
            for outcome in _watch(process, seed, left):
                yield outcome
                seed = outcome.seed + 1
        finally:
            process.kill()
            process.wait()


def _watch(process: subprocess.Popen[bytes], seed: int, left: list[float]) -> Iterator[Outcome]:
    """Outcomes as they come, the last one that of the watchdog where there was cause; what is left of the time."""
    assert process.stdout is not None and process.stderr is not None
    out, words, buffer = process.stdout.fileno(), bytearray(), bytearray()
    os.set_blocking(process.stderr.fileno(), False)
    ready, last, patience, until = False, time.monotonic(), START, float("inf")
    while True:
        if select.select([out], [], [], LOOK)[0]:
            piece = os.read(out, 1 << 16)
            if not piece:
                break
            buffer += piece
        words += process.stderr.read() or b""
        del words[:-CUT]
        *complete, rest = bytes(buffer).split(b"\n")
        buffer = bytearray(rest)
        for line in complete:
            last = time.monotonic()
            if not ready:
                ready, patience, until = True, PATIENCE, last + left[0]
                continue
            outcome = Outcome(**json.loads(line))
            yield outcome
            seed = outcome.seed + 1
        now = time.monotonic()
        left[0] = min(left[0], until - now)
        if complete and now >= until:  # not in the middle of a try: it may be the one that hangs
            return
        if now - last > patience:
            process.send_signal(signal.SIGUSR1)  # says where it is
            time.sleep(0.5)
            words += process.stderr.read() or b""
            text = f"nothing for {now - last:.0f} s; {words.decode(errors='replace')}"
            yield Outcome(seed, HANG, "hang", text, now - last)
            return
        taken = _memory(process.pid)
        if taken > MEMORY:
            yield Outcome(seed, CRASH, "memory", f"{taken / 1e9:.1f} GB", now - last)
            return
    status = process.wait()
    if status != 0:
        words += process.stderr.read() or b""
        text = f"status {status}; {words.decode(errors='replace')}"
        yield Outcome(seed, CRASH, "crash", text, time.monotonic() - last)


def _memory(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
