# SPDX-License-Identifier: Apache-2.0
"""The package as a package: both builds, its description, what it needs, a comment on every interface field."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adatoken3d_ros

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
INTERFACES = sorted(path for kind in ("msg", "srv", "action") for path in (ROOT / kind).iterdir())
EXECUTABLES = {"adatoken3d", "adatoken3d_node", "demo_camera"}

# Modules outside the standard library: the rosdep key in package.xml, or the line of requirements.txt where a robot's
# system has no package, and the requirement in pyproject.toml.
PYTHON_MODULES = {
    "PIL": ("python3-pil", "pillow"),
    "cv2": ("python3-opencv", "opencv-python-headless"),
    "huggingface_hub": ("transformers", "transformers"),
    "matplotlib": ("python3-matplotlib", "matplotlib"),
    "numpy": ("python3-numpy", "numpy"),
    "open3d": ("open3d-cpu", "open3d-cpu"),
    "psutil": ("python3-psutil", "psutil"),
    "rich": ("python3-rich", "rich"),
    "rosbags": ("rosbags", "rosbags"),
    "safetensors": ("transformers", "safetensors"),
    "scipy": ("python3-scipy", "scipy"),
    "tokenizers": ("transformers", "tokenizers"),
    "torch": ("torch", "torch"),
    "transformers": ("transformers", "transformers"),
    "yaml": ("python3-yaml", "PyYAML"),
}
# What an extra of pyproject.toml brings, and what that brings itself.
OF_EXTRAS = {"ray", "starlette", "viser", "websockets"}
# ROS packages: those that have no wheel, those that come with the wheel of rclpy.
WITHOUT_WHEEL = {"ament_index_python", "launch", "launch_ros", "sensor_msgs_py", "tf2_msgs"}
WITH_RCLPY = {"action_msgs", "builtin_interfaces", "lifecycle_msgs", "rcl_interfaces"}
# Dependencies that no line of Python imports: programs that launch files start, and what generated messages need.
NOT_IMPORTED = {"builtin_interfaces", "python3-venv", "ros2bag", "ros2launch", "rosidl_default_runtime", "rviz2"}


def is_ros(module: str) -> bool:
    """Whether a top-level module belongs to ROS: client library, messages, launch, ..."""
    named = module in {"adatoken3d", "rclpy", "std_srvs", *WITHOUT_WHEEL, *WITH_RCLPY}
    return named or module.endswith(("_msgs", "_msgs_py")) or module.startswith(("ament_", "launch", "rosidl_", "tf2_"))


def imports(source: str) -> set[str]:
    """Every module that a source imports, anywhere in it: full dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            found.add(node.module)
    return found


def sources(*folders: str) -> Iterator[tuple[str, set[str]]]:
    """(path relative to the root, modules imported) of every Python file below the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), imports(path.read_text(encoding="utf-8"))


def tree_files() -> list[Path]:
    """The files of the project, relative to the root: what git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of the project's files")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [Path(name) for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's files, so that no build writes into the sources."""
    copy = tmp_path_factory.mktemp("workspace") / "src" / "adatoken3d_ros"
    for file in tree_files():
        (copy / file.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)
    return copy


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without anything that a shell with a sourced ROS or workspace would add."""
    sourced = ("PYTHONPATH", "AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH", "COLCON_PREFIX_PATH", "CMAKE_TOOLCHAIN_FILE")
    return {**{name: value for name, value in os.environ.items() if name not in sourced}, **changes}


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}"
    return done.stdout


needs_wheels = pytest.mark.skipif(
    not (Path(sys.prefix) / "share" / "rosidl_default_generators").is_dir(),
    reason="the ROS 2 wheels are not in this environment",
)


