# SPDX-License-Identifier: Apache-2.0
"""What /diagnostics says: five tasks, each a pure function of what is known, with thresholds and `n/a` before data."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from adatoken3d_ros.engine.answer import Answer, Status
from adatoken3d_ros.ros.conversions import ns_to_stamp

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
NOT_YET = "n/a"

# Share of the budgets missed among the answers of the last minute.
MISSED_WARN, MISSED_ERROR = 0.05, 0.5
MISSED_SECONDS = 60.0
# How many times slower or faster a stage runs than when it was measured; plans allow for it.
DRIFT_WARN, DRIFT_ERROR = 2.0, 5.0
# Share of the machine's or the GPU's memory that is still free.
FREE_WARN, FREE_ERROR = 0.10, 0.03
LATENCY_WINDOW = 100
# Answers that say whether a budget could be kept.
_JUDGED = (Status.OK, Status.TRUNCATED, Status.BUDGET_INFEASIBLE)


@dataclass(frozen=True)
class Report:
    """One task: what a person should know, and the numbers behind it."""

    task: str
    level: bytes
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputState:
    """The inputs as they are now; times in seconds.

    Attributes:
        active: whether inputs are subscribed to.
        silent: {input: seconds since its last message, None if there was none}; only the inputs that are needed.
        since_start: since the inputs were started.
        since_pair: since colour and depth last matched, None if they never did.
        apart: difference of the newest colour and depth stamps, None before both have come.
        waiting: why the newest pair waits for its pose; empty if none waits.
        problem: the last frame or message that could not be used, and why; empty if the last one was good.
        values: counters.
    """

    active: bool
    silent: Mapping[str, float | None] = field(default_factory=dict)
    since_start: float = 0.0
    since_pair: float | None = None
    apart: float | None = None
    waiting: str = ""
    problem: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def inputs(state: InputState, stale_after: float) -> Report:
    """Whether frames come in: ERROR for what has been missing for `stale_after` seconds, WARN for half of it."""
    if not state.active:
        return Report("inputs", OK, "not active", state.values)
    worst: tuple[bytes, str] = (OK, "frames arrive")

    def add(level: bytes, message: str) -> None:
        nonlocal worst
        if level > worst[0]:
            worst = level, message

    if state.problem:
        add(ERROR, state.problem)
    for name, silent in state.silent.items():
        seconds = state.since_start if silent is None else silent
        text = f"{name} has been silent for {seconds:.1f} s" if silent is not None else f"nothing on {name} yet"
        add(_by_age(seconds, stale_after), text)
    if all(silent is not None for silent in state.silent.values()):
        unpaired = state.since_start if state.since_pair is None else state.since_pair
        apart = NOT_YET if state.apart is None else f"{state.apart * 1e3:.1f} ms"
        add(
            _by_age(unpaired, stale_after),
            f"no synchronised pair for {unpaired:.1f} s: the newest stamps are {apart} apart",
        )
    if state.waiting:
        add(WARN, state.waiting)
    if worst[0] == OK and any(silent is None for silent in state.silent.values()):
        worst = OK, "waiting for the first frame"
    return Report("inputs", worst[0], worst[1], state.values)


def scene(active: bool, views: int, tokens: int, age: float | None, fates: Mapping[str, int]) -> Report:
    """How much has been seen; WARN while there is nothing to ask about."""
    values = {
        "key_frames": views,
        "spatial_tokens": tokens,
        "data_age_s": NOT_YET if age is None else f"{age:.3f}",
        **{f"frames.{fate}": count for fate, count in sorted(fates.items())},
    }
    if views:
        return Report("scene", OK, f"{views} key frames, {tokens} spatial tokens", values)
    return Report("scene", WARN if active else OK, "nothing has been seen yet", values)


def model(state: str, model_id: str, strategy: str, loading_s: float | None, problem: str, waiting: int) -> Report:
    """Whether the model can answer; ERROR after a load or a question that failed."""
    values = {"state": state, "model_id": model_id or NOT_YET, "strategy": strategy, "questions_waiting": waiting}
    if loading_s is not None:
        return Report("model", WARN, f"loading for {loading_s:.1f} s", values)
    if problem:
        return Report("model", ERROR, problem, values)
    if not model_id:
        return Report("model", OK, f"not loaded ({state})", values)
    return Report("model", OK, "answering" if waiting else "ready", values)


class LatencyWindow:
    """Times of the last answers, and which budgets of the last minute were missed.

    Args:
        size: answers that the percentiles are taken of.
        clock: seconds, monotonic.
    """

    def __init__(self, size: int = LATENCY_WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        self._answers: deque[Answer] = deque(maxlen=size)
        self._budgets: deque[tuple[float, bool]] = deque()
        self._clock = clock
        self.statuses: Counter[str] = Counter()

    def add(self, answer: Answer) -> None:
        """Takes an answer into account; a budget that was refused as infeasible counts as missed."""
        self.statuses[answer.status.name] += 1
        if answer.question.latency_budget_ms and answer.status in _JUDGED:
            kept = answer.budget_met and answer.status != Status.BUDGET_INFEASIBLE
            self._budgets.append((self._clock(), kept))
        if answer.status in (Status.OK, Status.TRUNCATED):
            self._answers.append(answer)

    def report(self, drift: Mapping[str, float] | None = None) -> Report:
        """Percentiles of the question-to-answer time; WARN and ERROR on missed budgets and on drift.

        Args:
            drift: by stage, time that it takes over time that it took when it was measured.
        """
        while self._budgets and self._clock() - self._budgets[0][0] > MISSED_SECONDS:
            self._budgets.popleft()
        budgets = [kept for _, kept in self._budgets]
        missed = 1.0 - sum(budgets) / len(budgets) if budgets else 0.0
        level = ERROR if missed >= MISSED_ERROR else WARN if missed >= MISSED_WARN else OK
        message = f"{missed:.0%} of the latency budgets of the last minute were missed"
        drift = drift or {}
        stage = max(drift, key=lambda name: abs(math.log(drift[name])), default="")
        factor = drift.get(stage, 1.0)
        off = max(factor, 1 / factor)
        drifted = ERROR if off >= DRIFT_ERROR else WARN if off >= DRIFT_WARN else OK
        if drifted > level:
            level, message = drifted, f"{stage} takes {factor:.2g} times as long as when it was measured"
        counts = {f"answers.{name}": count for name, count in sorted(self.statuses.items())}
        if not self._answers:
            empty = {"total_ms.p50": NOT_YET, "total_ms.p95": NOT_YET, "budgets_missed": NOT_YET}
            return Report("latency", level, "no answer yet" if level == OK else message, {**empty, **counts})
        total = np.array([answer.times.total for answer in self._answers])
        p50, p95 = (float(np.percentile(total, q)) for q in (50, 95))
        message = f"median {p50:.0f} ms" if level == OK else message
        last = self._answers[-1].times
        values = {
            "total_ms.p50": f"{p50:.3f}",
            "total_ms.p95": f"{p95:.3f}",
            "budgets_missed": f"{missed:.3f}" if budgets else NOT_YET,
            **{
                f"last.{stage}_ms": f"{getattr(last, stage):.3f}"
                for stage in ("queue", "encode", "tokens", "prefill", "decode", "total")
            },
            **{f"drift.{name}": f"{value:.3f}" for name, value in sorted(drift.items())},
            **counts,
        }
        return Report("latency", level, message, values)


@dataclass(frozen=True)
class Memory:
    """Bytes: of this process, of the machine, and of the GPU (0 where there is none in use)."""

    process: int
    free: int
    total: int
    gpu_free: int = 0
    gpu_total: int = 0


def memory(state: Memory) -> Report:
    """Free memory of the machine and the GPU with WARN and ERROR."""
    shares = {"machine": state.free / max(1, state.total)}
    if state.gpu_total:
        shares["GPU"] = state.gpu_free / state.gpu_total
    where, share = min(shares.items(), key=lambda item: item[1])
    level = ERROR if share < FREE_ERROR else WARN if share < FREE_WARN else OK
    message = f"{state.process / 2**20:.0f} MiB used"
    if level != OK:
        message = f"only {share:.1%} of the {where}'s memory is free"
    values = {
        "process_mib": f"{state.process / 2**20:.1f}",
        "machine_free_mib": f"{state.free / 2**20:.1f}",
        "machine_total_mib": f"{state.total / 2**20:.1f}",
        "gpu_free_mib": f"{state.gpu_free / 2**20:.1f}" if state.gpu_total else NOT_YET,
        "gpu_total_mib": f"{state.gpu_total / 2**20:.1f}" if state.gpu_total else NOT_YET,
    }
    return Report("memory", level, message, values)


def read_memory(on_gpu: bool) -> Memory:
    """The machine's figures from /proc, and the GPU's if a model is on it."""
    process = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    gpu = sys.modules["torch"].cuda.mem_get_info() if on_gpu else (0, 0)
    return Memory(process, kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024, *gpu)


def array(reports: list[Report], node_name: str, hardware_id: str, now_ns: int) -> DiagnosticArray:
    """The message; status names are `node: task` (REP 107)."""
    message = DiagnosticArray()
    ns_to_stamp(message.header.stamp, now_ns)
    message.status = [
        DiagnosticStatus(
            level=report.level,
            name=f"{node_name}: {report.task}",
            message=report.message,
            hardware_id=hardware_id,
            values=[KeyValue(key=key, value=str(value)) for key, value in report.values.items()],
        )
        for report in reports
    ]
    return message


def _by_age(seconds: float, stale_after: float) -> bytes:
    return ERROR if seconds >= stale_after else WARN if seconds >= stale_after / 2 else OK
