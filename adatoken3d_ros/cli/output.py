# SPDX-License-Identifier: Apache-2.0
"""How the commands show an answer: one record for the message and for the engine's own type, a table, JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adatoken3d_ros.engine.answer import Answer, Status, status_name
from adatoken3d_ros.engine.stages import STAGES
from adatoken3d_ros.scene.evidence import Evidence, Observed

Record = dict[str, Any]
_MAYBE = (
    "data_age",
    "confirmed_age",
    "confidence",
    "predicted_ms",
    "coverage",
    "probability",
)  # NaN in a message where it is not known


def record_of_answer(answer: Answer) -> Record:
    """The engine's answer under the field names of adatoken3d/msg/Answer, and the question's clicks; no age of the data
    (None), as nothing is live. A confidence of NaN becomes None.
    """
    return {
        "question": answer.question.text,
        "clicks": answer.question.clicks.tolist(),
        "text": answer.text,
        "status": answer.status.name,
        "status_message": answer.status_message,
        "stamp_ns": answer.stamp_ns,
        "boxes": [{"center": list(box.centre), "size": list(box.size)} for box in answer.boxes],
        "data_age": None,
        "confirmed_age": None,
        **{f"{stage}_ms": getattr(answer.times, stage) for stage in (*STAGES, "total")},
        "latency_budget_ms": answer.question.latency_budget_ms or 0.0,
        "budget_met": answer.budget_met,
        "spatial_tokens": answer.spatial_tokens,
        "retained_tokens": answer.retained_tokens,
        "prefill_flops": answer.prefill_flops,
        "prefill_flops_unpruned": answer.prefill_flops_unpruned,
        "strategy": answer.strategy,
        "model_id": answer.model_id,
        "seed": answer.seed,
        "confidence": _known(answer.confidence),
        "plan": answer.plan,
        "predicted_ms": None if answer.predicted is None else answer.predicted.total,
        "as_of_ns": answer.as_of_ns,
        "verdict": answer.verdict.name,
        "verdict_reason": answer.verdict_reason,
        "evidence": [_evidence(item) for item in answer.evidence],
        "coverage": _known(answer.coverage),
        "goal_near": None if answer.goal is None else answer.goal[:3, 3].tolist(),
        "goal_reason": answer.goal_reason,
        "probability": _known(answer.probability),
        "candidate_probabilities": list(answer.candidate_probabilities),
    }


def _evidence(evidence: Evidence) -> Record:
    return {
        "place": list(evidence.place),
        "extent": list(evidence.extent),
        "first_seen_ns": evidence.first_ns,
        "last_seen_ns": evidence.last_ns,
        "views": evidence.views,
        "contribution": _known(evidence.contribution),
        "gone_ns": evidence.gone_ns,
        "moved_to": None if evidence.moved_to is None else list(evidence.moved_to),
        "moved_confidence": evidence.moved_confidence,
    }


def _xyz(point: Any) -> tuple[float, float, float]:
    return point.x, point.y, point.z


def _ns(stamp: Any) -> int:
    return int(stamp.sec * 10**9 + stamp.nanosec)


def _evidence_of_message(message: Any) -> Evidence:
    return Evidence(
        place=_xyz(message.place),
        extent=_xyz(message.extent),
        first_ns=_ns(message.first_seen),
        last_ns=_ns(message.last_seen),
        views=message.views,
        contribution=message.contribution,
        gone_ns=_ns(message.gone),
        moved_to=_xyz(message.moved_to) if message.moved else None,
        moved_confidence=message.moved_confidence,
    )


def record_of_message(message: Any) -> Record:
    """An adatoken3d/msg/Answer as plain values, NaN as None; it has no clicks, which a message does not tell."""
    same = (
        *("question", "text", "status_message", "latency_budget_ms", "budget_met", "spatial_tokens", "retained_tokens"),
        *("prefill_flops", "prefill_flops_unpruned", "strategy", "model_id", "seed", "plan"),
        *("verdict_reason", "goal_reason"),
        *(f"{stage}_ms" for stage in (*STAGES, "total")),
    )
    boxes = [
        {
            "center": [box.center.position.x, box.center.position.y, box.center.position.z],
            "size": [box.size.x, box.size.y, box.size.z],
        }
        for box in message.boxes
    ]
    return {
        **{name: getattr(message, name) for name in same},
        "status": Status(message.status).name,
        "stamp_ns": _ns(message.header.stamp),
        "boxes": boxes,
        "as_of_ns": _ns(message.as_of),
        "verdict": Observed(message.verdict).name,
        "evidence": [_evidence(_evidence_of_message(item)) for item in message.evidence],
        "goal_near": list(_xyz(message.goal_near.pose.position)) if message.goal_near.header.frame_id else None,
        "candidate_probabilities": list(message.candidate_probabilities),
        **{name: _known(getattr(message, name)) for name in _MAYBE},
    }


def print_answer(record: Record, console: Console | None = None) -> None:
    """Prints a record as a table for people."""
    console = console or Console()
    table = Table(show_header=False, title="Answer", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(record):
        # The text comes from a model: it is no markup.
        table.add_row(name, Text(value))
    console.print(table)


def rows(record: Record) -> list[tuple[str, str]]:
    """(name, value) pairs in the order in which people ask for them."""
    status = _status(record)
    before, after = record["spatial_tokens"], record["retained_tokens"]
    full, run = record["prefill_flops_unpruned"], record["prefill_flops"]
    age, confirmed, budget = record["data_age"], record["confirmed_age"], record["latency_budget_ms"]
    stages = ", ".join(f"{stage} {record[f'{stage}_ms']:.1f}" for stage in STAGES)
    sure = record.get("confidence")
    boxes = "; ".join(f"centre {_triple(box['center'])} size {_triple(box['size'])}" for box in record["boxes"])
    known = record.get("verdict_reason") and f"{record['verdict']}: {record['verdict_reason']}"
    return [
        ("question", record["question"]),
        ("answer", record["text"] or "(empty)"),
        *([("expected", record["expected"])] if "expected" in record else []),
        ("status", status),
        *([] if sure is None else [("confidence", f"{sure:.0%} likely to be right")]),
        *([("boxes (m)", boxes)] if boxes else []),
        *([("known", known)] if known else []),
        ("spatial tokens", f"{before} before, {after} after" + (f" ({after / before:.0%} kept)" if before else "")),
        ("prefill FLOPs", f"{run:.3g} of {full:.3g} ({1 - run / full:.1%} saved)" if full else "none"),
        ("time (ms)", f"{record['total_ms']:.1f} in all: {stages}"),
        ("age of the data", "no live data" if age is None else f"{age:.2f} s, confirmed {confirmed:.2f} s ago"),
        ("latency budget", f"{budget:g} ms, {'met' if record['budget_met'] else 'missed'}" if budget else "none"),
        ("strategy, model", f"{record['strategy']}, {record['model_id']}" if record["model_id"] else "none was asked"),
    ]


def _status(record: Record) -> str:
    status, message = record["status"], record["status_message"]
    return status_name(status, message) + (f": {message}" if message else "")


def brief(record: Record) -> str:
    """What an answer cost, in one line."""
    status = _status(record)
    kept = f", {record['retained_tokens']} of {record['spatial_tokens']} tokens" if record["spatial_tokens"] else ""
    return f"{status}, {record['total_ms']:.0f} ms{kept}"


def write_json(record: Record, path: Path) -> None:
    """Writes a record as JSON; raises OSError when it cannot."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _triple(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values) + ")"
