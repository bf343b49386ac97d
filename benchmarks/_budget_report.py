# SPDX-License-Identifier: Apache-2.0
"""What came of questions with budgets: figures, goals, a table and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from adatoken3d_ros.engine.answer import Answer
from adatoken3d_ros.engine.budget.plans import RUNGS

MOST_LATE = 20  # late answers that are told one by one


@dataclass(frozen=True, eq=False)
class Row:
    """One question that was answered; times in milliseconds, `asker` by the clock of who asked."""

    budget: float
    asker: float
    answer: Answer
    loss: float
    score: float | None

    @property
    def use(self) -> float:
        return self.answer.times.total / self.budget


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What the module's text says of a run."""
    late = [max(0.0, row.use - 1.0) for row in rows]
    clock = [abs(row.asker - row.answer.times.total) for row in rows]
    errors = [
        abs(row.answer.predicted.total / (row.answer.times.total - row.answer.times.queue) - 1.0)
        for row in rows
        if row.answer.predicted is not None
    ]
    found: dict[str, Any] = {
        "questions": len(rows),
        "miss_rate": sum(over > 0 for over in late) / len(rows),
        "p95_overshoot": float(np.percentile(late, 95)),
        "median_use": median(row.use for row in rows),
        "p95_prediction_error": float(np.percentile(errors, 95)) if errors else None,
        "median_ms": median(row.answer.times.total for row in rows),
        "clock_error_ms": max(clock),
        "clock_error_ms_p95": float(np.percentile(clock, 95)),
        "clock_error_ms_p50": median(clock),
        "hurried": sum("hurried before" in row.answer.plan for row in rows),
        "loss": float(np.mean([row.loss for row in rows])),
        "loss_by_decile": by_decile(rows, lambda row: row.loss),
        "statuses": dict(Counter(row.answer.status.name for row in rows)),
        "rungs": dict(Counter(RUNGS[row.answer.decision.rung] for row in rows if row.answer.decision is not None)),
        "late": [_late(row) for row in rows if row.use > 1.0][:MOST_LATE],
        "budget_ms": [min(row.budget for row in rows), max(row.budget for row in rows)],
    }
    if rows[0].score is not None:
        found["accuracy"] = float(np.mean([row.score for row in rows if row.score is not None]))
        found["accuracy_by_decile"] = by_decile(rows, lambda row: row.score or 0.0)
    return found


def _late(row: Row) -> dict[str, Any]:
    """What happened to a late answer."""
    answer = row.answer
    return {
        "budget_ms": row.budget,
        "plan": answer.plan,
        "status": answer.status_message,
        "answer": answer.text,
        "predicted_ms": None if answer.predicted is None else asdict(answer.predicted),
        "taken_ms": asdict(answer.times),
    }


def by_decile(rows: Sequence[Row], value: Callable[[Row], float]) -> list[float]:
    """Mean over the questions in each tenth of the budgets, from tight to ample."""
    ordered = sorted(rows, key=lambda row: row.budget)
    parts = np.array_split(np.array([value(row) for row in ordered]), min(10, len(ordered)))
    return [float(part.mean()) for part in parts]


def draw(result: dict[str, Any], path: Path) -> None:
    """Left: loss against prefill time by policy. Right: how much of its budget each answer took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for name, points in result["frontier"].items():
        ordered = sorted(points, key=lambda point: point["prefill_ms"])
        ours = name == result["setting"]["policy"]
        left.plot(
            [point["prefill_ms"] for point in ordered],
            [max(point["loss"], 1e-6) for point in ordered],
            "o-" if ours else "s--",
            label=f"{name} (planned with)" if ours else name,
            linewidth=2.5 if ours else 1.0,
            markersize=5 if ours else 3,
            color="tab:red" if ours else None,
            zorder=3 if ours else 2,
        )
    left.set_yscale("log")
    left.set_xlabel("prefill, ms")
    left.set_ylabel("divergence from the unpruned answer, KL in nats")
    left.set_title(f"What a pruning policy costs and saves ({result['setting']['model']} model)", fontsize=10)
    left.legend(fontsize=7)
    left.grid(alpha=0.3)
    for name, colour in (("quiet", "tab:blue"), ("hog", "tab:orange")):
        pairs = np.array(result["pairs"][name])
        right.scatter(
            pairs[:, 0], pairs[:, 1], s=8, color=colour, label=f"{name}: {result[name]['miss_rate']:.1%} late"
        )
    budgets = [budget for name in ("quiet", "hog") for budget, _ in result["pairs"][name]]
    ends = np.array([min(budgets), max(budgets)])
    right.plot(ends, ends, "k-", linewidth=1, label="budget")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("latency budget, ms")
    right.set_ylabel("question to answer, ms")
    right.set_title("Answers against their budgets", fontsize=10)
    right.legend(fontsize=7)
    right.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def goals(result: dict[str, Any]) -> dict[str, bool]:
    """What the engine is held to."""
    quiet, hogged, controllers = result["quiet"], result["hog"], result["controllers"]
    goals = {
        "quiet: at most 1 % late": quiet["miss_rate"] <= 0.01,
        "hog: at most 5 % late after it started": hogged["miss_rate"] <= 0.05,
        "p95 overshoot at most 5 %, quiet and hog": max(quiet["p95_overshoot"], hogged["p95_overshoot"]) <= 0.05,
        "quiet: half the answers take 70 % of their budget": quiet["median_use"] >= 0.7,
        "a look-up takes less than 0.1 ms": result["planning"]["choose_us"] < 100.0,
        "on average no worse than always the cheapest plan": quiet["loss"] <= controllers["cheapest"]["loss"],
    }
    if "accuracy_by_decile" in quiet:
        ours, cheapest = quiet["accuracy_by_decile"], controllers["cheapest"]["accuracy_by_decile"]
        goals["more accurate in the upper half of the budgets"] = np.mean(ours[5:]) >= np.mean(ours[:5])
        goals["in every decile as accurate as the cheapest"] = all(a >= b for a, b in zip(ours, cheapest, strict=True))
    return goals


def report(result: dict[str, Any]) -> Table:
    table = Table(title=f"Latency budgets, {result['setting']['model']} model", box=SIMPLE)
    table.add_column("run", no_wrap=True)
    for column in ("late", "p95 over", "use", "p95 error", "ms", "loss"):
        table.add_column(column, justify="right")
    rows = {"quiet": result["quiet"], "hog": result["hog"]}
    for name, row in {**rows, **{k: v for k, v in result["controllers"].items() if k != "ours"}}.items():
        error = row["p95_prediction_error"]
        table.add_row(
            name,
            f"{row['miss_rate']:.1%}",
            f"{row['p95_overshoot']:.1%}",
            f"{row['median_use']:.0%}",
            "" if error is None else f"{error:.0%}",
            f"{row['median_ms']:.0f}",
            f"{row['loss']:.2e}",
        )
    return table
