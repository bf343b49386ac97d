# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d demo`: a camera in a furnished room, the scene node, and questions, in separate processes over DDS.

Without questions of yours, the demo asks three whose answers it knows from the room, and says how many came out right.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adatoken3d_ros.cli import fleet_demo
from adatoken3d_ros.cli.options import add_settings
from adatoken3d_ros.cli.processes import ProcessError, Processes
from adatoken3d_ros.cli.view import add_address, node_source, require_viser, serving
from adatoken3d_ros.weights import embedded_path

if TYPE_CHECKING:
    from adatoken3d_ros.ros.client import SceneClient
    from adatoken3d_ros.ros.suggestions import Suggestion, Suggestions

T = TypeVar("T")

QUESTION = "How many chairs are there?"  # where the camera suggests nothing
FAMILIES = ("existence", "class", "colour", "on", "count", "direction", "closer", "nearest")  # the demo's taste
ROUND = 3  # questions that are asked by themselves
SUGGESTION_SECONDS = 15.0
NODE = "adatoken3d"
SEED = 2  # a bedroom with much in it
DOMAINS = range(1, 102)  # above, the ports overlap with those that Linux hands out
PROBED = 10  # participants of a domain that are looked for: the first may have ended before the others
POLL_SECONDS = 0.1
WRITE_TINY = "import sys; from adatoken3d_ros.lmm.registry import write_tiny; write_tiny(sys.argv[1])"


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "demo", help="try everything with no robot and no camera (needs ROS 2)", description=__doc__
    )
    parser.add_argument(
        "--question", action="append", metavar="TEXT", help="what to ask, may be repeated (three about the room)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint (the one in the package, else a tiny random one)"
    )
    add_settings(parser, "--budget-ms")
    parser.add_argument(
        "--robots", type=int, default=1, metavar="N", help="so many, a room each, that share one engine (needs Ray)"
    )
    parser.add_argument("--views", type=int, default=6, metavar="N", help="key frames to wait for (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="keep asking for this long")
    parser.add_argument("--interactive", action="store_true", help="then ask what you type, until an empty line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last answer as JSON")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the room (%(default)s)")
    parser.add_argument("--domain-id", type=int, metavar="ID", help="ROS domain; without it a free one is taken")
    parser.add_argument("--rviz", action="store_true", help="start RViz, or say how, and stay until Ctrl-C")
    parser.add_argument(
        "--view", action=argparse.BooleanOptionalAction,
        help="print the address of a page for the browser, and stay until Ctrl-C (on a terminal, where viser is there)",
    )  # fmt: skip
    add_address(parser)
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="longest wait for a step (%(default)s)"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the nodes write")


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 if every question was answered, 1 if one was not."""
    require_ros()
    if args.model is not None and not args.model.is_dir():
        raise NotADirectoryError(f"--model: {args.model} is no directory")
    fleet_demo.check(args)
    domain, claim = claim_domain() if args.domain_id is None else (args.domain_id, nullcontext())
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"

    from adatoken3d_ros.ros.client import SceneClient

    with claim, Processes(show=args.verbose) as processes:
        model, tiny = (args.model, False) if args.model is not None else default_model()
        if args.robots > 1:
            if tiny:
                write_tiny(model, lambda command: processes.run("tiny_model", command))
            return fleet_demo.run(args, processes, model, partial(start_nodes, processes, model), suggested)
        start_nodes(processes, model, "", args.seed)
        if tiny:
            print(
                "A tiny model with random weights answers until a trained one is given with --model: expect no sense."
            )
        elif args.model is None:
            print(
                "The small model that comes with the package answers. It is for trying things out: twelve kinds of "
                "questions about furniture; what it does not understand it answers with UNSURE and why."
            )
        # The client only: what could take long happens in the other processes.
        with closing(SceneClient()) as client, _viewed(args) as address:
            try:
                return _converse(args, Demo(client, processes, args.timeout), model, tiny, domain, address)
            finally:
                processes.interrupt()


@contextmanager
def _viewed(args: argparse.Namespace) -> Iterator[str]:
    """The page in the browser, from the beginning; yields its address."""
    if not (sys.stdout.isatty() and importlib.util.find_spec("viser") if args.view is None else args.view):
        yield ""
        return
    require_viser()
    from adatoken3d_ros.ros.client import SceneClient

    source = node_source(SceneClient(), {"model.path": str(args.model or "")})
    with serving(source, args.host, args.port, args.token) as address:
        yield address


def _converse(args: argparse.Namespace, demo: Demo, model: Path, tiny: bool, domain: int, address: str) -> int:
    from adatoken3d_ros.cli.output import print_answer, record_of_message, write_json
    from adatoken3d_ros.engine.answer import Status
    from adatoken3d_ros.ros.suggestions import Suggestions

    suggestions = Suggestions(demo.client.node)
    demo.bring_up(model, tiny=tiny, views=args.views)
    if address:
        print(f"Look at it and ask in the browser: {address}", flush=True)
    elif args.view is None:
        print("With --view it prints the address of a page for the browser, and stays (make demo DEMO_ARGS=--view).")
    view = f"ROS_DOMAIN_ID={domain} ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST rviz2 -d {share()}/config/adatoken3d.rviz"
    if args.rviz:
        if shutil.which("rviz2"):
            demo.processes.start("rviz2", ["rviz2", "-d", str(share() / "config" / "adatoken3d.rviz")])
        else:
            print(f"rviz2 is not installed here; where it is, this shows the scene while the demo runs:\n  {view}")
    answered = True
    right: list[bool] = []
    for question, expected in _questions(args, lambda: demo.watch(suggested, suggestions, len(right))):
        answer = demo.watch(demo.client.ask, question, latency_budget_ms=args.budget_ms, timeout=args.timeout)
        record = record_of_message(answer)
        if expected is not None:
            record["expected"] = expected
            right.append(answer.text == expected)
        print_answer(record)
        answered &= Status(answer.status).answered
        if args.json is not None:
            write_json(record, args.json)
    if right:
        print(f"{sum(right)} of {len(right)} answers are those of the room.")
    if args.rviz or address:
        if address:
            print(f"The page stays until Ctrl-C: {address}", flush=True)
        while True:
            demo.processes.check()
            time.sleep(POLL_SECONDS)
    return 0 if answered else 1


def _questions(args: argparse.Namespace, suggest: Callable[[], list[Suggestion]]) -> Iterator[tuple[str, str | None]]:
    """(question, answer if that is known): the given ones or suggested ones, again until --seconds have passed, then
    those that are typed.
    """
    end = time.monotonic() + args.seconds
    first = True
    while first or time.monotonic() < end:
        first = False
        if args.question:
            yield from ((question, None) for question in args.question)
        elif found := suggest():
            yield from ((suggestion.question, suggestion.answer) for suggestion in found)
        else:
            yield QUESTION, None
    while args.interactive:
        try:
            line = input("question (empty to end): ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line, None


def suggested(suggestions: Suggestions, asked: int) -> list[Suggestion]:
    """Some of what the camera suggests, of other families each time; `asked`: how many there were before."""
    newest = {suggestion.family: suggestion for suggestion in suggestions.newest(SUGGESTION_SECONDS)}
    wanted = [newest[family] for family in FAMILIES if family in newest]
    start = asked % max(1, len(wanted))
    return [*wanted[start:], *wanted[:start]][:ROUND]


class Demo:
    """The running nodes as the demo sees them: a client, and processes that must not end."""

    def __init__(self, client: SceneClient, processes: Processes, timeout: float) -> None:
        self.client = client
        self.processes = processes
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(max_workers=1)

    def watch(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        """Calls and waits, but not for a process that has died. Raises ProcessError and what the call raises."""
        future: Future[T] = self._threads.submit(call, *args, **options)
        while not future.done():
            self.processes.check()
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise
        return future.result()

    def bring_up(self, model: Path, *, tiny: bool, views: int) -> None:
        """From started processes to a node that has seen `views` key frames, with a progress display."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn()) as progress:
            steps = progress.add_task("starting two nodes", total=3)
            if tiny:
                write_tiny(model, lambda command: self.processes.run("tiny_model", command))
            self.watch(self.client.state, timeout=self._timeout)
            progress.update(steps, advance=1, description="loading the model")
            self._change(self.client.configure)
            progress.update(steps, advance=1, description="starting the inputs")
            self._change(self.client.activate)
            progress.update(steps, advance=1, description="both nodes run")
            frames = progress.add_task("looking around (key frames)", total=views)
            deadline = time.monotonic() + self._timeout
            while (seen := self._views()) < views:
                self.processes.check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"only {seen} of {views} key frames within {self._timeout:g} s")
                progress.update(frames, completed=seen)
                time.sleep(POLL_SECONDS)
            progress.update(frames, completed=views)

    def _change(self, transition: Callable[..., None]) -> None:
        from adatoken3d_ros.ros.client import LifecycleError

        try:
            self.watch(transition, timeout=self._timeout)
        except LifecycleError as error:
            raise ProcessError(f"{error}{self.processes.last_words(NODE)}") from error

    def _views(self) -> int:
        return int(self.client.diagnostics("scene").get("key_frames", 0))


