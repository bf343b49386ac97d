# SPDX-License-Identifier: Apache-2.0
"""The house: which folder may import which, no circles, sizes of files, who may name an architecture, and the walk.

All of it is read from the sources; nothing is imported. Imports count wherever they stand: at the top, inside a
function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

from test_package import is_ros, sources

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "adatoken3d_ros"

# Folders of architectures: they are found. Only the name of a new one goes into ARCHITECTURES.
FAMILIES = {f"lmm/{path.parent.name}" for path in (ROOT / PACKAGE / "lmm").glob("*/checkpoint.py")}

# Folder or file of the package -> what its modules may import besides their own folder. `lmm` without more is all of
# lmm that names no architecture, `engine` all of it but the budget; strategies are marked by the model's identity.
BASE = {"files", "requirements", "settings", "text", "weights"}
MAY_IMPORT: dict[str, set[str]] = {
    "files": BASE,
    "requirements": BASE,
    "settings": BASE,
    "text": BASE,
    "weights": BASE,
    "scene": BASE,
    "lmm/identity": BASE,
    "pruning": {"lmm/identity", *BASE},
    "decoder": {"pruning", *BASE},
    "lmm": {"lmm/identity", "lmm/vision", "decoder", "pruning", "scene", *BASE},
    "lmm/vision": {"decoder", "scene", *BASE},
    **{folder: {"lmm", "lmm/identity", "lmm/vision", "decoder", "pruning", "scene", *BASE} for folder in FAMILIES},
    "engine": {"engine/budget", "lmm", "lmm/identity", "decoder", "pruning", "scene", *BASE},
    "engine/budget": {"engine", "lmm", "decoder", "pruning", *BASE},
    "lab": {"engine", "engine/budget", "lmm", "lmm/vision", "decoder", "pruning", "scene", *BASE},
    "ros": {"engine", "fleet", "pruning", "scene", *BASE},
    "view": {"engine", "pruning", "ros", "scene", *BASE},
    "fleet": {"engine", "engine/budget", "lmm", "lmm/identity", "decoder", "pruning", "scene", *BASE},
    "cli": {"engine", "engine/budget", "fleet", "lab", "lmm", "ros", "decoder", "pruning", "scene", "view", *BASE},
}
TRANSFORMERS = {"lmm", "lmm/vision", *FAMILIES, "decoder", "pruning", "engine", "engine/budget", "lab"}
# The tables in which an adapter and a tower are found by the words of a config.json.
TABLES = {"lmm/registry.py"}

# Architectures of language models and towers, as they appear in identifiers, imports and strings. `clip` is also a
# verb, so CLIP counts only in capitals or as a module of that name.
ARCHITECTURES = re.compile(
    r"llava|llama|vicuna|qwen|mistral|gemma|gpt_?2|siglip|dino|vit_|efficientnet|video.?3d"
    r"|(?-i:CLIP|(?<=\.)clip\b)",
    re.IGNORECASE,
)

NAMING = {  # file that names an architecture -> why it may
    "cli/train.py": "the published vision tower that training begins with is a file of that name",
    "lab/training/pretrained.py": "the published vision tower that training begins with",
    "lmm/vision/tower.py": "transformers' image processor that resizes, crops and normalises bears CLIP's name",
}

MOST_LINES, FEWEST_LINES = 400, 30
SMALL = {  # file with fewer than 30 lines -> why; an __init__.py that holds its docstring alone needs no reason
    "adatoken3d_ros/pruning/policies/divprune.py": "a policy is a file",
    "adatoken3d_ros/weights/__init__.py": "the path of the embedded model, importable without torch",
}


@cache
def modules() -> dict[str, Path]:
    """{dotted name: path} of every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(source: ast.AST, known: Collection[str] = ()) -> Iterator[str]:
    """Full names of what is imported anywhere; `from a import b` names a.b where that is a module, else a."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"line {node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module


@cache
def graph() -> dict[str, set[str]]:
    """{module: modules of the package that it imports}."""
    known = modules()
    return {name: set(imported(tree(path), known)) & known.keys() - {name} for name, path in known.items()}


def layer(module: str) -> str:
    """The longest entry of MAY_IMPORT that holds the module; empty for the package itself."""
    path = "/".join(module.split(".")[1:])
    holding = [name for name in MAY_IMPORT if path == name or path.startswith(name + "/")]
    return max(holding, key=len, default=path)


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach each other (strongly connected, more than one)."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges.get(name, ())
        reached[start] = seen
    found: list[set[str]] = []
    for name in edges:
        if name in reached[name] and not any(name in circle for circle in found):
            found.append({other for other in reached[name] if name in reached.get(other, ())})
    return found


def docstrings(source: ast.Module) -> set[int]:
    """Identities of the constants that are docstrings: they may cite a paper."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def words(source: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier, imported name and string; comments and docstrings are left out."""
    left_out = docstrings(source)
    for node in ast.walk(source):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr if node.attr != "clip" else ""
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield line, node.arg
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield line, node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((line, part) for part in parts)


def listed(found: Mapping[str, object]) -> str:
    """What is wrong, one line a file."""
    return "".join(f"\n  {name}: {what}" for name, what in sorted(found.items()))


