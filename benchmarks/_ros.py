# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the node share: a graph of real processes on a domain of its own, counters that must add up,
timed requests, and figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import rclpy
from adatoken3d.action import AskSceneStream
from adatoken3d.srv import AskScene
from rcl_interfaces.msg import Parameter, ParameterValue
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import get_parameter_value

from adatoken3d_ros.cli.demo import claim_domain
from adatoken3d_ros.cli.processes import Processes
from adatoken3d_ros.ros.client import SceneClient

ROOT = Path(__file__).resolve().parents[1]
NODE = "node"  # its name among the processes
NAME = "/adatoken3d"
WAIT = 300.0  # seconds; a machine that is busy with other things may be slow
SETTLED = 3  # equal reports of the counters in a row


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Flags that every benchmark of the node has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint; if not given, a tiny random one")
    parser.add_argument("--show", action="store_true", help="let the processes write to the terminal")
    return parser


class Bench:
    """The node as a process, and whoever else is needed; all of them end with the benchmark.

    Args:
        model: directory of a checkpoint; None: a tiny one of random weights, whose answers end only by their limit.
        show: let the processes write to the terminal.
        remaps: {name of the node's: topic}.
        parameters: of the node; `pose__source="static"` gives pose.source.
    """

    def __init__(
        self,
        model: Path | None = None,
        *,
        show: bool = False,
        remaps: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> None:
        self._folder = TemporaryDirectory(prefix="adatoken3d-")
        self.processes = Processes(show=show)
        domain, self._claim = claim_domain()
        changes = {
            "ROS_DOMAIN_ID": str(domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        self._environment = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        self._parameters = {
            "model.path": str(model or endless_model(Path(self._folder.name) / "tiny")),
            "pose.source": "pose_topic",
            "diagnostics.period": 0.25,
            "budget.warm_up": False,
            **{name.replace("__", "."): value for name, value in parameters.items()},
        }
        self._remaps = dict(remaps or {})
        self.process: psutil.Process | None = None
        self._client: SceneClient | None = None

    def __enter__(self) -> Bench:
        try:
            arguments = [word for item in self._parameters.items() for word in ("-p", "{}:={}".format(*item))]
            arguments += [word for item in self._remaps.items() for word in ("-r", "{}:={}".format(*item))]
            started = self.python(NODE, "adatoken3d_ros.ros.node", "--ros-args", *arguments)
            self.process = psutil.Process(started.pid)
            self._client = SceneClient()
            self._client.configure(timeout=WAIT)
            self._client.activate(timeout=WAIT)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def client(self) -> SceneClient:
        assert self._client is not None
        return self._client

    def python(self, name: str, module: str, *arguments: str) -> Any:
        """Starts a module as a process that runs until the end, or until it is done."""
        return self.processes.start(name, [sys.executable, "-m", module, *arguments])

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = WAIT) -> Any:
        """Until the condition is true; returns its value. Raises ProcessError with last words if the node ends."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            self.processes.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout:.0f} s{self.processes.last_words(NODE)}")
            time.sleep(0.02)
        return value

    def counters(self) -> dict[str, str]:
        """The newest counters that the node has told about inputs and frames."""
        return {**self.client.diagnostics("inputs"), **self.client.diagnostics("scene")}

    def settled(self, at_least: Mapping[str, int] | None = None, timeout: float = 30.0) -> dict[str, str]:
        """The counters once they no longer change and have reached what is given, or as they are after the timeout."""
        deadline, same, last = time.monotonic() + timeout, 0, self._counted()
        while time.monotonic() < deadline and same < SETTLED:
            time.sleep(1.5 * float(self._parameters["diagnostics.period"]))
            self.processes.check()
            now = self._counted()
            reached = all(now.get(name, 0) >= count for name, count in (at_least or {}).items())
            same = same + 1 if now == last and now and reached else 0
            last = now
        return self.counters()

    def _counted(self) -> dict[str, int]:
        return {name: int(value) for name, value in self.counters().items() if value.isdigit()}

    def cpu_seconds(self) -> float:
        """CPU time of the node until now, all threads together."""
        assert self.process is not None
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss_mb(self) -> float:
        """Memory of the node, 10^6 bytes."""
        assert self.process is not None
        return float(self.process.memory_info().rss / 1e6)

    def _end(self) -> None:
        try:
            if self._client is not None:
                self._client.close()
        finally:
            self.processes.stop()
            self._folder.cleanup()
            self._claim.close()
            for name, value in self._environment.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def endless_model(path: Path) -> Path:
    """The tiny checkpoint with the end of the answer made impossible: how long it writes is up to who asks."""
    from safetensors.torch import load_file, save_file

    from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint

    path = write_tiny_checkpoint(path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][2] = 0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def unaccounted(values: Mapping[str, str]) -> dict[str, int]:
    """What is missing from the node's counters, by stage; all zeros if every message met its fate.

    A message is paired, dropped for a reason, or pending; a pair is handed over, dropped for a reason, or waits; a
    frame that was handed over, or a further picture of its cloud, is a key frame, is none for a reason, or is dropped.
    """
    numbers: Counter[str] = Counter({name: int(value) for name, value in values.items() if value.isdigit()})

    def total(prefix: str) -> int:
        return sum(count for name, count in numbers.items() if name.startswith(prefix))

    streams = [name.removeprefix("paired.") for name in numbers if name.startswith("paired.")]
    missing = {
        f"messages.{name}": numbers[f"received.{name}"]
        - numbers[f"paired.{name}"]
        - numbers[f"pending.{name}"]
        - total(f"dropped.{name}.")
        for name in streams
    }
    missing["pairs"] = (
        numbers["pairs.matched"] - numbers["pairs.handed_over"] - numbers["pairs.waiting"] - total("pairs.dropped.")
    )
    missing["frames"] = numbers["pairs.handed_over"] + numbers["pictures.further"] - total("frames.")
    return missing


class Requests:
    """Requests to the node with the time until what came back, milliseconds, from a context of its own."""

    def __init__(self) -> None:
        self.context = Context()
        rclpy.init(args=[], context=self.context)
        self.node = Node("benchmark", context=self.context, use_global_arguments=False, start_parameter_services=False)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._get: Any = self.node.create_client(GetParameters, f"{NAME}/get_parameters")
        self._set: Any = self.node.create_client(SetParameters, f"{NAME}/set_parameters")
        self._ask: Any = self.node.create_client(AskScene, f"{NAME}/ask")
        self._stream: Any = ActionClient(self.node, AskSceneStream, f"{NAME}/ask_stream")
        ready = [client.service_is_ready for client in (self._get, self._set, self._ask)]
        ready.append(self._stream.server_is_ready)
        self.wait(lambda: all(is_ready() for is_ready in ready), "the node's services")

    def close(self) -> None:
        self._executor.shutdown()
        self._stream.destroy()
        self.node.destroy_node()
        self.context.try_shutdown()

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = WAIT) -> Any:
        """Spins until the condition is true and returns its value."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            self._executor.spin_once(timeout_sec=0.02)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        return value

    def _timed(self, future: Any, what: str) -> tuple[Any, float]:
        """The result and when it came, seconds."""
        came: list[float] = []
        future.add_done_callback(lambda _: came.append(time.perf_counter()))
        self.wait(lambda: came, what)
        return future.result(), came[0]

    def ask(self, question: str, max_new_tokens: int) -> Any:
        """A future of the answer."""
        return self._ask.call_async(AskScene.Request(question=question, max_new_tokens=max_new_tokens))

    def answered(self, question: str, max_new_tokens: int, budget_ms: float) -> tuple[Any, float]:
        """The answer within a latency budget, and the time until it came."""
        request = AskScene.Request(question=question, max_new_tokens=max_new_tokens, latency_budget_ms=budget_ms)
        began = time.perf_counter()
        reply, came = self._timed(self._ask.call_async(request), "an answer")
        return reply.answer, 1e3 * (came - began)

    def get_parameter(self, name: str) -> float:
        """Time of a parameter get."""
        began = time.perf_counter()
        reply, came = self._timed(self._get.call_async(GetParameters.Request(names=[name])), "a parameter")
        assert len(reply.values) == 1
        return 1e3 * (came - began)

    def set_parameter(self, name: str, value: Any) -> str:
        """Empty, or why the node refused the value."""
        parameter = Parameter(name=name, value=get_parameter_value(json.dumps(value)))
        assert isinstance(parameter.value, ParameterValue)
        reply, _ = self._timed(self._set.call_async(SetParameters.Request(parameters=[parameter])), "a reply")
        (result,) = reply.results
        return "" if result.successful else str(result.reason) or "refused"

    def queue_and_cancel(self, question: str) -> tuple[float, float]:
        """Times until a question that is asked beside another has its queue status, and until a cancel is answered."""
        stages: list[tuple[str, float]] = []
        goal = AskSceneStream.Goal(question=question)
        began = time.perf_counter()
        sent = self._stream.send_goal_async(
            goal, feedback_callback=lambda message: stages.append((message.feedback.stage, time.perf_counter()))
        )
        handle, _ = self._timed(sent, "the goal to be accepted")
        self.wait(lambda: stages, "a status")
        stage, came = stages[0]
        if stage != "queue":
            raise RuntimeError(f"the first status of a question that must wait was {stage!r}")
        result = handle.get_result_async()
        cancelled = time.perf_counter()
        reply, replied = self._timed(handle.cancel_goal_async(), "a reply to the cancel")
        assert reply.goals_canceling, "the goal was not there to be cancelled"
        self._timed(result, "the cancelled question's answer")
        return 1e3 * (came - began), 1e3 * (replied - cancelled)


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest, under `name`_p50 and so on."""
    figures = {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
    return {key: round(value, 3) for key, value in {**figures, f"{name}_max": max(values)}.items()}


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """The figures as JSON, if a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Machine and arguments, to be kept beside the figures."""
    flags = {name: value for name, value in vars(args).items() if name != "json"}
    return {
        "cores": psutil.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
        "fastdds_profiles": os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE", ""),
        **{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()},
    }