def start_nodes(
    processes: Processes, model: Path, namespace: str, seed: int, more: Mapping[str, str] | None = None
) -> None:
    """The scene node and the camera, with the parameters of config/demo.yaml and config/demo_camera.yaml.

    namespace: of both, which have its name behind theirs. more: parameters of the node.
    """

    def parameters(name: str) -> list[str]:
        own = ["-r", f"__ns:=/{namespace}"] if namespace else []
        return ["--ros-args", *own, "--params-file", str(share() / "config" / name)]

    module = [sys.executable, "-m"]
    # What the node measures of this machine, for seconds, is kept for the next demo.
    own = {"model.path": model, "autostart": "false", "budget.cache": tiny_checkpoint_path().parent, **(more or {})}
    given = [f for k, v in own.items() for f in ("-p", f"{k}:={v}")]
    node = ["adatoken3d_ros.ros.node", *parameters("demo.yaml"), *given]
    camera = ["adatoken3d_ros.ros.demo_camera", *parameters("demo_camera.yaml"), "-p", f"seed:={seed}"]
    processes.start(NODE + namespace, [*module, *node])
    processes.start("demo_camera" + namespace, [*module, *camera])


def require_ros() -> None:
    """Raises ModuleNotFoundError-like OSError that says what to install where ROS or the interfaces are missing."""
    if importlib.util.find_spec("rclpy") is None:
        raise OSError(
            "the demo needs ROS 2, and this Python finds no rclpy: source a ROS 2 installation "
            "(. /opt/ros/<distribution>/setup.bash), or run 'make demo', which installs it from PyPI (Linux, x86_64)"
        )
    if importlib.util.find_spec("adatoken3d") is None:
        raise OSError(
            "the ROS interfaces of adatoken3d are not built: run 'pip install .' in the package, or 'colcon build' and "
            "source install/setup.bash"
        )


