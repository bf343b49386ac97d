# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.hostile`: what it calls a failure, its watchdog, the documented errors in a table, spoilt files in short.

What it does to messages and questions is in `test_fuzz.py`, and to the node in its own long form.
"""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from benchmarks import _hostile as h
from benchmarks import hostile
from benchmarks._hostile_door import Refused
from benchmarks._hostile_kinds import ATTACKS

# Tries of each kind of file; a few seconds each.
FILES = {"scenes": 150, "config": 150, "tokenizer": 60, "weights": 150, "strategies": 400, "latency_cache": 100,
    "bag_mcap": 300, "bag_sqlite3": 300}  # fmt: skip


def attempt(rng: random.Random) -> None:
    raise [ValueError("no"), ValueError(""), KeyError("x"), h.Loss("gone"), RecursionError(), SystemExit(1)][
        rng.randrange(6)
    ]


def test_what_counts_as_a_failure() -> None:
    attack = h.Attack(test_what_counts_as_a_failure, (ValueError,), lambda folder: attempt)
    tally, found = h.Tally(), {}
    for seed in range(60):
        outcome = h.judge(attack, attempt, seed)
        found[outcome.error, outcome.what] = outcome == h.judge(attack, attempt, seed) or outcome.text
        tally.add("x", outcome)
    assert set(found) == {
        ("ValueError", "refused"), ("ValueError", "undocumented"), ("KeyError", "undocumented"), ("Loss", "loss"),
        ("RecursionError", "undocumented"), ("SystemExit", "undocumented"),
    }  # fmt: skip
    assert h.judge(attack, lambda rng: None, 0).what == "accepted"
    figures = hostile.figures({"x": tally})
    assert figures["tries"] == 60 and figures["hangs"] == figures["crashes"] == 0
    assert figures["losses"] == figures["kinds"]["x"]["losses"] > 0 and figures["undocumented"] > 20
    assert len(figures["failures"]) == min(h.KEPT, figures["losses"] + figures["undocumented"])
    assert {"kind", "seed", "what", "text"} <= set(figures["failures"][0])


def test_the_watchdog_tells_hangs_and_ends_from_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 1 hangs, 3 ends its process, 4 takes too much memory; the others are made all the same."""
    child = """
        import os, sys, time
        from types import SimpleNamespace
        from benchmarks import _hostile as h

        def attempt(rng):
            drawn = rng.random()
            seed = next(s for s in range(9) if h.random.Random(s).random() == drawn)
            if seed == 1:
                time.sleep(100)
            if seed == 3:
                os.abort()
            if seed == 4:
                kept = bytes(range(256)) * 400_000
                time.sleep(100)

        attacks = {"x": h.Attack(attempt, (), lambda folder: attempt)}
        sys.modules["benchmarks._hostile_kinds"] = SimpleNamespace(ATTACKS=attacks)
        h.child(sys.argv[1], *map(int, sys.argv[2:]))
    """
    monkeypatch.setattr(h, "CHILD", textwrap.dedent(child))
    monkeypatch.setattr(h, "PATIENCE", 2.0)
    monkeypatch.setattr(h, "MEMORY", 100 * 10**6)
    found = list(h.tries("x", 0, 6, 1000.0))
    assert [(one.seed, one.what) for one in found] == [
        (0, "accepted"), (1, "hang"), (2, "accepted"), (3, "crash"), (4, "crash"), (5, "accepted"),
    ]  # fmt: skip
    assert "attempt" in found[1].text, "where it hangs"
    assert "status -6" in found[3].text and found[4].error == "memory"


def test_errors_that_are_documented_are_in_the_docstrings() -> None:
    for kind, attack in ATTACKS.items():
        for error in attack.documented:
            if error is not Refused:
                assert error.__name__ in (attack.target.__doc__ or ""), (kind, error)


@pytest.mark.parametrize("kind", list(FILES))
def test_spoilt_files(kind: str, tmp_path: Path) -> None:
    attack = ATTACKS[kind]
    made = attack.prepare(tmp_path)
    tally = h.Tally()
    for seed in range(FILES[kind]):
        tally.add(kind, h.judge(attack, made, seed))
    assert tally.failures == []
    assert tally.accepted and tally.refused, "some of them are harmless, most are not"


def test_in_its_smallest_size(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert hostile.main(["--only", "poses", "--only", "signals", "--tries", "3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [kind["tries"] for kind in found["kinds"].values()] == [3, 3]
    assert [found[name] for name in ("undocumented", "hangs", "crashes", "losses", "failures")] == [0, 0, 0, 0, []]


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--only", "nothing"], ["--tries", "0"], ["--seed", "-1"]])
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        hostile.parse(arguments)


def test_every_kind_is_there() -> None:
    live: Any = hostile.LIVE
    assert set(FILES) < set(ATTACKS) and not set(ATTACKS) & set(live)
    assert {name.removeprefix("node_") for name in live} == {
        "questions", "parameters", "transitions", "storms", "files", "signals",
    }  # fmt: skip
