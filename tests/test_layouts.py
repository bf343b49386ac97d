# SPDX-License-Identifier: Apache-2.0
"""The layout for Foxglove and Lichtblick shows what the node publishes; links of the documentation lead somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = json.loads((ROOT / "config" / "foxglove.json").read_text(encoding="utf-8"))
PANELS: dict[str, Any] = LAYOUT["configById"]
RVIZ = (ROOT / "config" / "adatoken3d.rviz").read_text(encoding="utf-8")
PUBLISHERS = (ROOT / "adatoken3d_ros" / "ros" / "outputs" / "publishers.py").read_text(encoding="utf-8")
PUBLISHED = set(re.findall(r'"~/(\w+)"', PUBLISHERS))
PAGE = {"key_frames"}  # for the page in the browser: neither program has a view of pictures with their places
TEXTS = {"answer", "token_report"}  # for which RViz has no display: it shows them as markers and as columns of clouds
MARKERS = (ROOT / "adatoken3d_ros" / "ros" / "outputs" / "markers.py").read_text(encoding="utf-8")


def placed(layout: Any) -> Iterator[str]:
    if isinstance(layout, str):
        yield layout
    else:
        assert layout["direction"] in ("row", "column") and 0 < layout["splitPercentage"] < 100
        yield from placed(layout["first"])
        yield from placed(layout["second"])


def fields(name: str) -> set[str]:
    text = (ROOT / "msg" / f"{name}.msg").read_text(encoding="utf-8")
    return set(re.findall(r"^[\w/\[\]]+ +(\w+)", text, re.MULTILINE))


def test_every_panel_has_its_place() -> None:
    assert sorted(placed(LAYOUT["layout"])) == sorted(PANELS)
    assert {name.partition("!")[0] for name in PANELS} == {"3D", "Image", "RawMessages", "Plot", "CallService"}
    # Each program reads its own key and shows the panel's type without one.
    assert all(one["foxglovePanelTitle"] == one["lichtblickPanelTitle"] != "" for one in PANELS.values())


def test_all_that_the_node_publishes_is_shown() -> None:
    assert {"answer", "scene_tokens", "retained_tokens", "token_report", "markers", "goal"} <= PUBLISHED
    text = json.dumps(LAYOUT)
    assert set(re.findall(r"/adatoken3d/(\w+)", text)) == PUBLISHED - PAGE | {"ask"}
    assert {"/rgb/image", "/depth/image", "/clicked_point"} <= set(re.findall(r'"(/[\w/]+)"', text))


def test_rviz_shows_all_that_it_has_a_display_for() -> None:
    displays = yaml.safe_load(RVIZ)["Visualization Manager"]["Displays"]
    shown = {one["Topic"]["Value"]: one for one in displays if "Topic" in one}
    assert {topic.partition("/")[2] for topic in shown if topic.startswith("adatoken3d/")} == PUBLISHED - TEXTS - PAGE
    assert {"rgb/image", "depth/image"} <= set(shown)
    # All that markers tell is shown until somebody switches a namespace off.
    assert shown["adatoken3d/markers"]["Namespaces"] == {} and shown["adatoken3d/markers"]["Enabled"]
    told = {"views", "marks", "free", "unseen", "gone", "moved", "evidence", "goal", "boxes", "answer"}
    assert all(f'"{name}"' in MARKERS for name in told)
    latched = {"scene_tokens", "retained_tokens", "markers"}
    assert {shown[f"adatoken3d/{name}"]["Topic"]["Durability Policy"] for name in latched} == {"Transient Local"}


def test_fields_are_those_of_the_messages() -> None:
    value = PANELS["Plot!layers"]["paths"][0]["value"]
    match = re.fullmatch(r"/adatoken3d/token_report\.(\w+)\[:\]\.(\w+)", value)
    assert match and match[1] in fields("TokenReport") and match[2] in fields("LayerTokens")
    source = (ROOT / "adatoken3d_ros" / "ros" / "outputs" / "messages.py").read_text(encoding="utf-8")
    (named,) = re.findall(r"RETAINED_FIELDS = \((.*)\)", source)
    for panel in ("3D!contribution", "3D!layers"):
        assert f'"{PANELS[panel]["topics"]["/adatoken3d/retained_tokens"]["colorField"]}"' in named
    request = (ROOT / "srv" / "AskScene.srv").read_text(encoding="utf-8").partition("---")[0]
    asked = json.loads(PANELS["CallService!ask"]["requestPayload"])
    assert set(asked) <= set(re.findall(r"^[\w/\[\]]+ +(\w+)", request, re.MULTILINE))


def test_no_page_points_to_a_file_that_is_not_there() -> None:
    """Without the site, whose builder looks at headings, too (`make docs`)."""
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert missing == []
