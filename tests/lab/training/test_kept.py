# SPDX-License-Identifier: Apache-2.0
"""What a long benchmark found is not looked for again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from benchmarks._kept import Kept, strategy_key
from benchmarks._scenes import Reader, Workers


@dataclass(frozen=True)
class Square:
    number: int

    def kept_as(self) -> list[int]:
        return [self.number]


CALLS: list[int] = []


def squared(reader: object, task: Square) -> list[float]:
    CALLS.append(task.number)
    return [task.number**2, 0.1 * task.number]


def plain(reader: object, number: int) -> int:
    CALLS.append(number)
    return number


def test_what_was_found_is_not_looked_for_again(tmp_path: Path) -> None:
    path, console, reader = tmp_path / "new" / "kept.jsonl", Console(quiet=True), cast(Reader, None)

    def ask(model: str, numbers: Sequence[int], path: Path | None = path) -> tuple[list[list[float]], list[int], int]:
        CALLS.clear()
        with Workers(reader, 1, console) as pool:
            workers = Kept(pool, path, model)
            found = workers.map("squares", squared, [Square(n) for n in numbers])
        return found, CALLS[:], workers.reused

    one, two, three = ([n**2, 0.1 * n] for n in (1, 2, 3))
    assert ask("a", [1, 2]) == ([one, two], [1, 2], 0)
    assert ask("a", [3, 2, 1, 3]) == ([three, two, one, three], [3], 3)
    assert ask("b", [2]) == ([two], [2], 0), "another model"
    with path.open("a") as file:
        file.write('["a line that was cut')
    assert ask("a", [1, 2, 3]) == ([one, two, three], [], 3)
    assert path.read_text().count("\n") == 4 and path.read_text().endswith("\n")
    assert ask("a", [1], None) == ([one], [1], 0)
    with Workers(reader, 1, console) as pool:
        CALLS.clear()
        assert [Kept(pool, path, "a").map("plain", plain, [5]) for _ in range(2)] == [[5], [5]] and CALLS == [5, 5]


def test_work_that_ends_in_the_middle_is_kept(tmp_path: Path) -> None:
    def some(reader: object, task: Square) -> int:
        if task.number == 3:
            raise KeyboardInterrupt
        return task.number

    for _ in range(2):
        with Workers(cast(Reader, None), 1, Console(quiet=True)) as pool, pytest.raises(KeyboardInterrupt):
            workers = Kept(pool, tmp_path / "kept", "a")
            workers.map("some", some, [Square(n) for n in (1, 2, 3, 4)])
    assert workers.reused == 2 and len((tmp_path / "kept").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"decode_speedup": 3.0}', "ends with what no run has begun to write"),
        ('{\n "questions": 3\n}\n', "line 1 is none"),
        ('["one", 1]\n7\n', "line 2 is none"),
        ("[" + chr(0) * 3, "ends with what no run has begun to write"),
    ],
)
def test_another_file_is_refused_and_stays_as_it_is(tmp_path: Path, content: str, named: str) -> None:
    """Figures that lie beside it, say: a file without a last newline was emptied as a line that was cut off."""
    path = tmp_path / "figures.json"
    path.write_text(content)
    with Workers(cast(Reader, None), 1, Console(quiet=True)) as pool, pytest.raises(ValueError, match=named):
        Kept(pool, path, "a")
    assert path.read_text() == content


def test_a_strategy_is_told_from_others() -> None:
    one = Strategy("one", "ours", Schedule.of([2], [0.5]))
    others = [
        Strategy("one", "fastv", one.schedule),
        Strategy("one", "ours", Schedule.of([2], [0.4])),
        Strategy("one", "ours", Schedule.of([2], [0.5], withdraw_layer=4)),
        Strategy("one", "ours", one.schedule, options={"rows": "last"}),
    ]
    assert all(strategy_key(other) != strategy_key(one) for other in others)
    assert strategy_key(Strategy("two", "ours", one.schedule, info={"target": 1})) == strategy_key(one)
    assert strategy_key(Strategy("one", "fastv", one.schedule))[-1] != strategy_key(one)[-1], "the source"