def test_a_layer_imports_only_those_below() -> None:
    wrong: dict[str, set[str]] = {}
    for name, targets in graph().items():
        own = layer(name)
        if name == PACKAGE:
            continue
        assert own in MAY_IMPORT, f"{name} belongs to no layer of MAY_IMPORT"
        allowed = {own, *MAY_IMPORT[own]}
        if path_in_package(name) in {*TABLES, *NAMING}:
            allowed |= {"lmm/vision", *FAMILIES}
        for target in targets - {PACKAGE}:
            if layer(target) not in allowed:
                wrong.setdefault(name.removeprefix(PACKAGE + "."), set()).add(target.removeprefix(PACKAGE + "."))
    assert not wrong, listed(wrong)


def test_only_the_ros_part_imports_ros() -> None:
    outside = [
        f"{path}: {module}"
        for path, imports in sources(PACKAGE, "benchmarks")
        if not path.startswith((f"{PACKAGE}/ros/", "benchmarks/_ros"))
        for module in sorted(imports)
        if is_ros(module.partition(".")[0])
    ]
    assert outside == []


def test_only_layers_of_the_model_import_transformers() -> None:
    users = {name for name, path in modules().items() if any(top(n) == "transformers" for n in imported(tree(path)))}
    assert {name for name in users if layer(name) not in TRANSFORMERS} == set()


def test_there_are_no_import_circles() -> None:
    assert circles(graph()) == []


def test_no_file_is_too_long() -> None:
    every = {path: n for folder in (PACKAGE, "tests", "benchmarks") for path, n in lengths(folder).items()}
    long = {path: n for path, n in every.items() if n > MOST_LINES}
    assert not long, listed(long)


def test_no_file_is_too_short() -> None:
    found = {path: n for path, n in lengths(PACKAGE).items() if n < FEWEST_LINES and not only_a_docstring(ROOT / path)}
    assert found.keys() == SMALL.keys(), listed(found)


def test_nothing_outside_its_folder_names_an_architecture() -> None:
    found: dict[str, list[str]] = {}
    for name, path in modules().items():
        own = path_in_package(name)
        if own in TABLES or layer(name) in FAMILIES:
            continue
        tower = path.stem if layer(name) == "lmm/vision" else None
        for line, text in words(tree(path)):
            named = {match.group().lower() for match in ARCHITECTURES.finditer(text)} - {tower}
            if named:
                found.setdefault(own, []).append(f"line {line}: {text[:60]!r}")
    assert found.keys() == NAMING.keys(), listed(found)


def walk() -> list[tuple[str, Path, str]]:
    """(number, file, text) of the steps in docs/architecture.md, from its top to the table of folders."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Folders")[0]
    steps = re.findall(r"^(\d+)\. `([\w/]+\.py)`: (.+?)(?=^\d+\. |^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return [(number, ROOT / file, " ".join(told.split())) for number, file, told in steps]


def test_the_walk_through_the_house_is_true() -> None:
    """At most fifteen files, each once; what a step says is in its file is defined there, and its other files exist."""
    steps = walk()
    assert [number for number, _, _ in steps] == [str(n) for n in range(1, len(steps) + 1)] and 10 < len(steps) <= 15
    assert len({file for _, file, _ in steps}) == len(steps)
    wrong = []
    for number, file, told in steps:
        if not file.is_file():
            wrong.append(f"{number}: there is no {file.relative_to(ROOT)}")
            continue
        defined = set(definitions(tree(file)))
        for name in re.findall(r"`([\w./]+)`", told):
            if name.endswith((".py", "/")):
                if not (file.parent / name).exists() and not (ROOT / PACKAGE / name).exists():
                    wrong.append(f"{number}: there is no {name}")
            elif name not in defined:
                wrong.append(f"{number}: {file.relative_to(ROOT)} does not define {name}")
    assert wrong == []


def definitions(source: ast.Module) -> Iterator[str]:
    """Functions, classes, and `Class.method` and `Class.field` of a file."""
    for node in source.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                yield f"{node.name}.{inner.name}"
            elif isinstance(inner, ast.AnnAssign):
                yield f"{node.name}.{ast.unparse(inner.target)}"


def path_in_package(module: str) -> str:
    return modules()[module].relative_to(ROOT / PACKAGE).as_posix()


def top(module: str) -> str:
    return module.partition(".")[0]


def lengths(folder: str) -> dict[str, int]:
    """{path: lines} of the Python files below a folder."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}


def only_a_docstring(path: Path) -> bool:
    """Whether an __init__.py only makes a folder a package and says what it is for (the first one: its version)."""
    body = tree(path).body
    return path.name == "__init__.py" and (len(body) <= 1 or path.parent == ROOT / PACKAGE)


def test_the_tools_of_this_file_see_what_they_are_for() -> None:
    source = ast.parse(
        '"""On Llama."""\n'
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from a import b, c\n"
        "def f(qwen_size: int) -> None:\n"
        '    """As SigLIP."""\n'
        "    import a.d\n"
        "    x.clip(0, 1)\n"
        '    g("llava_v1")\n'
    )
    assert {"a.b", "a", "a.d"} <= set(imported(source, ["a.b"]))
    assert [text for _, text in words(source) if ARCHITECTURES.search(text)] == ["qwen_size", "llava_v1"]
    assert ARCHITECTURES.search("transformers.CLIPModel") and ARCHITECTURES.search("lmm.vision.clip")
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [{"b", "c"}]


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by their last name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
