# SPDX-License-Identifier: Apache-2.0
"""Writes docs/node.md's table of parameters anew, from the settings.

python scripts/readme_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from adatoken3d_ros.settings import SETTINGS, Setting

README = Path(__file__).resolve().parents[1] / "docs" / "node.md"
HEAD = "| parameter | default | allowed | | may change until |\n|---|---|---|---|---|\n"
TABLE = re.compile(r"(<!-- parameters: begin.*?-->\n).*?(\n<!-- parameters: end -->)", re.DOTALL)


def row(setting: Setting) -> str:
    value = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    default = f"`{value}`" if value != "" else ""
    limits = ", ".join(f"`{choice}`" for choice in setting.choices)
    if setting.low is not None and setting.high is not None:
        limits = f"{setting.low:g} to {setting.high:g}"
    return f"| `{setting.name}` | {default} | {limits} | {setting.description} | {setting.read} |"


def renewed(readme: str) -> str:
    """The page with the table as it should be. Raises ValueError where it has no place for it."""
    if not TABLE.search(readme):
        raise ValueError(f"{README} has no lines 'parameters: begin' and 'parameters: end'")
    return TABLE.sub(lambda found: found[1] + HEAD + "\n".join(map(row, SETTINGS)) + found[2], readme)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
