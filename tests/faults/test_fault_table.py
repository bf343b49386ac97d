# SPDX-License-Identifier: Apache-2.0
"""docs/faults.md names tests that exist, down to their parameters."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables whose first column is called fault."""
    found, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith("| fault |"):
            inside = True
        elif inside and line.startswith("| "):
            found.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
    return found


ROWS = rows((ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))
# What must be there: words of the first column.
FAULTS = """
NaN depth; infinite depth; zero depth; negative depth; saturated depth; no valid depth at all; wrong size;
wrong encoding;
wrong step; wrong length; size that changes in mid-stream; different times; stamp in the past; stamp in the future;
stamp of zero; equal stamps; TF missing; TF late; TF extrapolated; TF not rigid; NaN quaternion;
camera inside an object;
empty cloud; huge cloud; malformed; cloud of NaN; empty question; only spaces; 1 MB; control characters;
tokens of the prompt template; `<image>`; `<boxes>`; NaN click; too many clicks; negative budget; budget of zero;
NaN budget; tiny budget; unknown model; truncated weights; wrong shape; a strategy for another model;
folders that cannot be written; no memory for the model; GPU out of memory; SIGINT while the model loads;
SIGTERM while the model loads; SIGKILL while the model loads; SIGINT during an answer; SIGTERM during an answer;
SIGKILL during an answer; every order; two nodes of the same name; never reads; client that disappears;
unknown type; tensor that is missing; tensor that is too much; smaller than a patch; longer than the context;
first legal gate; of another architecture; without valid depth; GPTQ; GGUF; PyTorch files; no instructions;
products are wrong; old a driver; cannot be compiled; garbage model; too little memory
"""


@cache
def _body(path: str) -> list[ast.stmt]:
    return ast.parse((ROOT / path).read_text(encoding="utf-8")).body


@cache
def written_tests(path: str) -> dict[str, set[str]]:
    """{test: ids of its parameters, as far as they are written down} of a file."""
    found = {}
    for node in _body(path):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names = {
                inner.id
                for decorator in node.decorator_list
                for inner in ast.walk(decorator)
                if isinstance(inner, ast.Name)
            }
            decorators = ast.unparse(ast.List(node.decorator_list, ast.Load())) + _assigned(path, names)
            ids = set(re.findall(r"id='([^']+)'", decorators)) | set(re.findall(r"signal\.(SIG\w+)", decorators))
            found[node.name] = ids
    return found


def _assigned(path: str, names: set[str]) -> str:
    """What is assigned to these names at the top of the file."""
    return " ".join(
        ast.unparse(node.value)
        for node in _body(path)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in names for t in node.targets)
    )


def test_every_fault_has_a_test_that_exists() -> None:
    assert len(ROWS) >= 40
    for fault, action, test in ROWS:
        match = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[([\w-]+)\])?`", test)
        assert match is not None, (fault, test)
        path, name, parameter = match.groups()
        assert (ROOT / path).is_file(), (fault, path)
        assert name in written_tests(path), (fault, test)
        assert parameter is None or parameter in written_tests(path)[name], (fault, test, written_tests(path)[name])
        assert action, fault


def test_every_fault_that_is_to_be_handled_is_in_the_table() -> None:
    faults = [row[0] for row in ROWS]
    missing = [words for words in re.split(r";\s*", FAULTS.strip()) if not any(words in fault for fault in faults)]
    assert missing == []
    assert len(faults) == len(set(faults))
