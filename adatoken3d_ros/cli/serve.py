# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d serve`: one engine for many robots, whose nodes set engine.url to it (docs/fleet.md).

Listens on this machine alone, until --host says otherwise; then a token is required. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adatoken3d_ros.cli.options import add_settings, settings_of

_METRICS = "http://127.0.0.1:8001/metrics"
_OPTIONS = ("--model", "--vision-path", "--device", "--dtype", "--quantization", "--decoding")


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("serve", help="one engine for many robots (needs Ray)", description=__doc__)
    add_settings(parser, *_OPTIONS)
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="engines, weights each (%(default)s)")
    parser.add_argument("--address", default="local", help="of a Ray cluster to run on; local: one of its own, here")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="its first line is what all robots have to bear"
    )
    parser.add_argument(
        "--tokens-file", type=Path, metavar="FILE", help="a line NAME: TOKEN for each robot that may come in"
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    parser.add_argument("--max-scenes", type=int, default=16, metavar="N", help="that a replica holds (%(default)s)")
    parser.add_argument(
        "--max-mb", type=float, default=4096, metavar="M", help="that they may take there (%(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=50.0, metavar="X", help="requests a second, a robot (%(default)s)"
    )
    parser.add_argument("--budget-cache", default="", metavar="DIR", help="keeps what is measured of this machine")
    parser.add_argument("--metrics-port", type=int, default=8001, metavar="N", help="of Prometheus' text (%(default)s)")
    parser.add_argument(
        "--status", nargs="?", const=_METRICS, metavar="URL",
        help=f"print what a running service counted, by robot, and end ({_METRICS})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the command, until it is interrupted."""
    from rich.console import Console

    console = Console()
    if args.status is not None:
        from adatoken3d_ros.fleet import metrics

        console.print(metrics.table(metrics.read(metrics.fetch(args.status))))
        return 0

    from adatoken3d_ros.engine.loading import checkpoint_path
    from adatoken3d_ros.fleet.cluster import require_ray
    from adatoken3d_ros.fleet.door import DoorConfig
    from adatoken3d_ros.fleet.serving import Service, is_loopback, running
    from adatoken3d_ros.fleet.tokens import read_token, read_tokens

    require_ray()
    given = settings_of(args)
    settings = {**given, "budget.warm_up": True}
    settings |= {"model.path": str(checkpoint_path(given["model.path"]).resolve())}
    if args.budget_cache:
        settings["budget.cache"] = str(Path(args.budget_cache).resolve())
    service = Service(
        settings=settings,
        replicas=args.replicas,
        max_scenes=args.max_scenes,
        max_mb=args.max_mb,
        door=DoorConfig(
            token=read_token(args.token_file) if args.token_file else "",
            tokens=read_tokens(args.tokens_file) if args.tokens_file else {},
            rate=args.rate,
        ),
        address=args.address,
        host=args.host,
        port=args.port,
        certificate=None if args.tls_cert is None else args.tls_cert.resolve(),
        key=None if args.tls_key is None else args.tls_key.resolve(),
        metrics_port=args.metrics_port,
    )
    ended = threading.Event()
    with ExitStack() as stack:
        with console.status("starting Ray, loading the model"):
            url = stack.enter_context(running(service))
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # in the place of Ray's, which aborts
        console.print(f"robots ask at {url} (engine.url)", highlight=False, soft_wrap=True)
        if not is_loopback(args.host) and args.tls_cert is None:
            console.print("without TLS the token and the scenes can be read on the way: --tls-cert, --tls-key")
        ended.wait()
    return 0
