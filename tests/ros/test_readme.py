# SPDX-License-Identifier: Apache-2.0
"""The README says what the node has: names and parameters are compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("rclpy")

from adatoken3d_ros.ros.parameters import SPECS, Spec

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def row(spec: Spec) -> str:
    default = f"`{spec.default}`" if spec.default != "" else ""
    limits = ", ".join(f"`{c}`" for c in spec.choices) if spec.choices else ""
    if spec.low is not None and spec.high is not None:
        limits = f"{spec.low:g} to {spec.high:g}"
    return f"| `{spec.name}` | {default} | {limits} | {spec.description} | {spec.read} |"


def table() -> str:
    head = ["| parameter | default | allowed | | may change until |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, SPECS)])


def test_the_parameter_table_is_the_nodes() -> None:
    found = re.search(r"<!-- parameters: begin.*?-->\n(.*?)\n<!-- parameters: end -->", README, re.DOTALL)
    assert found is not None and found[1].strip() == table(), f"the table should be:\n{table()}"


def test_the_files_that_it_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[2] / target).exists(), target


if __name__ == "__main__":
    print(table())
