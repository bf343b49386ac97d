# SPDX-License-Identifier: Apache-2.0
"""Requests to a node from plain Python, with an end to each wait and errors that say what is missing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from lifecycle_msgs.srv import GetState
from rclpy.context import Context
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

POLL_SECONDS = 0.2  # how often a waiting call looks whether the node and ROS are still there
AGAIN_SECONDS = 1.0  # after which a request that may be repeated is


def deadline_of(timeout: float | None) -> float:
    """When so many seconds from now have passed, by the monotonic clock; None: never."""
    return float("inf") if timeout is None else time.monotonic() + timeout


class Connection:
    """A node, an executor and a thread of one's own beside the node that is talked to.

    Args:
        name: of the other node, in full.
        context: an initialised rclpy context to use and to leave open; None for a context of its own, which installs
            no signal handlers and ignores ROS arguments of the process.

    Attributes:
        node: whose callbacks run in the thread.
    """

    def __init__(self, name: str, context: Context | None = None) -> None:
        self.name = name
        self._owns_context = context is None
        if context is None:
            context = Context()
            rclpy.init(args=[], context=context)
        self._context = context
        other = name.rpartition("/")[2]
        self.node = Node(
            f"{other}_client_{os.getpid()}_{threading.get_native_id()}",
            context=context,
            use_global_arguments=False,
            enable_rosout=False,
            start_parameter_services=False,
        )
        self._get_state: Any = None
        self._met = False
        self._executor: Any = SingleThreadedExecutor(context=context)
        self._executor.add_node(self.node)
        self._closed = False
        self._thread = threading.Thread(target=self._spin, name=f"{other}_client", daemon=True)

    def start(self) -> None:
        """Starts the thread; call it when there is what it is to look at, the clients of services among it."""
        # The last of the clients: who has found its reader of replies has found theirs (RTPS announces them in order).
        self._get_state = self.node.create_client(GetState, f"{self.name}/get_state")
        self._thread.start()

    def close(self, *entities: Any) -> None:
        """Ends the thread, destroys `entities` and then the node. Afterwards every call is a ConnectionError."""
        self._closed = True
        self._executor.shutdown()
        self._thread.join()
        for entity in entities:
            entity.destroy()
        self.node.destroy_node()
        if self._owns_context:
            self._context.try_shutdown()

    def state(self, timeout: float | None) -> str:
        """The other node's lifecycle state."""
        reply = self._call(
            self._get_state, GetState.Request(), deadline_of(timeout), f"no reply within {timeout} s", AGAIN_SECONDS
        )
        return str(reply.current_state.label)

    def _spin(self) -> None:
        # Another thread may shut ROS down at any moment; then the wait set, a handle or the context is gone.
        try:
            self._executor.spin()
        except (ExternalShutdownException, InvalidHandle):
            return
        except RuntimeError:
            if self._context.ok() and not self._closed:
                raise

    def alive(self) -> bool:
        """Whether anything can still be sent and heard."""
        return not self._closed and self._thread.is_alive() and self._context.ok()

    def send(self, send: Callable[[], Any], on_done: Callable[[Any], object]) -> None:
        """Calls `send` in the spinning thread, so that a fast reply cannot overtake the bookkeeping of its request."""
        if not self.alive():
            raise ConnectionError(f"the connection to {self.name} is closed, or ROS was shut down")
        self._executor.create_task(lambda: send().add_done_callback(on_done))

    def call(self, client: Any, request: Any, timeout: float | None, reply: str) -> Any:
        """The reply of a service, within `timeout` seconds; `reply` says what is waited for. Raises as `wait`."""
        deadline, failure = deadline_of(timeout), f"no {reply} within {timeout} s"
        self.meet(client.service_is_ready, deadline, failure)
        return self._call(client, request, deadline, failure)

    def meet(self, ready: Callable[[], bool], deadline: float, failure: str) -> None:
        """Returns once ready() and the other node has found this one. Raises as `wait`.

        A server drops its reply if it has not found the client's reader within 100 ms (rmw_fastrtps). So, before
        anything that must not be sent twice, the other node's state is asked for until it has been heard.
        """
        self.wait(ready, deadline, failure)
        if not self._met:
            self._call(self._get_state, GetState.Request(), deadline, failure, AGAIN_SECONDS)

    def _call(self, client: Any, request: Any, deadline: float, failure: str, again: float = float("inf")) -> Any:
        """As `call`, but to a node that may not have found this one; sent every `again` seconds until it replies."""
        self.wait(client.service_is_ready, deadline, failure)
        done = threading.Event()
        futures: list[Any] = []
        replies: list[Any] = []
        due = time.monotonic()

        def send() -> Any:
            futures.append(client.call_async(request))
            return futures[-1]

        def on_reply(future: Any) -> None:
            replies.append(future)
            done.set()

        def replied() -> bool:
            nonlocal due
            if not done.is_set() and time.monotonic() >= due:
                due += again
                self.send(send, on_reply)
            return done.is_set()

        try:
            self.wait(replied, deadline, failure, wait=done.wait, present=client.service_is_ready)
        finally:
            for future in futures:
                client.remove_pending_request(future)
        self._met = True
        return replies[0].result()

    def wait(
        self,
        ready: Callable[[], bool],
        deadline: float,
        failure: str,
        *,
        wait: Callable[[float], object] = time.sleep,
        present: Callable[[], bool] | None = None,
    ) -> None:
        """Returns once ready(). `present` says whether the other side is still there: then it is only slow.

        Raises:
            TimeoutError: after the deadline; says whether the node is missing, not active or still answering.
            ConnectionError: the node or ROS went away.
        """
        while not self.looked(ready):
            remaining = deadline - time.monotonic()
            if present is not None and not self.looked(present):
                raise ConnectionError(f"{self.name} went away before it replied")
            if remaining <= 0:
                raise TimeoutError(f"{failure}: {self.diagnose(present is not None)}")
            wait(min(remaining, POLL_SECONDS if present is not None else POLL_SECONDS / 10))

    def looked(self, condition: Callable[[], bool]) -> bool:
        """condition(), which looks at handles that another thread may be closing."""
        closed = f"the connection to {self.name} is closed, or ROS was shut down"
        if not self.alive():
            raise ConnectionError(closed)
        try:
            return condition()
        except (InvalidHandle, RuntimeError) as error:
            if self.alive():
                raise
            raise ConnectionError(closed) from error

    def diagnose(self, sent: bool) -> str:
        """Why nothing came back, as far as this side can see, and what to do about it."""
        if sent:
            return (
                f"{self.name} has the request and is still busy with it; give a longer timeout or a latency budget, "
                "or use stream(), which can be cancelled"
            )
        domain = self._context.get_domain_id()
        nodes = [f"{ns.rstrip('/')}/{name}" for name, ns in self.node.get_node_names_and_namespaces()]
        others = sorted({name for name in nodes if "_client_" not in name and not name.startswith("/_")})
        if self.name not in nodes:
            seen = f"the nodes there are {', '.join(others)}" if others else "no node is there"
            return (
                f"no node {self.name} on ROS_DOMAIN_ID {domain}, {seen}; start it "
                "(ros2 launch adatoken3d adatoken3d.launch.py), or check its name, namespace and domain"
            )
        if self._get_state.service_is_ready():
            state = self.state(timeout=2.0)
            if state != "active":
                return (
                    f"{self.name} is {state!r}, not 'active'; use configure() and activate(), or "
                    f"ros2 lifecycle set {self.name} {'configure' if state == 'unconfigured' else 'activate'}"
                )
        return f"{self.name} is there, but it does not offer what was asked for (yet)"
