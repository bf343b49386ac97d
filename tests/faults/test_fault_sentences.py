# SPDX-License-Identifier: Apache-2.0
"""What docs/faults.md says of all faults at once, as far as it can be read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

ROS = Path(__file__).resolve().parents[2] / "adatoken3d_ros" / "ros"
# Once for each thing that happens, not for each message that comes.
EACH_TIME = ("configure failed", "activate failed", "nodes are named")
LEVELS = ("warning", "warn", "error", "fatal")
FORWARDS = "logs.py"  # counts by itself what it leaves out


def test_warnings_come_at_most_every_five_seconds() -> None:
    seen, unbounded = 0, []
    for path in sorted(ROS.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            logger = ast.unparse(call.func.value)
            if call.func.attr not in LEVELS or not logger.endswith(("get_logger()", ".log")):
                continue
            text, limits = ast.unparse(call), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            seen += 1
            if limits.get("throttle_duration_sec") != "WARN_SECONDS" and not any(words in text for words in EACH_TIME):
                unbounded.append(f"{path.name}: {text}")
    assert unbounded == [] and seen >= 10


def test_that_is_five_seconds() -> None:
    tree = ast.parse((ROS / FORWARDS).read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WARN_SECONDS"
    )
    assert ast.literal_eval(value) == 5.0
