# SPDX-License-Identifier: Apache-2.0
"""What pages say was measured is what lies beside them as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _claims_docs, _frontier_docs, claims, frontier
from benchmarks._pages import blocks, markdown_table, points, put
from benchmarks.accuracy import EXACT

ROOT = Path(frontier.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CARD, FIGURES, README = (ROOT / name for name in ("docs/model_card.md", "docs/benchmarks.md", "README.md"))


def measured(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize(("page", "names"), [(FIGURES, {"frontier", "claims"}), (README, {"frontier"})])
def test_written_figures_are_those_of_the_json(page: Path, names: set[str]) -> None:
    found = {name: (source, text) for name, source, text in blocks(page) if name in names}
    assert found.keys() == names
    for name, (source, text) in found.items():
        assert source is not None
        result = json.loads((ROOT / source).read_text())
        expected = _claims_docs.markdown(result) if name == "claims" else _frontier_docs.words_for(page, result)
        assert text == expected, f"{page.name} is not what {source} says: write it anew with --from {source} --docs"


def card_rows() -> Iterator[str]:
    """Of the model card's tables of accuracy."""
    own = measured("accuracy_cpu")
    four = [own["test"], own["test_unseen"], own["blind"]["test"], own["majority"]["test"]]
    for family in EXACT:
        yield f"| {family} | " + " | ".join(f"{one['families'][family]:.2f}" for one in four) + " |"
    cells = ["**{macro:.3f}** ({0:.3f} to {1:.3f})".format(*one["interval"], macro=one["macro"]) for one in four]
    yield "| **macro** (95 % interval) | " + " | ".join(cells) + " |"
    yield " | ".join("{acc25:.2f}, {acc50:.2f}".format(**one["boxes"]) for one in four)
    for camera in ("real", "other"):
        seen = measured(f"accuracy_{camera}_cpu")
        assert seen["camera"] == camera and seen["model"]["hash"] == own["model"]["hash"]
        yield from (
            "{macro:.3f} ({0:.3f} to {1:.3f})".format(*seen[s]["interval"], macro=seen[s]["macro"])
            for s in ("test", "test_unseen")
        )
    views = measured("accuracy_video3d_cpu")
    for family in EXACT:
        cells = [
            "{:.2f} ({:.2f} to {:.2f})".format(views[s]["families"][family], *views[s]["intervals"][family])
            for s in ("test", "test_unseen")
        ]
        yield f"| {family} | {' | '.join(cells)} | {views['majority']['test']['families'][family]:.2f} |"


def test_the_model_card_has_the_figures() -> None:
    card = CARD.read_text()
    assert [row for row in card_rows() if row not in card] == []
    photographs, demo = measured("photographs_cpu"), measured("demo_rooms_cpu")
    cells = [
        "{:.2f} ({:.2f} to {:.2f})".format(photographs[who]["accuracy"], *photographs[who]["interval"])
        for who in ("none", "ours", "majority", "constant")
    ]
    assert f"| all (95 % interval) | {' | '.join(cells)} |" in card
    for one, words in ((demo["all"], "are right ({} to {})"), (demo["asked_first"], "({} to {})")):
        assert words.format(*(f"{end:.3f}" for end in one["interval"])) in card
        assert f"{one['right']:.3f}" in card


def test_the_front_page_has_the_figures() -> None:
    readme, page = README.read_text(), FIGURES.read_text()
    own, photographs = measured("accuracy_cpu"), measured("photographs_cpu")["none"]["accuracy"]
    macro, blind = own["test"]["macro"], own["blind"]["test"]["macro"]
    assert f"{macro:.2f} of its answers about new synthetic rooms are right ({blind:.2f} without looking" in readme
    assert f"on photographs {photographs:.2f}" in readme
    assert f"Macro {macro:.3f} on new rooms" in page
    assert f"{own['test_unseen']['macro']:.3f} with unseen furniture" in page and f"blind {blind:.3f}" in page
    assert f"boxes at overlap 0.25: {own['test']['boxes']['acc25']:.2f}" in page


def test_figures_are_put_into_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, other = tmp_path / "page.md", tmp_path / "README.md"
    page.write_text(
        "a\n<!-- frontier -->\nearlier\n<!-- end of frontier -->\nb\n"
        "<!-- claims: old.json -->\n<!-- end of claims -->\n"
    )
    other.write_text("<!-- frontier: x -->\n<!-- end of frontier -->")
    for command, name, pages in ((frontier, "frontier_cpu", [page, other]), (claims, "claims_cpu", [page])):
        words = [name, "--from", str(RESULTS / f"{name}.json"), "--json", "f.json", "--docs", *map(str, pages)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.chdir(tmp_path)
        command.main()
        assert json.loads((tmp_path / "f.json").read_text()) == measured(name)
    text = page.read_text()
    asked, kept = measured("frontier_cpu")["setting"], measured("frontier_cpu")["policies"]["ours"][0]
    first = f"{asked['questions']:,} questions about {asked['rooms']} rooms of the split test"
    assert text.startswith(f"a\n<!-- frontier: f.json -->\n\n{first}") and "\nb\n" in text
    assert [name for name, source, _ in blocks(page) if source == "f.json"] == ["frontier", "claims"]
    cell = "{accuracy:.3f}, {0} ({1} to {2}); ".format(
        *map(points, (kept["difference"], *kept["difference_interval"])), accuracy=kept["macro"]
    )
    assert "earlier" not in text and f"| **`ours`** | {cell}" in text
    share = "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in (kept["ratio"], *kept["ratio_interval"])))
    assert f"keeps {share} with 63 % fewer" in other.read_text().replace("\n", " ")
    with pytest.raises(ValueError, match="has no <!-- speed -->"):
        put(page, "speed", "")


def test_figures_as_text() -> None:
    assert [points(x) for x in (0.0126, -0.0004, 0.0, -0.5)] == ["+1.3", "0.0", "0.0", "-50.0"]
    assert markdown_table([["a", "b"], ["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
