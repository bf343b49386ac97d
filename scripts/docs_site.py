# SPDX-License-Identifier: Apache-2.0
"""What the site has beside docs/: README.md as its first page, and files of the repository that a page links to.

A hook of mkdocs (mkdocs.yml). Links are written for who reads the files where they are; here they are turned to where
things are in the site. A link to what is not there is left alone, and mkdocs, which is strict, refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
FILES = "files"  # folder of the site for what is no page
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds pages and linked files to those of docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    linked: set[str] = set()
    own = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None]
    for page in [*PAGES, *own]:
        text = (ROOT / page).read_text(encoding="utf-8")
        linked |= {_target(page, match[2]) for match in _LINK.finditer(text)}
    for name in sorted(linked):
        if not name.startswith("docs/") and name not in PAGES and (ROOT / name).is_file():
            files.append(File.generated(config, f"{FILES}/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turns the links of a page to where things are in the site, whose pages are all in one folder."""
    where = next((source for source, target in PAGES.items() if target == page.file.src_uri), None)
    source = where or f"docs/{page.file.src_uri}"

    def turned(match: re.Match[str]) -> str:
        name = _target(source, match[2])
        if name in PAGES:
            place = PAGES[name]
        elif name.startswith("docs/"):
            place = name.removeprefix("docs/")
        elif (ROOT / name).is_file():
            place = f"{FILES}/{name}"
        else:
            return match[0]
        return f"{match[1]}{place}{match[3] or ''}{match[4]}"

    return _LINK.sub(turned, markdown)


def _target(page: str, link: str) -> str:
    """Where a link of a page leads, from the root of the repository."""
    return posixpath.normpath(posixpath.join(str(PurePosixPath(page).parent), link))