@needs_wheels
@pytest.mark.skipif(not (BIN / "colcon").exists(), reason="colcon is not installed")
@pytest.mark.timeout(600)
def test_colcon_builds_the_tree_with_no_options(tree: Path) -> None:
    environment = clean_environment(
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        AMENT_PREFIX_PATH=sys.prefix,
        CMAKE_TOOLCHAIN_FILE=str(tree / "cmake" / "ros_wheels_toolchain.cmake"),
        CMAKE_GENERATOR="Ninja",  # half the time of make, which colcon slows down further where other work runs
    )
    workspace = tree.parents[1]
    assert "Summary: 1 package finished" in run(["colcon", "build"], workspace, environment)

    install = workspace / "install" / "adatoken3d"
    for folder in ("launch", "config"):
        sent = {path.name for path in (tree / folder).iterdir()}
        assert {path.name for path in (install / "share" / "adatoken3d" / folder).iterdir()} == sent
    assert (install / "share" / "ament_index" / "resource_index" / "packages" / "adatoken3d").is_file()

    program = """
import adatoken3d, adatoken3d_ros
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer, Box3D, TokenReport
from adatoken3d.srv import AskScene
from rclpy.serialization import deserialize_message, serialize_message
sent = Answer(text="a desk", boxes=[Box3D()])
assert deserialize_message(serialize_message(sent), Answer) == sent  # the compiled type support works, too
print(adatoken3d.__file__, adatoken3d_ros.__file__, sep="\\n")
"""
    sourced = ["bash", "-c", '. install/setup.bash && cd / && exec "$@"', "bash"]
    printed = run([*sourced, sys.executable, "-c", program], workspace, environment)
    interfaces, module = (Path(line) for line in printed.splitlines()[-2:])
    assert install in interfaces.parents
    assert install in module.parents

    assert (install / "share" / "adatoken3d" / "requirements.txt").is_file()
    for name in EXECUTABLES:
        assert os.access(install / "lib" / "adatoken3d" / name, os.X_OK)
    assert "demo" in run([*sourced, "adatoken3d", "--help"], workspace, environment)
    check_colcon_test(workspace, environment)


