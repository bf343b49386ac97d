# SPDX-License-Identifier: Apache-2.0
"""The comparison of architectures at its smallest, and its goals by hand."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

from benchmarks import architectures
from benchmarks._architecture_report import TITLES, goals, markdown

ROOT = Path(__file__).parents[2]


def test_every_architecture_is_fitted_timed_and_held_to_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    monkeypatch.setattr(sys, "argv", ["architectures", "--quick", "--json", str(file), "--threads", "1"])
    architectures.main()
    found = json.loads(file.read_text())
    assert list(found) == [*TITLES, "setting"]
    for name in TITLES:
        one = found[name]
        assert one["parity"] <= 1e-4 and one["parity_with"]
        assert one["speedup_80"] > 0 and one["hit_80"] > 0
        random = one["random"]
        assert random["flops"]["80"] < random["flops"]["63"] < random["flops"]["none"]
        assert all(0 < share <= 1 for kept in random["kept"].values() for share in kept)
    for name, trained in (("llava3d", "embedded"), ("video3d", "video3d_small")):
        one = found[name]["trained"]
        assert one["model"]["name"] == trained and one["accuracy"]["questions"] > 0
        assert one["parity"] <= 1e-4 and one["flops_saved"]["80"] >= 0.8
        low, high = one["accuracy"]["difference_interval"]["80"]
        assert low <= one["accuracy"]["difference"]["80"] <= high
    assert found["qwen3vl"]["trained"] is None
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- architectures -->\nold\n<!-- end of architectures -->\nafter\n")
    words = ["architectures", "--from", str(file), "--picture", str(picture), "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    architectures.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    begin, table, end = page.read_text().partition(markdown(found))
    assert (begin, end) == ("before\n<!-- architectures -->\n", "\n<!-- end of architectures -->\nafter\n")
    assert table.count("\n| ") == 2 + 3 * 5


def test_the_docs_have_the_figures_that_lie_beside_them() -> None:
    """And none where nothing was measured yet."""
    results = ROOT / "benchmarks" / "results" / "architectures_cpu.json"
    table = markdown(json.loads(results.read_text())) + "\n" if results.is_file() else ""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"<!-- architectures -->\n{table}<!-- end of architectures -->" in page


def test_goals_by_hand() -> None:
    form = {"parity": 1e-5, "hit_63": 0.9, "hit_80": 0.95, "random": {"spatial_tokens": 1000}}
    met = {name: copy.deepcopy(form) for name in TITLES}
    assert all(goals(met).values()) and len(goals(met)) == 9
    met["qwen3vl"]["parity"], met["video3d"]["hit_80"], met["llava3d"]["random"]["spatial_tokens"] = 2e-4, 0.89, 999
    assert sum(not value for value in goals(met).values()) == 1 + 1 + 2
