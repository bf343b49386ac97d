# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d view`: the scene and its answers in the browser, live.

Of a bag or a folder, answered in this process without ROS; without either, of a node that runs. It listens on this
machine alone, and only who knows the address that it prints may come in.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.ask import frames
from adatoken3d_ros.cli.options import OPTIONS, add_scenes, add_settings, check_files, settings_of
from adatoken3d_ros.settings import DEFAULTS

if TYPE_CHECKING:
    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.ros.client import SceneClient
    from adatoken3d_ros.view.source import Source

PORT = 8080
EMBEDDED_CLICK = "What is the object at {p}?"  # a wording that the model in the package knows
ASKED_OF_NODE = ("click_question", "latency_budget_ms", "model.path", "strategy")
WAIT_SECONDS = 5.0  # for a node that is said to run
MISSING = "the view needs viser: pip install 'viser>=1.1.1,<1.2' (or 'adatoken3d-ros[view]')"


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "view", help="see a scene in the browser and ask about it: a bag, a folder, or a running node",
        description=__doc__,
    )  # fmt: skip
    add_scenes(parser, required=False)
    add_settings(parser, "--strategy", "--budget-ms", "--max-new-tokens", "--unsure-below")
    parser.add_argument("--node", default="adatoken3d", metavar="NAME", help="the running node's name (%(default)s)")
    parser.add_argument("--namespace", default="", metavar="NAME", help="the running node's namespace")
    add_address(parser)


def add_address(parser: argparse.ArgumentParser) -> None:
    """Adds where the page is."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen there (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help="port, or the next free one; 0: any free one (%(default)s)"
    )
    parser.add_argument(
        "--token", metavar="TEXT",
        help="what the address ends with, at least 16 letters (a new one each time); '' for none, on this machine only",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the command until Ctrl-C."""
    check_files(args)
    _check_given(args)
    require_viser()
    from adatoken3d_ros.view.server import check_place, check_token

    check_token(args.token, args.host)
    check_place(args.host, args.port)
    source = _local(args) if args.bag or args.folder else _node(args)
    with serving(source, args.host, args.port, args.token) as address:
        print(f"The view: {address}\nCtrl-C ends it.", flush=True)
        threading.Event().wait()
    return 0


@contextmanager
def serving(source: Source, host: str, port: int, token: str | None) -> Iterator[str]:
    """A page of a source, for as long as the context lasts; yields its address. Closes the source.

    Raises:
        OSError: without viser.
        ServerError: see `view.server`.
    """
    require_viser()
    from adatoken3d_ros.view.page import Page
    from adatoken3d_ros.view.server import address, check_token, start, stop

    try:
        known = check_token(token, host)
        server = start(host, port, known)
        page = Page(server, source)
        try:
            yield address(server, known)
        finally:
            page.close()
            stop(server)
    finally:
        source.close()


def require_viser() -> None:
    """Raises OSError that says what to install."""
    if importlib.util.find_spec("viser") is None:
        raise OSError(MISSING)


def _check_given(args: argparse.Namespace) -> None:
    """Raises ValueError for a setting that a running node would never hear of."""
    if args.bag or args.folder:
        return
    for option, name in OPTIONS.items():
        value = getattr(args, option.strip("-").replace("-", "_"), None)
        if value is not None and value != DEFAULTS[name]:
            raise ValueError(f"{option} {value} is for --bag and --folder: a node is asked as it is configured")


def _local(args: argparse.Namespace) -> Source:
    from rich.console import Console

    from adatoken3d_ros.cli.output import record_of_answer
    from adatoken3d_ros.engine import loading
    from adatoken3d_ros.settings import Settings
    from adatoken3d_ros.view.local import LocalSource

    given = settings_of(args)
    # Budgets are set in the page, so how fast the machine is, is measured.
    about = {} if args.model else {"click_question": EMBEDDED_CLICK}
    settings = Settings({**given, **about, "budget.warm_up": True})
    with Console().status("loading the model") as shown:
        engine = loading.load_engine(
            settings, lambda share, step: shown.update(f"loading the model: {step}, {share:.0%}")
        )
    command = partial(asked_again, shlex.split(args.typed), settings["latency_budget_ms"])
    return LocalSource(engine, settings, frames(args), record_of_answer, command)


def asked_again(typed: list[str], typed_ms: float, question: Question, strategy: str) -> str:
    """The line that asks a question of a local view again; typed: the view's own, and what budget it gives."""
    clicks = [word for click in question.clicks.tolist() for word in ("--click", *(f"{x:.3f}" for x in click))]
    limit = question.latency_budget_ms or 0.0
    budget = ["--budget-ms", f"{limit:g}"] if limit != typed_ms else []
    named = ["--strategy", strategy] if strategy else []
    options = typed[typed.index("view") + 1 :]  # --debug may stand before the command
    line = shlex.join(["adatoken3d", "ask", question.text, *_without_address(options), *named, *budget, *clicks])
    chosen = f"without {len(question.without)}" if len(question.without) else f"with only {len(question.only)}"
    narrowed = len(question.without) or len(question.only)
    return f"{line}  # and in the view, {chosen} tokens that were selected" if narrowed else line


def _without_address(typed: list[str]) -> list[str]:
    """What was typed without the options that `ask` does not have."""
    left, skip = [], False
    for word in typed:
        if skip:
            skip = False
        elif word.partition("=")[0] in ("--host", "--port", "--token", "--node", "--namespace"):
            skip = "=" not in word
        else:
            left.append(word)
    return left


def _node(args: argparse.Namespace) -> Source:
    if any(importlib.util.find_spec(name) is None for name in ("rclpy", "adatoken3d")):
        raise OSError("a running node is seen by ROS 2, which is missing here: source it, or give --bag or --folder")
    from adatoken3d_ros.ros.client import SceneClient

    client = SceneClient(args.node, args.namespace)
    try:
        configured = client.parameters(*ASKED_OF_NODE, timeout=WAIT_SECONDS)
    except (TimeoutError, ConnectionError) as error:
        print(f"The page will be empty until the node is there: {error}", flush=True)
        configured = {}
    return node_source(client, configured)


def node_source(client: SceneClient, configured: Mapping[str, Any]) -> Source:
    """A running node as a view's source; it closes the client.

    Args:
        configured: values of parameters of the node, as far as they are known.
    """
    from adatoken3d_ros.cli.output import record_of_message
    from adatoken3d_ros.pruning.policies import POLICY_NAMES
    from adatoken3d_ros.view.node import NodeSource

    known = {**DEFAULTS, **configured}
    click = known["click_question"]
    if click == DEFAULTS["click_question"] and not known["model.path"]:
        click = EMBEDDED_CLICK
    strategies = tuple(dict.fromkeys((known["strategy"], *POLICY_NAMES, *_fitted(known["model.path"]))))
    return NodeSource(client, strategies, known["latency_budget_ms"], click, record_of_message)


def _fitted(model_path: str) -> list[str]:
    """Names of the strategies that were fitted to a node's model, as far as its checkpoint is here, too."""
    from adatoken3d_ros.engine.loading import checkpoint_path, strategy_files

    try:
        return [file.stem for file in strategy_files(checkpoint_path(model_path))]
    except (ValueError, OSError):  # it is on another machine
        return []