def check_colcon_test(workspace: Path, environment: dict[str, str]) -> None:
    """Each folder is a test of its own whose results are kept; where none can be run, that is a failure."""
    listed = run(["ctest", "-N", "-V"], workspace / "build" / "adatoken3d", environment)
    names = re.findall(r"^ *Test +#\d+: (\S+)", listed, re.MULTILINE)
    result = ["colcon", "test-result", "--all", "--verbose"]
    if not (Path(sys.prefix) / "share" / "ament_cmake_pytest").is_dir():
        assert names == ["ament_cmake_pytest_is_missing"]
        run(["colcon", "test"], workspace, environment)
        done = subprocess.run(result, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "1 failure" in done.stdout, done.stdout
        return
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert set(names) == folders | {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    run(["colcon", "test", "--ctest-args", "-R", "^test_caplog$"], workspace, environment)
    assert "test_caplog.xunit.xml: 2 tests, 0 errors, 0 failures, 0 skipped" in run(result, workspace, environment)


@needs_wheels
@pytest.mark.timeout(600)
def test_pip_wheel_is_complete(tree: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    sent = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    run(command, tmp_path, clean_environment())
    (wheel,) = tmp_path.glob("*.whl")
    version = adatoken3d_ros.__version__
    assert wheel.name.startswith(f"adatoken3d_ros-{version}-cp{sys.version_info[0]}{sys.version_info[1]}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"adatoken3d_ros-{version}.dist-info/entry_points.txt").decode()
    data = f"adatoken3d_ros-{version}.data/data"
    libraries = f"{data}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"

    modules = {name for name in sent if name.startswith("adatoken3d_ros/")}
    shared = {name for name in sent if name.startswith(("launch/", "config/"))}
    assert modules <= names
    assert {f"{data}/share/adatoken3d/{name}" for name in shared} <= names
    assert {f"{data}/share/adatoken3d/{path.parent.name}/{path.name}" for path in INTERFACES} <= names
    assert {f"{data}/lib/adatoken3d/{name}" for name in EXECUTABLES} <= names
    assert {f"{libraries}/adatoken3d/{kind}/__init__.py" for kind in ("msg", "srv", "action")} <= names
    assert f"{data}/share/ament_index/resource_index/packages/adatoken3d" in names
    assert f"{data}/lib/libadatoken3d__rosidl_typesupport_fastrtps_c.so" in names
    assert "adatoken3d = adatoken3d_ros.cli.main:main" in entry_points
    # The sources come once, from setuptools, and pip makes the command.
    assert not {name for name in names if name.startswith((f"{libraries}/adatoken3d_ros", f"{data}/bin/"))}


@needs_wheels
def test_installed_with_pip_the_sources_stay_in_place() -> None:
    if importlib.util.find_spec("adatoken3d") is None:
        pytest.skip("the package is not installed in this environment: make env")
    program = (
        "import adatoken3d.msg, adatoken3d_ros; print(adatoken3d.msg.__file__, adatoken3d_ros.__file__, sep='\\n')"
    )
    # From another folder, and with no variable set.
    printed = run([sys.executable, "-c", program], Path("/"), {"PATH": os.defpath})
    interfaces, module = (Path(line) for line in printed.splitlines())
    assert Path(sys.prefix) in interfaces.parents
    assert module == ROOT / "adatoken3d_ros" / "__init__.py"
    assert importlib.metadata.version("adatoken3d-ros") == adatoken3d_ros.__version__


def test_package_xml() -> None:
    catkin_package = pytest.importorskip("catkin_pkg.package", reason="catkin_pkg is not installed")
    warnings: list[str] = []
    package = catkin_package.parse_package(str(ROOT), warnings=warnings)
    assert warnings == []
    assert package.name == "adatoken3d"
    assert package.package_format == 3
    assert package.version == adatoken3d_ros.__version__
    assert package.licenses == ["Apache-2.0"]
    assert package.get_build_type() == "ament_cmake"
    assert "rosidl_interface_packages" in [group.name for group in package.member_of_groups]


def test_every_model_that_is_shipped_says_its_licence_and_whose_tower_it_has() -> None:
    """Furniture has its own test: tests/lab/synthetic/test_furniture.py."""
    folders = {
        path.parent for part in ("adatoken3d_ros", "benchmarks") for path in (ROOT / part).rglob("*.safetensors")
    }
    assert {folder.name for folder in folders} >= {"embedded", "video3d_small"}
    for folder in folders:
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "Licence: Apache-2.0" in text, folder
        tower = json.loads((folder / "config.json").read_text(encoding="utf-8"))["mm_vision_tower"]
        if not (folder / tower).is_dir():  # its own
            assert "copyright" in text and "EfficientNet-Lite0" in text, folder
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (folder / target).exists(), f"{folder}: {target}"
    desk = (ROOT / "benchmarks" / "data" / "tum_fr1_desk.json").read_text(encoding="utf-8")
    assert "CC BY 4.0" in desk and "not part of this package" in desk


def test_every_import_is_declared() -> None:
    catkin_package = pytest.importorskip("catkin_pkg.package", reason="catkin_pkg is not installed")
    package = catkin_package.parse_package(str(ROOT))
    keys = {dependency.name for dependency in package.exec_depends} | set(requirements_txt())
    requirements = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def is_declared(module: str) -> bool:
        if is_ros(module):
            key, requirement = module, f"ros-kilted-{module.replace('_', '-')}"
            if module in WITHOUT_WHEEL | WITH_RCLPY:
                return key in keys
        elif module in PYTHON_MODULES:
            key, requirement = PYTHON_MODULES[module]
        else:
            return False
        return key in keys and re.search(rf'^  "{requirement}[">]', requirements, re.MULTILINE) is not None

    undeclared = [
        f"{path}: {module}"
        for path, modules in sources("adatoken3d_ros", "launch")
        for module in sorted({name.partition(".")[0] for name in modules})
        if module not in {"adatoken3d", "adatoken3d_ros", *OF_EXTRAS, *sys.stdlib_module_names}
        and not is_declared(module)
    ]
    assert undeclared == []


def test_nothing_else_is_declared() -> None:
    catkin_package = pytest.importorskip("catkin_pkg.package", reason="catkin_pkg is not installed")
    keys = {dependency.name for dependency in catkin_package.parse_package(str(ROOT)).exec_depends}
    assert [key for key in keys if key.endswith("-pip")] == []  # refused on Ubuntu 24.04
    modules = {name.partition(".")[0] for _, found in sources("adatoken3d_ros", "launch") for name in found}
    used = {PYTHON_MODULES.get(module, (module,))[0] for module in modules}
    assert keys - used - NOT_IMPORTED == set()
    assert keys >= NOT_IMPORTED


def requirements_txt() -> dict[str, str]:
    """{package: its versions} of what pip installs on a robot."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]
    return {name: entry.removeprefix(name) for entry in entries for name in re.findall(r"^[\w-]+", entry)}


def test_a_robot_gets_the_versions_of_pyproject() -> None:
    listed = read_pyproject()["project"]["dependencies"]
    wanted = requirements_txt()
    assert "numpy>=1.26" in listed and wanted.pop("numpy") == ">=1.26,<2"  # the messages of ROS are compiled for it
    assert wanted.pop("open3d") == wanted["open3d-cpu"]  # the same for other processors
    assert [entry for entry in (name + versions for name, versions in wanted.items()) if entry not in listed] == []


def load_bootstrap() -> Any:
    """scripts/bootstrap.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("ros", ["kilted", "jazzy"])
def test_constraints_pin_every_requirement(ros: str) -> None:
    bootstrap, content = load_bootstrap(), read_pyproject()
    project = content["project"]
    extras = project["optional-dependencies"]
    listed = [*content["build-system"]["requires"], *project["dependencies"]]
    listed += [*extras["view"], *extras["fleet"], *extras["dev"]]
    wanted = bootstrap.requirements(listed, ros)
    pinned = {line.partition("==")[0] for line in bootstrap.constraints(ros)}
    missing = [name for name in (re.split(r"[\[><=]", item)[0].lower() for item in wanted) if name not in pinned]
    assert missing == []


def test_jazzys_constraints_replace_those_of_kilted() -> None:
    pins = load_bootstrap().constraints("jazzy")
    assert [line for line in pins if line.startswith("numpy==")] == ["numpy==1.26.4"]  # of Ubuntu 24.04
    assert [line for line in pins if line.startswith("ros-rclpy==")] == ["ros-rclpy==7.1.6"]
    assert [line for line in pins if line.startswith("ros-kilted-")] == []


def test_transformers_is_bounded() -> None:
    """Its 5.40 takes the argument `past_key_values` from the layers, which gated runs pass."""
    (bound,) = [item for item in read_pyproject()["project"]["dependencies"] if item.startswith("transformers")]
    assert bound == "transformers>=5,<5.40"


def test_cmake_lists_every_interface() -> None:
    listed = re.findall(r"^  ((?:msg|srv|action)/\S+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(f"{path.parent.name}/{path.name}" for path in INTERFACES)


def test_imports_finds_what_a_function_imports() -> None:
    assert imports("def f():\n    import rclpy.node\n    from std_msgs.msg import String\n") == {
        "rclpy.node",
        "std_msgs.msg",
    }


@pytest.mark.parametrize("path", INTERFACES, ids=lambda path: path.name)
def test_every_interface_field_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "what the interface is for stands in its first line"
    fields = [line for line in lines if line.strip() and line.strip() != "---" and not line.lstrip().startswith("#")]
    assert fields
    assert [line for line in fields if not re.search(r"# \S", line)] == []
