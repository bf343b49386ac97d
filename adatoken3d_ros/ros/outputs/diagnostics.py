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
from adatoken3d_ros.engine.stages import STAGES
from adatoken3d_ros.ros.engine_owner import Loading
from adatoken3d_ros.ros.inputs.accounting import NOT_YET, InputState
from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from adatoken3d_ros.text import shown

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

# Share of the budgets missed among the answers of the last minute.
MISSED_WARN, MISSED_ERROR = 0.05, 0.5
MISSED_SECONDS = 60.0
# How many times slower or faster a stage runs than when it was measured; plans allow for it.
DRIFT_WARN, DRIFT_ERROR = 2.0, 5.0
# Share of the machine's or the GPU's memory that is still free.
FREE_WARN, FREE_ERROR = 0.10, 0.03
LATENCY_WINDOW = 100
PERCENTILES = (50, 95, 99)
KEY, VALUE = 200, 500  # characters of what stands below a status
# So many frames without a key frame among them are no accident.
HOPELESS_FRAMES = 10
# Answers that say whether a budget could be kept.
_JUDGED = (*(status for status in Status if status.answered), Status.BUDGET_INFEASIBLE)


@dataclass(frozen=True)
class Report:
    """One task: what a person should know, and the numbers behind it."""

    task: str
    level: bytes
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)


def inputs(state: InputState, stale_after: float, min_rate: float = 0.0) -> Report:
    """Whether frames come in, and why not: all that is wrong at the worst level.

    Args:
        state: what is known.
        stale_after: ERROR for what has been missing for so many seconds, WARN for half of it.
        min_rate: WARN below so many messages a second, ERROR below half of it; 0: rates are only told.
    """
    values = {
        **{f"topic.{topic}": name for topic, name in state.names.items()},
        **{f"rate_hz.{name}": _figure(rate, 2) for name, rate in state.rate.items()},
        **{f"gap_s.{name}": _figure(gap, 3) for name, gap in state.gap.items()},
        "stamps_apart_ms": _figure(None if state.apart is None else state.apart * 1e3, 1),
        **state.values,
    }
    if not state.active:
        return Report("inputs", OK, "not active", values)
    found: list[tuple[bytes, str]] = []
    found += [(ERROR, text) for text in state.mismatches]
    if state.problem:
        found.append((ERROR, state.problem))
    for topic, silent in state.silent.items():
        seconds, name = state.since_start if silent is None else silent, state.name(topic)
        text = f"{name} has been silent for {seconds:.1f} s" if silent is not None else f"nothing on {name} yet"
        found.append((_by_age(seconds, stale_after), text))
    for topic, rate in state.rate.items():
        if rate is not None and rate < min_rate:
            level = ERROR if rate < min_rate / 2 else WARN
            found.append((level, f"{state.name(topic)} comes {rate:.2f} times a second, less than {min_rate:g}"))
    if all(silent is not None for silent in state.silent.values()):
        unpaired = state.since_start if state.since_pair is None else state.since_pair
        text = f"the newest stamps are {values['stamps_apart_ms']} ms apart"
        found.append((_by_age(unpaired, stale_after), f"no synchronised pair for {unpaired:.1f} s: {text}"))
    if state.waiting:
        found.append((WARN, state.waiting))
    found += [(WARN, text) for text in state.warnings]
    worst = max((level for level, _ in found), default=OK)
    if worst != OK:
        return Report("inputs", worst, "; ".join(text for level, text in found if level == worst), values)
    waits = any(silent is None for silent in state.silent.values())
    return Report("inputs", OK, "waiting for the first frame" if waits else "frames arrive", values)


def scene(
    active: bool,
    views: int,
    tokens: int,
    age: float | None,
    fates: Mapping[str, int],
    given_up: int = 0,
    contradiction: str = "",
    confirmed_age: float | None = None,
    held: tuple[float, float] = (0.0, 0.0),
    gone: int = 0,
) -> Report:
    """How much has been seen; WARN while there is nothing to ask about, ERROR if frames come and none can be used.

    Args:
        age: of the newest key frame, seconds.
        given_up: views that could not be encoded, also those that had waited as key frames.
        contradiction: why what has been seen cannot be believed; ERROR, too.
        confirmed_age: of the newest frame that agreed with the scene, or is in it, seconds.
        held: bytes that it holds in memory, and that it may hold, 0 for any number.
        gone: things that are remembered after they have gone.
    """
    values = {
        "key_frames": views,
        "spatial_tokens": tokens,
        "data_age_s": _figure(age, 3),
        "confirmed_age_s": _figure(confirmed_age, 3),
        "views_given_up": given_up,
        "things_gone": gone,
        "scene_mb": _figure(held[0] / 1e6, 1),
        "memory_limit_mb": _figure(held[1] / 1e6, 1) if held[1] else "none",
        **{f"frames.{fate}": count for fate, count in sorted(fates.items())},
    }
    if contradiction:
        return Report("scene", ERROR, contradiction, values)
    if views:
        return Report("scene", OK, f"{views} key frames, {tokens} spatial tokens", values)
    judged = {fate: count for fate, count in fates.items() if fate not in ("superseded", "time_jump") and count}
    if active and sum(judged.values()) >= HOPELESS_FRAMES:
        counts = ", ".join(f"{count} {fate}" for fate, count in sorted(judged.items()))
        return Report("scene", ERROR, f"frames come, but none has become a view: {counts}", values)
    return Report("scene", WARN if active else OK, "nothing has been seen yet", values)