def share() -> Path:
    """Folder with the package's `config` and `launch`: the source tree where that is what runs, else the ROS share."""
    source = Path(__file__).resolve().parents[2]
    if (source / "package.xml").is_file():
        return source
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix]
    for prefix in prefixes:
        folder = Path(prefix) / "share" / "adatoken3d"
        if (folder / "package.xml").is_file():
            return folder
    raise FileNotFoundError(f"share/adatoken3d was not found below {', '.join(prefixes)}: is the package installed?")


def claim_domain(domains: Iterable[int] | None = None) -> tuple[int, socket.socket]:
    """A ROS domain in which no participant runs on this machine and that no other caller holds, and what holds it:
    free again when the socket is closed. The first of `domains`; without them one of DOMAINS at random.

    Participant p of domain d listens on UDP port 7410 + 250 d + 2 p (RTPS specification, well-known ports), but only
    seconds after the domain was chosen: two demos that start together are told apart by an abstract socket's name.

    Raises:
        OSError: if there is none.
    """
    for domain in random.sample(DOMAINS, len(DOMAINS)) if domains is None else domains:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0adatoken3d-domain-{domain}")
            for participant in range(PROBED):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                    probe.bind(("", 7410 + 250 * domain + 2 * participant))
        except OSError:
            claim.close()
            continue
        return domain, claim
    raise OSError("every ROS domain from 1 to 101 is in use on this machine: give one with --domain-id")


def default_model() -> tuple[Path, bool]:
    """The checkpoint that answers when none is named; whether it is the tiny random one, which may not be there yet."""
    try:
        return embedded_path(), False
    except FileNotFoundError:
        return tiny_checkpoint_path(), True


def tiny_checkpoint_path() -> Path:
    """Where the tiny random checkpoint is kept: one for each version of the code that writes and reads it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    code = hashlib.sha256()
    for source in sorted((Path(__file__).resolve().parents[1] / "lmm").rglob("*.py")):
        code.update(source.read_bytes())
    return cache / "adatoken3d" / f"tiny-random-{code.hexdigest()[:12]}"


def tiny_checkpoint() -> Path:
    """The tiny random checkpoint, written if it is not there yet. Raises OSError when that fails."""
    path = tiny_checkpoint_path()
    write_tiny(path, lambda command: subprocess.run(command, check=True))
    return path


def write_tiny(path: Path, execute: Callable[[list[str]], object]) -> None:
    """Has a process of its own (torch takes seconds to import) write the checkpoint, unless it is there.

    It appears under its name when it is complete, so that an interrupted run leaves nothing half written.
    """
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / "checkpoint"
        execute([sys.executable, "-c", WRITE_TINY, str(written)])
        try:
            written.rename(path)
        except OSError:
            # Another demo was faster.
            if not path.is_dir():
                raise
