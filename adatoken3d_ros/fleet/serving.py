# SPDX-License-Identifier: Apache-2.0
"""The service as it is started: Ray, its door to the network, the deployment of replicas.

Where nothing else is said it can be reached from this machine alone.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adatoken3d_ros.fleet.cluster import LOCAL, connected
from adatoken3d_ros.fleet.door import DoorConfig
from adatoken3d_ros.text import quoted, shown

NAME = "adatoken3d"
PORT, METRICS_PORT = 8000, 8001
_NEEDS_TOKEN = "that needs a token (--token-file, or --tokens-file)"


@dataclass(frozen=True)
class Service:
    """How the service is to be.

    Attributes:
        settings: values of `settings.py` other than the defaults: which model, where.
        replicas: engines, each with the weights. max_scenes, max_mb: of each.
        address: of the Ray that runs it. host, port: where robots reach it. certificate, key: of TLS; both or neither.
        metrics_port: where a Ray that is started here tells what it counts, on 127.0.0.1.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    max_scenes: int = 16
    max_mb: float = 4096.0
    door: DoorConfig = field(default_factory=DoorConfig)
    address: str = LOCAL
    host: str = "127.0.0.1"
    port: int = PORT
    certificate: Path | None = None
    key: Path | None = None
    metrics_port: int = METRICS_PORT

    def __post_init__(self) -> None:
        """Raises ValueError or OSError, naming the value, for what cannot be or must not be."""
        for name, least in (("replicas", 1), ("max_scenes", 1), ("max_mb", 1), ("port", 1), ("metrics_port", 1)):
            value = getattr(self, name)
            if not least <= value < (65536 if "port" in name else float("inf")):
                raise ValueError(f"{name.replace('_', '-')} {value} is out of range")
        if self.port == self.metrics_port:
            raise ValueError(f"port and metrics-port are both {self.port}")
        if not self.door.asks and not is_loopback(self.host):
            raise ValueError(f"host {quoted(self.host)} lets other machines in: {_NEEDS_TOKEN}")
        if not self.door.asks and self.address != LOCAL:
            raise ValueError(f"a cluster ({quoted(self.address)}) is seen by others: {_NEEDS_TOKEN}")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("TLS needs both a certificate and its key (--tls-cert, --tls-key)")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"{path} is no file")

    @property
    def url(self) -> str:
        """For `engine.url` of a robot, with the name of this machine where it listens at all of its addresses."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_machine(service: Service) -> None:
    """Looks whether this machine gives what the service needs, before Ray starts, which does not say what it lacks.

    Raises:
        OSError: for a port that is taken, an address that is not this machine's, or certificates that cannot be used;
            the text names option and value.
    """
    if service.certificate is not None and service.key is not None:
        try:  # with an empty password: one would be asked for at the terminal otherwise
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(service.certificate, service.key, lambda: "")
        except (OSError, ValueError) as error:
            raise OSError(
                f"--tls-cert {service.certificate} and --tls-key {service.key} are of no use: {shown(error)}"
            ) from error
    if service.address != LOCAL:
        return  # the port is of another machine
    for host, port, option in (
        (service.host, service.port, "port"),
        ("127.0.0.1", service.metrics_port, "metrics-port"),
    ):
        try:
            family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = f"--{option} {port} is taken on {host}: name another"
                raise OSError(f"{why}, or end what listens there") from error
            if error.errno == errno.EACCES:
                raise OSError(f"--{option} {port} is only for those who may listen below 1024") from error
            raise OSError(f"--host {quoted(host)} is no address of this machine: {shown(error)}") from error


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The service, from when it answers to the end of the block; gives its URL.

    Raises:
        OSError: if there is no Ray, or the engine does not come up, and as `check_machine`; the text says why.
    """
    from adatoken3d_ros.fleet.deployment import application
    from adatoken3d_ros.fleet.replica import ReplicaConfig

    check_machine(service)
    processors = max(1, (os.cpu_count() or 1) // service.replicas)
    port = service.metrics_port
    with connected(service.address, cpus=processors * service.replicas, metrics_port=port) as ray:
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        gpus = float(ray.cluster_resources().get("GPU", 0)) if service.settings.get("model.device") != "cpu" else 0.0
        config = ReplicaConfig(
            settings=dict(service.settings),
            replicas=service.replicas,
            gpus=min(1.0, gpus / service.replicas),
            cpus=processors if service.address == LOCAL else 1,
            max_scenes=service.max_scenes,
            max_mb=service.max_mb,
            door=service.door,
        )
        tls: dict[str, Any] = {}
        if service.certificate is not None:
            tls = {"ssl_certfile": str(service.certificate), "ssl_keyfile": str(service.key)}
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=service.host, port=service.port, **tls),
        )
        try:
            try:
                serve.run(application(config), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise OSError(f"the service does not come up: {_reason(serve.status(), str(error))}") from error
            yield service.url
        finally:
            serve.delete(NAME)  # others on the cluster stay


def _reason(status: Any, otherwise: str) -> str:
    """The last line of what a replica raised when it was made."""
    told = [one.message for app in status.applications.values() for one in app.deployments.values() if one.message]
    lines = [line.strip() for text in told for line in text.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return shown((raised or lines or [otherwise])[-1], 500)
