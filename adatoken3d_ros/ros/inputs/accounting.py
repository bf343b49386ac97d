# SPDX-License-Identifier: Apache-2.0
"""What has come in, what became of it and what is wrong with it: the books behind /diagnostics and NO_SCENE."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from adatoken3d_ros.ros.inputs.pairing import Assembler
from adatoken3d_ros.ros.outputs.diagnostics import NOT_YET, Arrivals, InputState

AGES = 2000  # frames whose age at acceptance is remembered; a minute at 30 Hz
QUIET = ("duplicate_stamp", "out_of_order", "time_jump")  # dropped for a reason that need not alarm anybody


class InputRecord:
    """Counts messages and frames over all that the inputs go through, and remembers the newest problem.

    Attributes:
        lock: reentrant; held by whoever changes what the executor's and the frames' threads share.
        problem: the last frame or message that could not be used, and why; empty if the last one was good.
        refused: pose messages and transforms that were refused.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.problem = ""
        self.refused: Counter[str] = Counter({"poses.refused": 0, "transforms.refused": 0})
        self._hidden = False  # the problem is one that only a conversion finds
        self._checked = False  # the frame that is being taken has passed its checks
        self._arrivals: dict[str, Arrivals] = {}
        self._counts: Counter[str] = Counter()
        self._before: Counter[str] = Counter()  # what became of messages that came before the inputs' last start
        self._fates: Counter[str] = Counter()
        self._ages: deque[float] = deque(maxlen=AGES)
        self._happened: set[str] = set()  # since the inputs' last start
        self._needed: tuple[str, ...] = ()
        self._started = 0.0
        self._paired_at: float | None = None

    @property
    def fates(self) -> Counter[str]:
        """What became of the frames until now; a copy, because the thread that takes them counts on."""
        with self.lock:
            return self._fates.copy()

    # --- what happens, in this order ----------------------------------------------------------------------------------

    def begin(self, needed: tuple[str, ...]) -> None:
        """The inputs start; `needed` are the topics that must carry something."""
        self._arrivals.clear()
        self._ages.clear()
        self._happened.clear()
        self._needed = needed
        self.problem = ""
        self._paired_at = None
        self._started = time.monotonic()

    def first(self, event: str) -> bool:
        """Whether this is the first event of its kind since the inputs' last start. Any thread."""
        with self.lock:
            known = event in self._happened
            self._happened.add(event)
            return not known

    def received(self, topic: str) -> bool:
        """A message has come; returns whether it is the topic's first since the inputs' last start."""
        self.arrived(topic).add(time.monotonic())
        self._counts[topic] += 1
        return self.first(f"message on {topic}")

    def paired(self) -> None:
        """Colour and geometry have matched."""
        self._paired_at = time.monotonic()

    def accepted(self, age_ms: float) -> None:
        """A frame is handed over, so old by its stamp."""
        self._ages.append(age_ms)

    def dropped(self, reason: str, text: str) -> None:
        """A message or a pair gives no frame."""
        if reason not in QUIET:
            with self.lock:
                self.problem, self._hidden = text, False

    def frame_done(self, kind: str, problem: str) -> None:
        """Counts what became of a frame; `problem` is empty if nothing is wrong with it. Any thread."""
        with self.lock:
            self._fates[kind] += 1
            if kind in ("superseded", "stopped"):
                return
            if problem:
                self.problem, self._hidden = problem, self._checked
            self._checked = False

    def is_well(self, converted: bool) -> None:
        """A frame is good as far as it was looked at; nobody needed to convert it if the camera stands still."""
        with self.lock:
            self._checked = True
            if converted or not self._hidden:
                self.problem = ""

    def ended(self, counters: Mapping[str, int]) -> None:
        """The inputs have stopped; what became of their messages counts on."""
        self._before.update(counters)

    # --- what is known ------------------------------------------------------------------------------------------------

    def arrived(self, topic: str) -> Arrivals:
        """When messages of a topic came."""
        return self._arrivals.setdefault(topic, Arrivals())

    def state(self, assembler: Assembler | None, counts: Mapping[str, int]) -> InputState:
        """What diagnostics should know.

        Args:
            assembler: None while the inputs are stopped.
            counts: further counters.
        """
        values = {**self._values(assembler), **counts}
        if assembler is None:
            return InputState(active=False, values=values)
        now = time.monotonic()
        newest = assembler.pairer.newest
        return InputState(
            active=True,
            silent={name: self.arrived(name).silent(now) for name in self._needed},
            rate={name: self.arrived(name).rate(now) for name in assembler.pairer.streams},
            gap={name: self.arrived(name).gap(now) for name in assembler.pairer.streams},
            since_start=now - self._started,
            since_pair=None if self._paired_at is None else now - self._paired_at,
            apart=(max(newest.values()) - min(newest.values())) / 1e9 if all(newest.values()) else None,
            waiting=assembler.why_waiting(),
            problem=self.problem,
            values=values,
        )

    def _values(self, assembler: Assembler | None) -> dict[str, Any]:
        values: dict[str, Any] = {f"received.{name}": count for name, count in sorted(self._counts.items())}
        counters = self._before.copy()
        if assembler is not None:
            counters.update(assembler.counters())
            for name in assembler.pairer.streams:
                values[f"pending.{name}"] = assembler.pairer.pending(name)
            values["pairs.waiting"] = assembler.waiting
        values.update(sorted(counters.items()))
        for percent in (50, 95):
            age = f"{np.percentile(self._ages, percent):.2f}" if self._ages else NOT_YET
            values[f"accepted.age_ms.p{percent}"] = age
        values.update(self.refused)
        return values
