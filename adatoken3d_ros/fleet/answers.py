# SPDX-License-Identifier: Apache-2.0
"""Answers on their way back to a robot: events as lines of JSON, the last with safetensors behind it.

Every field of an `Answer` travels but those of `ROBOTS_OWN`, which rest on what the robot alone knows of its scene.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from safetensors.numpy import save

from adatoken3d_ros.engine.answer import Answer, Box, Question, Status, TokenReport
from adatoken3d_ros.engine.budget.plans import Plan
from adatoken3d_ros.engine.knowing import Recalled
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.fleet.wire import WireError, read_arrays, read_json
from adatoken3d_ros.pruning.strategy import parse
from adatoken3d_ros.text import shown

ROBOTS_OWN = ("question", "verdict", "verdict_reason", "evidence", "coverage", "goal", "goal_reason")


def line(event: str, **said: Any) -> bytes:
    """One event of a stream: `wait` (still here), `stage`, `text` or `done`."""
    return json.dumps({"event": event, **said}, separators=(",", ":"), default=np.generic.item).encode() + b"\n"


_PLAIN = (
    "text",
    "status_message",
    "budget_met",
    "spatial_tokens",
    "retained_tokens",
    "prefill_flops",
    "prefill_flops_unpruned",
    "strategy",
    "model_id",
    "seed",
    "plan",
    "confidence",
    "stamp_ns",
    "as_of_ns",
    "confirmed_ns",
    "probability",
)
_REPORT = {
    "xyz": (np.float32, 3),
    "rgb": (np.uint8, 3),
    "contribution": (np.float32, 0),
    "last_layer": (np.int64, 0),
    "retained": (np.bool_, 0),
}
_RECALLED = {"again_xyz": (np.float32, 3), "again_contribution": (np.float32, 0), "again_owner": (np.int64, 0)}


def done(answer: Answer, recalled: Recalled | None) -> bytes:
    """The last event, with what follows it."""
    said: dict[str, Any] = {name: getattr(answer, name) for name in _PLAIN}
    said["status"] = int(answer.status)
    said["boxes"] = [[*box.centre, *box.size] for box in answer.boxes]
    said["times"] = asdict(answer.times)
    said["predicted"] = None if answer.predicted is None else asdict(answer.predicted)
    said["decision"] = None if answer.decision is None else _plan(answer.decision)
    said["candidates"] = list(answer.candidate_probabilities)
    arrays: dict[str, Any] = {}
    if (report := answer.report) is not None:
        arrays |= {name: np.ascontiguousarray(getattr(report, name), kind) for name, (kind, _) in _REPORT.items()}
        said["layers"] = [list(report.spatial_per_layer), list(report.flops_per_layer), report.lorenz_share_60]
    if recalled is not None:
        arrays |= {name: np.ascontiguousarray(getattr(recalled, name[6:]), kind)
                   for name, (kind, _) in _RECALLED.items()}  # fmt: skip
    tail = bytes(save(arrays)) if arrays else b""
    return line("done", answer=said, bytes=len(tail)) + tail


def read_done(event: Mapping[str, Any], tail: bytes, question: Question) -> tuple[Answer, Recalled | None]:
    """The answer to a robot's question, and what it draws on as if nothing had gone. Raises WireError."""
    try:
        said = event["answer"]
        report = recalled = None
        layers = said.get("layers")
        if tail:
            again = "again_xyz" in _header_names(tail)
            arrays = read_arrays(tail, {**(_REPORT if layers is not None else {}), **(_RECALLED if again else {})})
            if layers is not None:
                spatial, flops, lorenz = layers
                per_layer: dict[str, Any] = {
                    "spatial_per_layer": tuple(map(int, spatial)),
                    "flops_per_layer": tuple(map(float, flops)),
                    "lorenz_share_60": float(lorenz),
                }
                report = TokenReport(**{name: arrays[name] for name in _REPORT}, **per_layer)
            recalled = Recalled(*(arrays[name] for name in _RECALLED)) if again else None
        answer = Answer(question, Status(said["status"]), report=report, **{name: said[name] for name in _PLAIN})
        boxes = tuple(Box((b[0], b[1], b[2]), (b[3], b[4], b[5])) for b in said["boxes"])
        answer = replace(
            answer,
            boxes=boxes,
            times=StageTimes(**said["times"]),
            predicted=_times(said["predicted"]),
            decision=None if said["decision"] is None else _read_plan(said["decision"]),
            candidate_probabilities=tuple(map(float, said["candidates"])),
        )
        return answer, recalled
    except (LookupError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise WireError(f"no answer: {shown(error, 200)}") from error


_parsed = lru_cache(maxsize=64)(parse)  # a robot meets the same few strategies again and again


def _plan(plan: Plan) -> dict[str, Any]:
    said = {one.name: getattr(plan, one.name) for one in fields(plan)}
    return {
        **said,
        "strategy": plan.strategy.text(),
        "predicted": None if plan.predicted is None else asdict(plan.predicted),
    }


def _read_plan(said: Mapping[str, Any]) -> Plan:
    return Plan(**{**said, "strategy": _parsed(said["strategy"]), "predicted": _times(said["predicted"])})


def _times(said: Mapping[str, Any] | None) -> StageTimes | None:
    return None if said is None else StageTimes(**said)


def _header_names(tail: bytes) -> set[str]:
    (length,) = struct.unpack_from("<Q", tail)
    if length > len(tail):
        raise WireError("arrays that end within their header")
    return set(read_json(tail[8 : 8 + length]))
