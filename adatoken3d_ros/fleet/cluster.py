# SPDX-License-Identifier: Apache-2.0
"""Ray, started on this machine alone or joined where it runs, in the one way that this package uses it.

What is started here listens on 127.0.0.1 only, has no dashboard and tells nobody that it is used.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adatoken3d_ros.text import quoted, shown

LOCAL = "local"  # as an address: a Ray of one's own, on this machine
_ATTEMPTS = 2  # to start Ray: on a busy machine the first may take too long
_OBJECTS = 256 * 2**20  # bytes of shared memory of a Ray that is started here
# What Ray does where it supports no clusters: all of its parts listen on the loopback interface alone.
_NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_MISSING = "this needs Ray, which is not installed here: pip install 'adatoken3d-ros[fleet]' (or make env)"


def on_loopback() -> None:
    """Runs in each process that a Ray started here has: what replicas of Serve open for each other, which is on all
    interfaces otherwise, is on the loopback one, too."""
    from ray._common import tls_utils

    add = tls_utils.add_port_to_grpc_server
    tls_utils.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))


def require_ray() -> None:
    """Raises OSError that says what to install."""
    if importlib.util.find_spec("ray") is None:
        raise OSError(_MISSING)


@contextmanager
def connected(
    address: str = LOCAL, *, cpus: int = 1, objects: int = _OBJECTS, metrics_port: int | None = None
) -> Iterator[Any]:
    """The module `ray`, connected until the end of the block; as it is, where this process is connected already.

    Args:
        address: LOCAL, or of a cluster that runs: "auto", "HOST:PORT", "ray://HOST:PORT".
        cpus: that a Ray started here may hand out; it has all GPUs of the machine.
        objects: bytes of shared memory of a Ray started here. metrics_port: where it tells what it counts.

    Raises:
        OSError: if Ray is missing, or nothing answers at the address; the text names it.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # GPUs stay visible to who reserved none
    if address == LOCAL:
        os.environ[_NO_CLUSTER] = "0"
        os.environ.setdefault("RAY_metrics_report_interval_ms", "2000")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        yield ray
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        ray_constants.ENABLE_RAY_CLUSTER = False  # where ray was imported before
        for attempt in range(_ATTEMPTS):
            try:
                ray.init(
                    address=LOCAL,
                    num_cpus=cpus,
                    object_store_memory=objects,
                    include_dashboard=False,
                    _metrics_export_port=metrics_port,
                    runtime_env={"worker_process_setup_hook": f"{__name__}.{on_loopback.__name__}"},
                    **common,
                )
                break
            except Exception as error:  # Ray raises nothing narrower where its parts take more than 30 s to start
                ray.shutdown()
                if attempt + 1 == _ATTEMPTS or "timed out" not in str(error):
                    raise OSError(f"Ray does not start here: {shown(error, 300)}") from error
    else:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OSError(f"no Ray answers at {quoted(address)}: {shown(error, 300)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
