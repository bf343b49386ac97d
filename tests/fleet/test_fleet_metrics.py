# SPDX-License-Identifier: Apache-2.0
"""What is counted of a question, how it is read back, and the table of it."""

from __future__ import annotations

import http.server
import threading
from typing import Any

import pytest
from rich.console import Console

from adatoken3d_ros.fleet import metrics

EXPORTED = """# HELP ray_adatoken3d_questions_total adatoken3d: questions
# TYPE ray_adatoken3d_questions_total counter
ray_adatoken3d_questions_total{NodeAddress="127.0.0.1",WorkerId="a",robot="r1",status="OK"} 3.0
ray_adatoken3d_questions_total{NodeAddress="127.0.0.1",WorkerId="b",robot="r1",status="OK"} 1.0
ray_adatoken3d_questions_total{NodeAddress="127.0.0.1",WorkerId="b",robot="r1",status="BUSY"} 1.0
ray_adatoken3d_questions_total{WorkerId="a",robot="r\\"2",status="UNSURE"} 2.0
ray_adatoken3d_late_total{WorkerId="b",robot="r1"} 1.0
ray_adatoken3d_refused_total{WorkerId="b",robot="r1"} 1.0
ray_adatoken3d_resident_hits_total{WorkerId="a",robot="r1"} 3.0
ray_adatoken3d_tokens_kept_total{WorkerId="a",robot="r1"} 120.0
ray_adatoken3d_stage_seconds_total{WorkerId="a",robot="r1",stage="total"} 1.5
ray_adatoken3d_stage_seconds_total{WorkerId="b",robot="r1",stage="total"} 0.5
ray_serve_num_http_requests_total{route="/"} 7.0
"""


class Counter:
    """What Ray's is asked for."""

    def __init__(self, seen: dict[Any, float], name: str) -> None:
        self.seen, self.name = seen, name

    def inc(self, value: float, tags: dict[str, str]) -> None:
        key = (self.name, *tags.values())
        self.seen[key] = self.seen.get(key, 0) + value


def test_a_question_is_counted_once_under_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Any, float] = {}
    monkeypatch.setattr(metrics, "_counter", lambda name: Counter(seen, name))
    metrics.record("r1", "OK", True, False, 40, {"queue": 10.0, "total": 250.0, "encode": 0.0, "decode": None})
    metrics.record("r1", "BUDGET_INFEASIBLE", False, True, 0, {"total": 5.0})
    assert seen == {
        ("questions", "r1", "OK"): 1,
        ("resident_hits", "r1"): 1,
        ("tokens_kept", "r1"): 40,
        ("stage_seconds", "r1", "queue"): 0.01,
        ("stage_seconds", "r1", "total"): 0.25,
        ("questions", "r1", "BUDGET_INFEASIBLE"): 1,
        ("late", "r1"): 1,
        ("refused", "r1"): 1,
    }


def test_what_is_exported_is_read_and_shown() -> None:
    counts = metrics.read(EXPORTED)
    one = counts["r1"]
    assert (one.questions, one.answered, one.late, one.refused, one.resident_hits) == (5, 4, 1, 1, 3)
    assert (one.tokens_kept, one.stage_seconds["total"]) == (120, 2.0)
    assert (counts['r\\"2'].questions, counts['r\\"2'].answered) == (2, 2)
    console = Console(width=120, record=True)
    console.print(metrics.table(counts))
    row = next(line for line in console.export_text().splitlines() if " r1 " in line)
    assert row.replace("│", " ").split() == ["r1", "5", "1", "(20%)", "1", "(20%)", "3", "(60%)", "30", "0", "0", "500"]


def test_it_is_fetched_and_a_silent_address_is_named() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(EXPORTED.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}/metrics"
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert metrics.read(metrics.fetch(address))["r1"].questions == 5
    server.server_close()
    for silent in (address, "nonsense"):
        with pytest.raises(OSError, match=f"nothing is told at {silent}: .* is 'adatoken3d serve' running there"):
            metrics.fetch(silent)