def model(
    state: str,
    model_id: str,
    strategy: str,
    loading: Loading | None,
    problem: str,
    waiting: int,
    namesakes: int = 0,
    failures: int = 0,
    last_failure: str = "",
) -> Report:
    """Whether the model can answer: WARN while it loads, ERROR after a load or a question that failed.

    Args:
        state: of the lifecycle. model_id: empty without a model. strategy: its name.
        loading: None when nothing is being loaded.
        problem: why the last load or the last question failed; empty if it did not.
        waiting: questions that wait or run.
        namesakes: other nodes of the same name, which answer in this one's place: WARN.
        failures: exceptions that came out of callbacks. last_failure: the last of them.
    """
    values = {
        "state": state,
        "model_id": model_id or NOT_YET,
        "strategy": strategy,
        "questions_waiting": waiting,
        "load_progress": NOT_YET if not loading and not model_id else f"{loading.share if loading else 1.0:.2f}",
        "namesakes": namesakes,
        "callback_failures": failures,
        "last_callback_failure": last_failure or NOT_YET,
    }
    if loading is not None:
        step = f": {loading.share:.0%}, {loading.step}" if loading.step else ""
        return Report("model", WARN, f"loading for {loading.seconds:.1f} s{step}", values)
    if problem:
        return Report("model", ERROR, problem, values)
    if namesakes:
        text = f"{namesakes + 1} nodes have this node's name, and each may answer (one that was killed is seen a while)"
        return Report("model", WARN, text, values)
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
        self.clock = clock
        self.statuses: Counter[str] = Counter()

    def add(self, answer: Answer) -> None:
        """Takes an answer into account; a budget that was refused as infeasible counts as missed."""
        self.statuses[answer.status.name] += 1
        if answer.question.latency_budget_ms and answer.status in _JUDGED:
            kept = answer.budget_met and answer.status != Status.BUDGET_INFEASIBLE
            self._budgets.append((self.clock(), kept))
        if answer.status.answered:
            self._answers.append(answer)

    def report(
        self, drift: Mapping[str, float] | None = None, taken: Mapping[str, int] | None = None, waiting: int = 0
    ) -> Report:
        """Percentiles of the question-to-answer time; WARN and ERROR on missed budgets and on drift.

        Args:
            taken: by way, questions that came. waiting: answers that wait until those before them are heard.
            drift: by stage, time that it takes over time that it took when it was measured.
        """
        while self._budgets and self.clock() - self._budgets[0][0] > MISSED_SECONDS:
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
        rest = {
            "budgets_missed": f"{missed:.3f}" if budgets else NOT_YET,
            **{f"drift.{name}": f"{value:.3f}" for name, value in sorted(drift.items())},
            **{f"questions.{way}": count for way, count in (taken or {}).items()},
            **{f"answers.{name}": count for name, count in sorted(self.statuses.items())},
            "answers.to_be_sent": waiting,
        }
        if not self._answers:
            empty = {f"total_ms.p{q}": NOT_YET for q in PERCENTILES}
            return Report("latency", level, "no answer yet" if level == OK else message, {**empty, **rest})
        times = {
            stage: np.array([getattr(answer.times, stage) for answer in self._answers]) for stage in (*STAGES, "total")
        }
        message = f"median {np.median(times['total']):.0f} ms" if level == OK else message
        values = {
            **{f"total_ms.p{q}": f"{np.percentile(times['total'], q):.3f}" for q in PERCENTILES},
            **{f"{stage}_ms.p95": f"{np.percentile(times[stage], 95):.3f}" for stage in STAGES},
            **{f"last.{stage}_ms": f"{taken[-1]:.3f}" for stage, taken in times.items()},
            **rest,
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
    """The message; status names are `node: task` (REP 107). Whatever is told is one line of bounded length."""
    message = DiagnosticArray()
    ns_to_stamp(message.header.stamp, now_ns)
    message.status = [
        DiagnosticStatus(
            level=report.level,
            name=f"{node_name}: {report.task}",
            message=shown(report.message),
            hardware_id=shown(hardware_id, KEY),
            values=[KeyValue(key=shown(key, KEY), value=shown(value, VALUE)) for key, value in report.values.items()],
        )
        for report in reports
    ]
    return message


def _figure(value: float | None, digits: int) -> str:
    return NOT_YET if value is None else f"{value:.{digits}f}"


def _by_age(seconds: float, stale_after: float) -> bytes:
    return ERROR if seconds >= stale_after else WARN if seconds >= stale_after / 2 else OK
